"""The attention family: both directions between two streams, the shared score, windows, and the sparse masks of DALL-E.

Inputs are seeded normal numbers in [B, S, H, D] views, as a Linear gives them. Ops that end in `_fwd` are the forward
alone; the others are forward and backward. `co_attention_ragged_fwd` has lengths between a third and the whole.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import (
    Floor,
    Peer,
    Row,
    Settings,
    Skip,
    Step,
    Workload,
    clock_for,
    compare,
    compile_skip,
    describe,
    interleave,
    measure_group,
    summarise,
    upstream_like,
)
from .report import Target

NAME = "attention"
TESTS = "tests/ops/test_attention.py"
OPS = ("co_attention_fwd", "co_attention", "co_attention_ragged_fwd")
DTYPES = ("float32", "bfloat16")
# (B, text, regions, heads, width): ViLBERT, its VQA, LXMERT with a batch and alone, METER
SHAPES = ((64, 38, 37, 8, 128), (64, 38, 101, 8, 128), (64, 23, 101, 8, 128), (64, 20, 36, 12, 64), (1, 20, 36, 12, 64),
          (32, 40, 50, 12, 64), (8, 40, 577, 12, 64))
QUICK_SHAPES = ((4, 20, 36, 12, 64), (1, 20, 36, 12, 64))
# measured beside the grid, float32: (B, image, text, heads, width) of GLIP, (B, side, window, shift, heads, width) of
# Swin-T's first stage, (B, text, side, heads, width) of DALL-E
OTHERS = {"bi_attention_fwd": (1, 4096, 256, 8, 256), "bi_attention": (1, 4096, 256, 8, 256),
          "window_attention_fwd": (8, 56, 7, 3, 3, 32), "window_attention": (8, 56, 7, 3, 3, 32),
          "axial_attention_fwd": (1, 256, 32, 16, 64)}
QUICK_OTHERS = {"bi_attention_fwd": (1, 256, 64, 2, 64), "bi_attention": (1, 256, 64, 2, 64),
                "window_attention_fwd": (1, 14, 7, 3, 3, 32), "window_attention": (1, 14, 7, 3, 3, 32),
                "axial_attention_fwd": (1, 64, 8, 4, 64)}

OURS, SDPA, NAIVE, COMPILED = "vlmfast", "two SDPA calls", "two matmul-softmax-matmul", "compiled matmul-softmax-matmul"
MASKED, MASKED_ONE = "two SDPA calls, bool mask", "SDPA, bool mask"
TIMM, FUSED = "Swin, default path", "Swin, SDPA path"
PRODUCTS = "matrix products"
DROPOUT = 0.1


def _family(workload: Workload) -> str:
    return next(name for name in ("bi", "window", "axial", "co") if workload.op.startswith(name))


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """The streams of the op, and the two lengths of a ragged one. The generator runs on the CPU."""
    generator = torch.Generator().manual_seed(0)
    wants_gradient = not workload.op.endswith("_fwd")

    def stream(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator).to(workload.device, workload.torch_dtype)
        return tensor.requires_grad_(wants_gradient)

    kind = _family(workload)
    if kind == "window":
        batch, side, window, _, heads, width = workload.shape
        return stream(batch, side, side, 3, heads, width), stream((2 * window - 1) ** 2, heads)
    if kind == "axial":
        batch, text, side, heads, width = workload.shape
        return tuple(stream(batch, text + side * side, heads, width) for _ in range(3))
    batch, sa, sb, heads, width = workload.shape
    if kind == "bi":
        return tuple(stream(batch, s, heads, width) for s in (sa, sb, sb, sa))
    streams = [stream(batch, s, heads, width) for s in (sa, sa, sa, sb, sb, sb)]
    if "ragged" not in workload.op:
        return tuple(streams)
    lengths = [torch.randint((s + 2) // 3, s + 1, (batch,), generator=generator) for s in (sa, sb)]
    return *streams, *(n.to(workload.device) for n in lengths)


# The formulas a user would write


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = _heads_first(query, key, value)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    q, k, v = _heads_first(query, key, value)
    scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    probs = scores.softmax(-1)
    if mask is not None:
        probs = probs.nan_to_num(0.0)
    if dropout:
        probs = F.dropout(probs, dropout)
    return (probs @ v).transpose(1, 2)


def both(attend: Callable[..., Tensor], dropout: float = 0.0) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(query_a, key_a, value_a, query_b, key_b, value_b):
        return attend(query_a, key_b, value_b, None, dropout), attend(query_b, key_a, value_a, None, dropout)

    return run


def _valid(lengths: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=lengths.device) < lengths[:, None]


def both_masked(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """With masks made in advance; padded queries see nothing, so that every peer's rows there are 0."""
    made: dict[str, Tensor] = {}

    def run(query_a, key_a, value_a, query_b, key_b, value_b, lengths_a, lengths_b):
        if not made:
            a, b = _valid(lengths_a, query_a.shape[1]), _valid(lengths_b, query_b.shape[1])
            made["a"], made["b"] = (a[:, None, :, None] & b[:, None, None], b[:, None, :, None] & a[:, None, None])
        return attend(query_a, key_b, value_b, made["a"]), attend(query_b, key_a, value_a, made["b"])

    return run


