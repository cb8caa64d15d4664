"""Referring expressions: which region does a phrase mean? As in 12-in-1 (arXiv:1912.02315)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fine_tuning import TaskBatch
from .pair_inputs import PairTask


@dataclass(frozen=True)
class Grounded:
    """The region that a phrase means.

    Attributes:
        box: x1, y1, x2, y2 in the units of the regions' boxes.
        region: its number among the regions; None is the whole picture (global region of ViLBERT and VL-BERT).
        probability: that the box is right, by itself (ViLBERT, VL-BERT) or among the regions (UNITER, VisualBERT).
        probabilities: [R] of all regions, without the whole picture.
    """

    box: tuple[float, float, float, float]
    region: int | None
    probability: float
    probabilities: Tensor


class Grounding(PairTask):
    """Finds what a phrase refers to.

    Args:
        model: a ViLBERT, VisualBERT, UNITER or VL-BERT with a head that scores regions; see `with_head`.
        whole_picture: the global region may be the answer, as in ViLBERT's public code.
        options: see `PairTask`.
    """

    task = "grounding"

    def __init__(self, model, *, whole_picture: bool = True, **options):
        super().__init__(model, **options)
        self.whole_picture, self._first = whole_picture, int(self.takes.global_region)

    def __call__(self, phrase: str | Sequence[str], regions) -> Grounded | list[Grounded]:
        """The best box; a list where `phrase` or `regions` is a list.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        texts, pictures, one = self.examples(phrase, regions)
        found: list[Grounded] = []
        alone = self.task_head.loss in ("regions_bce", "regions_mean_bce")
        for arguments, output in self.run(texts, pictures):
            logits = output.logits[self.head].float().cpu().flatten(1)  # [B, R], the global region first
            for row, count in zip(logits, arguments["num_regions"].tolist(), strict=True):
                row = row[:count].sigmoid() if alone else row[:count].softmax(0)
                picture = pictures[len(found) if len(pictures) > 1 else 0]
                start = 0 if self.whole_picture or count == 1 else self._first
                best = int(row[start:].argmax()) + start - self._first
                box = picture.boxes[best].tolist() if best >= 0 else (0.0, 0.0, picture.width, picture.height)
                found.append(Grounded(tuple(box), best if best >= 0 else None, row[best + self._first].item(),
                                      row[self._first :].clone()))
        return found[0] if one else found

    def batch(self, phrase: Sequence[str], regions, boxes: Tensor) -> TaskBatch:
        """Phrases, pictures and true boxes [B, 4] in the units of the regions' boxes, to train on.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        texts, pictures, _ = self.examples(phrase, regions)
        many = max(len(texts), len(pictures))
        boxes = torch.as_tensor(boxes, dtype=torch.float32)
        if boxes.shape != (many, 4):
            raise ValueError(f"Grounding: boxes has shape {list(boxes.shape)}, must be {[many, 4]}")
        inputs = self.inputs(texts, pictures)
        target = torch.zeros(inputs["image_feat"].shape[:2])
        for i, (row, box) in enumerate(zip(target, boxes, strict=True)):
            picture = pictures[i if len(pictures) > 1 else 0]
            seen = picture.boxes
            if self._first:
                seen = torch.cat([seen.new_tensor([[0, 0, picture.width, picture.height]]), seen])
            count = int(inputs["num_regions"][i])
            row[:count] = box_iou(seen[:count], box[None])[:, 0]
        return TaskBatch(inputs, target.to(self.device))


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of [N, 4] and [M, 4] boxes x1, y1, x2, y2: [N, M]; 0 where both are empty.

    Sides are x2 - x1, without the extra pixel of some older evaluations.

    Raises:
        ValueError: other shapes.
    """
    for name, value in (("boxes", boxes), ("others", others)):
        if value.ndim != 2 or value.shape[1] != 4:
            raise ValueError(f"box_iou: {name} is {list(value.shape)}, must be [N, 4] (x1, y1, x2, y2)")
    sides = torch.minimum(boxes[:, None, 2:], others[:, 2:]) - torch.maximum(boxes[:, None, :2], others[:, :2])
    shared = sides.clamp(min=0).prod(-1)
    area, other = ((value[:, 2:] - value[:, :2]).prod(-1) for value in (boxes, others))
    union = area[:, None] + other - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(shared))


def grounding_accuracy(found: Tensor, truth: Tensor, threshold: float = 0.5) -> float:
    """Share of [N, 4] boxes whose IoU with the true one [N, 4] exceeds the threshold."""
    if found.shape != truth.shape or not len(found):
        raise ValueError(f"grounding_accuracy: found is {list(found.shape)}, truth is {list(truth.shape)}; must be "
                         "as many boxes, at least one")
    return (box_iou(found, truth).diagonal() > threshold).double().mean().item()
