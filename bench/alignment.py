"""The alignment family: IPOT plans of word-region costs, and the optimal transport distance with its gradients.

Costs are 1 - cosine of seeded normal vectors. `ipot_ragged` has lengths between a third and the whole, and its last
example is padding alone. `optimal_transport` is forward and backward; the plan is a constant there for every peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Floor, Peer, Row, Settings, Skip, Step, Workload, compile_skip, copy_floor, describe, upstream_like
from .report import Target

NAME = "alignment"
TESTS = "tests/ops/test_alignment.py"
OPS = ("ipot", "ipot_ragged", "optimal_transport")
DTYPES = ("float32", "bfloat16")
# (B, words, regions, width): UNITER's batches, its longest texts, one example
SHAPES = ((64, 40, 50, 768), (64, 20, 36, 768), (16, 60, 100, 768), (1, 40, 50, 768))
QUICK_SHAPES = ((8, 20, 36, 64), (1, 20, 36, 64))

OURS, EAGER, COMPILED = "vlmfast", "batched loop", "compiled batched loop"
COPY = "kernel and plan, read and written every step"
BETA, ITERATIONS = 0.5, 50


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return 1 - F.normalize(x, dim=-1, eps=1e-5) @ F.normalize(y, dim=-1, eps=1e-5).transpose(1, 2)


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """The cost, or both sides' vectors, and two lengths. The generator runs on the CPU."""
    batch, n, m, width = workload.shape
    generator = torch.Generator().manual_seed(0)
    sides = [torch.randn(batch, rows, width, generator=generator) for rows in (n, m)]
    lengths = [torch.full((batch,), rows) for rows in (n, m)]
    if workload.op == "ipot_ragged":
        lengths = [torch.randint((rows + 2) // 3, rows + 1, (batch,), generator=generator) for rows in (n, m)]
        lengths[0][-1] = lengths[1][-1] = 0
    lengths = [x.to(workload.device) for x in lengths]
    if workload.op != "optimal_transport":
        return _cost(*sides).to(workload.device, workload.torch_dtype), *lengths
    return *(x.to(workload.device, workload.torch_dtype).requires_grad_() for x in sides), *lengths


# The formula a user would write


def plan_by_loop(cost: Tensor, lengths_x: Tensor, lengths_y: Tensor) -> Tensor:
    """UNITER's loop, batched: 1e4 in the denominators of padding, no example leaves early."""
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    pad_x = torch.arange(cost.shape[1], device=cost.device) >= lengths_x[:, None]
    pad_y = torch.arange(cost.shape[2], device=cost.device) >= lengths_y[:, None]
    pad = pad_x[:, :, None] | pad_y[:, None]
    kernel = torch.exp(-cost / BETA).masked_fill(pad, 0)
    n, m = (count.clamp(min=1)[:, None].to(cost.dtype) for count in (lengths_x, lengths_y))
    plan, sigma, extra_x, extra_y = (~pad).to(cost.dtype), ~pad_x / n, 1e4 * pad_x, 1e4 * pad_y
    for _ in range(ITERATIONS):
        q = kernel * plan
        delta = 1 / (m * torch.bmm(sigma[:, None], q)[:, 0] + extra_y)
        sigma = 1 / (n * torch.bmm(q, delta[:, :, None])[:, :, 0] + extra_x)
        plan = sigma[:, :, None] * q * delta[:, None]
    return plan.masked_fill(pad, 0)


def distance_by(plan_of: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(x, y, lengths_x, lengths_y):
        cost = _cost(*(side.to(torch.promote_types(side.dtype, torch.float32)) for side in (x, y)))
        return (plan_of(cost.detach(), lengths_x, lengths_y) * cost).sum((1, 2))

    return run


def by_loop(workload: Workload) -> Callable[..., Tensor]:
    return distance_by(plan_by_loop) if workload.op == "optimal_transport" else plan_by_loop


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    step = Step(by_loop(workload), doubles)
    step.upstream = [upstream_like(x.float()).double() for x in step.outputs()]
    outputs, gradients = step()
    found = {workload.op: outputs[0].detach()}
    return found | {f"gradient {i}": x for i, x in enumerate(gradients)}


# Peers and floors


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(workload: Workload) -> Callable[..., Tensor]:
    ops = load_ops()
    return ops.optimal_transport_distance if workload.op == "optimal_transport" else ops.ipot


def _compiled(workload: Workload) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    compiled = torch.compile(plan_by_loop, fullgraph=True, dynamic=False)
    return distance_by(compiled) if workload.op == "optimal_transport" else compiled


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then what a user could write instead."""
    try:
        load_ops()
        found = [Peer(OURS, _ours, ours=True, floor=COPY)]
    except (ImportError, AttributeError) as error:
        found = [Peer(OURS, lambda w: None, ours=True, skip=describe(error))]
    skip = compile_skip("left out by --quick" if quick else None)
    return found + [Peer(EAGER, by_loop, floor=COPY), Peer(COMPILED, _compiled, floor=COPY, skip=skip)]


def floors(workload: Workload) -> list[Floor]:
    """The traffic of the steps alone, in float32 and without padding skipped: both matrices read, the plan written."""
    batch, n, m, _ = workload.shape
    copy = copy_floor(3 * 4 * batch * n * m, workload.device)

    def run():
        for _ in range(ITERATIONS):
            copy()

    return [Floor(COPY, run, "torch.copy_")]


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    yield from ()


def targets(rows: Sequence[Row]) -> list[Target]:
    """Plans against the eager loop on the CPU with one thread, and their accuracy."""
    found = []
    for row in rows:
        if row.ours and row.device == "cpu" and row.threads == 1 and row.kind == "time":
            at = f"{row.op} {row.dtype} {'x'.join(map(str, row.shape))}"
            if EAGER in row.ratio_to:
                least = 1.0 if row.op == "optimal_transport" else 3.0  # there the products outweigh the plan
                found.append(Target(f"against the {EAGER}, {at}", row.ratio_to[EAGER], ">=", least))
            if row.dtype == "float32" and row.op in row.error:
                found.append(Target(f"relative error, {at}", row.error[row.op], "<=", 1e-5, unit=""))
    return found
