"""Measures the peers of one op next to each other: same process, same inputs, one call each in turn.

A family module (see README.md) supplies inputs, peers, floors and the float64 truth (None for random results);
everything else is here.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import memory


@dataclass(frozen=True)
class Workload:
    """One op at one size: what every peer is given."""

    op: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.op} {self.size} {self.dtype} {self.device}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass(frozen=True)
class Peer:
    """One implementation. `make(workload)` returns a callable that takes the family's inputs and returns the outputs.

    `floor` names the floor whose time its own is divided by; `skip` says why it cannot run here.
    """

    name: str
    make: Callable[[Workload], Callable[..., Any]]
    ours: bool = False
    floor: str | None = None
    skip: str | None = None


@dataclass(frozen=True)
class Floor:
    """The least work the op can be: a bare GEMM of the same FLOPs, or a copy of the same bytes.

    Several floors of one name, told apart by `by`, are rival libraries: the fastest of them counts. One library alone
    may run at half of what the processor does, and percentages of it would flatter everything.
    """

    name: str
    run: Callable[[], object]
    by: str = "torch"


@dataclass(frozen=True)
class Settings:
    """`repeats` fixes the number of rounds; None takes what fits in `budget_s` per group, or `min_rounds`."""

    repeats: int | None = None
    budget_s: float = 20.0
    min_rounds: int = 3
    max_rounds: int = 200
    quick: bool = False
    shapes: tuple[tuple[int, ...], ...] | None = None  # the user's own; None: the family's


@dataclass
class Row:
    """One peer at one workload. Seconds, bytes; a ratio above 1 says how many times faster this row is."""

    kind: str  # "time" (forward + backward), "overhead" (one tiny forward call), "memory" (a fresh process)
    family: str
    op: str
    peer: str
    ours: bool
    device: str
    dtype: str
    shape: list[int]
    threads: int
    clock: str | None = None  # "cpu": process CPU time; "wall"; "cuda": events
    min_s: float | None = None
    median_s: float | None = None
    spread_s: float | None = None  # interquartile range
    repeats: int | None = None
    floor: str | None = None
    floor_s: float | None = None
    floor_by: dict[str, float] = field(default_factory=dict)  # seconds by library; `floor_s` is the least
    percent_of_floor: float | None = None
    strongest_peer: str | None = None
    ratio_to_strongest: float | None = None
    ratio_to: dict[str, float] = field(default_factory=dict)
    peak_extra_bytes: int | None = None
    saved_bytes: int | None = None
    error: dict[str, float] = field(default_factory=dict)  # relative Frobenius error against float64
    commit: str | None = None
    cpu: str | None = None
    isa: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: str, family: str, workload: Workload, peer: Peer, **values: Any) -> Row:
        where = {"device": workload.device, "dtype": workload.dtype, "threads": workload.threads}
        return cls(kind, family, workload.op, peer.name, peer.ours, shape=list(workload.shape), **where, **values)


@dataclass(frozen=True)
class Skip:
    """A peer that gave no row, and why. `failed` is true where it started and raised."""

    workload: str
    peer: str
    reason: str
    ours: bool = False
    failed: bool = False


# Clocks: each takes a call and returns its seconds. The result is dropped inside the timed span, so that freeing an
# autograd graph is charged to the peer that built it.


def cpu_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def wall_time(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaTime:
    """Event time of one call after the L2 cache has been overwritten."""

    def __init__(self, device: str):
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.flush = torch.empty(max(2 * size, 1 << 26), dtype=torch.uint8, device=device)
        self.start, self.end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def __call__(self, call: Callable[[], object]) -> float:
        self.flush.zero_()
        self.start.record()
        call()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


def clock_for(workload: Workload) -> tuple[str, Callable[[Callable[[], object]], float]]:
    """CPU time ignores other processes but sums over threads, so it only means something with one thread."""
    if workload.device.startswith("cuda"):
        return "cuda", CudaTime(workload.device)
    return ("cpu", cpu_time) if workload.threads == 1 else ("wall", wall_time)


def interleave(
    runners: Mapping[str, Callable[[], object]],
    measure: Callable[[Callable[[], object]], float] = wall_time,
    settings: Settings | None = None,
    warmup: int = 1,
    block: int = 1,
    on_round: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Samples of every runner, taken A B C A B C ..., so that drift of the machine hits all alike.

    `block` consecutive calls make one turn; each of them is a sample.
    """
    settings = settings or Settings()
    for _ in range(warmup):
        for call in runners.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in runners}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < (settings.repeats or settings.max_rounds):
            for name, call in runners.items():
                samples[name].extend([measure(call) for _ in range(block)])
            done += 1
            if on_round:
                on_round(done)
            if not settings.repeats and done >= settings.min_rounds:
                elapsed = time.perf_counter() - start
                if elapsed + elapsed / done > settings.budget_s:
                    break
    finally:
        if collecting:
            gc.enable()
    return samples


def summarise(samples: Sequence[float]) -> dict[str, Any]:
    """Minimum, median, interquartile range and count."""
    quarters = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {
        "min_s": min(samples),
        "median_s": statistics.median(samples),
        "spread_s": quarters[2] - quarters[0],
        "repeats": len(samples),
    }


