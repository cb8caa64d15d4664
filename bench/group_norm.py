"""The group_norm family: GroupNorm, scale and shift, and SiLU, at the sizes of GLIDE's residual blocks.

Activations are [B, C, side, side] seeded normal numbers, in 32 groups. Ops that end in `_fwd` are the forward alone;
`modulated` ones have scale and shift.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Floor, Peer, Row, Settings, Skip, Step, Workload, compile_skip, copy_floor, describe, upstream_like
from .report import Target

NAME = "group_norm"
TESTS = "tests/ops/test_group_norm.py"
OPS = ("modulated_fwd", "plain_fwd", "modulated", "plain")
DTYPES = ("float32",)
# (B, C, side): GLIDE's base model with guidance, its upsampler's first level, and a model for small pictures
SHAPES = ((2, 192, 64), (2, 384, 32), (2, 768, 8), (1, 192, 256), (16, 64, 32))
QUICK_SHAPES = ((2, 64, 16),)
GROUPS = 32

OURS, EAGER, COMPILED = "vlmfast", "F.group_norm, F.silu", "compiled F.group_norm, F.silu"
COPY = "activations and gradients read and written once"
LEAST = 1.2  # against both, or the family is not worth its place


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """x, weight, bias and, where modulated, scale and shift. The generator runs on the CPU."""
    batch, channels, side = workload.shape
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, channels, side, side), (channels,), (channels,)]
    shapes += [(batch, channels)] * 2 if workload.op.startswith("modulated") else []
    wanted = not workload.op.endswith("_fwd")
    return tuple(torch.randn(shape, generator=generator).to(workload.device, workload.torch_dtype)
                 .requires_grad_(wanted) for shape in shapes)


def formula(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None = None,
            shift: Tensor | None = None) -> Tensor:
    """What the public code of ADM and GLIDE writes."""
    z = F.group_norm(x, GROUPS, weight, bias, 1e-5)
    if scale is not None:
        z = z * (1 + scale[..., None, None]) + shift[..., None, None]
    return F.silu(z)


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    step = Step(formula, doubles)
    step.upstream = [upstream_like(x.float()).double() for x in step.outputs()]
    outputs, gradients = step()
    return {"out": outputs[0].detach()} | {f"gradient {i}": x for i, x in enumerate(gradients)}


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(workload: Workload) -> Callable[..., Tensor]:
    op = load_ops().group_norm_silu

    def run(x, weight, bias, scale=None, shift=None):
        return op(x, GROUPS, weight, bias, scale=scale, shift=shift)

    return run


def _compiled(workload: Workload) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(formula, fullgraph=True, dynamic=False)


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then what a user could write instead."""
    try:
        load_ops()
        found = [Peer(OURS, _ours, ours=True, floor=COPY)]
    except (ImportError, AttributeError) as error:
        found = [Peer(OURS, lambda w: None, ours=True, skip=describe(error))]
    skip = compile_skip("left out by --quick" if quick else None)
    return found + [Peer(EAGER, lambda w: formula, floor=COPY), Peer(COMPILED, _compiled, floor=COPY, skip=skip)]


def floors(workload: Workload) -> list[Floor]:
    """x read and y written; with a backward also x and the gradient read, and that of x written."""
    batch, channels, side = workload.shape
    passes = 2 if workload.op.endswith("_fwd") else 5
    size = passes * batch * channels * side * side * workload.torch_dtype.itemsize
    return [Floor(COPY, copy_floor(size, workload.device), "torch.copy_")]


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    yield from ()


def targets(rows: Sequence[Row]) -> list[Target]:
    """Forward and backward against both rivals, on the CPU with one thread."""
    found = []
    for row in rows:
        if row.ours and row.device == "cpu" and row.threads == 1 and row.kind == "time":
            at = f"{row.op} {row.dtype} {'x'.join(map(str, row.shape))}"
            least = None if row.op.endswith("_fwd") else LEAST
            found += [Target(f"against {rival}, {at}", row.ratio_to[rival], ">=", least)
                      for rival in (EAGER, COMPILED) if rival in row.ratio_to]
    return found
