"""Referring expressions: which region does a phrase mean? As in 12-in-1 (arXiv:1912.02315)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .two_stream import PairTask


@dataclass(frozen=True)
class Grounded:
    """The region that a phrase means.

    Attributes:
        box: x1, y1, x2, y2 in the units of the regions' boxes.
        region: its number among the regions; None is the whole picture (ViLBERT's global region).
        probability: that the box is right, by itself.
        probabilities: [R] of all regions, without the whole picture.
    """

    box: tuple[float, float, float, float]
    region: int | None
    probability: float
    probabilities: Tensor


class Grounding(PairTask):
    """Finds what a phrase refers to. A ViLBERT with a "vision" head.

    Args:
        whole_picture: the global region may be the answer, as in the public code.
        tokenizer, task_id, batch_size, max_tokens, max_regions: see `PairTask`.
    """

    task = "grounding"

    def __init__(self, model, *, whole_picture: bool = True, **options):
        super().__init__(model, **options)
        self.head, self.whole_picture = self.require_head("vision"), whole_picture

    def __call__(self, phrase: str | Sequence[str], regions) -> Grounded | list[Grounded]:
        """The best box; a list where `phrase` or `regions` is a list.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        texts, pictures, one = self.examples(phrase, regions)
        found: list[Grounded] = []
        for arguments, output in self.run(texts, pictures, head=self.head):
            probability = output.logits[self.head].squeeze(-1).float().sigmoid().cpu()  # [B, 1 + R]
            for row, count in zip(probability, arguments["num_regions"].tolist(), strict=True):
                picture = pictures[len(found) if len(pictures) > 1 else 0]
                best = int(row[:count].argmax()) if self.whole_picture or count == 1 else int(row[1:count].argmax()) + 1
                box = picture.boxes[best - 1].tolist() if best else (0.0, 0.0, picture.width, picture.height)
                found.append(Grounded(tuple(box), best - 1 if best else None, row[best].item(), row[1:count].clone()))
        return found[0] if one else found


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
