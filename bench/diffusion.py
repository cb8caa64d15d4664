"""The diffusion family: steps of samplers, noising, and the training loss with its gradient.

Shapes are (B, C, H, W) of the samples; inputs are seeded normal numbers. Steps stand in the middle of GLIDE's 100 (for
DDIM of 50), all samples at the same; the loss takes any of 1000. `guided_ancestral` and `ddpm` draw their noise, except
in the first call of each peer, which takes the inputs' and is compared with float64. `ddim` has eta 0 and diffusers'
default treatment of clamped estimates.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import diffusion_peers as rivals
from .harness import (
    Floor,
    Peer,
    Row,
    Settings,
    Skip,
    Step,
    Workload,
    compile_skip,
    copy_floor,
    describe,
    measure_group,
    upstream_like,
)
from .report import Target

NAME = "diffusion"
TESTS = "tests/ops/test_diffusion.py"
OPS = ("guided_ancestral", "given_noise", "ddim", "ddpm", "q_sample", "loss")
DTYPES = ("float32",)
SHAPES = ((8, 3, 64, 64), (8, 3, 256, 256))
QUICK_SHAPES = ((2, 3, 64, 64),)
# measured beside the grid, with one thread: one sample, a large batch, the small pictures of a training
OTHERS = (("guided_ancestral", (1, 3, 64, 64)), ("guided_ancestral", (64, 3, 64, 64)), ("loss", (16, 3, 32, 32)))

OURS, GLIDE, GUIDED = "vlmfast", "GLIDE's arithmetic", "guided-diffusion's arithmetic"
LEAN, COMPILED, DIFFUSERS = "lean formula", "compiled lean formula", "diffusers"
COPY = "copy of the compulsory bytes"
DRAWN, GUIDANCE = ("guided_ancestral", "ddpm"), ("guided_ancestral", "given_noise")
# (op, peer, B, side): how many times faster ours has to be
LEAST = {("guided_ancestral", GLIDE, 8, 64): 10.0, ("guided_ancestral", GLIDE, 8, 256): 30.0,
         ("ddim", DIFFUSERS, 8, 256): 3.0, ("ddpm", DIFFUSERS, 8, 256): 3.0, ("loss", GUIDED, 8, 64): 10.0}


def spacing_of(op: str) -> str:
    return {"ddim": "ddim50", "q_sample": "1000", "loss": "1000"}.get(op, "100")


def inputs(workload: Workload) -> tuple[Tensor | int, ...]:
    """Steps: x, the model's output, t [B], noise. q_sample: x0, t, noise. Loss: the model's output, noise, x0, x_t, t.
    The generator runs on the CPU."""
    generator, (batch, channels, *size) = torch.Generator().manual_seed(0), workload.shape
    op, steps = workload.op, rivals.STEPS[spacing_of(workload.op)]

    def draw(rows: int, width: int) -> Tensor:
        return torch.randn(rows, width, *size, generator=generator).to(workload.device, workload.torch_dtype)

    x, noise = draw(batch, channels), draw(batch, channels)
    if op in ("q_sample", "loss"):
        t = torch.randint(steps, (batch,), generator=generator).to(workload.device)
        if op == "q_sample":
            return x, t, noise
        x0 = (0.5 * x).clamp(-1, 1)
        return draw(batch, 2 * channels).requires_grad_(), noise, x0, rivals.noised(x0, t, noise), t
    out = draw(batch * (2 if op in GUIDANCE else 1), channels * (1 if op == "ddim" else 2))
    return x, out, torch.full((batch,), steps // 2, device=workload.device), noise


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    if workload.op == "loss":
        step = Step(rivals.training_loss, doubles)
        step.upstream = [upstream_like(x.to(workload.torch_dtype)).double() for x in step.outputs()]
        (loss,), (gradient,) = step()
        return {"loss": loss.detach(), "d_output": gradient}
    if workload.op == "q_sample":
        return {"x": rivals.noised(*doubles)}
    x, out, t, noise = doubles
    if workload.op in GUIDANCE:
        return {"x": rivals.sampler_step(x, out, t, noise)}
    return {"x": rivals.lean_step(workload.op)(x, out, int(t[0]), noise)}


# Peers and floors


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(workload: Workload) -> Callable[..., Tensor]:
    from vlmfast.diffusion import Schedule

    ops, op = load_ops(), workload.op
    schedule = Schedule.cosine(1000)
    if op == "q_sample":
        return lambda x0, t, noise: ops.q_sample(x0, t, schedule, noise=noise)
    if op == "loss":
        return lambda out, noise, x0, x, t: ops.diffusion_loss(out, noise, x0, t, schedule)
    schedule = schedule.respace(spacing_of(op))
    options = {"sampler": "ddim", "use_clipped_model_output": False} if op == "ddim" else {}
    options |= {"guidance_scale": rivals.SCALE} if op in GUIDANCE else {}
    return _given_first(op, lambda x, out, t, noise: ops.denoise_step(x, out, t, schedule, noise=noise, **options))


def _given_first(op: str, run: Callable[..., Tensor], number: bool = False) -> Callable[..., Tensor]:
    """`run` with the inputs' noise, but of an op that draws its own only in the first call; t as a number or [B]."""
    calls = itertools.count()

    def step(x, out, t, noise):
        given = next(calls) == 0 or op not in DRAWN
        return run(x, out, at if number else t, noise if given and op != "ddim" else None)

    at = rivals.STEPS[spacing_of(op)] // 2
    return step


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then what a user could run instead."""
    op, device = workload.op, workload.device
    try:
        load_ops()
        found = [Peer(OURS, _ours, ours=True, floor=COPY)]
    except (ImportError, AttributeError) as error:
        found = [Peer(OURS, lambda w: None, ours=True, skip=describe(error))]
    missing = compile_skip("left out by --quick" if quick else None)

    def add(name: str, make: Callable[[], Callable], skip: str | None = None) -> None:
        def made(workload: Workload) -> Callable:
            torch._dynamo.reset()
            return make()

        found.append(Peer(name, made, floor=COPY, skip=skip))

    if op == "loss":
        add(GUIDED, lambda: rivals.training_loss)
        add(LEAN, lambda: rivals.loss_by(lambda formula: formula, device))
        add(COMPILED, lambda: rivals.loss_by(rivals.compiler, device), missing)
    elif op == "q_sample":
        add(GUIDED, lambda: rivals.noised)
        add(LEAN, lambda: rivals.noising_by(lambda formula: formula, device))
        add(COMPILED, lambda: rivals.noising_by(rivals.compiler, device), missing)
    else:
        if op in GUIDANCE:
            add(GLIDE, lambda: _given_first(op, rivals.sampler_step))
        else:
            add(DIFFUSERS, lambda: _given_first(op, rivals.scheduler_step(op), True), rivals.diffusers_missing())
        add(LEAN, lambda: _given_first(op, rivals.lean_step(op), True))
        add(COMPILED, lambda: _given_first(op, rivals.compiled_step(op, device)), missing)
    return found


def passes(op: str) -> int:
    """How many times the samples' bytes an op has to move.

    A step reads x and the output, of guidance both predictions but one variance, and the noise unless it is drawn, and
    writes x. The loss reads prediction, variance and noise forward and backward, x0 only at the first step, and writes
    two gradients.
    """
    return {"guided_ancestral": 5, "given_noise": 6, "ddim": 3, "ddpm": 4, "q_sample": 3, "loss": 3 + 5}[op]


def floors(workload: Workload) -> list[Floor]:
    size = workload.torch_dtype.itemsize
    for n in workload.shape:
        size *= n
    return [Floor(COPY, copy_floor(passes(workload.op) * size, workload.device), "torch.copy_")]


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """Other sizes of two ops, unless the user has named sizes."""
    if settings.shapes or settings.quick:
        return
    settings = replace(settings, budget_s=settings.budget_s / 2)
    for op, shape in OTHERS:
        rows, skips = measure_group(sys.modules[__name__], Workload(op, shape, device=device), settings)
        yield from rows
        yield from skips


def targets(rows: Sequence[Row]) -> list[Target]:
    """From our rows measured on the CPU in float32 with one thread."""
    found = []
    for row in rows:
        if not row.ours or (row.kind, row.device, row.dtype, row.threads) != ("time", "cpu", "float32", 1):
            continue
        place, (batch, *_, side) = f"{row.op} {'x'.join(map(str, row.shape))}", row.shape
        found += [Target(f"against {rival}, {place}", ratio, ">=", LEAST.get((row.op, rival, batch, side)))
                  for rival, ratio in row.ratio_to.items()]
        if row.floor_s:
            most = 1.6 if side == 256 and row.op not in (*DRAWN, "loss") else None
            found.append(Target(f"time over the {COPY}, {place}", row.min_s / row.floor_s, "<=", most))
        found += [Target(f"relative error of {name}, {place}", error, "<=", 5e-6 if name.startswith("d_") else 2e-6, "")
                  for name, error in row.error.items()]
    return found
