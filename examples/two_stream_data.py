"""Composed scenes and their texts as the padded batches that ViLBERT and LXMERT take; used by train_two_stream.py.

Sizes: N texts, B of them in a batch, T tokens, R regions (a global one first for ViLBERT), D feature width.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tuxpaint_scenes import NUMBERS, PLURALS

from vlmfast.data import RegionBatch, RegionFeatures, Regions, collate_regions
from vlmfast.objectives.bert_like import IGNORE

SPLITS = {"test_scene": "new scenes", "test_cutout": "new cut-outs"}
SCALE, FLOOR = 0.5, 0.05  # of standardised features, so that boxes, in 0 ... 1, are not drowned; for constant features
CAPTIONS = 3  # of each training scene
COLORED = 0.25  # share of the objects in them whose colour is said
# share of the captions in a batch that get the text of another scene; half of them in both papers, but only the others
# have words and regions to predict
MISMATCHED = 0.3
MASKED_WORDS, MASKED_REGIONS = 0.4, 0.3  # both papers mask 15 %; these captions and scenes are short


@dataclass(frozen=True)
class Scenes:
    """What `tuxpaint_scenes.build` wrote; questions and statements are the rows of its .jsonl files.

    regions: features shifted and scaled, (feature - mean) / spread, by mean and standard deviation over the training
    regions: pictures on light grounds have so much in common that ViLBERT, with one LayerNorm over features and boxes,
    takes long to tell raw ones apart. mean, spread: [D].
    """

    regions: list[Regions]
    mean: Tensor
    spread: Tensor
    questions: list[dict]
    statements: list[dict]  # those about one scene
    kinds: list[str]
    colors: list[str]
    answers: list[str]

    @classmethod
    def read(cls, folder: Path) -> "Scenes":
        def lines(name: str) -> list[dict]:
            return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]

        words = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))
        questions = lines("questions.jsonl")
        statements = [row for row in lines("statements.jsonl") if len(row["image_ids"]) == 1]
        statements = [{**row, "image_id": row["image_ids"][0]} for row in statements]
        answers = sorted({row["answer"] for row in questions if row["split"] == "train"})
        regions = list(RegionFeatures.open(folder / "features.tsv", "lxmert"))
        trained = torch.cat([one.features for one in regions if one.image_id.startswith("train_")])
        mean, spread = trained.mean(0), (trained.std(0) + FLOOR) / SCALE
        regions = [replace(one, features=(one.features - mean) / spread) for one in regions]
        return cls(regions, mean, spread, questions, statements, words["kinds"], words["colors"], answers)

    @property
    def feature_dim(self) -> int:
        return self.regions[0].features.shape[1]

    def rows(self, split: str) -> list[dict]:
        """Questions and statements of a split, each with its words under "text"."""
        asked = [{**row, "text": row["question"]} for row in self.questions if row["split"] == split]
        return asked + [{**row, "text": row["statement"]} for row in self.statements if row["split"] == split]

    def captions(self, seed: int) -> list[dict]:
        """Captions of the training scenes, for pretraining."""
        rng = np.random.default_rng(seed)
        own = [regions for regions in self.regions if regions.image_id.startswith("train_")]
        return [{"image_id": regions.image_id, "text": caption(regions, self.kinds, self.colors, rng)}
                for regions in own for _ in range(CAPTIONS)]


def caption(regions: Regions, kinds: list[str], colors: list[str], rng: np.random.Generator) -> str:
    """All objects in random order, a quarter of the single ones with their colour: "red apple two buses hat".

    Articles and commas are left out: among words that can be guessed from the text, it takes pretraining several times
    as long to find out that names go with regions.
    """
    count = Counter(kinds[i] for i in regions.classes)
    color = {kinds[i]: [*colors, ""][j] for i, j in zip(regions.classes, regions.attributes, strict=True)}
    parts = []
    for kind in rng.permutation(sorted(count)).tolist():
        shown = color[kind] if rng.random() < COLORED else ""
        several = f"{[*NUMBERS, 'four', 'five', 'six'][count[kind]]} {PLURALS.get(kind, f'{kind}s')}"
        parts.append(several if count[kind] > 1 else f"{shown} {kind}".strip())
    return " ".join(parts)


@dataclass(frozen=True)
class Texts:
    """N texts, each about one scene.

    Attributes:
        input_ids: [N, T]. lengths: [N] tokens. scenes: [N] rows of the region tensors.
        answers: [N] classes; IGNORE where nothing is asked, and for answers that training never gave.
        truths: [N] 1 where text and scene match, 0 where not, IGNORE for questions.
        rows: see `Scenes.rows` and `Scenes.captions`.
    """

    input_ids: Tensor
    lengths: Tensor
    scenes: Tensor
    answers: Tensor
    truths: Tensor
    rows: list[dict]

    @classmethod
    def of(cls, rows: list[dict], scenes: Scenes, tokenizer) -> "Texts":
        tokens = tokenizer([row["text"] for row in rows])
        place = {regions.image_id: i for i, regions in enumerate(scenes.regions)}
        number = {answer: i for i, answer in enumerate(scenes.answers)}
        truths = [IGNORE if "answer" in row else int(row.get("label", True)) for row in rows]
        return cls(tokens.input_ids, tokens.lengths, torch.tensor([place[row["image_id"]] for row in rows]),
                   torch.tensor([number.get(row.get("answer"), IGNORE) for row in rows]), torch.tensor(truths), rows)

    def __len__(self) -> int:
        return len(self.rows)


class Pictures(NamedTuple):
    """Regions of all scenes as one model takes them, and what they show.

    regions: features [S, R, D], boxes [S, R, P]. kinds, colors: [S, R], IGNORE for padding, the global region and where
    a colour has no name. global_rows: 1 where row 0 is the global region, else 0.
    """

    regions: RegionBatch
    kinds: Tensor
    colors: Tensor
    global_rows: int

    @classmethod
    def of(cls, scenes: Scenes, boxes: str) -> "Pictures":
        batch = collate_regions(scenes.regions, boxes)
        first = int(batch.lengths[0]) - len(scenes.regions[0])
        kinds = torch.full(batch.features.shape[:2], IGNORE)
        colors = kinds.clone()
        for i, regions in enumerate(scenes.regions):
            kinds[i, first : first + len(regions)] = regions.classes
            named = torch.where(regions.attributes < len(scenes.colors), regions.attributes, IGNORE)
            colors[i, first : first + len(regions)] = named
        return cls(batch, kinds, colors, first)

    def unseen(self) -> "Pictures":
        """The same scenes with one region of zeros each: what a model is left with that must not look."""
        regions = self.regions
        blank = RegionBatch(torch.zeros_like(regions.features[:, :1]), torch.zeros_like(regions.boxes[:, :1]),
                            torch.ones_like(regions.lengths), regions.ids)
        nothing = torch.full_like(self.kinds[:, :1], IGNORE)
        return Pictures(blank, nothing, nothing, 0)


@dataclass(frozen=True)
class Targets:
    """What a batch is scored by; IGNORE where there is nothing to predict.

    answers [B], truths [B], words [B, T]; kinds, colors [B, R]; features [B, R, D] before masking; masked [B, R] bool.
    """

    answers: Tensor
    truths: Tensor
    words: Tensor
    kinds: Tensor
    colors: Tensor
    features: Tensor
    masked: Tensor


    def to(self, device, non_blocking: bool = False) -> "Targets":
        return Targets(**{name: value.to(device, non_blocking=non_blocking) for name, value in vars(self).items()})


class Inputs(dict):
    """Arguments of `model(**inputs)`."""

    def to(self, device, non_blocking: bool = False) -> "Inputs":
        return Inputs({name: value.to(device, non_blocking=non_blocking) for name, value in self.items()})


def make_batch(texts: Texts, pictures: Pictures, index: Tensor) -> tuple[Inputs, Targets]:
    """Inputs of `model(**inputs)` and unmasked targets of the texts `index` [B], cut to the longest."""
    scenes, lengths = texts.scenes[index], texts.lengths[index]
    counts = pictures.regions.lengths[scenes]
    longest, most = int(lengths.max()), int(counts.max())
    inputs = Inputs(
        input_ids=texts.input_ids[index, :longest], image_feat=pictures.regions.features[scenes, :most],
        image_loc=pictures.regions.boxes[scenes, :most], text_lengths=lengths, num_regions=counts,
    )  # fmt: skip
    targets = Targets(texts.answers[index], texts.truths[index], torch.full_like(inputs["input_ids"], IGNORE),
                      pictures.kinds[scenes, :most], pictures.colors[scenes, :most], inputs["image_feat"],
                      torch.zeros(len(index), most, dtype=torch.bool))
    return inputs, targets


class BatchLoader:
    """Shuffled batches of (inputs, targets); batch k of an epoch depends on seed, epoch and k only.

    With `pretraining` some of the texts are exchanged for those of other scenes; in the others words and regions are
    targets, and in both words and regions are masked. A masked word becomes [MASK] in 80 %, a random one in 10 %, and
    stays in 10 %; a masked region's feature becomes zero, for LXMERT in 10 % that of another region, and stays in 10 %.

    Args:
        mask_id: the id of [MASK]. vocab_size: random words are those from `mask_id` + 1 on.
    """

    def __init__(self, texts: Texts, pictures: Pictures, batch_size: int, *, mask_id: int, vocab_size: int,
                 pretraining: bool = False, seed: int = 0):
        if not 1 <= batch_size <= len(texts):
            raise ValueError(f"BatchLoader: batch_size is {batch_size}, must be 1 ... {len(texts)}")
        self.texts, self.pictures, self.batch_size = texts, pictures, batch_size
        self.mask_id, self.vocab_size, self.pretraining, self.seed = mask_id, vocab_size, pretraining, seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.texts) // self.batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch of the next pass, `start` batches of which are taken as done."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Inputs, Targets]]:
        start, self.start = self.start, 0
        order = torch.from_numpy(np.random.default_rng([self.seed, self.epoch]).permutation(len(self.texts)))
        for k in range(start, len(self)):
            index = order[k * self.batch_size : (k + 1) * self.batch_size]
            inputs, targets = make_batch(self.texts, self.pictures, index)
            if self.pretraining:
                seed = int(np.random.default_rng([self.seed, self.epoch, k]).integers(2**62))
                inputs, targets = self._exchanged(inputs, targets, self.texts.scenes[index])
                inputs, targets = self._masked(inputs, targets, torch.Generator().manual_seed(seed))
            yield inputs, targets

    def _exchanged(self, inputs: Inputs, targets: Targets, scenes: Tensor):
        """The first texts change places: each gets the next one's, and is false unless both show the same scene."""
        count = int(len(scenes) * MISMATCHED)
        source = torch.arange(len(scenes))
        source[:count] = source[:count].roll(-1)
        changed = {name: inputs[name][source] for name in ("input_ids", "text_lengths")}
        return Inputs({**inputs, **changed}), replace(targets, truths=(scenes == scenes[source]).long())

    def _masked(self, inputs: Inputs, targets: Targets, generator: torch.Generator):
        ids, mine = inputs["input_ids"], (targets.truths == 1)[:, None]
        column = torch.arange(ids.shape[1])
        inner = (column > 0) & (column < inputs["text_lengths"][:, None] - 1)  # between [CLS] and [SEP]
        chosen = inner & (torch.rand(ids.shape, generator=generator) < MASKED_WORDS)
        roll = torch.rand(ids.shape, generator=generator)
        other = torch.randint(self.mask_id + 1, self.vocab_size, ids.shape, generator=generator)
        new = torch.where(chosen & (roll < 0.8), self.mask_id, torch.where(chosen & (roll >= 0.9), other, ids))
        features, masked = self._masked_regions(inputs, generator)
        targets = replace(targets, words=torch.where(chosen & mine, ids, IGNORE), masked=masked & mine)
        return Inputs({**inputs, "input_ids": new, "image_feat": features}), targets

    def _masked_regions(self, inputs: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Features [B, R, D] with regions masked, and which [B, R]."""
        features, first = inputs["image_feat"], self.pictures.global_rows
        shape, column = features.shape[:2], torch.arange(features.shape[1])
        exists = (column >= first) & (column < inputs["num_regions"][:, None])
        masked = exists & (torch.rand(shape, generator=generator) < MASKED_REGIONS)
        roll = torch.rand(shape, generator=generator)
        changed = features * (~masked | (roll >= 0.9))[..., None]
        if first:  # the mean of what is left
            left = (exists & ~masked).sum(1, keepdim=True).clamp(min=1)
            return torch.cat([changed[:, first:].sum(1, keepdim=True) / left[..., None], changed[:, first:]], 1), masked
        every = features[exists]
        other = every[torch.randint(len(every), shape, generator=generator)]
        return torch.where((masked & (roll < 0.1))[..., None], other, changed), masked
