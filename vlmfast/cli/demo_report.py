"""Tables and report of `vlmfast demo`."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from ..ops import info_nce
from .demo_model import BATCH, KS, Experiment, RecallRow, eager_loss
from .measure import cpu_seconds, peak_rise

LARGE_BATCH = 4096


@dataclass(frozen=True)
class LossRow:
    """Forward and backward of one loss on one batch."""

    name: str
    pairs: int
    seconds: float  # process CPU time
    memory: int | None  # bytes above the features, their gradients included


def compare_losses(experiment: Experiment) -> list[LossRow]:
    """The fused loss beside plain PyTorch, on features of a training batch and on a large batch of such features."""
    image, text = experiment.embed(experiment.train_pairs.select(range(BATCH)))
    scale = experiment.model.logit_scale.detach().exp()
    copies = -(-LARGE_BATCH // BATCH)
    generator = torch.Generator().manual_seed(0)

    def large(x: torch.Tensor) -> torch.Tensor:
        x = x.repeat(copies, 1)
        return F.normalize(x + 0.03 * torch.randn(x.shape, generator=generator), dim=-1)

    rows = []
    for a, b in ((image, text), (large(image), large(text))):
        def call(loss, a=a, b=b):
            leaves = [x.clone().requires_grad_() for x in (a, b, scale)]
            loss(*leaves).backward()
            return leaves

        calls = {"vlmfast info_nce": partial(call, info_nce), "plain PyTorch": partial(call, eager_loss)}
        seconds = cpu_seconds(calls)
        rows += [LossRow(name, len(a), seconds[name], peak_rise(calls[name])) for name in calls]
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up on a terminal, the first to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return f"| {' | '.join([cells[0].ljust(widths[0]), *rest])} |"

    rule = ["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])


def recall_table(rows: Sequence[RecallRow]) -> str:
    """Recall at 1, 5 and 10 of both directions beside chance."""
    def three(recalls: dict[int, float]) -> str:
        return " ".join(f"{recalls[k]:.3f}" for k in KS)

    head = ["R@1 R@5 R@10", "queries", "image to text", "text to image", "chance"]
    return table(head, [[row.name, str(row.queries), three(row.image_to_text), three(row.text_to_image),
                          three(row.chance)] for row in rows]) + "\n"


def loss_table(rows: Sequence[LossRow]) -> str:
    """Time and memory of the losses, with what the numbers say in words."""
    head = ["loss, forward and backward", "pairs", "CPU ms", "peak memory MiB"]
    body = [[row.name, str(row.pairs), f"{1000 * row.seconds:.2f}",
             "unknown" if row.memory is None else f"{row.memory / 2**20:.1f}"] for row in rows]
    words = []
    for ours, plain in zip(rows[::2], rows[1::2], strict=True):
        ratio = plain.seconds / max(ours.seconds, 1e-9)
        verdict = f"{ratio:.1f} times less" if ratio >= 1 else f"{1 / ratio:.1f} times more"
        words.append(f"{ours.pairs} pairs: the fused loss takes {verdict} time than plain PyTorch")
    return f"{table(head, body)}\n{'; '.join(words)}.\n"


def document(facts: dict, experiment: Experiment, result, rows, comparison, wall: float, cpu: float, args) -> str:
    """The text of report.md."""
    config = experiment.config
    command = f"vlmfast demo --seed {args.seed} --threads {args.threads}" + (
        f" --seconds {args.seconds:g}" if args.seconds is not None else "")
    backends = "\n".join(f"| {name} | {state} |" for name, state in facts["backends"].items())
    return f"""# What a small CLIP learns from emoji

Made by `{command}` with vlmfast {facts['vlmfast']}, PyTorch {facts['torch']}, Python {facts['python']} on
{facts['platform']}.

| backend | state |
|---|---|
{backends}

## Training
{experiment.describe()}. {result.step} steps in {wall:.0f} s ({cpu:.0f} s of process CPU time): AdamW, learning rate
{config.lr:g} with warm-up and cosine, weight decay {config.weight_decay:g}, label smoothing {config.label_smoothing:g},
random shifts of {experiment.loader.shift} pixels, averaged weights ({config.ema:g}). Last loss
{result.records[-1]['loss']:.3f}.

![loss](loss.png)

## Retrieval
Ranks are among all held-out pictures (captions) of the same split. "Chance" is the expected recall of a random order.
Held-out concepts are base figures that training shows in no skin tone; relatives (the same activity by another gender,
the same animal's face) may be in it.

{recall_table(rows)}
![queries and their five best pictures](retrieval.png)

## The loss
The same features through the fused loss and through plain PyTorch, {torch.get_num_threads()} thread(s), median of
interleaved runs, process CPU time; memory is the rise of the process's resident set above the features themselves.

{loss_table(comparison)}"""
