"""What a run leaves behind: a JSON file, a Markdown page and a picture."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .environment import Gate
from .harness import Row, Skip

SCHEMA = 1
HEADERS = {
    "time": "op|N x D|dtype|threads|clock|peer|min ms|median ms|spread ms|runs"
    "|% of floor|x strongest|peak MiB|saved MiB",
    "overhead": "op|N x D|dtype|peer|min us|median us|runs",
    "memory": "op|N x D|dtype|threads|peer|peak MiB",
}


@dataclass(frozen=True)
class Target:
    """A figure and what it has to be: `bound` is "<=" or ">="; `value` None where it was not measured."""

    figure: str
    value: float | None
    bound: str
    target: float | None
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.value is None or self.target is None:
            return None
        return self.value <= self.target if self.bound == "<=" else self.value >= self.target

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        return {True: "yes", False: "no", None: "-"}[self.met]


@dataclass(frozen=True)
class Report:
    family: str
    environment: dict
    gate: Gate
    rows: Sequence[Row]
    skips: Sequence[Skip]
    targets: Sequence[Target]

    def to_dict(self) -> dict:
        return {
            "schema": SCHEMA,
            "family": self.family,
            "environment": {**self.environment, "tests": self.gate.status},
            "rows": [asdict(row) for row in self.rows],
            "skipped": [asdict(skip) for skip in self.skips],
            "targets": [{**asdict(target), "met": target.met} for target in self.targets],
        }


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    cells = [header.split("|"), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant figures, with an exponent below a thousandth; "-" for nothing."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}e}"
    exponent = int(f"{value:.{digits - 1}e}".split("e")[1])  # of the rounded number: 0.9996 is 1.00
    return f"{value:.{max(digits - 1 - exponent, 0)}f}"


def _times(row: Row, scale: float, *columns: str) -> list[str]:
    return [number(None if getattr(row, c) is None else getattr(row, c) * scale) for c in columns]


def _mib(size: int | None) -> str:
    return number(None if size is None else size / 2**20)


def _cells(row: Row) -> list[object]:
    size, peer = "x".join(map(str, row.shape)), f"**{row.peer}**" if row.ours else row.peer
    if row.kind == "overhead":
        return [row.op, size, row.dtype, peer, *_times(row, 1e6, "min_s", "median_s"), row.repeats]
    if row.kind == "memory":
        return [row.op, size, row.dtype, row.threads, peer, _mib(row.peak_extra_bytes)]
    return [
        *(row.op, size, row.dtype, row.threads, row.clock, peer),
        *(*_times(row, 1e3, "min_s", "median_s", "spread_s"), row.repeats),
        *(number(row.percent_of_floor), number(row.ratio_to_strongest)),
        *(_mib(row.peak_extra_bytes), _mib(row.saved_bytes)),
    ]


def _error_table(rows: Sequence[Row]) -> str:
    """Relative errors do not depend much on threads: the first row of every op, size, dtype and peer stands for all."""
    first: dict[tuple, Row] = {}
    for row in rows:
        if row.error:  # random results have none
            first.setdefault((row.op, tuple(row.shape), row.dtype, row.peer), row)
    names = list(dict.fromkeys(name for row in first.values() for name in row.error))
    body = [
        [
            *(row.op, "x".join(map(str, row.shape)), row.dtype, f"**{row.peer}**" if row.ours else row.peer),
            *(f"{row.error[name]:.1e}" if name in row.error else "-" for name in names),
        ]
        for row in first.values()
    ]
    return table("|".join(["op", "N x D", "dtype", "peer", *names]), body)


def _floor_table(rows: Sequence[Row]) -> str:
    """What each library needs for the bare work; empty without floors."""
    body: dict[tuple, list[object]] = {}
    for row in rows:
        where = (row.op, "x".join(map(str, row.shape)), row.dtype, row.threads, row.clock, row.floor)
        for by, seconds in row.floor_by.items():
            body[where + (by,)] = [*where, by, number(seconds * 1e3)]
    return table("op|N x D|dtype|threads|clock|floor|by|min ms", body.values()) if body else ""


def markdown(report: Report) -> str:
    place, parts = report.environment, [f"# {report.family}"]
    device = f"{place['gpu']}, " if place.get("gpu") else ""
    libraries = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    parts.append(
        f"{device}{place['cpu']} ({place['cores']} cores, isa {place['isa']}, backend {place['backend']}), "
        f"commit {place['commit']}, {libraries}, "
        f"{place['time']}, load average at the start {place['load_average']}.\n\nTests: {report.gate.text}"
    )
    for kind, title in (
        ("time", "Forward and backward, interleaved"),
        ("overhead", "Call overhead, forward only under no_grad"),
        ("memory", "Peak extra memory of one forward and backward, fresh process"),
    ):
        chosen = [row for row in report.rows if row.kind == kind]
        if not chosen:
            continue
        parts += [f"## {title}", table(HEADERS[kind], map(_cells, chosen))]
        if kind == "time":
            floors = _floor_table(chosen)
            parts += ["## Floors, from the same turns", floors] if floors else []
            parts += ["## Relative error against float64", _error_table(chosen)]
    if report.skips:
        reasons: dict[tuple[str, str], list[str]] = {}
        for skip in report.skips:
            reasons.setdefault((skip.peer, ("FAILED: " if skip.failed else "") + skip.reason), []).append(skip.workload)
        parts += ["## Not run", *(f"- {peer}: {why} ({'; '.join(at)})" for (peer, why), at in reasons.items())]
    if report.targets:
        body = [
            [t.figure, number(t.value), f"{t.bound} {t.target:g}" if t.target else "-", t.unit, t.verdict, t.note]
            for t in report.targets
        ]
        parts += ["## Targets", table("figure|measured|target|unit|met|note", body)]
    return "\n\n".join(parts) + "\n"


def plot(report: Report, path: Path) -> bool:
    """Bars of time over the strongest peer's time, one panel per workload; False where matplotlib is missing."""
    groups: dict[tuple, list[Row]] = {}
    for row in report.rows:
        if row.kind == "time" and row.ratio_to_strongest:
            groups.setdefault((row.op, tuple(row.shape), row.dtype, row.threads, row.clock), []).append(row)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    if not groups:
        return False
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(7.5 * columns, 0.7 + 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for panel, ((op, shape, dtype, threads, clock), rows) in zip(panels, groups.items(), strict=False):
        rows = sorted(rows, key=lambda row: -row.min_s)
        lengths = [1 / row.ratio_to_strongest for row in rows]
        bars = panel.barh([row.peer for row in rows], lengths, color=["C0" if row.ours else "0.7" for row in rows])
        panel.bar_label(bars, [f"{number(row.min_s * 1e3)} ms" for row in rows], padding=3, fontsize=7)
        panel.axvline(1, color="k", linewidth=0.8, linestyle=":")
        panel.set_xlim(0, max(lengths) * 1.2)
        panel.tick_params(labelsize=8)
        panel.set_title(f"{op} {'x'.join(map(str, shape))} {dtype}, {threads} thread(s), {clock} time", fontsize=9)
        panel.set_xlabel("time / strongest peer's time (shorter is faster)", fontsize=8)
    for panel in list(panels):
        panel.set_visible(False)
    figure.suptitle(f"{report.family}: {report.environment['cpu']}, commit {report.environment['commit']}", fontsize=10)
    figure.savefig(path, dpi=120)
    return True


def write(report: Report, folder: Path) -> list[Path]:
    """Writes <family>.json, <family>.md and, with matplotlib, <family>.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{report.family}.{end}" for end in ("json", "md", "png")]
    paths[0].write_text(json.dumps(report.to_dict(), indent=1) + "\n")
    paths[1].write_text(markdown(report))
    return paths if plot(report, paths[2]) else paths[:2]
