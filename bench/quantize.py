"""The quantize family: Gumbel quantization of a discrete VAE's logits, and the nearest code.

Logits are [B, V, side, side] seeded normal numbers. Ops that end in `_fwd` are the forward alone; the others are
forward and backward. Every library draws noise of its own, so the Gumbel ops have no common truth: their tests compare
the peers with the noise given.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import memory
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

NAME = "quantize"
TESTS = "tests/ops/test_quantize.py"
OPS = ("soft_fwd", "hard_fwd", "soft", "hard", "soft_kl")
DTYPES = ("float32",)
# (B, V, side, D)
SHAPES = ((4, 8192, 32, 128), (1, 8192, 32, 128), (8, 8192, 32, 128), (4, 8192, 32, 512))
QUICK_SHAPES = ((1, 1024, 16, 64),)
# measured beside the grid: OpenAI's last 1 x 1 convolution, and a VQGAN's codebook
OTHERS = {"encode_indices": (1, 8192, 32, 2048), "vector_quantize": (4, 8192, 32, 256)}
QUICK_OTHERS = {"encode_indices": (1, 512, 8, 128), "vector_quantize": (1, 512, 16, 64)}
TAU, BETA = 0.9, 0.25

OURS, EAGER, UNIFORM, COMPILED = "vlmfast", "F.gumbel_softmax", "uniform noise", "compiled uniform noise"
DALLE_KL, TAMING_KL = "F.gumbel_softmax, DALLE-pytorch's KL", "F.gumbel_softmax, taming's KL"
UNIFORM_KL, COMPILED_KL = "uniform noise, taming's KL", "compiled uniform noise, taming's KL"
CONVOLUTION, LINEAR, DISTANCES, CDIST = "conv2d, argmax", "linear, argmax", "distances, argmin", "cdist, argmin"
FLOOR = "matrix products and a copy of the logits' traffic"


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """Logits or features, and the codes. The generator runs on the CPU."""
    batch, entries, side, width = workload.shape
    generator = torch.Generator().manual_seed(0)
    channels = width if workload.op in OTHERS else entries
    wants_gradient = not workload.op.endswith("_fwd") and workload.op != "encode_indices"
    shapes = (batch, channels, side, side), (entries, width)
    return tuple(torch.randn(shape, generator=generator).to(workload.device, workload.torch_dtype)
                 .requires_grad_(wants_gradient) for shape in shapes)


# The formulas a user would write; `noise` draws like its argument


def exponential_noise(logits: Tensor) -> Tensor:
    """As F.gumbel_softmax draws it."""
    return -torch.empty_like(logits).exponential_().log()


def uniform_noise(logits: Tensor) -> Tensor:
    least = torch.finfo(torch.float32).tiny
    return -(-(torch.rand_like(logits) + least).log() + least).log()


def eager(noise: Callable[[Tensor], Tensor], hard: bool = False,
          divergence: Callable[[Tensor], Tensor] | None = None) -> Callable[..., tuple[Tensor, ...]]:
    def run(logits: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        soft = ((logits + noise(logits)) / TAU).softmax(1)
        if hard:
            index = soft.argmax(1, keepdim=True)
            soft = torch.zeros_like(logits).scatter_(1, index, 1.0) - soft.detach() + soft
        z = torch.einsum("bvhw,vd->bdhw", soft, codebook)
        return (z,) if divergence is None else (z, divergence(logits))

    return run


def dalle_divergence(logits: Tensor) -> Tensor:
    """DALLE-pytorch's, whose sum is made a mean over positions here."""
    rows = logits.flatten(2).transpose(1, 2)
    log_q = rows.log_softmax(-1)
    log_uniform = torch.log(torch.tensor([1.0 / rows.shape[-1]], device=logits.device))
    return F.kl_div(log_uniform, log_q, None, None, "batchmean", log_target=True) / rows[..., 0].numel()


def taming_divergence(logits: Tensor) -> Tensor:
    q = logits.softmax(1)
    return (q * (q * logits.shape[1] + 1e-10).log()).sum(1).mean()


