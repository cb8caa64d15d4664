"""Recall at k for retrieval in both directions, with duplicates counted as they should be."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


def same_caption_ids(captions: Sequence[str]) -> Tensor:
    """One id per distinct caption (case and outer white space ignored), [N] int64: equal captions answer each other."""
    ids: dict[str, int] = {}
    return torch.tensor([ids.setdefault(caption.strip().lower(), len(ids)) for caption in captions], dtype=torch.long)


def best_ranks(query: Tensor, candidate: Tensor, query_ids: Tensor, candidate_ids: Tensor, chunk: int = 1024) -> Tensor:
    """Rank of each query's best correct candidate, 0 = first.

    The rank counts wrong candidates that score at least as high, so a model that gives every pair the same score gets
    no credit, and a second picture with the very same caption is no error.

    Args:
        query, candidate: [N, D] and [M, D] floating point; scores are their dot products.
        query_ids, candidate_ids: [N] and [M] integers; a candidate is correct where the ids are equal.
        chunk: queries scored at a time.

    Returns:
        [N] int64; M for a query without a correct candidate and for one whose scores are not finite.

    Raises:
        ValueError: shapes do not fit.
    """
    if query.ndim != 2 or candidate.ndim != 2 or query.shape[1] != candidate.shape[1]:
        raise ValueError(f"best_ranks: query is {list(query.shape)}, candidate is {list(candidate.shape)}; "
                         "must be [N, D] and [M, D]")
    _check_ids("best_ranks", query_ids=(query_ids, len(query)), candidate_ids=(candidate_ids, len(candidate)))
    ranks = torch.empty(len(query), dtype=torch.long, device=query.device)
    for start in range(0, len(query), chunk):
        rows = slice(start, start + chunk)
        ranks[rows] = score_ranks(query[rows] @ candidate.T, query_ids[rows], candidate_ids)
    return ranks


def score_ranks(scores: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """`best_ranks` from scores [N, M], a higher one fits better."""
    correct = query_ids[:, None] == candidate_ids
    best = scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
    rank = ((scores >= best) & ~correct).sum(1)
    usable = correct.any(1) & scores.isfinite().all(1)
    return torch.where(usable, rank, scores.shape[1])


def _check_ids(where: str, **wanted: tuple[Tensor, int]) -> None:
    for name, (ids, rows) in wanted.items():
        if ids.shape != (rows,):
            raise ValueError(f"{where}: {name} is {list(ids.shape)}, must be [{rows}]")


def chance_recall(query_ids: Tensor, candidate_ids: Tensor, k: int) -> float:
    """Expected recall at k of a random order: mean over queries of 1 - C(M - P, k) / C(M, k), P correct among M."""
    total = len(candidate_ids)
    if not len(query_ids) or not total:
        return 0.0
    values, counts = candidate_ids.unique(return_counts=True)
    count_of = dict(zip(values.tolist(), counts.tolist(), strict=True))
    misses: dict[int, float] = {}
    recall = 0.0
    for identity in query_ids.tolist():
        correct = count_of.get(identity, 0)
        if correct not in misses:
            miss = 1.0
            for drawn in range(min(k, total)):
                miss *= max(total - correct - drawn, 0) / (total - drawn)
            misses[correct] = miss
        recall += 1.0 - misses[correct]
    return recall / len(query_ids)


@dataclass(frozen=True)
class RecallReport:
    """Recall at k of both directions, beside that of a random order.

    Attributes:
        image_to_text, text_to_image: k -> share of queries with a correct answer among the best k.
        chance_image_to_text, chance_text_to_image: the same for a random order.
        image_ranks, text_ranks: rank of the best correct answer per query, 0 = first; [N] and [M] int64.
    """

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]
    image_ranks: Tensor = field(repr=False)
    text_ranks: Tensor = field(repr=False)

    def to_dict(self) -> dict[str, float]:
        """Flat names such as `image_to_text_r1` for logs."""
        values = {}
        for direction in ("image_to_text", "text_to_image"):
            for k, recall in getattr(self, direction).items():
                values[f"{direction}_r{k}"] = recall
                values[f"{direction}_r{k}_chance"] = getattr(self, f"chance_{direction}")[k]
        return values


def recall_at_k(image: Tensor, text: Tensor, ks: Sequence[int] = (1, 5, 10), *, image_ids: Tensor | None = None,
                text_ids: Tensor | None = None) -> RecallReport:
    """Recall at k, image to text and text to image.

    Args:
        image: [N, D] features; text: [M, D] features. Any length: they are normalised here.
        ks: how many answers count.
        image_ids, text_ids: [N] and [M] integers; a pair is correct where they are equal. None pairs row i with row i.
            Several captions of one picture share its id; see `same_caption_ids` for repeated captions.

    Raises:
        ValueError: shapes do not fit, or a k is under 1.
    """
    image_ids, text_ids = _pair_ids("recall_at_k", len(image), len(text), ks, image_ids, text_ids, image.device)
    image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
    return _report(best_ranks(image, text, image_ids, text_ids), best_ranks(text, image, text_ids, image_ids),
                   image_ids, text_ids, ks)


def recall_of_scores(scores: Tensor, ks: Sequence[int] = (1, 5, 10), *, text_ids: Tensor | None = None,
                     image_ids: Tensor | None = None) -> RecallReport:
    """`recall_at_k` from the scores of all pairs, for models that read text and picture together.

    Args:
        scores: [M, N], text by image, a higher one fits better.
        ks, text_ids, image_ids: see `recall_at_k`; ids are [M] and [N].

    Raises:
        ValueError: shapes do not fit, or a k is under 1.
    """
    if scores.ndim != 2:
        raise ValueError(f"recall_of_scores: scores is {list(scores.shape)}, must be [texts, images]")
    texts, images = scores.shape
    image_ids, text_ids = _pair_ids("recall_of_scores", images, texts, ks, image_ids, text_ids, scores.device)
    _check_ids("recall_of_scores", text_ids=(text_ids, texts), image_ids=(image_ids, images))
    return _report(score_ranks(scores.T, image_ids, text_ids), score_ranks(scores, text_ids, image_ids), image_ids,
                   text_ids, ks)


def _pair_ids(where: str, images: int, texts: int, ks: Sequence[int], image_ids: Tensor | None,
              text_ids: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The given ids, or those that pair row i with row i."""
    if any(k < 1 for k in ks):
        raise ValueError(f"{where}: ks is {list(ks)}, must be 1 or more")
    if (image_ids is None) != (text_ids is None):
        raise ValueError(f"{where}: give both image_ids and text_ids, or neither")
    if image_ids is not None:
        return image_ids, text_ids
    if images != texts:
        raise ValueError(f"{where}: text has {texts} rows, image has {images}; give ids")
    ids = torch.arange(images, device=device)
    return ids, ids


def _report(image_ranks: Tensor, text_ranks: Tensor, image_ids: Tensor, text_ids: Tensor,
            ks: Sequence[int]) -> RecallReport:
    def recalls(ranks: Tensor) -> dict[int, float]:
        return {k: (ranks < k).double().mean().item() if len(ranks) else 0.0 for k in ks}

    return RecallReport(
        image_to_text=recalls(image_ranks),
        text_to_image=recalls(text_ranks),
        chance_image_to_text={k: chance_recall(image_ids, text_ids, k) for k in ks},
        chance_text_to_image={k: chance_recall(text_ids, image_ids, k) for k in ks},
        image_ranks=image_ranks,
        text_ranks=text_ranks,
    )
