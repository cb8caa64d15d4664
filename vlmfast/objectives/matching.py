"""Pairs that match and pairs that do not: negatives, the matching loss, word-region alignment.

Sizes: B batch, T words, R regions, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vlmfast.ops import optimal_transport_distance

from .language import cross_entropy

WRA_WEIGHT = 0.1  # UNITER's


class HardNegatives(NamedTuple):
    """texts [B]: for each image, the index of a text that is not its own; images [B]: for each text, of an image."""

    texts: Tensor
    images: Tensor


def sample_mismatches(batch: int, *, rate: float = 0.5, exact: bool = False, groups: Tensor | None = None,
                      generator: torch.Generator | None = None,
                      device: torch.device | str | None = None) -> Tensor:
    """In-batch negatives: which example's partner each example gets, its own index where the pair stays.

    Args:
        batch: B.
        rate: probability of another partner, uniform over the rest.
        exact: exactly int(rate * B) examples get one (METER).
        groups: [B] integers; examples of one group, such as captions of one image, are no negatives of each other.
            An example without any negative keeps its partner.

    Returns:
        [B] int64.

    Raises:
        ValueError: a batch of one example, a rate outside 0..1.
    """
    if batch < 2:
        raise ValueError(f"sample_mismatches: the batch has {batch} example(s), must have at least 2 to draw negatives")
    if not 0 <= rate <= 1:
        raise ValueError(f"sample_mismatches: rate is {rate}, must lie between 0 and 1")
    allowed = _others(batch, groups, device)
    other = allowed.double()
    other = torch.where(allowed.any(1, keepdim=True), other, torch.eye(batch, device=device, dtype=other.dtype))
    other = torch.multinomial(other, 1, generator=generator)[:, 0]
    draw = torch.rand(batch, generator=generator, device=device)
    moved = draw.argsort().argsort() < int(rate * batch) if exact else draw < rate
    return torch.where(moved, other, torch.arange(batch, device=device))


def hard_negatives(similarity: Tensor, *, scale: float = 1.0, highest: bool = False, groups: Tensor | None = None,
                   generator: torch.Generator | None = None) -> HardNegatives:
    """For each image the text, and for each text the image, that looks most like its own without being it.

    Args:
        similarity: [B, B], rows are images, columns texts; of contrastive features, for example.
        scale: draws with probability softmax(scale * similarity) over the negatives (CLIP's multiplier, not its log).
        highest: takes the most similar one instead of drawing (UNITER's retrieval).
        groups: as in `sample_mismatches`.

    Raises:
        ValueError: not square, a batch of one, or an example without negatives.

    Source: ALBEF (arXiv:2107.07651), sec. 3.2; UNITER (arXiv:1909.11740), sec. 4.
    """
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(f"hard_negatives: similarity has shape {list(similarity.shape)}, must be [B, B]")
    allowed = _others(len(similarity), groups, similarity.device)
    if not allowed.any(1).all():
        raise ValueError("hard_negatives: an example has no negative in the batch, must have at least one")
    score = (scale * similarity.detach().double()).masked_fill(~allowed, -torch.inf)

    def choose(rows: Tensor) -> Tensor:
        return rows.argmax(1) if highest else torch.multinomial(rows.softmax(1), 1, generator=generator)[:, 0]

    return HardNegatives(choose(score), choose(score.T))


def match_labels(matched: Tensor, match_index: int) -> Tensor:
    """[B] bool -> [B] classes, `match_index` where the pair matches; 0 or 1 according to the model."""
    if match_index not in (0, 1):
        raise ValueError(f"match_labels: match_index is {match_index!r}, must be 0 or 1")
    return torch.where(matched, match_index, 1 - match_index)


def matching_loss(logits: Tensor, matched: Tensor, match_index: int, *, normalizer: str = "batch") -> Tensor:
    """Cross entropy of "do they match", for image and text (ITM) or for two sentences (NSP).

    Args:
        logits: [B, 2].
        matched: [B] bool.
        match_index: class of a matching pair: 0 for ViLBERT and BERT's next sentence, 1 for most others.
    """
    return cross_entropy(logits, match_labels(matched, match_index), normalizer=normalizer)


def word_region_alignment(text: Tensor, image: Tensor, matched: Tensor | None = None, *,
                          keep_text: Tensor | None = None, keep_image: Tensor | None = None, beta: float = 0.5,
                          iterations: int = 50, k: int = 1, normalizer: str = "batch") -> Tensor:
    """Optimal transport distance of matching pairs minus that of mismatched ones.

    Args:
        text, image: [B, T, D] and [B, R, D] states of one width.
        matched: [B] bool; None: all match.
        keep_text, keep_image: [B, T] and [B, R] bool, True where a row exists.
        beta, iterations, k: of the transport plan.
        normalizer: "batch".

    Source: UNITER (arXiv:1909.11740), eq. 3, and its public code.
    """
    if normalizer != "batch":
        raise ValueError(f"word_region_alignment: normalizer is {normalizer!r}, must be one of batch")
    if text.shape[-1] != image.shape[-1]:
        raise ValueError(f"word_region_alignment: text is {text.shape[-1]} wide, image {image.shape[-1]}; they must be "
                         "equal")
    distance = optimal_transport_distance(text, image, mask_x=keep_text, mask_y=keep_image, beta=beta,
                                          iterations=iterations, k=k)
    if matched is not None:
        distance = torch.where(matched, distance, -distance)
    return distance.sum() / max(len(text), 1)


def _others(batch: int, groups: Tensor | None, device) -> Tensor:
    """[B, B] bool, True for pairs of different examples of different groups."""
    if groups is None:
        groups = torch.arange(batch, device=device)
    elif groups.shape != (batch,):
        raise ValueError(f"groups: has shape {list(groups.shape)}, must be [{batch}]")
    return groups[:, None] != groups
