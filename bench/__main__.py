"""python -m bench FAMILY: tests first, then the peers side by side, then JSON, Markdown and a picture."""

from __future__ import annotations

import argparse
import importlib
import itertools
import os
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch
from tqdm import tqdm

from . import FAMILIES, environment, report
from .harness import Row, Settings, Skip, Workload, measure_group

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _shapes(text: str) -> tuple[tuple[int, ...], ...]:
    shapes = tuple(tuple(int(n) for n in part.split("x")) for part in text.split(","))
    if any(n < 1 for shape in shapes for n in shape):
        raise ValueError
    return shapes


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(DTYPES):
        raise ValueError
    return names


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch finds no CUDA device")
    return str(device)


for _parse, _name in ((_shapes, "shape list"), (_dtypes, "dtype list"), (_positive, "positive number")):
    _parse.__name__ = _name  # argparse names the type in "invalid ... value"
_counts.__name__, _device.__name__ = "thread list", "device"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    made.add_argument("family", nargs="?", choices=FAMILIES)
    made.add_argument("--list", action="store_true", help="families, their ops and peers, and what is missing here")
    made.add_argument("--quick", action="store_true", help="small shapes, no torch.compile; about a minute")
    made.add_argument("--device", type=_device, default="cpu", help="cpu (default) or cuda")
    made.add_argument("--ops", type=_names, metavar="NAME,...", help="some of the family's; default: all")
    made.add_argument("--shapes", type=_shapes, metavar="NxD,...", help="instead of the family's own")
    made.add_argument("--dtype", type=_dtypes, metavar="NAME,...", help=f"any of {', '.join(DTYPES)}")
    made.add_argument("--threads", type=_counts, metavar="N,...", help="default: 1,2 as far as there are cores")
    made.add_argument("--repeats", type=_positive, metavar="N", help="rounds a group; default: what 20 s allow")
    made.add_argument("--out", type=Path, default=Path("build/bench"), metavar="DIR", help="default: %(default)s")
    made.add_argument("--no-tests", action="store_true", help="skip the family's tests; the report says so")
    return made


def load(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{name}")


def list_families() -> str:
    lines = []
    for name in FAMILIES:
        family = load(name)
        shapes = ", ".join("x".join(map(str, shape)) for shape in family.SHAPES)
        lines.append(f"{name}: {', '.join(family.OPS)}; shapes {shapes}; tests {family.TESTS}")
        for op in family.OPS:
            known = {}
            for dtype in family.DTYPES:
                for peer in family.peers(Workload(op, family.QUICK_SHAPES[0], dtype)):
                    known.setdefault(peer.name, (peer, []))[1].append(dtype)
            for peer, dtypes in known.values():
                only = "" if len(dtypes) == len(family.DTYPES) else f" [{', '.join(dtypes)} only]"
                lines.append(f"  {op}: {peer.name}{only}" + (f" (missing: {peer.skip})" if peer.skip else ""))
    return "\n".join(lines)


def workloads(family: ModuleType, args: argparse.Namespace) -> list[Workload]:
    shapes = args.shapes or (family.QUICK_SHAPES if args.quick else family.SHAPES)
    threads = args.threads or tuple(n for n in (1, 2) if n <= (os.cpu_count() or 1))
    if args.device != "cpu":
        threads = (1,)
    grid = itertools.product(args.ops or family.OPS, shapes, args.dtype or family.DTYPES, threads)
    return [Workload(op, shape, dtype, args.device, count) for op, shape, dtype, count in grid]


def measure(family: ModuleType, args: argparse.Namespace) -> tuple[list[Row], list[Skip]]:
    budget = 1.5 if args.quick else 20.0
    settings = Settings(args.repeats, budget, quick=args.quick, shapes=args.shapes)
    rows, skips = [], []
    tqdm.monitor_interval = 0  # its thread would be counted in the process's CPU time
    groups = workloads(family, args)
    with tqdm(total=len(groups) + 1, file=sys.stderr, unit="group") as bar:
        for workload in groups:
            bar.set_description_str(str(workload))
            found, missing = measure_group(family, workload, settings, on_stage=bar.set_postfix_str)
            rows += found
            skips += missing
            bar.update()
        bar.set_description_str("overhead and memory")
        for item in family.extras(settings, args.device):
            (rows if isinstance(item, Row) else skips).append(item)
        bar.update()
    return rows, skips


def main(argv: list[str] | None = None) -> int:
    """0: measured; 1: the tests are red, or an op of ours could not run; 2: bad arguments."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.list:
        print(list_families())
        return 0
    if not args.family:
        arguments.error(f"name a family ({', '.join(FAMILIES)}) or pass --list")
    family = load(args.family)
    rank = len(family.SHAPES[0])
    if args.shapes and any(len(shape) != rank for shape in args.shapes):
        arguments.error(f"argument --shapes: {args.family} wants {rank} numbers a shape, such as 2048x512")
    if unknown := [name for name in args.ops or () if name not in family.OPS]:
        arguments.error(f"argument --ops: {args.family} has no {unknown[0]}, only {', '.join(family.OPS)}")
    if args.no_tests:
        gate = environment.Gate("not run", "WARNING: not run (--no-tests); the figures may come from broken code")
    else:
        print(f"running {family.TESTS}", file=sys.stderr)
        gate = environment.run_tests(family.TESTS)
    if gate.status != "green":
        print(gate.text, file=sys.stderr)
    if not gate.may_report:
        return 1
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")  # the compiler's, about itself
    place = environment.describe(args.device)
    rows, skips = measure(family, args)
    for row in rows:
        row.commit, row.cpu, row.isa, row.versions = (place[key] for key in ("commit", "cpu", "isa", "versions"))
    result = report.Report(args.family, place, gate, rows, skips, family.targets(rows))
    paths = report.write(result, args.out)
    print(report.markdown(result))
    print("written: " + ", ".join(map(str, paths)), file=sys.stderr)
    return int(any(skip.ours for skip in skips))


if __name__ == "__main__":
    sys.exit(main())