def compare(rows: Sequence[Row]) -> None:
    """Fills in the ratios of rows measured in one interleaved run, by their minima.

    The strongest peer is the fastest row that is not ours; one of our modes is never the baseline of another.
    """
    rivals = [row for row in rows if not row.ours]
    strongest = min(rivals, key=lambda row: row.min_s) if rivals else None
    for row in rows:
        row.ratio_to = {other.peer: other.min_s / row.min_s for other in rows if other is not row}
        if strongest:
            row.strongest_peer = strongest.peer
            row.ratio_to_strongest = strongest.min_s / row.min_s


def upstream_like(output: Tensor) -> Tensor:
    """The incoming gradient every peer is given: 1 for a scalar loss, else seeded normal numbers."""
    if output.dim() == 0:
        return torch.ones_like(output)
    generator = torch.Generator().manual_seed(1)
    return torch.randn(output.shape, generator=generator).to(output)


class Step:
    """Forward and backward of one peer; returns (outputs, gradients of the inputs which require them).

    The gradients are fresh tensors each call: accumulating into `.grad` would time an addition that is not the op's.
    """

    def __init__(self, forward: Callable[..., Any], inputs: Sequence[Any]):
        self.forward, self.inputs = forward, tuple(inputs)
        self.wanted = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        self.upstream: list[Tensor] | None = None

    def outputs(self) -> tuple[Tensor, ...]:
        out = self.forward(*self.inputs)
        return out if isinstance(out, tuple) else (out,)

    def __call__(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        outputs = self.outputs()
        if not self.wanted:
            return outputs, ()
        if self.upstream is None:
            self.upstream = [upstream_like(x) for x in outputs]
        return outputs, torch.autograd.grad(outputs, self.wanted, self.upstream)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the float64 truth."""
    truth = truth.double()
    scale = truth.norm().item()
    return (value.detach().double() - truth).norm().item() / (scale if scale else 1.0)


def errors(result: tuple, truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Errors by name; `truth` lists outputs, then gradients, in the order `Step` returns them."""
    values = [*result[0], *result[1]]
    if len(values) != len(truth):
        raise ValueError(f"errors: the peer returned {len(values)} tensors, the truth has {len(truth)}: {list(truth)}")
    return {name: relative_error(value, truth[name]) for name, value in zip(truth, values, strict=True)}


def measure_group(
    family: ModuleType,
    workload: Workload,
    settings: Settings,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> tuple[list[Row], list[Skip]]:
    """Every peer and floor of one workload in one interleaved run; rows, and the peers that could not run."""
    if workload.device == "cpu":
        torch.set_num_threads(workload.threads)
    inputs, rows, skips = family.inputs(workload), {}, []
    on_stage("float64 truth")
    truth = family.truth(workload, inputs)
    runners: dict[str, Callable[[], object]] = {}
    for peer in family.peers(workload, settings.quick):
        if peer.skip:
            skips.append(Skip(str(workload), peer.name, peer.skip, peer.ours))
            continue
        on_stage(peer.name)
        try:
            step = Step(peer.make(workload), inputs)
            found = step()
            row = Row.of("time", family.NAME, workload, peer, floor=peer.floor,
                         error={} if truth is None else errors(found, truth))
            del found
            row.saved_bytes = memory.saved_bytes(step.outputs)
            row.peak_extra_bytes = memory.peak_rise(step, workload.device)
            if row.peak_extra_bytes is None:
                row.peak_extra_bytes = memory.fresh_process_peak(family.NAME, workload, peer.name)
        except Exception as error:  # a peer that breaks must not take the others' figures with it
            skips.append(Skip(str(workload), peer.name, describe(error), peer.ours, failed=True))
            continue
        rows[peer.name], runners[f"peer: {peer.name}"] = row, step
    floors = family.floors(workload) if rows else []
    runners = {**{f"floor: {floor.name} by {floor.by}": floor.run for floor in floors}, **runners}
    clock, measure = clock_for(workload)
    samples = interleave(runners, measure, settings, on_round=lambda done: on_stage(f"round {done}"))
    for name, row in rows.items():
        row.clock = clock
        vars(row).update(summarise(samples[f"peer: {name}"]))
        row.floor_by = {f.by: min(samples[f"floor: {f.name} by {f.by}"]) for f in floors if f.name == row.floor}
        if row.floor_by:
            row.floor_s = min(row.floor_by.values())
            row.percent_of_floor = 100 * row.floor_s / row.min_s
    compare(list(rows.values()))
    return list(rows.values()), skips


def describe(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


# Parts for families


def copy_floor(size: int, device: str = "cpu") -> Callable[[], object]:
    """A memcpy that reads and writes `size` bytes altogether."""
    source = torch.ones(max(size // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def compile_skip(reason: str | None = None) -> str | None:
    """`reason`, or why torch.compile cannot run on this machine, or None."""
    if reason is None and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        return "torch.compile needs a C++ compiler, and neither g++ nor clang++ is there"
    return reason


def load_installed_file(package: str, file: str) -> ModuleType:
    """A single file of an installed package as a module, without importing the package and what that drags in.

    Raises:
        ModuleNotFoundError: the package is not installed, or has no such file.
    """
    found = importlib.util.find_spec(package)
    path = Path(found.origin).parent / file if found and found.origin else None
    if path is None or not path.is_file():
        raise ModuleNotFoundError(f"{package} is not installed" if path is None else f"{package} has no {file}")
    spec = importlib.util.spec_from_file_location(f"_bench_{package}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
