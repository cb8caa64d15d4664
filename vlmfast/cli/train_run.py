"""What the `vlmfast train` commands share: a run's options, its settings in the run folder, its messages."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path

from . import positive

SETTINGS_NAME = "train.json"
NOTES = {"min_lr": "where the cosine ends ", "warmup": "share of the steps ", "ema": "decay of averaged weights ",
         "max_grad_norm": "longest gradient, 0 for no clipping "}  # fmt: skip


def option(group, name: str, kind, text: str, **more) -> None:
    """An option that is absent from the arguments where it is not given, so that --resume can tell."""
    group.add_argument(name, type=kind, default=argparse.SUPPRESS, help=text, **more)


def add_run(parser: argparse.ArgumentParser, *files: str) -> None:
    """Where a run goes and how; `files` lie in its folder beside the usual ones."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER",
                        help=f"run folder: {', '.join(('checkpoint, log.jsonl, loss.png', *files))}")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA where there is a GPU")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_optimisation(parser: argparse.ArgumentParser, batch: str, accumulate: str, numbers: Mapping[str, float]):
    """The group of TrainConfig's options.

    Args:
        batch, accumulate: help of --batch-size and --accumulate.
        numbers: TrainConfig's float fields that the command offers, with their defaults here.
    """
    steps = parser.add_argument_group("optimisation")
    option(steps, "--epochs", positive, "(10)")
    option(steps, "--steps", positive, "optimizer steps, instead of epochs")
    option(steps, "--batch-size", positive, batch)
    option(steps, "--accumulate", positive, accumulate)
    for name, value in numbers.items():
        option(steps, flag(name), float, f"{NOTES.get(name, '')}({value:g})")
    option(steps, "--amp", str, "none, bf16 or fp16 (none)", choices=("none", "bf16", "fp16"))
    option(steps, "--seed", int, "(0)")
    option(steps, "--save-every", positive, "steps between checkpoints within an epoch")
    option(steps, "--log-every", positive, "steps between log lines (1)")
    return steps


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def settings_of(args, kind: type, needed: Iterable[str] = ("data",), *, defaults: Mapping | None = None,
                free: Iterable[str] = ("workers",), lists: Iterable[str] = ()) -> tuple:
    """(settings, TrainConfig fields) from the command line, on --resume completed by what the run was started with.

    Args:
        kind: dataclass of the settings beside TrainConfig.
        needed: those without a default.
        defaults: where they differ from the dataclasses' own.
        free: what may change between the two halves of a run without changing what it computes.
        lists: settings that are tuples; on the command line comma-separated, or repeated.

    Raises:
        FileNotFoundError: nothing to resume. ValueError: a flag differs from the run's, or the folder is taken.
    """
    from ..training import TrainConfig
    from ..training.state import STATE_NAME

    ours = {field.name for field in fields(kind)}
    theirs = {field.name for field in fields(TrainConfig)}
    given = {name: str(value) if isinstance(value, Path) else value
             for name, value in vars(args).items() if name in ours | theirs}
    for name in lists:
        if name in given:
            given[name] = tuple(given[name].split(",") if isinstance(given[name], str) else given[name])
    if args.resume:
        given = _resumed(args.out / SETTINGS_NAME, given, ours | theirs, free)
    else:
        if (args.out / STATE_NAME).exists():
            raise ValueError(f"--out: {args.out} already holds a run; add --resume, or take another folder")
        for name in needed:
            if name not in given:
                raise ValueError(f"{flag(name)} is missing")
        given = {**(defaults or {}), **given}
    settings = kind(**{name: value for name, value in given.items() if name in ours})
    if not 0 <= settings.val_fraction < 1:
        raise ValueError(f"--val-fraction is {settings.val_fraction}, must be in [0, 1)")
    if getattr(settings, "workers", 0) < 0:
        raise ValueError(f"--workers is {settings.workers}, must be 0 or more")
    return settings, {name: value for name, value in given.items() if name in theirs}


def _resumed(path: Path, given: dict, names: set[str], free: Iterable[str]) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path.parent} holds no {path.name}; no run was started there")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        stored = {name: tuple(value) if isinstance(value := stored[name], list) else value for name in names}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"--resume: {path} is damaged or of another kind of run ({error})") from error
    for name, value in given.items():
        if name not in free and value != stored[name]:
            raise ValueError(f"{flag(name)} is {value}, the run in {path.parent} has {stored[name]}; "
                             "leave it out, or start another run")
    return {**stored, **given}


def write_settings(folder: Path, values: dict) -> None:
    """train.json, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def line(text: str) -> None:
    """Prints above a progress bar."""
    from tqdm.auto import tqdm

    tqdm.write(text, file=sys.stdout)


def stopped(result, out: Path, model: str) -> str:
    """What to say of an interrupted run."""
    return (f"stopped at step {result.step} of {result.total}, saved in {out}; go on with\n"
            f"  vlmfast train {model} --out {shlex.quote(str(out))} --resume")
