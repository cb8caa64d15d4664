"""What the masked objectives hide: tokens or whole words, regions, and regions that overlap them.

Every function draws from `generator` (torch's default one without), on the CPU or the device of its inputs, so that the
same generator state gives the same masks.

Sizes: B batch, T tokens, R regions, D channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .common import IGNORE

RATE = 0.15  # of words and of regions, in every paper since BERT
WORD_SPLIT = (0.8, 0.1, 0.1)  # [MASK], a random token, the token itself
EPS = 1e-5


class MaskedTokens(NamedTuple):
    """input_ids [B, T] to read, labels [B, T] to predict (the old id where selected, elsewhere -100)."""

    input_ids: Tensor
    labels: Tensor


class MaskedRegions(NamedTuple):
    """features [B, R, D] to read; bool [B, R]: masked, to be predicted; hidden, whose feature was replaced; near, not
    masked but overlapping a masked one."""

    features: Tensor
    masked: Tensor
    hidden: Tensor
    near: Tensor


def word_ids(continues: Tensor, special: Tensor) -> Tensor:
    """Which word each token belongs to: [B, T] integers from 0 on in each text, -1 for special tokens.

    Args:
        continues: [B, T] bool, True for a piece that goes on with the word before it ("##ing"); with a vocabulary,
            `is_continuation[input_ids]`.
        special: [B, T] bool, True for [CLS], [SEP], padding.
    """
    starts = ~continues | special
    starts[:, 1:] |= special[:, :-1]
    return (starts.cumsum(1) - 1).masked_fill(special, -1)


def mask_tokens(input_ids: Tensor, special: Tensor, *, mask_id: int, random_ids: tuple[int, int], rate: float = RATE,
                split: tuple[float, float, float] = WORD_SPLIT, words: Tensor | None = None, at_least_one: bool = False,
                most: int | None = None, ignore_index: int = IGNORE,
                generator: torch.Generator | None = None) -> MaskedTokens:
    """Selects tokens with probability `rate`; of those, replaces shares `split` by [MASK], a random token, themselves.

    Args:
        input_ids: [B, T].
        special: [B, T] bool, True for tokens that are never selected, padding among them.
        mask_id: id of [MASK].
        random_ids: (first, end) of the ids that random tokens come from, end excluded.
        words: [B, T] from `word_ids`, for whole words: all pieces of a word are selected and treated alike, each with
            a random token of its own. None: every token by itself.
        at_least_one: selects the first token that may be, as [MASK], in texts where none was drawn (UNITER).
        most: selects round(rate * tokens that may be) of them, at least one and at most so many, in place of a draw
            for each (VD-BERT, OSCAR's captions).

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: BERT (arXiv:1810.04805), sec. 3.1; whole words: VL-BERT (arXiv:1908.08530), public code.
    """
    name = "mask_tokens"
    _check_rate(name, rate, split)
    if special.dtype != torch.bool:
        raise TypeError(f"{name}: special is {special.dtype}, must be bool")
    for field, value in (("special", special), ("words", words)):
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name}: {field} has shape {list(value.shape)}, must be {list(input_ids.shape)}")
    first, end = random_ids
    if not 0 <= first < end:
        raise ValueError(f"{name}: random_ids are {random_ids}, must be a range of at least one id")
    if most is not None and (most < 1 or words is not None):
        raise ValueError(f"{name}: most is {most}, must be at least 1, and None with words")
    unit = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids) if words is None else words
    unit = unit.clamp(min=0)
    draw, action = _uniform(2, *input_ids.shape, like=input_ids, generator=generator)
    draw, action = draw.gather(1, unit), action.gather(1, unit)  # one draw for all pieces of a word
    selected = (draw < rate) & ~special
    if most is not None:
        count = (rate * (~special).sum(1, keepdim=True)).round().clamp(1, most)
        selected = (draw.masked_fill(special, 2.0).argsort(1).argsort(1) < count) & ~special
    if at_least_one:
        free = ~special & ~selected.any(1, keepdim=True)
        forced = free & (free.cumsum(1) == 1)
        selected, action = selected | forced, action.masked_fill(forced, 0.0)
    random = torch.randint(first, end, input_ids.shape, generator=generator, device=input_ids.device,
                           dtype=input_ids.dtype)
    masked = torch.where(selected & (action < split[0]), mask_id, input_ids)
    masked = torch.where(selected & (action >= split[0]) & (action < split[0] + split[1]), random, masked)
    return MaskedTokens(masked, torch.where(selected, input_ids, ignore_index))


def mask_regions(features: Tensor, keep: Tensor | None = None, *, rate: float = RATE,
                 split: tuple[float, float, float] = (0.9, 0.0, 0.1), at_least_one: bool = False,
                 boxes: Tensor | None = None, neighbour_iou: float | None = None, hide_neighbours: bool = True,
                 generator: torch.Generator | None = None) -> MaskedRegions:
    """Masks regions with probability `rate`; of those, shares `split` become 0, a random region's feature, themselves.

    Args:
        features: [B, R, D]; a copy is changed.
        keep: [B, R] bool, True for regions that may be masked: not padding, not a whole-image row. None: all.
        split: ViLBERT, VL-BERT (0.9, 0, 0.1); LXMERT (0.8, 0.1, 0.1), random from any image of the batch; UNITER
            (1, 0, 0).
        at_least_one: masks, with feature 0, a random region of images where none was drawn (UNITER).
        boxes: [B, R, 4] x1, y1, x2, y2 in any unit, with neighbour_iou.
        neighbour_iou: regions that overlap a masked one by more are `near` (ViLBERT: 0.4), since they give it away.
        hide_neighbours: sets their features to 0 too, without predicting them; False only reports them.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Source: ViLBERT (arXiv:1908.02265), sec. 3.1; LXMERT (arXiv:1908.07490), sec. 3.1; UNITER (arXiv:1909.11740).
    """
    name = "mask_regions"
    _check_rate(name, rate, split)
    keep = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device) if keep is None else keep
    if keep.dtype != torch.bool:
        raise TypeError(f"{name}: keep is {keep.dtype}, must be bool")
    if keep.shape != features.shape[:2]:
        raise ValueError(f"{name}: keep has shape {list(keep.shape)}, must be {list(features.shape[:2])}")
    draw, action = _uniform(2, *keep.shape, like=features, generator=generator)
    masked = (draw < rate) & keep
    if at_least_one:
        none = keep & ~masked.any(1, keepdim=True)
        forced = none & (draw == draw.masked_fill(~keep, 2.0).amin(1, keepdim=True))
        masked, action = masked | forced, action.masked_fill(forced, 0.0)
    near = torch.zeros_like(masked)
    if neighbour_iou is not None:
        if boxes is None or boxes.shape != (*keep.shape, 4):
            shape = None if boxes is None else list(boxes.shape)
            raise ValueError(f"{name}: boxes are {shape}, must be {[*keep.shape, 4]} with neighbour_iou")
        overlaps = box_iou(boxes) > neighbour_iou
        near = (overlaps & masked[:, None]).any(2) & keep & ~masked
    zero = masked & (action < split[0])
    if hide_neighbours:
        zero = zero | near
    replaced = masked & (action >= split[0]) & (action < split[0] + split[1])
    found = features.masked_fill(zero[..., None], 0)
    if split[1] and replaced.any():
        rows, source = features[keep], torch.rand(keep.shape, generator=generator, device=features.device)
        source = (source * len(rows)).long().clamp(max=len(rows) - 1)
        found[replaced] = rows[source[replaced]]
    return MaskedRegions(found, masked, zero | replaced, near)


def box_iou(boxes: Tensor) -> Tensor:
    """[B, R, 4] corners -> [B, R, R] intersection over union; 0 where the union is empty."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    both = (high - low).clamp(min=0).prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
    union = area[:, :, None] + area[:, None] - both
    return torch.where(union > 0, both / union.where(union > 0, 1.0), 0.0)


def whole_image_feature(features: Tensor, keep: Tensor, excluded: Tensor, *, eps: float | None = None) -> Tensor:
    """[B, D] mean region, for the whole-image row that some models put first.

    Args:
        features: [B, R, D] without that row.
        keep: [B, R] bool, True where a region exists.
        excluded: [B, R] bool: masked regions and those that overlap them (ViLBERT), or masked ones (VL-BERT).
        eps: None: the sum runs over all regions, as they are after masking, its divisor counts those not excluded, at
            least 1 (ViLBERT). A number: the sum leaves them out, over their count + eps (VL-BERT: 1e-5).
    """
    there = keep & ~excluded
    total = features.masked_fill(~(keep if eps is None else there)[..., None], 0).sum(1)
    count = there.sum(1, keepdim=True)
    return total / (count.clamp(min=1) if eps is None else count + eps)


def _uniform(*shape: int, like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device)


def _check_rate(name: str, rate: float, split: tuple[float, float, float]) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"{name}: rate is {rate}, must lie between 0 and 1")
    if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-6:
        raise ValueError(f"{name}: split is {split}, must be three shares that add up to 1")
