"""The pretraining losses of ViLBERT and LXMERT as their repositories add them up, and the soft-target answer loss.

Each summand is a function of its own, in `language` and `regions`; `common` has the divisors.

Sizes: B batch, T tokens, R regions, C classes, D channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import IGNORE, PretrainingLoss, divisor, total_of, wide
from .language import cross_entropy
from .regions import (
    masked_region_kl,
    masked_region_nce,
    masked_region_regression,
    region_feature_loss,
    region_label_loss,
    sample_region_negatives,
)

__all__ = ["IGNORE", "PretrainingLoss", "cross_entropy", "lxmert_pretraining_loss", "masked_region_kl",
           "masked_region_nce", "masked_region_regression", "region_feature_loss", "region_label_loss",
           "sample_region_negatives", "soft_target_bce", "vilbert_pretraining_loss"]


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
    logits = wide(logits)
    total = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum")
    return total / divisor(name, normalizer, batch_sum_classes=len(logits), elements=logits.numel())


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
    return total_of(mlm=words, image=image_weight * image, nsp=aligned * (objective != 2))


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
    return total_of(**parts)
