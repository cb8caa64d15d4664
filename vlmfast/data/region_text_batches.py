"""Batches of texts with region features, in each model's layout, in an order that can be picked up anywhere.

Sizes: B examples, T tokens, R regions, D feature channels, P box numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .region_batches import collate_regions
from .region_boxes import lxmert_boxes
from .region_text import RegionTextPairs
from .regions import Regions
from .wordpiece import WordPieceTokenizer


@dataclass(frozen=True)
class Layout:
    """How a model takes pictures and texts.

    Attributes:
        boxes: for `encode_regions`.
        whole_image: row 0 of the regions is the whole picture.
        positions: rows of the position table that a text cannot use.
    """

    boxes: str
    whole_image: bool = False
    positions: int = 0


LAYOUTS: dict[str, Layout] = {
    "vilbert": Layout("vilbert", whole_image=True),
    "lxmert": Layout("lxmert"),
    "visualbert": Layout("lxmert"),  # it knows no boxes
    "uniter": Layout("uniter"),
    "vlbert": Layout("vl_bert", whole_image=True, positions=2),
    "imagebert": Layout("imagebert", positions=1),
    "vdbert": Layout("vd_bert"),
}


class RegionTextEncoder:
    """Regions and texts as the arguments of one model.

    Args:
        model: a name in `LAYOUTS`.
        tokenizer: of the texts.
        max_tokens: most tokens of a text, special ones included; longer texts are cut.
        max_regions: the first ones are kept, a whole-image row included; None: all.
        slots: VD-BERT's `len_vis_input`: the image lies in so many places of the text's sequence.
        class_offset: added to the file's class numbers; 1 where class 0 of the model's head is the background.

    Raises:
        ValueError: an unknown model; max_tokens leaves no room.
    """

    def __init__(self, model: str, tokenizer: WordPieceTokenizer, max_tokens: int, *, max_regions: int | None = None,
                 slots: int = 0, class_offset: int = 0):
        if model not in LAYOUTS:
            raise ValueError(f"RegionTextEncoder: model is {model!r}, must be one of {', '.join(LAYOUTS)}")
        if max_tokens < 3:
            raise ValueError(f"RegionTextEncoder: max_tokens is {max_tokens}, must be at least 3")
        if (model == "vdbert") != bool(slots):
            raise ValueError(f"RegionTextEncoder: slots is {slots}, must be positive for vdbert and 0 for others")
        self.model, self.layout, self.tokenizer, self.max_tokens = model, LAYOUTS[model], tokenizer, max_tokens
        self.max_regions, self.slots, self.class_offset = slots or max_regions, slots, class_offset

    def lengths(self, texts: Sequence[str]) -> tuple[np.ndarray, int]:
        """([N] tokens of each text as it will be read, how many texts are cut)."""
        whole = np.array([len(self.tokenizer.encode(text)) + 2 for text in texts])
        return np.minimum(whole, self.max_tokens), int((whole > self.max_tokens).sum())

    def text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> dict[str, Tensor]:
        """input_ids, token_type_ids [B, T], special [B, T] bool, text_lengths [B]."""
        tokenizer = self.tokenizer
        tokens = tokenizer(list(texts), pairs, max_length=self.max_tokens)
        ids, types, lengths = tokens.input_ids, tokens.token_type_ids, tokens.lengths
        special = torch.isin(ids, ids.new_tensor([tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask]))
        if self.slots:
            middle = ids.new_tensor([tokenizer.unk] * self.slots + [tokenizer.sep]).expand(len(ids), -1)
            ids = torch.cat([ids[:, :1], middle, ids[:, 1:]], dim=1)
            special = torch.cat([special[:, :1], torch.ones_like(middle, dtype=torch.bool), special[:, 1:]], dim=1)
            lengths = lengths + self.slots + 1
            types = torch.cat([torch.zeros_like(special[:, : self.slots + 2]).long(),
                               torch.ones_like(special[:, self.slots + 2 :]).long()], dim=1)
        return {"input_ids": ids, "token_type_ids": types, "text_lengths": lengths, "special": special}

    def image(self, regions: Sequence[Regions]) -> dict[str, Tensor]:
        """image_feat [B, R, D], image_loc [B, R, P], num_regions [B], boxes [B, R, 4] as fractions, and what the
        detector says of every picture: region_probs, region_classes, region_confidence, region_attributes,
        attribute_confidence."""
        batch = collate_regions(regions, self.layout.boxes, max_regions=self.max_regions)
        size = batch.features.shape[1]
        found = {"image_feat": batch.features, "image_loc": batch.boxes, "num_regions": batch.lengths}
        corners = [lxmert_boxes(one.boxes, one.width, one.height) for one in regions]
        found["boxes"] = self._rows(corners, size, torch.tensor([0.0, 0.0, 1.0, 1.0]))
        for name, field in (("region_probs", "class_probabilities"), ("region_classes", "classes"),
                            ("region_confidence", "confidences"), ("region_attributes", "attributes"),
                            ("attribute_confidence", "attribute_confidences")):
            values = [getattr(one, field) for one in regions]
            if all(value is not None for value in values):
                if name == "region_classes":
                    values = [value + self.class_offset for value in values]
                found[name] = self._rows(values, size)
        if self.slots:  # the image takes all of its places, used or not
            for name, value in found.items():
                if value.ndim > 1 and size < self.slots:
                    pad = value.new_zeros(len(value), self.slots - size, *value.shape[2:])
                    found[name] = torch.cat([value, pad], dim=1)
        return found

    def _rows(self, values: Sequence[Tensor], size: int, first: Tensor | None = None) -> Tensor:
        """[R_i, ...] of each picture -> [B, size, ...], cut or padded with zeros, `first` or zeros before them."""
        out = values[0].new_zeros(len(values), size, *values[0].shape[1:])
        start = int(self.layout.whole_image)
        for row, value in zip(out, values, strict=True):
            count = min(len(value), size - start)
            row[start : start + count] = value[:count]
        if start and first is not None:
            out[:, 0] = first
        return out


class LengthBatches:
    """Batches of examples of about the same length, in an order that depends on seed, epoch and position only.

    Each epoch shuffles the examples, sorts runs of `pool` batches by length, and shuffles the batches. Processes share
    every batch. What does not fill a batch waits for a later epoch.

    Args:
        lengths: [N] of the examples.
        batch_size: examples of a batch on this process.
        collate: indices -> what a pass yields.

    Raises:
        ValueError: fewer examples than a batch.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, collate: Callable[[list[int]], object], *,
                 pool: int = 50, seed: int = 0, rank: int = 0, world_size: int = 1):
        self.lengths = np.asarray(lengths)
        if not 1 <= batch_size <= len(self.lengths) // world_size:
            raise ValueError(f"LengthBatches: batch_size is {batch_size}, must be between 1 and "
                             f"{len(self.lengths) // world_size} ({len(self.lengths)} examples on {world_size} "
                             "processes)")
        self.batch_size, self.collate, self.pool = batch_size, collate, pool
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.lengths) // (self.batch_size * self.world_size)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch of the next pass, `start` batches of which are taken as done."""
        self.epoch, self.start = epoch, start

    def order(self) -> list[list[int]]:
        """The examples of each batch of the epoch on this process."""
        chance, size = np.random.default_rng((self.seed, self.epoch)), self.batch_size * self.world_size
        order = chance.permutation(len(self.lengths))[: len(self) * size]
        runs = [order[k : k + self.pool * size] for k in range(0, len(order), self.pool * size)]
        order = np.concatenate([run[np.argsort(self.lengths[run], kind="stable")] for run in runs])
        batches = order.reshape(len(self), size)[chance.permutation(len(self))]
        return batches[:, self.rank :: self.world_size].tolist()

    def __iter__(self) -> Iterator[object]:
        start, self.start = self.start, 0
        for indices in self.order()[start:]:
            yield self.collate(indices)


def in_order(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """All examples once, sorted by length, in batches of at most `batch_size`: for evaluation."""
    order = np.argsort(lengths, kind="stable")
    return [order[k : k + batch_size].tolist() for k in range(0, len(order), batch_size)]


class PairCollate:
    """Indices of pairs -> (image fields, text fields), `groups` among the former: captions of one picture are no
    mismatches of each other."""

    def __init__(self, pairs: RegionTextPairs, encoder: RegionTextEncoder):
        self.pairs, self.encoder = pairs, encoder
        self.number = {image_id: i for i, image_id in enumerate(pairs.images)}

    def __call__(self, indices: Sequence[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        indices = [self.pairs.readable(i) for i in indices]
        found = [self.pairs[i] for i in indices]
        image = self.encoder.image([regions for regions, _ in found])
        image["groups"] = torch.tensor([self.number[self.pairs.entries[i][0]] for i in indices])
        return image, self.encoder.text([text for _, text in found])
