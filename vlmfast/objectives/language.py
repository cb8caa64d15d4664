"""Losses over words: masked, prefix and sequence-to-sequence language models. See `common` for the divisors.

Sizes: B batch, T tokens, S target tokens, V vocabulary, C classes.
"""

import torch
from torch import Tensor

from .common import IGNORE, divisor, negative_log_likelihood, wide


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = IGNORE, normalizer: str = "labels") -> Tensor:
    """Sum of -log softmax(logits)[label] over the labels that count, divided.

    Masked words (`labels` [B, T]), text-image matching, answer classes, choices among options.

    Args:
        logits: [..., C].
        labels: [...] integers in 0..C-1, `ignore_index` or -1.
        normalizer: "labels", "tokens", "labels_eps", "samples" or "batch".

    Returns:
        [] float32 or wider.

    Raises:
        ValueError: shapes do not fit, a label out of range, unknown normalizer.
    """
    each, count = negative_log_likelihood("cross_entropy", logits, labels, ignore_index)
    if normalizer == "samples":
        own = ((labels != ignore_index) & (labels != -1)).flatten(1).sum(1)
        return (each.flatten(1).sum(1) / (own + 1e-4)).sum() / ((own > 0).sum() + 1e-4)
    return each.sum() / divisor("cross_entropy", normalizer, labels=count.clamp(min=1), tokens=count.clamp(min=1),
                                labels_eps=count + 1e-5, batch=len(labels))


def masked_words_without_worst(logits: Tensor, labels: Tensor, *, drop_worst: float = 0.0,
                               ignore_index: int = IGNORE) -> Tensor:
    """Masked words of the examples with the smallest losses, divided by their labels plus 1e-5 (VD-BERT).

    Args:
        logits, labels: [B, T, V] and [B, T].
        drop_worst: share of the examples that is left out; int(B * (1 - drop_worst)) stay.

    Source: VD-BERT (arXiv:2004.13278), public code; UniLM (arXiv:1905.03197).
    """
    name = "masked_words_without_worst"
    if not 0 <= drop_worst < 1:
        raise ValueError(f"{name}: drop_worst is {drop_worst}, must lie in 0..1, 1 excluded")
    each, _ = negative_log_likelihood(name, logits, labels, ignore_index)
    own = ((labels != ignore_index) & (labels != -1)).sum(1)
    totals, kept = each.sum(1).topk(int(len(labels) * (1 - drop_worst)), largest=False)
    return totals.sum() / (own[kept].sum() + 1e-5)


def sample_prefix_lengths(lengths: Tensor, *, least: int = 0, generator: torch.Generator | None = None) -> Tensor:
    """[B] prefix lengths, uniform over least..length - 1; the length itself for a text no longer than `least`."""
    draw = torch.rand(len(lengths), generator=generator, device=lengths.device, dtype=torch.float64)
    room = (lengths - least).clamp(min=0)
    return torch.minimum(least + torch.minimum((draw * room).long(), (room - 1).clamp(min=0)), lengths)


def prefix_lm_labels(input_ids: Tensor, prefix_lengths: Tensor, keep: Tensor | None = None,
                     ignore_index: int = IGNORE) -> Tensor:
    """[B, T] labels for a causal model: position t is to predict token t + 1 if that lies behind the prefix.

    The first token has no position before it in the text and is never predicted.

    Args:
        input_ids: [B, T].
        prefix_lengths: [B] tokens that are given.
        keep: [B, T] bool, True where a token exists; None: all.
    """
    at = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    wanted = at >= prefix_lengths[:, None]
    if keep is not None:
        wanted = wanted & keep[:, 1:].bool()
    labels = torch.full_like(input_ids, ignore_index)
    labels[:, :-1] = torch.where(wanted, input_ids[:, 1:], ignore_index)
    return labels


def prefix_lm_loss(logits: Tensor, input_ids: Tensor, prefix_lengths: Tensor, keep: Tensor | None = None, *,
                   normalizer: str = "tokens") -> Tensor:
    """Cross entropy of the tokens behind the prefix, each from the position before it.

    Args:
        logits: [B, T, V] of a model in which the prefix sees itself and later tokens see only what lies before.
        input_ids, prefix_lengths, keep: as in `prefix_lm_labels`.
        normalizer: "tokens" or "batch".

    Source: SimVLM (arXiv:2108.10904), eq. 3.
    """
    return cross_entropy(logits, prefix_lm_labels(input_ids, prefix_lengths, keep), normalizer=normalizer)


def seq2seq_loss(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, smooth: str = "all",
                 drop_worst: float = 0.0, ignore_index: int = IGNORE, normalizer: str = "tokens") -> Tensor:
    """Cross entropy of target tokens against a smoothed target.

    Args:
        logits: [B, S, V], position s scores label s.
        labels: [B, S], `ignore_index` or -1 at padding and, for masked targets (UniLM), at what was not masked.
        label_smoothing: eps.
        smooth: "all": eps / V on every token beside 1 - eps on the label, cross entropy (translation); "others":
            1 - eps on the label and eps / (V - 1) on the others, KL divergence (OSCAR, VLP).
        drop_worst: share of the tokens, those with the largest losses, that is left out (OSCAR: 0.2 after 20 000
            steps); int(M * (1 - drop_worst)) stay.
        normalizer: "tokens" (those that stay) or "batch".

    Source: OSCAR (arXiv:2004.06165), public code; UniLM (arXiv:1905.03197).
    """
    name = "seq2seq_loss"
    if smooth not in ("all", "others"):
        raise ValueError(f"{name}: smooth is {smooth!r}, must be one of all, others")
    for field, value in (("label_smoothing", label_smoothing), ("drop_worst", drop_worst)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {field} is {value}, must lie in 0..1, 1 excluded")
    each, count = negative_log_likelihood(name, logits, labels, ignore_index)
    if label_smoothing:
        eps, size = label_smoothing, logits.shape[-1]
        total = -wide(logits).log_softmax(-1).sum(-1).masked_fill((labels == ignore_index) | (labels == -1), 0)
        if smooth == "all":
            each = (1 - eps) * each + eps / size * total
        else:
            share = torch.tensor([1 - eps, eps / (size - 1)], dtype=each.dtype)
            entropy = float((share * share.log())[0] + (size - 1) * (share * share.log())[1])
            each = (1 - eps) * each + eps / (size - 1) * (total - each)
            each = torch.where((labels == ignore_index) | (labels == -1), 0.0, each + entropy)
    if drop_worst:
        there = each[(labels != ignore_index) & (labels != -1)]
        each = there.topk(int(len(there) * (1 - drop_worst)), largest=False).values
        count = torch.tensor(len(each), device=each.device)
    return each.sum() / divisor(name, normalizer, tokens=count.clamp(min=1), batch=len(labels))
