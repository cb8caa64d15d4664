"""`vlmfast train clip`: a dual encoder from pictures with captions, in one process or under `torchrun`."""

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from . import positive, set_threads

HELP = "train CLIP on a folder with captions (csv, jsonl, sidecar .txt) or on tar shards; torchrun for many processes"
SETTINGS_NAME = "train.json"
# what may change between the two halves of a run without changing what it computes
FREE = ("workers",)


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.1
    image_column: str | None = None
    caption_column: str | None = None
    model: str = "clip-tiny"
    tokenizer: str | None = None
    vocab_size: int = 4096
    context_length: int | None = None
    image_size: int | None = None
    batch_size: int = 256
    crop: float = 0.9
    flip: float = 0.0
    workers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Many processes: torchrun --nproc_per_node 2 --no-python vlmfast train clip --data ... --out ..."

    def option(group, name: str, kind, text: str, **more) -> None:
        group.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text, **more)

    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help="run folder: checkpoint, log.jsonl, loss.png")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a GPU")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")

    data = parser.add_argument_group("data")
    option(data, "--data", str, "folder with captions, a caption file, or tar shards such as 'shards-{000..127}.tar'")
    option(data, "--val", str, "pairs for validation (default: a tenth of the data; none for tar shards)")
    option(data, "--val-fraction", float, "share of the data kept for validation (0.1); 0: no validation")
    option(data, "--image-column", str, "of the caption file, where its name is unusual")
    option(data, "--caption-column", str, "of the caption file, where its name is unusual")
    option(data, "--crop", float, "smallest area of random crops (0.9); 1: none")
    option(data, "--flip", float, "probability of mirroring (0)")
    option(data, "--workers", int, "processes that read pictures (0)")

    model = parser.add_argument_group("model")
    option(model, "--model", str, "name (clip-tiny, clip-vit-b-32 ...) or checkpoint to start from (clip-tiny)")
    option(model, "--tokenizer", str, "vocabulary; default: the checkpoint's, else one learned from the captions")
    option(model, "--vocab-size", positive, "of a learned vocabulary (4096)")
    option(model, "--context-length", positive, "tokens of the longest text")
    option(model, "--image-size", positive, "side in pixels")

    steps = parser.add_argument_group("optimisation")
    option(steps, "--epochs", positive, "(10)")
    option(steps, "--steps", positive, "optimizer steps, instead of epochs")
    option(steps, "--batch-size", positive, "pairs per process and step, all contrasted with each other (256)")
    option(steps, "--accumulate", positive, "encode the batch in so many chunks; same loss, less memory (1)")
    option(steps, "--lr", float, "(5e-4)")
    option(steps, "--min-lr", float, "where the cosine ends (0)")
    option(steps, "--warmup", float, "share of the steps (0.1)")
    option(steps, "--weight-decay", float, "(0.2)")
    option(steps, "--max-grad-norm", float, "(1); 0: no clipping")
    option(steps, "--amp", str, "none, bf16 or fp16 (none)", choices=("none", "bf16", "fp16"))
    option(steps, "--objective", str, "clip or siglip (clip)", choices=("clip", "siglip"))
    option(steps, "--label-smoothing", float, "(0)")
    option(steps, "--ema", float, "decay of averaged weights (0: none)")
    option(steps, "--seed", int, "(0)")
    option(steps, "--save-every", positive, "steps between checkpoints within an epoch")
    option(steps, "--log-every", positive, "steps between log lines (1)")


def settings_of(args, kind: type = Settings, needed: tuple[str, ...] = ("data",)) -> tuple:
    """(settings, TrainConfig fields) from the command line, on --resume completed by what the run was started with.

    Args:
        kind: dataclass of the settings beside TrainConfig.
        needed: those without a default.

    Raises:
        FileNotFoundError: nothing to resume. ValueError: a flag differs from the run's, or the folder is taken.
    """
    from ..training import TrainConfig
    from ..training.state import STATE_NAME

    ours = {field.name for field in fields(kind)}
    theirs = {field.name for field in fields(TrainConfig)}
    given = {name: value for name, value in vars(args).items() if name in ours | theirs}
    path = args.out / SETTINGS_NAME
    if args.resume:
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {args.out} holds no {SETTINGS_NAME}; no run was started there")
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            saved = {name: saved[name] for name in ours | theirs}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"--resume: {path} is damaged ({error})") from error
        for name, value in given.items():
            if name not in FREE and value != saved[name]:
                raise ValueError(f"--{name.replace('_', '-')} is {value}, the run in {args.out} has {saved[name]}; "
                                 "leave it out, or start another run")
        given = {**saved, **given}
    else:
        if (args.out / STATE_NAME).exists():
            raise ValueError(f"--out: {args.out} already holds a run; add --resume, or take another folder")
        for name in needed:
            if name not in given:
                raise ValueError(f"--{name} is missing")
    settings = kind(**{name: value for name, value in given.items() if name in ours})
    config = {name: value for name, value in given.items() if name in theirs}
    if not 0 <= settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}, must be in [0, 1)")
    if settings.workers < 0:
        raise ValueError(f"--workers is {settings.workers}, must be 0 or more")
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
    import torch

    from ..training import Trainer
    from .clip_data import Data, make_model

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    data = Data.open(settings, config, process)
    say(f"{settings.data}: {data.report()}")
    torch.manual_seed(config.seed)
    model = make_model(settings, config, data, args.out if args.resume else None)
    preprocess = model.preprocess.for_training(flip=settings.flip, scale=(settings.crop, 1.0))
    loader = data.loader(preprocess, model.tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {parameters / 1e6:.2f}M parameters, {model.config.image_size} pixels, "
        f"{model.tokenizer.vocab_size} tokens; an epoch has {len(loader)} steps of "
        f"{loader.batch_size * process.world} pairs, on {process.world} x {process.device}")
    if process.first:
        args.out.mkdir(parents=True, exist_ok=True)
        _write_json(args.out / SETTINGS_NAME, {**asdict(settings), **config.to_dict()})

    progress = not args.no_progress
    validate = data.validation(model, say=_line if progress else print) if data.val is not None else None
    trainer = Trainer(model, loader, config, out=args.out, validate=validate, resume=args.resume,
                      device=process.device, progress=progress)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    result = trainer.run()
    skipped = data.skipped_while_reading()
    if skipped:
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(f"stopped at step {result.step} of {result.total}, saved in {args.out}; go on with\n"
            f"  vlmfast train clip --out {shlex.quote(str(args.out))} --resume")
        return 130
    say(f"{result.step} steps done; model, log.jsonl and loss.png are in {args.out}")
    return 0


def _line(text: str) -> None:
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stdout)


def _write_json(path: Path, values: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
