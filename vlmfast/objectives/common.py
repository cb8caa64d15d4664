r"""What the losses share: the divisors, and their sums in float32 or wider.

The public repositories divide the same sums by different counts, so every loss takes `normalizer`:

================== ====================================================================
labels, tokens     labels that are not ignored
labels_eps         labels that are not ignored, plus 1e-5 (VD-BERT)
samples            mean over an example's labels, then over examples that have any (VL-BERT)
mask               masked regions, at least 1
mask_dim           masked regions, at least 1, times channels
valid_rows         masked regions whose target is a distribution, at least 1 (VL-BERT)
all_regions        batch times regions, masked or not
batch              examples
batch_sum_classes  examples; classes are summed
elements           every number
================== ====================================================================

A batch without a single label or masked region has loss 0 and gradient 0. Labels equal to `ignore_index` or to -1 (what
the original repositories write) are ignored. Losses are computed in float32 or wider and returned so.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class PretrainingLoss(NamedTuple):
    """total [] is what to differentiate, parts are its weighted summands."""

    total: Tensor
    parts: dict[str, Tensor]


def total_of(**parts: Tensor) -> PretrainingLoss:
    return PretrainingLoss(sum(parts.values()), parts)


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def divisor(name: str, normalizer: str, **counts):
    """The count of that name; `name` is the loss in the error."""
    if normalizer not in counts:
        raise ValueError(f"{name}: normalizer is {normalizer!r}, must be one of {', '.join(counts)}")
    return counts[normalizer]


def negative_log_likelihood(name: str, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """(-log likelihood of each label, 0 where ignored; how many count)."""
    if labels.shape != logits.shape[:-1]:
        raise ValueError(f"{name}: labels have shape {list(labels.shape)}, must be {list(logits.shape[:-1])}")
    ignored = (labels == ignore_index) | (labels == -1)
    labels = torch.where(ignored, 0, labels)
    if labels.numel() and labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[-1]:
            raise ValueError(f"{name}: labels run from {low} to {high}, must lie in 0..{logits.shape[-1] - 1}, or be "
                             f"{ignore_index} or -1")
    each = -wide(logits).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return each.masked_fill(ignored, 0), (~ignored).sum()


def region_tensors(name: str, prediction: Tensor, target: Tensor, mask: Tensor,
                   whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """All three in float32 or wider, shapes checked; targets that do not count are 0 unless the `whole` is read."""
    if target.shape != prediction.shape:
        raise ValueError(f"{name}: target has shape {list(target.shape)}, must be {list(prediction.shape)}")
    if mask.shape != prediction.shape[:-1]:
        raise ValueError(f"{name}: mask has shape {list(mask.shape)}, must be {list(prediction.shape[:-1])}")
    prediction = wide(prediction)
    target = target if whole else target.masked_fill((mask == 0)[..., None], 0)
    return prediction, target.to(prediction.dtype), mask.to(prediction.dtype)
