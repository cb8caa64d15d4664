"""Pretraining without pairs: texts alone and images alone, with the detector's tags as the bridge between them.

Li et al. 2021, Unsupervised Vision-and-Language Pre-training Without Parallel Images and Captions (arXiv:2010.12831).

Sizes: B images, R regions, K tokens of tags with their first and last special token.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batch import PretrainingBatch
from .common import IGNORE, PretrainingLoss
from .language import cross_entropy
from .masking import RATE, WORD_SPLIT, MaskedTokens
from .models import head_for, inner, run, takes
from .presets import Conventions
from .pretraining import REGIONS, Pretraining, Step

MASKED_REGION_RATE = 0.9  # of tags whose region is masked


class Tags(NamedTuple):
    """input_ids [B, K]; regions [B, K] which region each token names, -1 for special tokens and padding; keep [B, K]
    bool."""

    input_ids: Tensor
    regions: Tensor
    keep: Tensor


def tag_words(names: Sequence[str]) -> list[str]:
    """Detector class names as words: the first alternative of "dog,puppy"."""
    return [name.split(",")[0].strip() for name in names]


class TagPieces:
    """Token ids of detected classes.

    Args:
        objects: for each object class, the token ids of its name, at least one.
        attributes: likewise for attributes, or None.
        first_id, last_id: around the tags of an image ([CLS], [SEP]).
        attribute_rate: probability that an attribute's name stands for the object's.
    """

    def __init__(self, objects: Sequence[Sequence[int]], attributes: Sequence[Sequence[int]] | None = None, *,
                 first_id: int = 101, last_id: int = 102, attribute_rate: float = 0.15):
        for name, pieces in (("objects", objects), ("attributes", attributes or [[0]])):
            if not pieces or not all(pieces):
                raise ValueError(f"TagPieces: {name} must have at least one token for each class")
        self.objects, self.attributes = [list(x) for x in objects], attributes and [list(x) for x in attributes]
        self.first_id, self.last_id, self.attribute_rate = first_id, last_id, attribute_rate

    def __call__(self, classes: Tensor, keep: Tensor, attributes: Tensor | None = None, *,
                 generator: torch.Generator | None = None) -> Tags:
        """[B, R] classes, [B, R] bool which regions exist, [B, R] attributes or None -> Tags.

        Raises:
            ValueError: a class without a name.
        """
        for name, ids, known in (("region_classes", classes, self.objects),
                                 ("region_attributes", attributes, self.attributes)):
            if ids is not None and known is not None and keep.any() and not (
                    0 <= int(ids[keep].min()) <= int(ids[keep].max()) < len(known)):
                raise ValueError(f"TagPieces: {name} run from {int(ids[keep].min())} to {int(ids[keep].max())}, must "
                                 f"lie in 0..{len(known) - 1}")
        swap = torch.rand(classes.shape, generator=generator, device=classes.device) < self.attribute_rate
        if attributes is None or self.attributes is None:
            swap = torch.zeros_like(swap)
        texts = []
        for i in range(len(classes)):
            ids, owners = [self.first_id], [-1]
            for r in keep[i].nonzero()[:, 0].tolist():
                pieces = self.attributes[int(attributes[i, r])] if swap[i, r] else self.objects[int(classes[i, r])]
                ids += pieces
                owners += [r] * len(pieces)
            texts.append((ids + [self.last_id], owners + [-1]))
        longest = max((len(ids) for ids, _ in texts), default=2)
        rows = [[values + [pad] * (longest - len(values)) for values, pad in zip(text, (0, -1), strict=True)]
                for text in texts]
        lengths = torch.tensor([len(ids) for ids, _ in texts], device=classes.device)
        found = torch.tensor(rows, dtype=torch.int64, device=classes.device).view(len(texts), 2, longest)
        return Tags(found[:, 0], found[:, 1], torch.arange(longest, device=classes.device) < lengths[:, None])


def mask_tags(tags: Tags, masked_regions: Tensor, *, mask_id: int, random_ids: tuple[int, int], rate: float = RATE,
              masked_region_rate: float = MASKED_REGION_RATE, split: tuple[float, float, float] = WORD_SPLIT,
              generator: torch.Generator | None = None) -> MaskedTokens:
    """Selects whole tags, with a higher probability where the region is masked too and could not be told otherwise.

    Args:
        tags: see `TagPieces`.
        masked_regions: [B, R] bool.
        mask_id, random_ids, split: as in `masking.mask_tokens`; all pieces of a tag are treated alike.
        rate, masked_region_rate: of tags whose region is seen, and masked.
    """
    draw, action = torch.rand((2, *masked_regions.shape), generator=generator, device=masked_regions.device)
    chance = torch.where(masked_regions, masked_region_rate, rate)
    owner, real = tags.regions.clamp(min=0), tags.regions >= 0
    selected, action = (draw < chance).gather(1, owner) & real, action.gather(1, owner)
    random = torch.randint(*random_ids, tags.input_ids.shape, generator=generator, device=owner.device)
    masked = torch.where(selected & (action < split[0]), mask_id, tags.input_ids)
    masked = torch.where(selected & (action >= split[0]) & (action < split[0] + split[1]), random, masked)
    return MaskedTokens(masked, tags.input_ids.where(selected, IGNORE))


class UnpairedPretraining:
    """Masked words of texts alone; masked regions and their tags of images alone.

    A batch holds texts or images, not both; draw its source with `multitask.TaskSampler`. A text's batch gives the
    part "mlm"; an image's, whose tags stand in the place of the text, "tags" through the same head, and the region
    objectives. A model whose forward takes `text_loc` [B, K, P] gets each tag's box there.

    Args:
        region_objectives: some of mrfr, mrc, mrc_kl, mrm_nce, mrc_attributes (the paper: LXMERT's three, with the
            preset "lxmert").
        pieces: names of the detected classes; images need `region_classes`. None: regions alone, with an empty text.
        preset, options: as for `Pretraining`.
    """

    def __init__(self, region_objectives: Sequence[str] = ("mrfr", "mrc"), pieces: TagPieces | None = None, *,
                 preset: str | Conventions | None = None, **options):
        if unknown := [name for name in region_objectives if name not in REGIONS]:
            raise ValueError(f"UnpairedPretraining: region_objectives has {unknown[0]!r}, must be some of "
                             f"{', '.join(REGIONS)}")
        self.pieces, self.regions = pieces, tuple(region_objectives)
        self.pretraining = Pretraining(["mlm", *region_objectives], preset=preset, **options)

    def __call__(self, model: nn.Module, batch: PretrainingBatch) -> PretrainingLoss:
        """The losses of one batch of one kind.

        Raises:
            ValueError: texts and images together, or what `Pretraining` raises.
        """
        if batch.input_ids is not None and batch.image_feat is not None:
            raise ValueError("UnpairedPretraining: the batch has input_ids and image_feat, must have one of them")
        if batch.input_ids is not None:
            return self.pretraining(model, batch, only=("mlm",))
        names = (*self.regions, *(("mlm",) if self.pieces is not None else ()))
        step = Step(self.pretraining, model, batch, names)
        masked = step.mask_regions(batch)
        given, extra, labels = replace(batch, image_feat=masked.features), {}, None
        if self.pieces is not None:
            batch.need("tags", "region_classes")
            tags = self.pieces(batch.region_classes, batch.image_keep, batch.region_attributes,
                               generator=step.generator)
            size = inner(model).config.vocab_size
            tokens = mask_tags(tags, masked.masked, mask_id=self.pretraining.mask_id, generator=step.generator,
                               random_ids=self.pretraining.random_ids or (0, size), split=step.rules.word_split)
            layout = {"text_lengths": tags.keep.sum(1)} if batch.image_mask is None else {
                "attention_mask": tags.keep.long()}
            given, labels = replace(given, input_ids=tokens.input_ids, **layout), tokens.labels
            if takes(model, "text_loc"):
                index = tags.regions.clamp(min=0)[..., None].expand(-1, -1, batch.image_loc.shape[-1])
                extra["text_loc"] = batch.image_loc.gather(1, index).masked_fill((tags.regions < 0)[..., None], 0)
        output = run(model, given, tuple(step.head.values()), masked.hidden, **extra)
        parts = {name: step.region_loss(name, output.logits[step.head[name]], batch, masked, None)
                 for name in self.regions}
        if labels is not None:
            parts["tags"] = cross_entropy(output.logits[head_for(model, "mlm", step.heads)], labels,
                                          normalizer=step.rules.word_normalizer)
        weights = self.pretraining.weights
        parts = {name: weights.get(name, 1.0) * value for name, value in parts.items()}
        return PretrainingLoss(sum(parts.values()), parts)
