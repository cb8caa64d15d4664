"""Losses of fine-tuning, as the repositories of the models have them; see `common` for the divisors.

Sizes: B examples, C classes, K choices of an example, R regions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .bert_like import soft_target_bce
from .common import divisor, wide
from .language import cross_entropy

__all__ = ["answer_kl", "choice_bce", "choice_cross_entropy", "choice_margin", "choice_two_class", "cross_entropy",
           "grounding_targets", "intensity_l1", "label_bce", "one_hot_bce", "region_bce", "region_cross_entropy",
           "region_kl", "soft_target_bce"]  # fmt: skip


def answer_kl(logits: Tensor, target: Tensor, *, normalizer: str = "batch") -> Tensor:
    """sum_c t_c (log t_c - log softmax(z)_c) over answers [B, C]; targets are used as they are, not normalised.

    Source: VisualBERT (arXiv:1908.03557), public code.
    """
    _like("answer_kl", "target", target, logits)
    logits = wide(logits)
    total = F.kl_div(logits.log_softmax(-1), target.to(logits.dtype), reduction="sum")
    return total / divisor("answer_kl", normalizer, batch=max(len(logits), 1), elements=max(logits.numel(), 1))


def one_hot_bce(logits: Tensor, labels: Tensor, *, normalizer: str = "elements") -> Tensor:
    """Binary cross entropy of classes [B, C] with the one-hot form of labels [B].

    Args:
        normalizer: "elements" (ViLBERT's NLVR2 and entailment) or "batch_sum_classes" (UNITER's entailment).
    """
    return soft_target_bce(logits, _one_hot(labels, logits), normalizer=normalizer)


def choice_cross_entropy(scores: Tensor, right: Tensor, *, normalizer: str = "batch") -> Tensor:
    """Cross entropy over the choices [B, K] of each example; right [B]. VCR and retrieval of ViLBERT, VisualBERT."""
    return cross_entropy(scores, right, normalizer=normalizer)


def choice_two_class(logits: Tensor, right: Tensor, *, match_index: int = 1, normalizer: str = "choices") -> Tensor:
    """Each choice by itself as right or wrong: logits [B, K, 2], right [B].

    Args:
        match_index: class of the right one.
        normalizer: "choices" (all B K of them) or "batch".

    Source: UNITER (arXiv:1909.11740), VCR; VD-BERT (arXiv:2004.13278); image-text matching with drawn negatives.
    """
    if match_index not in (0, 1):
        raise ValueError(f"choice_two_class: match_index is {match_index!r}, must be 0 or 1")
    chosen = _one_hot(right, logits[..., 0]).long()
    labels = chosen if match_index else 1 - chosen
    count = divisor("choice_two_class", normalizer, choices=max(labels.numel(), 1), batch=max(len(labels), 1))
    return cross_entropy(logits, labels, normalizer="labels") * labels.numel() / count


def choice_bce(scores: Tensor, right: Tensor, *, positive_weight: float = 1.0, normalizer: str = "choices") -> Tensor:
    """Binary cross entropy of the choices [B, K], the right one weighted, times (w + 1) / 2 w.

    Source: VL-BERT (arXiv:1908.08530), VCR, public code.
    """
    scores, weight = wide(scores), positive_weight
    total = F.binary_cross_entropy_with_logits(scores, _one_hot(right, scores), reduction="sum",
                                               pos_weight=scores.new_tensor(weight))
    total = total * (weight + 1) / (2 * weight)
    return total / divisor("choice_bce", normalizer, choices=max(scores.numel(), 1), batch=max(len(scores), 1))


def choice_margin(scores: Tensor, right: Tensor, *, margin: float = 0.2, normalizer: str = "pairs") -> Tensor:
    """max(0, margin + sigmoid(wrong) - sigmoid(right)) over the wrong choices of scores [B, K].

    Args:
        normalizer: "pairs", B (K - 1), or "batch".

    Source: UNITER (arXiv:1909.11740), retrieval, public code.
    """
    chance, chosen = wide(scores).sigmoid(), _one_hot(right, scores).bool()
    loss = (margin + chance - chance[chosen][:, None]).clamp(min=0).masked_fill(chosen, 0)
    pairs = max(scores.numel() - len(scores), 1)
    return loss.sum() / divisor("choice_margin", normalizer, pairs=pairs, batch=max(len(scores), 1))


def grounding_targets(overlap: Tensor, *, least: float = 0.5) -> Tensor:
    """IoU [B, R] of regions with the true box -> targets: what is below `least` is 0 (12-in-1, arXiv:1912.02315)."""
    return overlap.masked_fill(overlap < least, 0)


def region_bce(logits: Tensor, overlap: Tensor, keep: Tensor | None = None, *, least: float = 0.5, hard: bool = False,
               normalizer: str = "batch_sum_classes") -> Tensor:
    """Binary cross entropy of regions [B, R] with their IoU, or with whether it reaches `least` where `hard`.

    Args:
        keep: [B, R] bool, True where a region exists; None: all.
        normalizer: "batch_sum_classes" (ViLBERT: the mean times R), "regions" (VL-BERT: those that exist) or
            "elements".
    """
    _like("region_bce", "overlap", overlap, logits)
    logits, target = wide(logits), grounding_targets(overlap, least=least)
    target = (target > 0).to(logits.dtype) if hard else target.to(logits.dtype)
    keep = torch.ones_like(target, dtype=torch.bool) if keep is None else keep
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none").masked_fill(~keep, 0)
    return each.sum() / divisor("region_bce", normalizer, batch_sum_classes=max(len(logits), 1),
                                regions=keep.sum().clamp(min=1), elements=max(logits.numel(), 1))


def region_cross_entropy(logits: Tensor, overlap: Tensor, *, normalizer: str = "sum") -> Tensor:
    """Cross entropy over regions [B, R]; the right one has the greatest IoU. "sum" (UNITER) or "batch"."""
    _like("region_cross_entropy", "overlap", overlap, logits)
    each = F.cross_entropy(wide(logits), overlap.argmax(1), reduction="sum")
    return each / divisor("region_cross_entropy", normalizer, sum=1, batch=max(len(logits), 1))


def region_kl(logits: Tensor, overlap: Tensor, *, least: float = 0.5, normalizer: str = "batch") -> Tensor:
    """KL divergence over regions [B, R] from 1/n on the n that match (IoU of at least `least`); none: no loss.

    Source: VisualBERT (arXiv:1908.03557), Flickr30K entities, public code.
    """
    _like("region_kl", "overlap", overlap, logits)
    target = (overlap >= least).to(wide(logits).dtype)
    target = target / target.sum(1, keepdim=True).clamp(min=1)
    return answer_kl(logits, target, normalizer=normalizer)


def label_bce(logits: Tensor, target: Tensor, *, positive_weight: Tensor | None = None,
              normalizer: str = "elements") -> Tensor:
    """Binary cross entropy of labels [B, C] that occur together (six emotions); positive_weight [C]."""
    _like("label_bce", "target", target, logits)
    logits = wide(logits)
    total = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="sum",
                                               pos_weight=positive_weight)
    return total / divisor("label_bce", normalizer, elements=max(logits.numel(), 1),
                           batch_sum_classes=max(len(logits), 1))


def intensity_l1(scores: Tensor, target: Tensor, *, normalizer: str = "batch") -> Tensor:
    """|score - target| of intensities [B]."""
    _like("intensity_l1", "target", target, scores)
    scores = wide(scores)
    total = (scores - target.to(scores.dtype)).abs().sum()
    return total / divisor("intensity_l1", normalizer, batch=max(len(scores), 1))


def _like(name: str, field: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: {field} has shape {list(value.shape)}, must be {list(like.shape)}")


def _one_hot(labels: Tensor, like: Tensor) -> Tensor:
    """Labels [B] as [B, C] in the dtype of `like`, float32 or wider."""
    if labels.shape != like.shape[:1]:
        raise ValueError(f"labels: have shape {list(labels.shape)}, must be {list(like.shape[:1])}")
    if labels.numel() and labels.device.type == "cpu":
        low, high, classes = int(labels.min()), int(labels.max()), like.shape[1]
        if low < 0 or high >= classes:
            raise ValueError(f"labels: run from {low} to {high}, must lie in 0..{classes - 1}")
    return F.one_hot(labels.long(), like.shape[1]).to(wide(like).dtype)
