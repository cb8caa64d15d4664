"""Box inputs of the region models: pure functions from pixel boxes to what each model's location layer was trained on.

Every function takes boxes [R, 4] (x1, y1, x2, y2 in pixels, float) and the width W and height H of the picture in
pixels, and returns float32. W = H = 1 passes boxes that are already fractions.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def lxmert_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """[R, 4]: x1/W, y1/H, x2/W, y2/H (LXMERT, arXiv:1908.07490; also unsupervised VisualBERT)."""
    boxes = _checked(boxes, width, height)
    return boxes / boxes.new_tensor([width, height, width, height])


def vilbert_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """[R, 5]: x1/W, y1/H, x2/W, y2/H, (x2-x1)(y2-y1)/(WH) (ViLBERT, arXiv:1908.02265; ImageBERT)."""
    relative = lxmert_boxes(boxes, width, height)
    boxes = boxes.to(torch.float32)
    area = (boxes[:, 3] - boxes[:, 1]) * (boxes[:, 2] - boxes[:, 0]) / (float(width) * float(height))
    return torch.cat([relative, area[:, None]], dim=1)


def oscar_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """[R, 6]: x1/W, y1/H, x2/W, y2/H, w/W, h/H (OSCAR, VinVL and VisualBERT on Flickr30K append it to the features)."""
    relative = lxmert_boxes(boxes, width, height)
    return torch.cat([relative, relative[:, 2:4] - relative[:, 0:2]], dim=1)


def uniter_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """[R, 7]: x1/W, y1/H, x2/W, y2/H, w/W, h/H, wh/(WH) (UNITER, arXiv:1909.11740)."""
    six = oscar_boxes(boxes, width, height)
    return torch.cat([six, six[:, 4:5] * six[:, 5:6]], dim=1)


def vl_bert_boxes(boxes: Tensor, width: float, height: float) -> Tensor:
    """[R, 4]: (x_c/W, y_c/H, w/W, h/H) x 100, the arguments of VL-BERT's sines and cosines (arXiv:1908.08530)."""
    relative = lxmert_boxes(boxes, width, height)
    centre, size = (relative[:, 0:2] + relative[:, 2:4]) / 2, relative[:, 2:4] - relative[:, 0:2]
    return torch.cat([centre, size], dim=1) * 100


def vd_bert_boxes(boxes: Tensor, classes: Tensor, confidences: Tensor) -> Tensor:
    """[R, 7]: x1, y1, x2, y2, area, class, confidence (VD-BERT, arXiv:2004.13278).

    x are divided by the largest x of the picture's boxes + 1e-5, y likewise; W and H are not used.

    Args:
        classes: [R] detector class numbers. confidences: [R].
    """
    boxes = _checked(boxes, 1, 1)
    for field, values in (("classes", classes), ("confidences", confidences)):
        if values.shape != boxes.shape[:1]:
            raise ValueError(f"vd_bert_boxes: {field} is {list(values.shape)}, must be [{len(boxes)}] like the boxes")
    x, y = boxes[:, 0::2] / (boxes[:, 0::2].max() + 1e-5), boxes[:, 1::2] / (boxes[:, 1::2].max() + 1e-5)
    area = ((y[:, 1] - y[:, 0]) * (x[:, 1] - x[:, 0])).clamp(min=0)
    scaled = torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1], area], dim=1)
    return torch.cat([scaled, classes[:, None].to(scaled), confidences[:, None].to(scaled)], dim=1)


def vilbert_global_region(features: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ViLBERT's row 0: the mean feature with the box of the whole picture.

    Args:
        features: [R, D], after masking in pretraining.
        excluded: [R] bool; pretraining marks every region whose IoU with a masked one exceeds 0.4. The sum runs over
            all rows, its divisor counts the unmarked ones (at least 1), as the public weights were trained.

    Returns:
        feature [1, D], box [1, 5] = (0, 0, 1, 1, 1).
    """
    count = len(features) if excluded is None else int((~_flags(excluded, features, "excluded")).sum())
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]], device=features.device)
    return features.sum(dim=0, keepdim=True) / max(count, 1), box


def vl_bert_global_region(
    features: Tensor, width: float, height: float, masked: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """VL-BERT's box 0: the mean feature with the pixel box (0, 0, W-1, H-1), to be passed through `vl_bert_boxes`.

    Args:
        features: [R, D], unmasked.
        masked: [R] bool; the mean is then (mean·R - sum of the masked) / (R - #masked + 1e-5).

    Returns:
        feature [1, D], box [1, 4] in pixels.
    """
    mean = features.mean(dim=0, keepdim=True)
    if masked is not None:
        masked = _flags(masked, features, "masked")
        rest = mean * len(features) - features[masked].sum(dim=0, keepdim=True)
        mean = rest / (len(features) - int(masked.sum()) + 1e-5)
    return mean, torch.tensor([[0.0, 0.0, width - 1.0, height - 1.0]], device=features.device)


def uniter_region_count(
    confidences: Tensor, threshold: float = 0.2, min_regions: int = 10, max_regions: int = 100
) -> int:
    """How many leading regions UNITER keeps: those above the threshold, between `min_regions` and `max_regions`."""
    count = max(min_regions, int((confidences > threshold).sum()))
    return min(count, max_regions, len(confidences))


def _flags(flags: Tensor, features: Tensor, name: str) -> Tensor:
    if flags.dtype != torch.bool or flags.shape != features.shape[:1]:
        raise ValueError(
            f"global region: {name} is {flags.dtype} {list(flags.shape)}, must be bool [{len(features)}] like features"
        )
    return flags


def _checked(boxes: Tensor, width: float, height: float) -> Tensor:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes is {list(boxes.shape)}, must be [R, 4] (x1, y1, x2, y2)")
    if not (width > 0 and height > 0):
        raise ValueError(f"picture size is {width} x {height}, must be positive")
    return boxes.to(torch.float32)


BOXES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "lxmert": lxmert_boxes,
    "vilbert": vilbert_boxes,
    "imagebert": vilbert_boxes,
    "oscar": oscar_boxes,
    "uniter": uniter_boxes,
    "vl_bert": vl_bert_boxes,
}
