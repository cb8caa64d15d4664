"""The batch that every pretraining objective reads.

Sizes: B examples, T tokens, R regions, F feature channels, P box numbers, C detector classes, A attributes, S target
tokens.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

# which side of the pair a field belongs to, and moves with when pairs are mixed
TEXT = ("input_ids", "token_type_ids", "attention_mask", "text_lengths", "special", "words", "next_sentence",
        "prefix_lengths", "target_ids")
IMAGE = ("image_feat", "image_loc", "image", "image_mask", "num_regions", "boxes", "region_probs", "region_classes",
         "region_confidence", "region_attributes", "attribute_confidence")
PAIR = ("matched", "groups")


@dataclass
class PretrainingBatch:
    """Unmasked texts and images with what is known of them; an objective names the field it misses.

    Text (None: a batch of images alone):
        input_ids: [B, T] integers, before masking.
        token_type_ids: [B, T] segments.
        attention_mask: [B, T], 1 or True where a token exists; or
        text_lengths: [B] counts.
        special: [B, T] bool, True for tokens that are never masked ([CLS], [SEP], padding). None: by their ids.
        words: [B, T] which word a token belongs to, -1 for special ones; see `masking.word_ids`.
        next_sentence: [B] bool, True where the second sentence of the text follows the first.
        prefix_lengths: [B] tokens that are given, the rest is generated.
        target_ids: [B, S] target text of an encoder-decoder, beginning token first, padded with -100.

    Image (None: a batch of texts alone):
        image_feat: [B, R, F] detector features, the whole-image row first for models that have one.
        image_loc: [B, R, P] boxes as the model takes them.
        image: pixels, for models that take them.
        image_mask: [B, R], 1 or True where a region exists; or
        num_regions: [B] counts.
        boxes: [B, R, 4] x1, y1, x2, y2 for overlaps. None: the first four numbers of image_loc.
        region_probs: [B, R, C] detector probabilities; rows of a whole image and of padding are not read.
        region_classes, region_confidence: [B, R] detected class, and the detector's confidence in it (None: 1).
        region_attributes, attribute_confidence: [B, R] likewise.

    Pair:
        matched: [B] bool, which pairs belong together. None: all of them, and mismatches may be drawn.
        groups: [B] integers; examples with one number, such as captions of one image, are no mismatches.
    """

    input_ids: Tensor | None = None
    image_feat: Tensor | None = None
    image_loc: Tensor | None = None
    token_type_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    image_mask: Tensor | None = None
    text_lengths: Tensor | None = None
    num_regions: Tensor | None = None
    special: Tensor | None = None
    words: Tensor | None = None
    next_sentence: Tensor | None = None
    prefix_lengths: Tensor | None = None
    target_ids: Tensor | None = None
    image: Tensor | None = None
    boxes: Tensor | None = None
    region_probs: Tensor | None = None
    region_classes: Tensor | None = None
    region_confidence: Tensor | None = None
    region_attributes: Tensor | None = None
    attribute_confidence: Tensor | None = None
    matched: Tensor | None = None
    groups: Tensor | None = None

    def __post_init__(self):
        given = {entry.name: value for entry in fields(self) if (value := getattr(self, entry.name)) is not None}
        if not given.keys() & {"input_ids", "image_feat", "image"}:
            raise ValueError("PretrainingBatch: input_ids, image_feat and image are None, must be one of them at least")
        first = next(iter(given))
        for name, value in given.items():
            if len(value) != len(given[first]):
                raise ValueError(f"PretrainingBatch: {name} has {len(value)} examples, {first} {len(given[first])}; "
                                 "must be as many")
        for mask, lengths in (("attention_mask", "text_lengths"), ("image_mask", "num_regions")):
            if mask in given and lengths in given:
                raise ValueError(f"PretrainingBatch: {lengths} given together with {mask}, must be one or the other")
        for name in ("matched", "next_sentence", "special"):
            if name in given and given[name].dtype != torch.bool:
                raise TypeError(f"PretrainingBatch: {name} is {given[name].dtype}, must be bool")

    def __len__(self) -> int:
        return next(len(x) for x in (self.input_ids, self.image_feat, self.image) if x is not None)

    @property
    def device(self) -> torch.device:
        return next(x.device for x in (self.input_ids, self.image_feat, self.image) if x is not None)

    @property
    def text_keep(self) -> Tensor:
        """[B, T] bool, True where a token exists."""
        return _keep(self.input_ids, self.attention_mask, self.text_lengths)

    @property
    def image_keep(self) -> Tensor:
        """[B, R] bool, True where a region exists."""
        return _keep(self.image_feat, self.image_mask, self.num_regions)

    def need(self, objective: str, *names: str) -> None:
        """ValueError if one of these fields is None."""
        for name in names:
            if getattr(self, name) is None:
                raise ValueError(f"Pretraining: objective {objective!r} needs {name}, the batch has none")

    def pair(self, texts: Tensor, images: Tensor) -> "PretrainingBatch":
        """[P] and [P] -> P pairs, each of a text and an image of this batch; `matched` and `groups` are dropped."""
        found = {name: value[index] for names, index in ((TEXT, texts), (IMAGE, images)) for name in names
                 if (value := getattr(self, name)) is not None}
        return PretrainingBatch(**found)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "PretrainingBatch":
        given = {entry.name: x for entry in fields(self) if (x := getattr(self, entry.name)) is not None}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in given.items()})

    def inputs(self) -> dict[str, Tensor]:
        """What a model's forward takes."""
        names = ("input_ids", "image_feat", "image_loc", "image", "token_type_ids", "attention_mask", "image_mask",
                 "text_lengths", "num_regions")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def text_alone(self) -> "PretrainingBatch":
        """The same texts without images."""
        return replace(self, **dict.fromkeys(IMAGE + PAIR))

    def image_alone(self) -> "PretrainingBatch":
        """The same images without texts."""
        return replace(self, **dict.fromkeys(TEXT + PAIR))


def _keep(rows: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    if lengths is not None:
        return torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]
    return torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device) if mask is None else mask.bool()
