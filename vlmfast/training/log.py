"""JSON lines, the loss curve and the progress bar of a run."""

import json
import math
import os
from pathlib import Path

LOG_NAME = "log.jsonl"
CURVE_NAME = "loss.png"
RECALLS = {"image_to_text_r1": "image to text R@1", "text_to_image_r1": "text to image R@1"}
_COLORS = "tab:orange", "tab:green", "tab:red", "tab:purple"


class JSONLog:
    """Appends one JSON object a line to `log.jsonl` and mirrors it in `records`.

    Args:
        folder: of the run; None keeps records in memory only.
        step: steps of an earlier part of the run to keep; later lines, from beyond its checkpoint, are cut off.
            0 starts a new log.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self.path = None if folder is None else folder / LOG_NAME
        self.records: list[dict] = []
        if self.path is None:
            return
        if step and self.path.exists():
            self.records = [record for record in read_log(self.path) if record["step"] <= step]
        partial = self.path.with_name(LOG_NAME + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in self.records), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, **record) -> None:
        """Numbers that are not finite become null: JSON has no name for them."""
        record = {key: _plain(value) for key, value in record.items()}
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_log(path: str | Path) -> list[dict]:
    """Records of a log; a last line that was cut off by a crash is left out.

    Raises:
        ValueError: any other line is no JSON object with a step.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["step"] += 0
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ValueError(f"read_log: {path}, line {number} is no record of a training log") from error
        records.append(record)
    return records


def draw_curve(records: list[dict], path: str | Path, figures: dict[str, str] = RECALLS,
               label: str = "validation recall at 1", most: float | None = 1.0) -> None:
    """Loss (each step and smoothed) and validation figures over the steps, as a PNG.

    Args:
        figures: name in the validation records -> its legend.
        label: of their axis, which ends at `most`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    checks = [record for record in records if record.get("validation")]
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        x, y = zip(*steps, strict=True)
        smooth, average = [], y[0]
        for value in y:
            average += 0.1 * (value - average)
            smooth.append(average)
        axes.plot(x, y, color="tab:blue", alpha=0.3, linewidth=0.8)
        axes.plot(x, smooth, color="tab:blue", label="training loss")
    lowest = min((value for _, value in steps), default=0.0)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None) if lowest >= 0 else None)
    axes.grid(alpha=0.3)
    if checks:
        right = axes.twinx()
        for (name, legend), color in zip(figures.items(), _COLORS, strict=False):
            points = [(record["step"], record["validation"].get(name)) for record in checks]
            points = [point for point in points if point[1] is not None]
            if points:
                right.plot(*zip(*points, strict=True), color=color, marker=".", label=legend)
        right.set(ylabel=label, ylim=(0, most))
        if right.lines:
            right.legend(loc="center right")
    if steps:
        axes.legend(loc="upper right")
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
