"""`vlmfast train uniter` and its relatives: pretraining and fine-tuning of BERT-like models on region features."""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from . import positive, set_threads, train_run
from .train_run import add_optimisation, add_run, line, option, stopped, write_settings

HELP = "train {} on region features with captions, or on a task"
MODELS = ("vilbert", "lxmert", "visualbert", "uniter", "vlbert", "imagebert", "vdbert")
# what may change between the two halves of a run without changing what it computes
FREE = ("cache",)
# TrainConfig's own defaults are CLIP's
DEFAULTS = {"lr": 1e-4, "weight_decay": 0.01, "beta2": 0.999, "epochs": 10}


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    model: str = ""
    data: str | None = None
    format: str | None = None
    captions: str | None = None
    val: str | None = None
    val_fraction: float = 0.1
    image_name: str = "{}"
    train_splits: str | None = None
    val_splits: str | None = None
    max_regions: int | None = None
    cache: float = 1.0
    objectives: str | None = None
    preset: str | None = None
    mix: str = "sum"
    weights: str | None = None
    negatives: str | None = None
    task: str | None = None
    train: tuple[str, ...] = ()
    answers: str | None = None
    min_answers: int = 1
    init: str | None = None
    size: str = "small"
    config: tuple[str, ...] = ()
    vocab: str | None = None
    vocab_size: int = 8000
    max_tokens: int | None = None
    batch_size: int = 64


def add_arguments(parser: argparse.ArgumentParser, model: str) -> None:
    parser.set_defaults(model=model)
    parser.epilog = f"Many processes: torchrun --nproc_per_node 2 --no-python vlmfast train {model} --data ... " \
                    "--out ..."

    add_run(parser)

    data = parser.add_argument_group("data")
    option(data, "--data", str, "region features (.tsv, .npz, LMDB, HDF5, a folder of .npz), or a folder with such a "
                                "file and captions")
    option(data, "--format", str, "of the features, where it cannot be told")
    option(data, "--captions", str, "captions by image: .jsonl, .csv, Karpathy's or COCO's .json (that in --data)")
    option(data, "--val", str, "captions for validation (default: those of a tenth of the pictures); of a task: its "
                               "annotations, comma-separated where there are two files")
    option(data, "--val-fraction", float, "share of the pictures kept for validation (0.1); 0: no validation")
    option(data, "--image-name", str, "how the features name a picture, for example 'COCO_train2014_{:0>12}'")
    option(data, "--train-splits", str, "splits of the captions or annotations to train on, comma-separated (all)")
    option(data, "--val-splits", str, "splits of the same file for validation")
    option(data, "--max-regions", positive, "regions of a picture that are read, the first ones (all)")
    option(data, "--cache", float, "GiB of region features kept in memory (1)")

    what = parser.add_argument_group("what it learns")
    option(what, "--objectives", str, "pretraining objectives, comma-separated: mlm, mlm_whole_word, itm, wra, mrfr, "
                                      "mrc, mrc_kl, mrc_attributes, mrm_nce, contrastive ... (those of the paper)")
    option(what, "--preset", str, "whose conventions of masking and dividing: vilbert, lxmert, uniter ... (its own)")
    option(what, "--mix", str, "sum: all objectives in every step; sample: one a step (sum)",
           choices=("sum", "sample"))
    option(what, "--weights", str, "factors of the losses, with --mix sample chances, such as itm=2,mlm=2,mrfr=1")
    option(what, "--negatives", str, "mismatched pairs (in_batch)", choices=("in_batch", "hard"))
    option(what, "--task", str, "fine-tune for a task instead of pretraining: vqa, nlvr2, ve, retrieval")
    option(what, "--train", str, "annotations of the task, comma-separated where there are two files")
    option(what, "--answers", str, "list of answers of vqa (those of the training questions)")
    option(what, "--min-answers", positive, "questions an answer must occur in to be in that list (1)")

    model_group = parser.add_argument_group("model")
    option(model_group, "--init", Path, "checkpoint to start from, or a Hugging Face folder of a BERT")
    option(model_group, "--size", str, "tiny, small, base or large (small)", choices=("tiny", "small", "base", "large"))
    option(model_group, "--config", str, "config fields: name=value or a .json file; may be repeated", action="append")
    option(model_group, "--vocab", str, "WordPiece vocabulary (that of --init, else one learned from the texts)")
    option(model_group, "--vocab-size", positive, "of a learned vocabulary (8000)")
    option(model_group, "--max-tokens", positive, "tokens of the longest text, longer ones are cut (what the model has "
                                                  "positions for)")

    add_optimisation(parser, "examples per process and step (64)", "compute the batch in so many chunks (1)",
                     dict(lr=DEFAULTS["lr"], min_lr=0, warmup=0.1, weight_decay=DEFAULTS["weight_decay"],
                          max_grad_norm=1, ema=0))