def nearest(distances: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    def run(x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        rows = x.movedim(1, -1)
        flat = rows.reshape(-1, x.shape[1])
        codes = codebook[distances(flat.detach(), codebook.detach()).argmin(1)].view(rows.shape)
        loss = BETA * (codes.detach() - rows).square().mean() + (codes - rows.detach()).square().mean()
        return (rows + (codes - rows).detach()).movedim(-1, 1), loss

    return run


def squared_distances(rows: Tensor, codebook: Tensor) -> Tensor:
    return rows.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * rows @ codebook.T


# The truth, where there is one


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor] | None:
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    if workload.op == "encode_indices":
        return {"indices": (doubles[0].movedim(1, -1) @ doubles[1].T).argmax(-1)}
    if workload.op != "vector_quantize":
        return None
    step = Step(nearest(squared_distances), doubles)
    step.upstream = [upstream_like(x.to(workload.torch_dtype)).double() for x in step.outputs()]
    (z, loss), gradients = step()
    return {"z": z.detach(), "loss": loss.detach(), "d_x": gradients[0], "d_codebook": gradients[1]}


# Peers and floors


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    ops = load_ops()
    if workload.op == "encode_indices":
        return ops.encode_indices
    if workload.op == "vector_quantize":
        def run(x, codebook):
            found = ops.vector_quantize(x, codebook, beta=BETA)
            return found.z, found.loss
        return run
    mode, divergence = "straight_through" if "hard" in workload.op else "soft", workload.op.endswith("kl")

    def quantize(logits, codebook):
        found = ops.gumbel_quantize(logits, codebook, tau=TAU, mode=mode, kl_weight=float(divergence))
        return (found.z, found.kl) if divergence else (found.z,)

    return quantize


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then what a user could write instead."""
    try:
        load_ops()
        found = [Peer(OURS, _ours, ours=True, floor=FLOOR)]
    except (ImportError, AttributeError) as error:
        found = [Peer(OURS, lambda w: None, ours=True, skip=describe(error))]
    hard = "hard" in workload.op
    if workload.op == "encode_indices":
        rivals = {CONVOLUTION: lambda x, w: F.conv2d(x, w[..., None, None]).argmax(1),
                  LINEAR: lambda x, w: F.linear(x.movedim(1, -1), w).argmax(-1)}
    elif workload.op == "vector_quantize":
        rivals = {DISTANCES: nearest(squared_distances), CDIST: nearest(torch.cdist)}
    elif workload.op.endswith("kl"):
        rivals = {DALLE_KL: eager(exponential_noise, divergence=dalle_divergence),
                  TAMING_KL: eager(exponential_noise, divergence=taming_divergence),
                  UNIFORM_KL: eager(uniform_noise, divergence=taming_divergence)}
        found.append(_compiled(COMPILED_KL, rivals[UNIFORM_KL], quick))
    else:
        rivals = {EAGER: eager(exponential_noise, hard), UNIFORM: eager(uniform_noise, hard)}
        found.append(_compiled(COMPILED, rivals[UNIFORM], quick))
    return found + [Peer(name, lambda w, run=run: run, floor=FLOOR) for name, run in rivals.items()]


def _compiled(name: str, formula: Callable, quick: bool) -> Peer:
    skip = compile_skip("left out by --quick" if quick else None)

    def make(workload: Workload) -> Callable:
        torch._dynamo.reset()
        return torch.compile(formula, fullgraph=True, dynamic=False)

    return Peer(name, make, floor=FLOOR, skip=skip)


def logits_bytes(workload: Workload) -> int:
    batch, entries, side, _ = workload.shape
    return batch * entries * side * side * workload.torch_dtype.itemsize


def work(workload: Workload) -> tuple[int, float]:
    """(products of N x V x D, times the logits' bytes that must move) of an op that does no more than it has to."""
    return {"soft_fwd": (1, 1), "hard_fwd": (0, 1), "soft": (3, 3), "hard": (1, 3), "soft_kl": (3, 3),
            "encode_indices": (1, 0), "vector_quantize": (1, 0)}[workload.op]


def floors(workload: Workload) -> list[Floor]:
    batch, entries, side, width = workload.shape
    products, moves = work(workload)
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float32 if workload.device == "cpu" else workload.torch_dtype
    # chunks of rows, so that the floor's own operands stay small
    rows = min(batch * side * side, 1024)
    left = torch.randn(rows, width, generator=generator).to(workload.device, dtype)
    right = torch.randn(entries, width, generator=generator).to(workload.device, dtype)
    copy = copy_floor(math.ceil(moves * logits_bytes(workload)), workload.device)

    def run():
        for start in range(0, batch * side * side, rows):
            for _ in range(products):
                torch.mm(left[:batch * side * side - start], right.T)
        if moves:
            copy()

    return [Floor(FLOOR, run, "torch.mm")]


# Figures beside the grid


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """The ops at their own sizes, a DiscreteVAE's step beside its quantizer alone, and the peak memory of forward and
    backward in a fresh process."""
    from . import quantize_step

    own, step = sys.modules[__name__], quantize_step.QUICK_SHAPE if settings.quick else quantize_step.SHAPE
    groups = [(own, op, shape) for op, shape in (QUICK_OTHERS if settings.quick else OTHERS).items()]
    for family, op, shape in [*groups, (own, "soft_kl", step), (quantize_step, quantize_step.OP, step)]:
        rows, skips = measure_group(family, Workload(op, shape, device=device), settings)
        yield from rows
        yield from skips
    workload = Workload("soft_kl", (QUICK_SHAPES if settings.quick else SHAPES)[0], device=device)
    for peer in peers(workload, quick=True):
        if peer.skip:
            continue
        try:
            peak = memory.fresh_process_peak(NAME, workload, peer.name)
        except Exception as error:
            yield Skip(f"{workload}, fresh process", peer.name, describe(error), peer.ours, failed=True)
            continue
        yield Row.of("memory", NAME, workload, peer, peak_extra_bytes=peak)


def targets(rows: Sequence[Row]) -> list[Target]:
    """The figures of the design, from the rows measured on the CPU in float32."""
    rows = [row for row in rows if row.device == "cpu" and row.dtype == "float32"]
    groups: dict[tuple, dict[str, Row]] = {}
    found = []
    for row in rows:
        if row.kind == "time":
            groups.setdefault((row.op, tuple(row.shape), row.threads), {})[row.peer] = row
        elif row.kind == "memory" and row.ours:
            size = logits_bytes(Workload(row.op, tuple(row.shape), row.dtype))
            found.append(Target(f"peak extra memory over the logits, {_place(row)}", row.peak_extra_bytes / size, "<=",
                                1.3))
    for (op, *where), group in groups.items():
        alone = groups.get(("soft_kl", *where), {})
        found += [Target(f"share of a DiscreteVAE's step in the quantizer, {peer}, {_place(row)}",
                         alone[peer].min_s / row.min_s, "<=", None)
                  for peer, row in group.items() if op == "dvae_step" and peer in alone]
        ours = group.get(OURS)
        for rival, limit in _limits(ours.op, ours.shape[3]) if ours else ():
            if rival in group:
                found.append(Target(f"against {rival}, {_place(ours)}", group[rival].min_s / ours.min_s, ">=", limit))
    return found


def _place(row: Row) -> str:
    return f"{row.op} {'x'.join(map(str, row.shape))}, {row.threads} thread{'s' * (row.threads > 1)}"


@functools.cache
def _limits(op: str, width: int) -> tuple[tuple[str, float], ...]:
    if op == "dvae_step":
        return ()
    if width > 128:  # bound by the matrix products
        return {"soft_fwd": ((EAGER, 2.0),), "soft": ((EAGER, 2.0),), "encode_indices": ((CONVOLUTION, 1.0),),
                "vector_quantize": ((DISTANCES, 1.0),)}.get(op, ())
    return {"soft_fwd": ((EAGER, 10.0), (COMPILED, 2.5)), "hard_fwd": ((EAGER, 20.0),),
            "soft": ((EAGER, 4.0), (COMPILED, 1.5)), "soft_kl": ((DALLE_KL, 6.0),)}.get(op, ())
