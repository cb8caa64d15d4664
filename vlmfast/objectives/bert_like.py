r"""Pretraining and answer losses of the BERT-like models, each with its divisor as an argument.

The public repositories divide the same sums by different counts, so every loss takes `normalizer`:

================== ==============================================
labels             labels that are not ignored
mask               masked regions, at least 1
mask_dim           masked regions, at least 1, times channels
all_regions        batch times regions, masked or not
batch              examples
batch_sum_classes  examples; classes are summed
elements           every number
================== ==============================================

A batch without a single label or masked region has loss 0 and gradient 0. Labels equal to `ignore_index` or to -1 (what
the original repositories write) are ignored. Losses are computed in float32 or wider and returned so.

Sizes: B batch, T tokens, R regions, C classes, D channels.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


class PretrainingLoss(NamedTuple):
    """total [] is what to differentiate, parts are its weighted summands."""

    total: Tensor
    parts: dict[str, Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE, normalizer: str = "labels") -> Tensor:
    """Sum of -log softmax(logits)[label] over the labels that count, divided.

    Masked words (`labels` [B, T]), text-image matching, answer classes, choices among options.

    Args:
        logits: [..., C].
        labels: [...] integers in 0..C-1, `ignore_index` or -1.
        normalizer: "labels" or "batch".

    Returns:
        [] float32 or wider.

    Raises:
        ValueError: shapes do not fit, a label out of range, unknown normalizer.
    """
    each, count = _negative_log_likelihood("cross_entropy", logits, labels, ignore_index)
    return each.sum() / _divisor("cross_entropy", normalizer, labels=count.clamp(min=1), batch=len(labels))


def masked_region_kl(logits: Tensor, target: Tensor, mask: Tensor, *, normalizer: str = "mask") -> Tensor:
    """KL(target || softmax(logits)) of the masked regions.

    Args:
        logits, target: [B, R, C]; target rows are class probabilities.
        mask: [B, R], 1 or True where a region was masked.
        normalizer: "mask" (ViLBERT, visual_target 0) or "elements" (UNITER: masked regions times classes).

    Source: ViLBERT (arXiv:1908.02265), sec. 2.2; UNITER (arXiv:1909.11740), eq. 5.
    """
    name = "masked_region_kl"
    logits, target, keep = _regions(name, logits, target, mask)
    each = F.kl_div(logits.log_softmax(-1), target, reduction="none") * keep[..., None]
    count = keep.sum().clamp(min=1)
    return each.sum() / _divisor(name, normalizer, mask=count, elements=count * logits.shape[-1])


def masked_region_regression(prediction: Tensor, target: Tensor, mask: Tensor, *,
                             normalizer: str = "mask_dim") -> Tensor:
    """Squared error of the masked regions' features.

    Args:
        prediction, target: [B, R, D].
        mask: [B, R], 1 or True where a region was masked.
        normalizer: "mask_dim" (ViLBERT, visual_target 1; UNITER) or "mask".
    """
    name = "masked_region_regression"
    prediction, target, keep = _regions(name, prediction, target, mask)
    each = (prediction - target).square() * keep[..., None]
    count = keep.sum().clamp(min=1)
    return each.sum() / _divisor(name, normalizer, mask_dim=count * target.shape[-1], mask=count)


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
    prediction, target, keep = _regions(name, prediction, target, mask)
    if negative_index.shape[:2] != keep.shape or negative_index.ndim != 3:
        raise ValueError(f"{name}: negative_index has shape {list(negative_index.shape)}, must be "
                         f"{[*keep.shape, 'N']}")
    chosen = keep.bool()
    predicted = prediction[chosen]  # [M, D]
    negatives = target.flatten(0, 1)[negative_index[chosen]]  # [M, N, D]
    samples = torch.cat([target[chosen][:, None], negatives], dim=1)
    score = (samples @ predicted[:, :, None])[..., 0]  # [M, 1 + N]
    each = score.logsumexp(-1) - score[:, 0]
    return each.sum() / _divisor(name, normalizer, mask=keep.sum().clamp(min=1))


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
    each, count = _negative_log_likelihood(name, logits, labels, ignore_index)
    if confidence.shape != labels.shape:
        raise ValueError(f"{name}: confidence has shape {list(confidence.shape)}, must be {list(labels.shape)}")
    total = (each * confidence.to(each.dtype)).sum()
    return factor * total / _divisor(name, normalizer, all_regions=labels.numel(), labels=count.clamp(min=1))


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
    prediction, target, weight = _regions(name, prediction, target, weight)
    each = F.smooth_l1_loss(prediction, target, reduction="none").mean(-1) * weight
    return factor * each.sum() / _divisor(name, normalizer, all_regions=weight.numel(), mask=weight.sum().clamp(min=1))


def soft_target_bce(logits: Tensor, target: Tensor, *, normalizer: str = "batch_sum_classes") -> Tensor:
    """Binary cross entropy with soft scores: answers [B, C], grounded regions [B, R, 1].

    Args:
        logits, target: the same shape, target in 0..1.
        normalizer: "batch_sum_classes" (VQA, GQA, grounding: the mean times the number of classes) or "elements"
            (ViLBERT's NLVR2 and entailment).
    """
    name = "soft_target_bce"
    if logits.shape != target.shape:
        raise ValueError(f"{name}: target has shape {list(target.shape)}, must be {list(logits.shape)}")
    logits = _wide(logits)
    total = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum")
    return total / _divisor(name, normalizer, batch_sum_classes=len(logits), elements=logits.numel())


def vilbert_pretraining_loss(
    logits: dict[str, Tensor],
    masked_lm_labels: Tensor,
    image_label: Tensor,
    image_target: Tensor,
    next_sentence_label: Tensor,
    *,
    visual_target: int = 0,
    objective: int = 0,
    image_weight: float = 1.0,
    negative_index: Tensor | None = None,
    num_negative: int = 128,
    ignore_index: int = IGNORE,
    word_normalizer: str = "labels",
    region_normalizer: str | None = None,
) -> PretrainingLoss:
    """Masked words, masked regions and alignment.

    Args:
        logits: "mlm" [B, T, V], "image" [B, R, C] with the global region first, "nsp" [B, 2].
        masked_lm_labels: [B, T].
        image_label: [B, R - 1], 1 where a region was masked; without the global region, like
        image_target: [B, R - 1, C] class probabilities (visual_target 0) or features (1, 2).
        next_sentence_label: [B], 0 where text and image match.
        visual_target: 0 KL divergence, 1 squared error, 2 features against negatives.
        objective: 0; 1 mismatched pairs have no masked words and regions; 2 no alignment loss.
        image_weight: of the region loss.
        negative_index: [B, R - 1, N] for visual_target 2; None draws them with `num_negative`.
        word_normalizer, region_normalizer: see `cross_entropy` and the region losses; None is ViLBERT's own.

    Returns:
        PretrainingLoss with parts "mlm", "image", "nsp".

    Source: ViLBERT (arXiv:1908.02265), sec. 3.1; 12-in-1 (arXiv:1912.02315), sec. 3.2.
    """
    for name, value, allowed in (("visual_target", visual_target, (0, 1, 2)), ("objective", objective, (0, 1, 2))):
        if value not in allowed:
            raise ValueError(f"vilbert_pretraining_loss: {name} is {value!r}, must be one of {list(allowed)}")
    masked = image_label == 1
    if objective == 1:
        matched = (next_sentence_label == 0)[:, None]
        masked = masked & matched
        masked_lm_labels = torch.where(matched, masked_lm_labels, ignore_index)
    regions = logits["image"][:, 1:]
    option = {} if region_normalizer is None else {"normalizer": region_normalizer}
    if visual_target == 0:
        image = masked_region_kl(regions, image_target, masked, **option)
    elif visual_target == 1:
        image = masked_region_regression(regions, image_target, masked, **option)
    else:
        if negative_index is None:
            negative_index = sample_region_negatives(*masked.shape, num_negative, device=regions.device)
        image = masked_region_nce(regions, image_target, masked, negative_index, **option)
    words = cross_entropy(logits["mlm"], masked_lm_labels, ignore_index=ignore_index, normalizer=word_normalizer)
    aligned = cross_entropy(logits["nsp"], next_sentence_label, ignore_index=ignore_index)
    return _total(mlm=words, image=image_weight * image, nsp=aligned * (objective != 2))


def lxmert_pretraining_loss(
    logits: dict[str, Tensor],
    masked_lm_labels: Tensor | None = None,
    matched_label: Tensor | None = None,
    answer_label: Tensor | None = None,
    *,
    obj: tuple[Tensor, Tensor] | None = None,
    attr: tuple[Tensor, Tensor] | None = None,
    feat: tuple[Tensor, Tensor] | None = None,
    factor: float = 1 / 0.15,
    ignore_index: int = IGNORE,
    word_normalizer: str = "labels",
    region_normalizer: str = "all_regions",
) -> PretrainingLoss:
    """The sum of the losses whose targets are given.

    Args:
        logits: "mlm" [B, T, V], "matched" [B, 2], "vqa" [B, answers], "obj" and "attr" [B, R, C], "feat" [B, R, D].
        masked_lm_labels: [B, T]; words count on mismatched pairs too.
        matched_label: [B], 1 where text and image match.
        answer_label: [B] classes, ignored where there is no answer (as on mismatched pairs).
        obj, attr: (class [B, R], confidence [B, R]); every region counts, masked or not.
        feat: (features before masking [B, R, D], 1 where masked [B, R]).
        factor, region_normalizer: of the region losses; word_normalizer: of the masked words.

    Returns:
        PretrainingLoss with those of the parts "mlm", "matched", "obj", "attr", "feat", "vqa" that were given.

    Source: LXMERT (arXiv:1908.07490), sec. 3.1.
    """
    parts = {}
    if masked_lm_labels is not None:
        parts["mlm"] = cross_entropy(logits["mlm"], masked_lm_labels, ignore_index=ignore_index,
                                     normalizer=word_normalizer)
    if matched_label is not None:
        parts["matched"] = cross_entropy(logits["matched"], matched_label, ignore_index=ignore_index)
    for name, given in (("obj", obj), ("attr", attr)):
        if given is not None:
            parts[name] = region_label_loss(logits[name], *given, factor=factor, ignore_index=ignore_index,
                                            normalizer=region_normalizer)
    if feat is not None:
        parts["feat"] = region_feature_loss(logits["feat"], *feat, factor=factor, normalizer=region_normalizer)
    if answer_label is not None:
        parts["vqa"] = cross_entropy(logits["vqa"], answer_label, ignore_index=ignore_index)
    if not parts:
        raise ValueError("lxmert_pretraining_loss: no targets given, must be at least one")
    return _total(**parts)


def _total(**parts: Tensor) -> PretrainingLoss:
    return PretrainingLoss(sum(parts.values()), parts)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _divisor(name: str, normalizer: str, **counts):
    if normalizer not in counts:
        raise ValueError(f"{name}: normalizer is {normalizer!r}, must be one of {', '.join(counts)}")
    return counts[normalizer]


def _negative_log_likelihood(name: str, logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
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
    each = -_wide(logits).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    return each.masked_fill(ignored, 0), (~ignored).sum()


def _regions(name: str, prediction: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three in float32 or wider, shapes checked."""
    if target.shape != prediction.shape:
        raise ValueError(f"{name}: target has shape {list(target.shape)}, must be {list(prediction.shape)}")
    if mask.shape != prediction.shape[:-1]:
        raise ValueError(f"{name}: mask has shape {list(mask.shape)}, must be {list(prediction.shape[:-1])}")
    prediction = _wide(prediction)
    return prediction, target.to(prediction.dtype), mask.to(prediction.dtype)
