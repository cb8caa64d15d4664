"""Training of the BERT-like models: any selection of the pretraining objectives, or any loss made of parts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.region_text_batches import LengthBatches, PairCollate, RegionTextEncoder, in_order
from ..objectives.batch import PretrainingBatch
from ..objectives.common import PretrainingLoss
from ..objectives.masking import word_ids
from ..objectives.models import head_for, heads_of
from ..objectives.multitask import TaskSampler
from ..objectives.pretraining import Pretraining
from .config import TrainConfig
from .contrastive import chunk_sizes
from .loop import Trainer

MIXES = ("sum", "sample")
# with the objective they belong to: drawn together, as UNITER does
COMPANIONS = {"wra": "itm"}

Loss = Callable[[nn.Module, object, object, int], PretrainingLoss]


class ObjectiveTrainer(Trainer):
    """Trains a model on a loss with named parts, which run the model as often as they like.

    Args:
        model, loader, config, options: see `Trainer`; a batch is a pair whose halves have a length and `.to(device)`.
        loss: `loss(model, first, second, step)` -> total [] and parts; `config.accumulate` chunks of a batch are taken
            one after the other, and their losses averaged by their numbers of examples.
        name: of the loss; a run cannot be resumed with another one.
    """

    def __init__(self, model: nn.Module, loader, config: TrainConfig, loss: Loss, *, name: str = "", **options):
        self.loss, self.name = loss, name
        super().__init__(model, loader, config, **options)
        # several passes a step through changing parts of the model are more than DistributedDataParallel follows
        self.wrapped = self.model

    def add_gradient(self, batch: tuple, factor: Tensor) -> tuple[Tensor, dict]:
        sizes, parts, start = chunk_sizes(len(batch[1]), self.config.accumulate), {}, 0
        for size in sizes:
            chunk = batch if len(sizes) == 1 else [rows(part, start, start + size) for part in batch]
            with self._autocast():
                loss = self.loss(self.model, *chunk, self.step)
            share = size / len(batch[1])
            (loss.total * (share * factor)).backward()
            for part, value in loss.parts.items():
                parts[part] = parts.get(part, 0.0) + value.detach().float() * share
            start += size
        if self.process.world > 1:
            average_gradients(self.model, self.process.world)
        values = torch.stack(list(parts.values()))
        if self.process.world > 1:
            dist.all_reduce(values)
            values /= self.process.world
        return values.sum(), {"parts": dict(zip(parts, values.tolist(), strict=True))}

    def after_step(self) -> dict:
        scale = getattr(self.model, "logit_scale", None)
        if scale is not None:
            with torch.no_grad():
                scale.clamp_(0.0, math.log(100.0))
        return {}

    def examples(self, batch: tuple) -> int:
        return len(batch[1])  # an example may have several pictures

    def _data(self) -> dict:
        return {**super()._data(), "loss": self.name}


def rows(batch, start: int, stop: int):
    """Examples start ... stop of a tensor, a PretrainingBatch, or a TaskBatch, whose examples may have several rows."""
    if isinstance(batch, Tensor):
        return batch[start:stop]
    if isinstance(batch, PretrainingBatch):
        return PretrainingBatch(**{name: value[start:stop] for name, value in given_fields(batch).items()})
    size, inputs = len(batch), {}
    for name, value in batch.inputs.items():
        each = len(value) // size
        inputs[name] = value[start * each : stop * each] if each else value  # one text for all pictures
    return replace(batch, inputs=inputs, target=batch.target[start:stop])


def given_fields(batch: PretrainingBatch) -> dict[str, Tensor]:
    """The fields that are not None."""
    return {entry.name: value for entry in fields(batch) if (value := getattr(batch, entry.name)) is not None}


def average_gradients(model: nn.Module, world: int) -> None:
    """Mean of the gradients over processes; a parameter that only some of them used counts as 0 on the others."""
    trained = [p for p in model.parameters() if p.requires_grad]
    used = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    trained = [p for p, flag in zip(trained, used.tolist(), strict=True) if flag]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for kind in {p.grad.dtype for p in trained}:
        group = [p.grad for p in trained if p.grad.dtype == kind]
        flat = torch.cat([gradient.flatten() for gradient in group])
        dist.all_reduce(flat)
        flat /= world
        for gradient, value in zip(group, flat.split([g.numel() for g in group]), strict=True):
            gradient.copy_(value.view_as(gradient))


class PretrainingObjective:
    """`Pretraining` as the loss of an `ObjectiveTrainer`.

    Args:
        objective: the losses.
        mix: "sum", all of them in every step; "sample", one a step, drawn with `ratios` (UNITER), itm with wra.
        ratios: of the draws, by objective; 1 where not given.
        seed: of the draws; every process draws the same.

    Raises:
        ValueError: unknown mix, ratios of objectives that are not there or not positive.
    """

    def __init__(self, objective: Pretraining, *, mix: str = "sum", ratios: Mapping[str, float] | None = None,
                 seed: int = 0):
        if mix not in MIXES:
            raise ValueError(f"PretrainingObjective: mix is {mix!r}, must be one of {', '.join(MIXES)}")
        self.objective, self.mix, self.seed = objective, mix, seed
        hosts = [name for name in objective.objectives
                 if COMPANIONS.get(name) not in objective.objectives]
        if unknown := [name for name in ratios or {} if name not in hosts]:
            raise ValueError(f"PretrainingObjective: ratios has {unknown[0]!r}, must be some of {', '.join(hosts)}")
        sampler = TaskSampler({name: (ratios or {}).get(name, 1.0) for name in hosts})
        self.chances = sampler.probabilities()

    def names(self, step: int) -> tuple[str, ...] | None:
        """The objectives of a step, None for all."""
        if self.mix == "sum":
            return None
        chance = np.random.default_rng((self.seed, step))
        drawn = chance.choice(list(self.chances), p=list(self.chances.values()))
        return tuple(name for name in self.objective.objectives if drawn in (name, COMPANIONS.get(name)))

    def __call__(self, model: nn.Module, image: PretrainingBatch, text: PretrainingBatch, step: int) -> PretrainingLoss:
        batch = PretrainingBatch(**given_fields(image), **given_fields(text))
        return self.objective(model, batch, only=self.names(step))

    def check(self, model: nn.Module, detected: Iterable[str] = ()) -> None:
        """ValueError where the model's heads or the data cannot serve an objective.

        Args:
            detected: which of the fields "region_probs", "region_classes", "region_attributes" the data has.
        """
        heads, detected = self.objective.heads or heads_of(model), set(detected)
        for name in self.objective.objectives:
            head_for(model, name, heads)
        needs = {"mrc_kl": {"region_probs"}, "mrc": {"region_probs", "region_classes"},
                 "mrc_attributes": {"region_attributes"}}
        for name in self.objective.objectives:
            if name in needs and not needs[name] & detected:
                raise ValueError(f"objective {name!r} needs {' or '.join(sorted(needs[name]))}, which the region "
                                 "features do not have")
            if name == "nsp":
                raise ValueError("objective 'nsp' needs texts of two sentences, captions are one; 'itm' asks whether "
                                 "text and picture match")


class PretrainingCollate:
    """Indices of pairs -> (images, texts), two `PretrainingBatch`es, with what the objectives ask of them.

    Args:
        collate: gives the plain fields.
        objectives: their names.
    """

    def __init__(self, collate: PairCollate, objectives: Sequence[str]):
        self.collate, self.objectives = collate, tuple(objectives)
        tokenizer = collate.encoder.tokenizer
        names = tokenizer.tokens(range(tokenizer.vocab_size))
        self.continues = torch.tensor([name.startswith("##") for name in names])

    def __call__(self, indices: Sequence[int]) -> tuple[PretrainingBatch, PretrainingBatch]:
        image, text = self.collate(indices)
        if "mlm_whole_word" in self.objectives:
            text["words"] = word_ids(self.continues[text["input_ids"]], text["special"])
        if "seq2seq" in self.objectives:  # [CLS] is given, of VD-BERT the image slots and their [SEP] too
            slots = self.collate.encoder.slots
            text["prefix_lengths"] = torch.full((len(indices),), slots + 2 if slots else 1)
        return PretrainingBatch(**image), PretrainingBatch(**text)


def pretraining_loader(pairs, encoder: RegionTextEncoder, objectives: Sequence[str], batch_size: int, *, seed: int = 0,
                       rank: int = 0, world_size: int = 1) -> tuple[LengthBatches, int]:
    """(batches for an `ObjectiveTrainer`, how many texts are cut to `encoder.max_tokens`).

    The batch size shrinks to what there is.

    Raises:
        ValueError: fewer than two pairs for each process.
    """
    share = len(pairs) // world_size
    if share < 2:
        raise ValueError(f"pretraining_loader: {len(pairs)} pairs for {world_size} processes, must be two for each")
    lengths, cut = encoder.lengths(pairs.texts)
    collate = PretrainingCollate(PairCollate(pairs, encoder), objectives)
    loader = LengthBatches(lengths, min(batch_size, share), collate, seed=seed, rank=rank, world_size=world_size)
    return loader, cut


class ValidationLosses:
    """Called with a model, the mean of every part of the loss over held-out pairs, with the same masks each time.

    Args:
        pairs, encoder: what to evaluate.
        objective: whose losses.
        batch_size: pairs at a time.
        most: pairs that are looked at.
        say: gets a line to show.
    """

    def __init__(self, pairs, encoder: RegionTextEncoder, objective: PretrainingObjective, batch_size: int, *,
                 most: int = 2000, say: Callable[[str], None] | None = None):
        self.objective, self.say = objective, say
        self.collate = PretrainingCollate(PairCollate(pairs, encoder), objective.objective.objectives)
        lengths, _ = encoder.lengths(pairs.texts[:most])
        if len(lengths) < 2:
            raise ValueError("ValidationLosses: there is one pair, must be two at least to be mismatched")
        self.batches = in_order(lengths, max(batch_size, 2))
        if len(self.batches[-1]) == 1:  # nothing to be mismatched with
            self.batches[-2:] = [self.batches[-2] + self.batches[-1]]

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device, losses = next(model.parameters()).device, self.objective.objective
        sums, count, before = {}, 0, losses.generator
        losses.generator = torch.Generator(device).manual_seed(self.objective.seed)
        try:
            for indices in self.batches:
                image, text = (part.to(device) for part in self.collate(indices))
                batch = replace(image, **given_fields(text))
                for name, value in losses(model, batch).parts.items():
                    sums[name] = sums.get(name, 0.0) + value.item() * len(indices)
                count += len(indices)
        finally:
            losses.generator = before
        means = {name: value / max(count, 1) for name, value in sums.items()}
        if self.say is not None:
            self.say("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in means.items())
                     + f" ({count} pairs)")
        return {"loss": sum(means.values()), **means}