def settings_of(args) -> tuple[Settings, dict]:
    """(settings, TrainConfig fields); see `train_run.settings_of`."""
    settings, config = train_run.settings_of(args, Settings, defaults=DEFAULTS, free=FREE, lists=("train", "config"))
    if settings.cache < 0:
        raise ValueError(f"--cache is {settings.cache}, must be 0 or more")
    if settings.task is None and settings.train:
        raise ValueError("--train goes with --task; captions are given with --captions")
    return settings, config


def run(args) -> int:
    set_threads(args.threads)
    from ..training import TrainConfig
    from ..training.distributed import torchrun

    settings, values = settings_of(args)
    config = TrainConfig(**values)
    with torchrun(args.device) as process:
        return _run(args, settings, config, process)


def _run(args, settings: Settings, config, process) -> int:
    from ..training.pretraining import ObjectiveTrainer
    from .bert_data import prepare

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    progress = not args.no_progress
    resumed = args.out if args.resume else None
    job = prepare(settings, config, process, resumed, say, line=line if progress else print)
    model = job.model
    count = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {count / 1e6:.2f}M parameters from {job.started}, {model.tokenizer.vocab_size} tokens; "
        f"an epoch has {len(job.loader)} steps of {job.loader.batch_size * process.world} {job.unit}, on "
        f"{process.world} x {process.device}")
    if process.first:
        write_settings(args.out, {**asdict(settings), **config.to_dict()})
    trainer = ObjectiveTrainer(model, job.loader, config, job.loss, name=job.name, out=args.out, validate=job.validate,
                               resume=args.resume, device=process.device, progress=progress, save_model=job.save)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    start = time.perf_counter()
    result = trainer.run()
    if (skipped := job.skipped()):
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(stopped(result, args.out, settings.model))
        return 130
    if process.first:
        print(summary(result.records, job.cut, job.unit))
    say(f"{result.step} steps done in {time.perf_counter() - start:.0f} s; model, log.jsonl and loss.png are in "
        f"{args.out}")
    return 0


def summary(records: list[dict], cut: int, unit: str) -> str:
    """Losses at the start and the end of training, what validation found first and last, and its baselines."""
    steps = [record for record in records if "parts" in record]
    checks = [record["validation"] for record in records if record.get("validation")]
    names = list(dict.fromkeys(name for record in steps for name in record["parts"]))

    def row(name: str, values: list[float]) -> tuple:
        few = max(1, len(values) // 10)
        return name, sum(values[:few]) / few, sum(values[-few:]) / few

    rows = [("", "first steps", "last steps")]
    if len(names) != 1 and all(record["parts"].keys() == set(names) for record in steps):
        rows.append(row("loss", [record["loss"] for record in steps]))
    rows += [row(name, [record["parts"][name] for record in steps if name in record["parts"]]) for name in names]
    if checks:
        rows.append(("validation", "first", "last"))
        rows += [(name, checks[0].get(name), value) for name, value in checks[-1].items()]
    lines = ["  ".join([f"{name:24}", *map(_cell, values)]).rstrip() for name, *values in rows]
    if cut:
        lines.append(f"{cut} {unit} had a text longer than the model reads; it was cut")
    return "\n".join(lines)


def _cell(value) -> str:
    return f"{value:>12}" if isinstance(value, str) else f"{'':>12}" if value is None else f"{value:12.4f}"
