"""Regions of several pictures as the padded batch a model takes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .region_boxes import BOXES, vd_bert_boxes, vilbert_global_region, vl_bert_boxes, vl_bert_global_region
from .regions import Regions


class RegionBatch(NamedTuple):
    """Padded regions of B images.

    features: [B, R, D] float32, zero beyond the lengths. boxes: [B, R, P] float32, likewise. lengths: [B] int64.
    ids: B image ids.
    """

    features: Tensor
    boxes: Tensor
    lengths: Tensor
    ids: tuple[str, ...]

    def mask(self) -> Tensor:
        """[B, R] bool, True where a region is."""
        return torch.arange(self.features.shape[1], device=self.lengths.device) < self.lengths[:, None]


def encode_regions(regions: Regions, boxes: str | Callable | None = None) -> tuple[Tensor, Tensor]:
    """Features and box inputs of one image as a model takes them.

    Args:
        boxes: "lxmert", "vilbert" (a global row comes first), "imagebert", "uniter", "oscar", "vl_bert" (the whole
            image is box 0), "vd_bert" (needs classes and confidences), a function of (boxes, width, height), or None
            for pixels.

    Returns:
        features [R', D], boxes [R', P]; R' = R + 1 with a global row.
    """
    features = regions.features
    if boxes is None:
        return features, regions.boxes
    if callable(boxes):
        return features, boxes(regions.boxes, regions.width, regions.height)
    if boxes == "vd_bert":
        if regions.classes is None or regions.confidences is None:
            raise ValueError(f"encode_regions: image {regions.image_id} has no classes and confidences for 'vd_bert'")
        return features, vd_bert_boxes(regions.boxes, regions.classes, regions.confidences)
    if boxes not in BOXES:
        raise ValueError(f"encode_regions: boxes is {boxes!r}, must be one of {', '.join([*BOXES, 'vd_bert'])}")
    encoded = BOXES[boxes](regions.boxes, regions.width, regions.height)
    if boxes == "vilbert":
        feature, box = vilbert_global_region(features)
    elif boxes == "vl_bert":
        feature, pixels = vl_bert_global_region(features, regions.width, regions.height)
        box = vl_bert_boxes(pixels, regions.width, regions.height)
    else:
        return features, encoded
    return torch.cat([feature, features]), torch.cat([box, encoded])


def collate_regions(
    images: Sequence[Regions], boxes: str | Callable | None = None, *, max_regions: int | None = None
) -> RegionBatch:
    """One padded batch.

    Args:
        images: B of them, with the same D.
        boxes: see :func:`encode_regions`.
        max_regions: keeps the first ones, a global row included (ViLBERT's 101 are 100 and the global one, whose mean
            runs over all regions that the file holds).

    Raises:
        ValueError: no image, or images with features of different widths.
    """
    if not images:
        raise ValueError("collate_regions: images is empty, must hold at least one")
    if max_regions is not None and max_regions < 1:
        raise ValueError(f"collate_regions: max_regions is {max_regions}, must be positive")
    encoded = [encode_regions(regions, boxes) for regions in images]
    widths = {features.shape[1] for features, _ in encoded}
    if len(widths) > 1:
        raise ValueError(f"collate_regions: features are {sorted(widths)} wide, must be the same in all images")
    encoded = [(features[:max_regions], box[:max_regions]) for features, box in encoded]
    pad = torch.nn.utils.rnn.pad_sequence
    return RegionBatch(
        pad([features for features, _ in encoded], batch_first=True),
        pad([box for _, box in encoded], batch_first=True),
        torch.tensor([len(features) for features, _ in encoded]),
        tuple(regions.image_id for regions in images),
    )