def shared_by_sdpa(query_b: Tensor, key_a: Tensor, value_a: Tensor, value_b: Tensor) -> tuple[Tensor, Tensor]:
    return _sdpa(key_a, query_b, value_b), _sdpa(query_b, key_a, value_a)


def shared_plain(query_b: Tensor, key_a: Tensor, value_a: Tensor, value_b: Tensor) -> tuple[Tensor, Tensor]:
    q, k, va, vb = _heads_first(query_b, key_a, value_a, value_b)
    scores = q @ k.transpose(-1, -2) * query_b.shape[-1] ** -0.5
    outs = scores.transpose(-1, -2).softmax(-1) @ vb, scores.softmax(-1) @ va
    return tuple(out.transpose(1, 2) for out in outs)


def swin(workload: Workload, fused: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Roll, cut, attend with an additive bias and the mask of -100, put back. Index and mask are made in advance."""
    batch, side, width, shift, heads, dim = workload.shape
    count = side // width
    at = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(width), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None] + width - 1
    index = (offset[0] * (2 * width - 1) + offset[1]).flatten().to(workload.device)
    axis = torch.arange(side)
    part = (axis >= side - width).long() + (axis >= side - shift).long() if shift else torch.zeros_like(axis)
    region = (3 * part[:, None] + part).view(count, width, count, width).transpose(1, 2).reshape(-1, width * width)
    mask = ((region[:, :, None] != region[:, None]) * -100.0).to(workload.device, workload.torch_dtype)

    def run(qkv: Tensor, table: Tensor) -> Tensor:
        rolled = torch.roll(qkv, (-shift, -shift), (1, 2)).view(batch, count, width, count, width, 3, heads, dim)
        parts = rolled.transpose(2, 3).reshape(-1, width * width, 3, heads, dim).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        bias = table[index].view(width * width, width * width, heads).permute(2, 0, 1)[None]
        if fused:
            every = bias + mask[:, None].repeat(batch, 1, 1, 1)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=every)
        else:
            scores = (query * dim**-0.5) @ key.transpose(-1, -2) + bias
            scores = scores.view(batch, -1, heads, width * width, width * width) + mask[:, None]
            out = scores.view(-1, heads, width * width, width * width).softmax(-1) @ value
        out = out.transpose(1, 2).reshape(batch, count, count, width, width, heads * dim).transpose(2, 3)
        out = torch.roll(out.reshape(batch, side, side, heads * dim), (shift, shift), (1, 2))
        return out.view(batch, side, side, heads, dim)

    return run


def row_mask(workload: Workload) -> Tensor:
    """[L, L], True where an image position of DALL-E's row attention sees: text, and the last `side` positions."""
    _, text, side, _, _ = workload.shape
    at = torch.arange(text + side * side)
    back = at[:, None] - at
    image = (at >= text)[:, None] & (at >= text)
    return ((back >= 0) & (~image | (back <= side))).to(workload.device)


def axial_by(attend: Callable[..., Tensor], workload: Workload) -> Callable[..., Tensor]:
    mask = row_mask(workload)[None, None]
    return lambda query, key, value: attend(query, key, value, mask)


# The truth: the plain formulas in float64


def truth(workload: Workload, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    co = both_masked if "ragged" in workload.op else both
    formulas = {"co": lambda: co(_plain), "bi": lambda: shared_plain, "window": lambda: swin(workload, False),
                "axial": lambda: axial_by(_plain, workload)}
    formula = formulas[_family(workload)]()
    doubles = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in tensors]
    step = Step(formula, doubles)
    step.upstream = [upstream_like(x.to(workload.torch_dtype)).double() for x in step.outputs()]
    outputs, gradients = step()
    found = {f"out {i}": x.detach() for i, x in enumerate(outputs)}
    return found | {f"gradient {i}": x for i, x in enumerate(gradients)}


# Peers and floors


def load_ops():
    """`vlmfast.ops`; a function of its own, so that the harness can be tested without the package."""
    from vlmfast import ops

    return ops


def _ours(workload: Workload, dropout: float = 0.0) -> Callable[..., tuple[Tensor, ...] | Tensor]:
    ops, kind = load_ops(), _family(workload)
    if kind == "window":
        _, _, window, shift, _, _ = workload.shape
        return functools.partial(ops.window_attention, window=window, shift=shift)
    if kind == "axial":
        _, text, side, _, _ = workload.shape
        return functools.partial(ops.axial_attention, text_len=text, grid=(side, side), mode="row")
    if kind == "bi":
        return lambda *streams: ops.bi_attention(*streams)[:2]
    if "ragged" in workload.op:
        return lambda *x: ops.co_attention(*x[:6], lengths_a=x[6], lengths_b=x[7])[:2]
    return lambda *streams: ops.co_attention(*streams, dropout_a=dropout, dropout_b=dropout)[:2]


def _compiled(formula: Callable, skip: str | None) -> Peer:
    def make(workload: Workload) -> Callable:
        torch._dynamo.reset()
        return torch.compile(formula, fullgraph=True, dynamic=False)

    return Peer(COMPILED, make, floor=PRODUCTS, skip=compile_skip(skip))


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    """Ours first, then what a user could write instead."""
    try:
        load_ops()
        found = [Peer(OURS, _ours, ours=True, floor=PRODUCTS)]
    except (ImportError, AttributeError) as error:
        found = [Peer(OURS, lambda w: None, ours=True, skip=describe(error))]
    kind = _family(workload)
    no_compile = "left out by --quick" if quick else None
    if "ragged" in workload.op:
        rivals = [(MASKED, lambda w: both_masked(_sdpa))]
    elif kind == "co":
        rivals = [(SDPA, lambda w: both(_sdpa)), (NAIVE, lambda w: both(_plain))]
        found.append(_compiled(both(_plain), no_compile))
    elif kind == "bi":
        rivals = [(SDPA, lambda w: shared_by_sdpa), (NAIVE, lambda w: shared_plain)]
    elif kind == "window":
        rivals = [(TIMM, lambda w: swin(w, False)), (FUSED, lambda w: swin(w, True))]
    else:
        rivals = [(MASKED_ONE, lambda w: axial_by(_sdpa, w))]
    return found + [Peer(name, make, floor=PRODUCTS) for name, make in rivals]


def _products(workload: Workload) -> list[tuple[int, int, int, int]]:
    """(count, M, K, N) of the products that the forward needs; a ragged one is counted whole."""
    kind = _family(workload)
    if kind == "window":
        batch, side, window, _, heads, width = workload.shape
        units, size = batch * (side // window) ** 2 * heads, window * window
        return [(units, size, width, size), (units, size, size, width)]
    if kind == "axial":
        batch, text, side, heads, width = workload.shape
        units = batch * heads
        rows = [(units, text, width, text), (units, text, text, width)]
        return rows + [(units * side, side, width, text + side), (units * side, side, text + side, width)]
    batch, sa, sb, heads, width = workload.shape
    units, scores = batch * heads, [(batch * heads, sa, width, sb)]
    values = [(units, sa, sb, width), (units, sb, sa, width)]
    return scores + values if kind == "bi" else 2 * scores + values


def floors(workload: Workload) -> list[Floor]:
    """The matrix products alone, on contiguous operands: the forward's, and twice as many again for the backward."""
    generator = torch.Generator().manual_seed(2)
    dtype = torch.float32 if workload.device == "cpu" else workload.torch_dtype
    operands = [tuple(torch.randn(shape, generator=generator).to(workload.device, dtype)
                      for shape in ((count, m, k), (count, k, n))) for count, m, k, n in _products(workload)]
    times = 1 if workload.op.endswith("_fwd") else 3

    def run():
        for _ in range(times):
            for left, right in operands:
                torch.bmm(left, right)

    return [Floor(PRODUCTS, run, "torch.bmm")]


# Figures beside the grid


def extras(settings: Settings, device: str) -> Iterator[Row | Skip]:
    """The other ops at their own sizes, and co-attention with dropout, whose draws differ between libraries."""
    threads = 1
    for op, shape in (QUICK_OTHERS if settings.quick else OTHERS).items():
        workload = Workload(op, shape, device=device, threads=threads)
        rows, skips = measure_group(sys.modules[__name__], workload, settings)
        yield from rows
        yield from skips
    for shape in settings.shapes or (QUICK_SHAPES if settings.quick else SHAPES):
        yield from _with_dropout(Workload("co_attention_dropout", shape, device=device, threads=threads), settings)


def _with_dropout(workload: Workload, settings: Settings) -> list[Row]:
    if workload.device == "cpu":
        torch.set_num_threads(workload.threads)
    tensors = inputs(workload)
    calls = {Peer(OURS, _ours, ours=True): _ours(workload, DROPOUT), Peer(SDPA, _ours): both(_sdpa, DROPOUT),
             Peer(NAIVE, _ours): both(_plain, DROPOUT)}
    clock, measure = clock_for(workload)
    samples = interleave({peer.name: Step(call, tensors) for peer, call in calls.items()}, measure, settings)
    rows = [Row.of("time", NAME, workload, peer, clock=clock, **summarise(samples[peer.name])) for peer in calls]
    compare(rows)
    return rows


def targets(rows: Sequence[Row]) -> list[Target]:
    """The figures of the design, from the rows measured on the CPU with one thread; none for other devices."""
    rows = [row for row in rows if row.device == "cpu" and row.threads == 1 and row.kind == "time"]
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.op, row.dtype, tuple(row.shape)), {})[row.peer] = row
    found = []
    for (op, dtype, shape), group in groups.items():
        if OURS not in group:
            continue
        at = f"{op} {dtype} {'x'.join(map(str, shape))}"
        if dtype == "bfloat16":
            wide = groups.get((op, "float32", shape), {}).get(OURS)
            if wide:
                found.append(Target(f"float32 over bfloat16, {at}", wide.min_s / group[OURS].min_s, ">=", 1.0))
            continue
        for rivals, limit in _limits(op, shape):
            times = [group[name].min_s for name in rivals if name in group]
            if times:
                value = min(times) / group[OURS].min_s
                found.append(Target(f"against {' or '.join(rivals)}, {at}", value, ">=", limit))
    return found


def _limits(op: str, shape: tuple[int, ...]) -> list[tuple[list[str], float]]:
    return {
        "co_attention_fwd": [([SDPA], 1.7 if shape[0] == 1 else 1.3)],
        "co_attention": [([SDPA, NAIVE], 1.5)],
        "co_attention_ragged_fwd": [([MASKED], 2.0)],
        "co_attention_dropout": [([SDPA, NAIVE], 2.0)],
        "bi_attention_fwd": [([SDPA, NAIVE], 1.4)],
        "bi_attention": [([SDPA, NAIVE], 1.4)],
        "window_attention_fwd": [([TIMM], 3.0), ([FUSED], 1.7)],
        "axial_attention_fwd": [([MASKED_ONE], 5.0)],
    }.get(op, [])
