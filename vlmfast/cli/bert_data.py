"""What a run of `vlmfast train uniter` and its relatives needs: pairs, vocabulary, model, loss, validation."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..data.region_text import RegionTextPairs
from ..data.region_text_batches import RegionTextEncoder
from ..objectives import Pretraining
from ..training import TrainConfig
from ..training.distributed import Process
from ..training.pretraining import PretrainingObjective, ValidationLosses, pretraining_loader
from .bert_model import FIELDS, OBJECTIVES, limited, make_model, make_tokenizer, pretraining_heads, text_room

MAX_CAPTIONS = 200_000  # a learned vocabulary does not get better from more
GIB = 1 << 30


@dataclass
class Job:
    """What the trainer gets.

    Attributes:
        model: with its tokenizer; started: what its weights are.
        loader, loss, name, validate, save: see `ObjectiveTrainer`.
        cut: texts that are longer than the model reads.
        unit: what an example is called.
        skipped: what turned out unreadable so far; empty if nothing did.
    """

    model: nn.Module
    started: str
    loader: object
    loss: Callable
    name: str
    validate: Callable | None
    cut: int
    unit: str
    skipped: Callable[[], str]
    save: Callable | None = None


def prepare(settings, config: TrainConfig, process: Process, resumed: Path | None, say: Callable[[str], None],
            line: Callable[[str], None]) -> Job:
    """The job of the settings; `say` gets what was read, `line` what validation finds.

    Raises:
        FileNotFoundError, ValueError: data, checkpoint or settings do not fit.
    """
    if settings.task is not None:
        from .bert_tasks import prepare_task

        return prepare_task(settings, config, process, resumed, say, line)
    names = objectives_of(settings)
    weights = read_weights(settings.weights)
    # unknown names are told before anything is read
    options = dict(preset=settings.preset, negatives=settings.negatives)
    Pretraining(names, weights=weights, **options)
    pairs, val = open_pairs(settings, config, say)
    tokenizer = make_tokenizer(settings, pairs.texts[:MAX_CAPTIONS], resumed)
    torch.manual_seed(config.seed)
    facts = limited(pairs.facts(), settings.max_regions)
    model, started = make_model(settings, tokenizer, facts, pairs.feature_dim, pretraining_heads(settings.model), names,
                                resumed)
    encoder = make_encoder(settings, model)
    slots = encoder.slots
    special = (tokenizer.pad, tokenizer.cls, tokenizer.sep, tokenizer.mask)
    sampled = settings.mix == "sample"
    losses = Pretraining(names, weights=None if sampled else weights, mask_id=tokenizer.mask,
                         random_ids=(0, tokenizer.vocab_size), special_ids=special,
                         least_prefix=slots + 2 if slots else 0, **options)
    objective = PretrainingObjective(losses, mix=settings.mix, ratios=weights if sampled else None, seed=config.seed)
    objective.check(model, [name for name, there in (
        ("region_probs", facts.probabilities), ("region_classes", facts.classes),
        ("region_attributes", facts.attributes)) if there])
    loader, cut = pretraining_loader(pairs, encoder, names, settings.batch_size, seed=config.seed, rank=process.rank,
                                     world_size=process.world)
    if cut:
        say(f"{cut} captions have more than {encoder.max_tokens} tokens and are cut")
    validate = None
    if val is not None:
        validate = ValidationLosses(val, encoder, objective, settings.batch_size, say=line)

    def skipped() -> str:
        reports = [part.report() for part in (pairs, val) if part is not None]
        return "; ".join(str(report) for report in reports if report.total_skipped)

    return Job(model, started, loader, objective, f"{settings.mix} of {', '.join(names)}", validate, cut, "pairs",
               skipped)


def objectives_of(settings) -> tuple[str, ...]:
    given = settings.objectives
    if given is None:
        return OBJECTIVES[settings.model]
    return tuple(name.strip() for name in given.split(",") if name.strip())


def read_weights(text: str | None) -> dict[str, float] | None:
    """ "itm=2,mlm=1" -> numbers by name; ValueError where it is something else."""
    if text is None:
        return None
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise ValueError(f"--weights: {part!r} must be name=number") from None
        if not 0 < found[name.strip()] < float("inf"):
            raise ValueError(f"--weights: {part!r} must be positive")
    return found


def splits_of(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


def open_pairs(settings, config: TrainConfig, say) -> tuple[RegionTextPairs, RegionTextPairs | None]:
    """(training pairs, validation pairs or None)."""
    options = dict(format=settings.format, image_name=settings.image_name, cache_bytes=int(settings.cache * GIB))
    pairs = RegionTextPairs.open(settings.data, settings.captions, splits=splits_of(settings.train_splits), **options)
    say(f"{settings.data}: {pairs.report()}")
    val = None
    if settings.val or settings.val_splits:
        val = RegionTextPairs.open(settings.data, settings.val or settings.captions,
                                   splits=splits_of(settings.val_splits), **options)
        say(f"validation: {val.report()}")
    elif settings.val_fraction and len(pairs.images) >= 20:
        pairs, val = pairs.split(settings.val_fraction, seed=config.seed)
    say(f"{len(pairs)} captions of {len(pairs.images)} pictures for training, "
        + (f"{len(val)} of {len(val.images)} for validation" if val is not None else "no validation"))
    return pairs, val


def make_encoder(settings, model: nn.Module) -> RegionTextEncoder:
    """Regions and texts for the model; texts as long as it has positions for, or --max-tokens.

    Raises:
        ValueError: --max-tokens is more than that.
    """
    room = text_room(model, settings.model)
    if settings.max_tokens is not None and settings.max_tokens > room:
        raise ValueError(f"--max-tokens is {settings.max_tokens}, the model has room for {room}")
    slots = model.config.len_vis_input if settings.model == "vdbert" else 0
    return RegionTextEncoder(settings.model, model.tokenizer, settings.max_tokens or room, slots=slots,
                             max_regions=settings.max_regions, class_offset=int(FIELDS[settings.model].background))
