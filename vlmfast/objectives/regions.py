"""Losses of masked regions: features, classes, distributions, contrast. See `common` for the divisors.

Sizes: B batch, R regions, C classes, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORE, divisor, negative_log_likelihood, region_tensors


def masked_region_kl(logits: Tensor, target: Tensor, mask: Tensor, *, normalizer: str = "mask") -> Tensor:
    """KL(target || softmax(logits)) of the masked regions.

    Args:
        logits, target: [B, R, C]; target rows are class probabilities.
        mask: [B, R], 1 or True where a region was masked.
        normalizer: "mask" (ViLBERT, visual_target 0) or "elements" (UNITER: masked regions times classes).

    Source: ViLBERT (arXiv:1908.02265), sec. 2.2; UNITER (arXiv:1909.11740), eq. 5.
    """
    name = "masked_region_kl"
    logits, target, keep = region_tensors(name, logits, target, mask)
    each = F.kl_div(logits.log_softmax(-1), target, reduction="none") * keep[..., None]
    count = keep.sum().clamp(min=1)
    return each.sum() / divisor(name, normalizer, mask=count, elements=count * logits.shape[-1])


def masked_region_regression(prediction: Tensor, target: Tensor, mask: Tensor, *,
                             normalizer: str = "mask_dim") -> Tensor:
    """Squared error of the masked regions' features.

    Args:
        prediction, target: [B, R, D].
        mask: [B, R], 1 or True where a region was masked.
        normalizer: "mask_dim" (ViLBERT, visual_target 1), "elements" (the same count, UNITER's name) or "mask".
    """
    name = "masked_region_regression"
    prediction, target, keep = region_tensors(name, prediction, target, mask)
    each = (prediction - target).square() * keep[..., None]
    count = keep.sum().clamp(min=1)
    return each.sum() / divisor(name, normalizer, mask_dim=count * target.shape[-1],
                                elements=count * target.shape[-1], mask=count)


def masked_region_nce(prediction: Tensor, target: Tensor, mask: Tensor, negative_index: Tensor, *,
                      normalizer: str = "mask") -> Tensor:
    """Cross entropy of a masked region's own feature against sampled ones, scored by their dot product with the
    prediction (12-in-1's visual_target 2).

    Args:
        prediction, target: [B, R, D].
        mask: [B, R], 1 or True where a region was masked.
        negative_index: [B, R, N] integers into the B * R rows of target; see `sample_region_negatives`.
        normalizer: "mask".
    """
    name = "masked_region_nce"
    prediction, target, keep = region_tensors(name, prediction, target, mask, whole=True)
    if negative_index.shape[:2] != keep.shape or negative_index.ndim != 3:
        raise ValueError(f"{name}: negative_index has shape {list(negative_index.shape)}, must be "
                         f"{[*keep.shape, 'N']}")
    chosen = keep.bool()
    predicted = prediction[chosen]  # [M, D]
    negatives = target.flatten(0, 1)[negative_index[chosen]]  # [M, N, D]
    samples = torch.cat([target[chosen][:, None], negatives], dim=1)
    score = (samples @ predicted[:, :, None])[..., 0]  # [M, 1 + N]
    each = score.logsumexp(-1) - score[:, 0]
    return each.sum() / divisor(name, normalizer, mask=keep.sum().clamp(min=1))


def sample_region_negatives(batch: int, regions: int, num_negative: int = 128, *,
                            generator: torch.Generator | None = None,
                            device: torch.device | str | None = None) -> Tensor:
    """Negatives for `masked_region_nce`: 70 % from other examples, 30 % other regions of the same one, rounded down.

    Returns:
        [B, R, int(0.7 n) + int(0.3 n)] int64 flat indices; n = 128 gives 127, as in the public code.

    Raises:
        ValueError: fewer than two examples or two regions, so that there is nothing to draw from.
    """
    if batch < 2 or regions < 2:
        raise ValueError(f"sample_region_negatives: has {batch} examples of {regions} regions, must have at least 2 of "
                         "both")
    across, inside = int(num_negative * 0.7), int(num_negative * 0.3)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(high, (batch, regions, count), generator=generator, device=device)

    own_row = torch.arange(batch, device=device)[:, None, None]
    own_column = torch.arange(regions, device=device)[:, None]
    row = draw(batch - 1, across)
    row = torch.where(row == own_row, batch - 1, row)  # the last one takes the place of the own one
    column = draw(regions - 1, inside)
    column = torch.where(column == own_column, regions - 1, column)
    return torch.cat([row * regions + draw(regions, across), own_row * regions + column], dim=-1)


def region_label_loss(logits: Tensor, labels: Tensor, confidence: Tensor, *, factor: float = 1 / 0.15,
                      ignore_index: int = IGNORE, normalizer: str = "all_regions") -> Tensor:
    """Cross entropy of every region's detected class, weighted by the detector's confidence (LXMERT: obj, attr).

    Args:
        logits: [B, R, C].
        labels, confidence: [B, R].
        factor: of the mean; LXMERT's code 1 / 0.15, transformers 6.67.
        normalizer: "all_regions" or "labels".

    Source: LXMERT (arXiv:1908.07490), sec. 3.1.
    """
    name = "region_label_loss"
    each, count = negative_log_likelihood(name, logits, labels, ignore_index)
    if confidence.shape != labels.shape:
        raise ValueError(f"{name}: confidence has shape {list(confidence.shape)}, must be {list(labels.shape)}")
    total = (each * confidence.to(each.dtype)).sum()
    return factor * total / divisor(name, normalizer, all_regions=labels.numel(), labels=count.clamp(min=1))


def region_feature_loss(prediction: Tensor, target: Tensor, weight: Tensor, *, factor: float = 1 / 0.15,
                        normalizer: str = "all_regions") -> Tensor:
    """Smooth L1 error of region features, averaged over channels and weighted per region (LXMERT: feat).

    Args:
        prediction, target: [B, R, D].
        weight: [B, R], 1 where a region was masked.
        factor: as in `region_label_loss`.
        normalizer: "all_regions" or "mask" (the sum of the weights, at least 1).
    """
    name = "region_feature_loss"
    prediction, target, weight = region_tensors(name, prediction, target, weight)
    each = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1) * weight
    return factor * each.sum() / divisor(name, normalizer, all_regions=weight.numel(), mask=weight.sum().clamp(min=1))


def masked_region_classification(logits: Tensor, target: Tensor, mask: Tensor, *, background: int | None = 0,
                                 normalizer: str = "mask") -> Tensor:
    """-log softmax(logits)[the likeliest class] of the masked regions.

    Args:
        logits, target: [B, R, C]; target rows are the detector's class probabilities.
        mask: [B, R], 1 or True where a region was masked.
        background: a class that is never the target (UNITER: 0); None: there is none.
        normalizer: "mask" or "all_regions".

    Source: UNITER (arXiv:1909.11740), sec. 3.2, MRC.
    """
    name = "masked_region_classification"
    logits, target, keep = region_tensors(name, logits, target, mask)
    if background is not None:
        if not 0 <= background < target.shape[-1] or target.shape[-1] < 2:
            raise ValueError(f"{name}: background is {background}, must lie in 0..{target.shape[-1] - 1}, beside "
                             "another class")
        target = target.index_fill(-1, torch.tensor([background], device=target.device), -torch.inf)
    each, _ = negative_log_likelihood(name, logits, target.argmax(-1), IGNORE)
    return (each * keep).sum() / divisor(name, normalizer, mask=keep.sum().clamp(min=1), all_regions=keep.numel())


def masked_region_soft_cross_entropy(logits: Tensor, target: Tensor, mask: Tensor, *,
                                     normalizer: str = "valid_rows") -> Tensor:
    """-sum_c target_c log softmax(logits)_c of the masked regions whose target sums to 1 within 0.1 (VL-BERT's MVRC).

    Args:
        logits, target: [B, R, C].
        mask: [B, R], 1 or True where a region was masked.
        normalizer: "valid_rows" or "mask".

    Source: VL-BERT (arXiv:1908.08530), sec. 3.3.
    """
    name = "masked_region_soft_cross_entropy"
    logits, target, keep = region_tensors(name, logits, target, mask)
    valid = keep * ((target.sum(-1) - 1).abs() < 0.1)
    each = -(target * logits.log_softmax(-1)).sum(-1) * valid
    return each.sum() / divisor(name, normalizer, valid_rows=valid.sum().clamp(min=1), mask=keep.sum().clamp(min=1))
