"""How the attention ops reach a backend: one or two directions and their gradients, as plain calls or as ops."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import attention_native as native
from . import dispatch
from .autograd import first_order

CAUSAL, PROBS, PROBS_DROPOUT, LSE, KEEP = 1, 2, 4, 8, 16
# the native backend keeps probabilities with the queries in the last dimension, padded to whole vectors
KEPT_LANES = 16


class Options(NamedTuple):
    """Optional tensors of one direction, in the order in which they cross the op; see `reference.attention.forward`.

    rows_q [G, Sq], rows_k [G, Sk] and regions [G, Sq] are for the native and the Triton backend: sequence b G + g
    consists of those rows of sample b (-1: no key), and with regions a query sees the keys of its own region. Sequences
    may share keys unless Sq = Sk.
    """
    lengths_q: Tensor | None = None
    lengths_k: Tensor | None = None
    key_mask: Tensor | None = None
    mask: Tensor | None = None
    prefix: Tensor | None = None
    pair_q: Tensor | None = None
    pair_k: Tensor | None = None
    cu_q: Tensor | None = None
    cu_k: Tensor | None = None
    rows_q: Tensor | None = None
    rows_k: Tensor | None = None
    regions: Tensor | None = None


class Direction(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    options: Options
    scale: float
    dropout: float
    flags: int


class _Static(NamedTuple):
    """What of a call is no tensor; `slots` tell where query, key, value, bias and each option are among the tensors."""
    name: str
    scale: list[float]
    dropout: list[float]
    flags: list[int]
    slots: list[tuple[int, ...]]


_NO_OPTIONS = Options()


def run(name: str, directions: list[Direction], seed: Tensor | None) -> list[tuple]:
    """[(out, probs or None, lse or None)] of each direction; `flags` say which of the last two are wanted."""
    wants_gradient = False
    if torch.is_grad_enabled():
        for d in directions:
            bias = d.bias
            if d.query.requires_grad or d.key.requires_grad or d.value.requires_grad \
                    or bias is not None and bias.requires_grad:
                wants_gradient = True
    if wants_gradient:
        static, tensors = _flatten(name, directions)
        found = _Attention.apply(static, seed, *tensors)
    elif needs_no_op(directions[0].query):
        return [results[:3] for results in _forward(name, directions, seed)]
    else:
        found = _call_fwd_op(name, directions, seed)
    if not wants_gradient:
        return [tuple(results[:3]) for results in found]
    flat = iter(found)
    return [(next(flat), next(flat) if d.flags & PROBS else None, next(flat) if d.flags & LSE else None)
            for d in directions]


def needs_no_op(x: Tensor) -> bool:
    """With plain tensors and no tracer nobody sees the op, whose boxing takes as long as a small call."""
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def _flatten(name: str, directions: list[Direction]) -> tuple[_Static, list[Tensor]]:
    """Each tensor once, which compilers insist on; -1 stands for None."""
    static, tensors = _Static(name, [], [], [], []), []
    for d in directions:
        static.scale.append(d.scale)
        static.dropout.append(d.dropout)
        static.flags.append(d.flags)
        slots = []
        for x in d[:4] if d.options is _NO_OPTIONS else (*d[:4], *d.options):
            slot = -1
            if x is not None:
                for at, known in enumerate(tensors):
                    if known is x:
                        slot = at
                if slot < 0:
                    slot = len(tensors)
                    tensors.append(x)
            slots.append(slot)
        static.slots.append(tuple(slots))
    return static, tensors


def _unflatten(static: _Static, tensors, keep: int) -> list[Direction]:
    directions = []
    for scale, dropout, flags, slots in zip(*static[1:], strict=True):
        found = [tensors[slot] if slot >= 0 else None for slot in slots]
        options = Options(*found[4:]) if len(found) > 4 else _NO_OPTIONS
        directions.append(Direction(*found[:4], options, scale, dropout, flags | keep))
    return directions


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, static, seed, *tensors):
        directions = _unflatten(static, tensors, KEEP)
        if needs_no_op(tensors[0]):
            found = _forward(static.name, directions, seed)
        else:
            found = _call_fwd_op(static.name, directions, seed)
        kept = [results[3] for results in found]
        if dispatch.choose("attention", tensors[0]) == "triton":
            kept += [results[0] for results in found]
        ctx.static = static
        ctx.save_for_backward(seed, *tensors, *kept)
        return tuple(x for results, flags in zip(found, static.flags, strict=True)
                     for x, wanted in zip(results, (True, flags & PROBS, flags & LSE), strict=False) if wanted)

    @staticmethod
    @first_order("attention")
    def backward(ctx, *upstream):
        static, (seed, *tensors) = ctx.static, ctx.saved_tensors
        count = 1 + max(slot for slots in static.slots for slot in slots)
        tensors, kept = tensors[:count], tensors[count:]
        directions = _unflatten(static, tensors, 0)
        flat, gradients = iter(upstream), []
        for flags in static.flags:
            gradients.append((next(flat), next(flat) if flags & PROBS else None, next(flat) if flags & LSE else None))
        wanted = ctx.needs_input_grad[2:]
        needs = [tuple(slot >= 0 and wanted[slot] for slot in slots[:4]) for slots in static.slots]
        if needs_no_op(tensors[0]):
            found = _backward(static.name, gradients, directions, seed, kept, needs)
        else:
            found = _call_bwd_op(static.name, gradients, directions, seed, kept, needs)
        results = [None] * len(tensors)
        for parts, need, slots in zip(found, needs, static.slots, strict=True):
            for gradient, needed, slot in zip(parts, need, slots, strict=False):
                if needed:
                    results[slot] = gradient if results[slot] is None else results[slot] + gradient
        return None, None, *results


def module_options(backend: str, direction: Direction, seed: Tensor | None, index: int) -> dict:
    """Keyword arguments of the primitives of a backend module: those of `reference.attention`, Triton takes tables."""
    o = direction.options
    tables = {"rows_q": o.rows_q, "rows_k": o.rows_k, "regions": o.regions} if backend == "triton" else {}
    return tables | {"lengths_q": o.lengths_q, "lengths_k": o.lengths_k, "key_mask": o.key_mask, "mask": o.mask,
            "bias": direction.bias, "prefix": o.prefix, "pair_q": o.pair_q, "pair_k": o.pair_k, "cu_q": o.cu_q,
            "cu_k": o.cu_k, "seed": seed, "scale": direction.scale, "causal": bool(direction.flags & CAUSAL),
            "dropout": direction.dropout, "direction": index,
            "probs_dropout": bool(direction.flags & PROBS_DROPOUT)}


def sizes(d: Direction) -> tuple[int, int, int, int]:
    """(sequences, heads, Sq, Sk); packed streams count as one sequence."""
    if d.options.cu_q is not None:
        return d.options.cu_q.shape[0] - 1, d.query.shape[1], d.query.shape[0], d.key.shape[0]
    if d.options.rows_q is not None:
        groups, sq = d.options.rows_q.shape
        return d.query.shape[0] * groups, d.query.shape[2], sq, d.options.rows_k.shape[1]
    pair = d.options.pair_q
    return (d.query if pair is None else pair).shape[0], d.query.shape[2], d.query.shape[1], d.key.shape[1]


def out_shapes(d: Direction, size: tuple[int, int, int, int], backend: str) -> tuple:
    """Shapes of out, probs, lse and what the forward keeps for the backward; None for what is not wanted.

    The native backend keeps probabilities, Triton two numbers per query (and reads out again).
    """
    batch, heads, sq, sk = size
    dv, packed, tables = d.value.shape[-1], d.options.cu_q is not None, d.options.rows_q is not None
    lines, kept = (sq, heads) if packed else (batch, heads, sq), None
    if backend == "triton":
        kept = (2, *lines) if d.flags & KEEP else None
    elif backend == "native" and not packed:
        kept = _kept_shape(d, batch, heads, sq, sk)
    return ((*d.query.shape[:-1], dv) if packed or tables else (batch, sq, heads, dv),
            (batch, heads, sq, sk) if d.flags & PROBS and not packed else None, lines if d.flags & LSE else None, kept)


def _kept_shape(d: Direction, batch: int, heads: int, sq: int, sk: int) -> tuple | None:
    # probabilities that are as small as the inputs are kept rather than computed again
    if not d.flags & KEEP or 2 * sq * sk > d.query.shape[-1] * (sq + sk):
        return None
    return batch, heads, sk, -(-sq // KEPT_LANES) * KEPT_LANES


def check_positions(name: str, d: Direction, index: int) -> None:
    """Values that no shape shows: lengths, offsets and indices. Reads the tensors, so CPU only."""
    o = d.options
    two = name.startswith(("co_", "bi_"))
    if name == "attention":
        letters = "", ""
    elif two:
        letters = ("_a", "_b") if index == 0 else ("_b", "_a")
    else:
        letters = "_q", "_k"
    for letter, lengths, cu, pair, x in ((letters[0], o.lengths_q, o.cu_q, o.pair_q, d.query),
                                         (letters[1], o.lengths_k, o.cu_k, o.pair_k, d.key)):
        if lengths is not None and len(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > x.shape[1]:
                raise ValueError(f"{name}: lengths{letter} reaches from {low} to {high}, it must lie between 0 and "
                                 f"{x.shape[1]}")
        if pair is not None and len(pair):
            low, high = int(pair.min()), int(pair.max())
            if low < 0 or high >= x.shape[0]:
                raise ValueError(f"{name}: pair{letter} reaches from {low} to {high}, it must lie between 0 and "
                                 f"{x.shape[0] - 1}")
        if cu is not None:
            if int(cu[0]) != 0 or bool((cu.diff() < 0).any()) or int(cu[-1]) > x.shape[0]:
                raise ValueError(f"{name}: cu{letter} must start at 0, never fall and end at {x.shape[0]} at most, "
                                 f"it starts at {int(cu[0])} and ends at {int(cu[-1])}")


def _refuse(name: str, directions: list[Direction]):
    for index, d in enumerate(directions):
        check_positions(name, d, index)
    raise ValueError(f"{name}: a length, an offset or an index leaves its stream")


def _forward(name: str, directions: list[Direction], seed: Tensor | None) -> list[tuple]:
    """[(out, probs, lse, kept)] of each direction, None for what is not wanted."""
    query = directions[0].query
    backend = dispatch.choose("attention", query)
    if backend != "native":
        return [_forward_elsewhere(name, backend, d, seed, index) for index, d in enumerate(directions)]
    dtype = query.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results, calls = [], []
    for index, d in enumerate(directions):
        size = sizes(d)
        out, probs, lse, kept = out_shapes(d, size, "native")
        found = (query.new_empty(out), None if probs is None else query.new_empty(probs),
                 None if lse is None else torch.empty(lse, dtype=wide),
                 None if kept is None else torch.empty(kept, dtype=wide))
        call = native.direction(d, size, bool(d.flags & CAUSAL), bool(d.flags & PROBS_DROPOUT), seed, index)
        native.outputs(call, *found)
        results.append(found)
        calls.append(call)
    if native.forward(calls):
        _refuse(name, directions)
    return results


def _forward_elsewhere(name: str, backend: str, d: Direction, seed: Tensor | None, index: int) -> tuple:
    device, flags = d.query.device.type, d.flags
    if device == "cpu":
        check_positions(name, d, index)
    module, options = dispatch.module("attention", backend), module_options(backend, d, seed, index)
    with torch.autocast(device, enabled=False):
        if backend == "triton":
            return module.forward_with_statistics(*d[:3], bool(flags & PROBS), bool(flags & LSE), bool(flags & KEEP),
                                                  **options)
        out, probs, lse = module.forward(*d[:3], **options)
    return out, probs if flags & PROBS else None, lse if flags & LSE else None, None


def _backward(name: str, gradients, directions: list[Direction], seed: Tensor | None, kept, needs) -> list[tuple]:
    """[(d_query, d_key, d_value, d_bias)] of each direction, None for what is not needed.

    `gradients` are (d_out, d_probs, d_lse) and `needs` four bools of each direction.
    """
    query = directions[0].query
    backend = _backward_backend(query, kept, len(directions))
    if backend != "native":
        return _backward_elsewhere(backend, gradients, directions, seed, kept, needs)
    results, calls, alive = [], [], []
    for index, (d, (d_out, d_probs, d_lse), wanted) in enumerate(zip(directions, gradients, needs, strict=True)):
        dtype = d.query.dtype
        o = d.options
        # rows that several sequences share are summed in the working type
        if dtype.itemsize == 2 and (o.pair_q is not None or o.rows_q is not None and o.rows_q.shape != o.rows_k.shape):
            dtype = torch.float32
        found = [torch.empty(x.shape, dtype=dtype) if need else None for x, need in zip(d[:3], wanted, strict=False)]
        found.append(torch.empty(d.bias.shape, dtype=d.bias.dtype) if wanted[3] else None)
        if d_out.dtype != d.query.dtype or d_out.stride(-1) != 1:
            d_out = d_out.to(d.query.dtype).contiguous()
        d_probs, d_lse = (None if g is None else g.contiguous() for g in (d_probs, d_lse))
        alive.append((d_out, d_probs, d_lse))
        call = native.direction(d, sizes(d), bool(d.flags & CAUSAL), bool(d.flags & PROBS_DROPOUT), seed, index)
        native.gradients(call, d_out, d_probs, d_lse, kept[index], found, dtype)
        calls.append(call)
        results.append(found)
    if native.backward(calls):
        _refuse(name, directions)
    return [tuple(g if g is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(found, d[:4], strict=True))
            for found, d in zip(results, directions, strict=True)]


def _backward_backend(query: Tensor, kept, directions: int) -> str:
    """The backend whose forward has kept something, since only it can read that; else the chosen one."""
    if len(kept) > directions:
        return "triton"
    if any(x is not None and x.numel() for x in kept):
        return "native"
    return dispatch.choose("attention", query)


def _backward_elsewhere(backend: str, gradients, directions: list[Direction], seed, kept, needs) -> list[tuple]:
    module, results = dispatch.module("attention", backend), []
    with torch.autocast(directions[0].query.device.type, enabled=False):
        for index, (d, upstream, need) in enumerate(zip(directions, gradients, needs, strict=True)):
            options = module_options(backend, d, seed, index)
            if backend == "triton":
                saved = (kept[len(directions) + index], kept[index]) if len(kept) > len(directions) else None
                options |= {"saved": saved, "needs": need}
            found = module.backward(*upstream, *d[:3], **options)
            results.append(tuple(g if wanted else None for g, wanted in zip(found, need, strict=True)))
    return results


# The same as ops of torch.library, in flat lists: for compilers and tracers


def _lists(directions: list[Direction]):
    return ([x for d in directions for x in d[:3]], [d.bias for d in directions],
            [x for d in directions for x in d.options])


def _per_direction(inputs, bias, options, scale, dropout, flags) -> list[Direction]:
    width = len(Options._fields)
    return [Direction(*inputs[3 * i:3 * i + 3], bias[i], Options(*options[width * i:width * (i + 1)]), scale[i],
                      dropout[i], flags[i]) for i in range(len(flags))]


def _numbers(directions: list[Direction]):
    return [d.scale for d in directions], [d.dropout for d in directions], [d.flags for d in directions]


def _fours(flat) -> list[tuple]:
    return [tuple(flat[i:i + 4]) for i in range(0, len(flat), 4)]


def _call_fwd_op(name, directions, seed) -> list[tuple]:
    found = _fwd_op(*_lists(directions), seed, *_numbers(directions), name)
    return [(out, probs if d.flags & PROBS else None, lse if d.flags & LSE else None, kept)
            for d, (out, probs, lse, kept) in zip(directions, _fours(found), strict=True)]


def _call_bwd_op(name, gradients, directions, seed, kept, needs) -> list[tuple]:
    flat = [x for upstream in gradients for x in upstream]
    return _fours(_bwd_op(flat, *_lists(directions), seed, kept, *_numbers(directions), [n for w in needs for n in w],
                          name))


def _fwd(inputs, bias, options, seed, scale, dropout, flags, name):
    found = _forward(name, _per_direction(inputs, bias, options, scale, dropout, flags), seed)
    return [inputs[0].new_empty(0) if x is None else x for results in found for x in results]


def _fwd_fake(inputs, bias, options, seed, scale, dropout, flags, name):
    backend = dispatch.choose("attention", inputs[0])
    dtype = inputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for d in _per_direction(inputs, bias, options, scale, dropout, flags):
        for shape, kind in zip(out_shapes(d, sizes(d), backend), (dtype, dtype, wide, wide), strict=True):
            results.append(inputs[0].new_empty(0) if shape is None else inputs[0].new_empty(shape, dtype=kind))
    return results


def _bwd(gradients, inputs, bias, options, seed, kept, scale, dropout, flags, needs, name):
    directions = _per_direction(inputs, bias, options, scale, dropout, flags)
    upstream = [tuple(gradients[i:i + 3]) for i in range(0, len(gradients), 3)]
    found = _backward(name, upstream, directions, seed, kept, _fours(needs))
    return [inputs[0].new_empty(0) if x is None else x for results in found for x in results]


def _bwd_fake(gradients, inputs, bias, options, seed, kept, scale, dropout, flags, needs, name):
    results = []
    for index in range(len(flags)):
        sources = *inputs[3 * index:3 * index + 3], bias[index]
        for source, need in zip(sources, needs[4 * index:4 * index + 4], strict=True):
            results.append(source.new_empty(source.shape) if need else inputs[0].new_empty(0))
    return results


_library = torch.library.Library("vlmfast", "FRAGMENT")
_ARGUMENTS = ("Tensor[] inputs, Tensor?[] bias, Tensor?[] options, Tensor? seed, {}float[] scale, float[] dropout, "
              "int[] flags, {}str name) -> Tensor[]")
_library.define("attention_fwd(" + _ARGUMENTS.format("", ""))
_library.define("attention_bwd(Tensor?[] gradients, " + _ARGUMENTS.format("Tensor[] kept, ", "bool[] needs, "))
for _name, _run, _fake in (("attention_fwd", _fwd, _fwd_fake), ("attention_bwd", _bwd, _bwd_fake)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
_fwd_op, _bwd_op = torch.ops.vlmfast.attention_fwd.default, torch.ops.vlmfast.attention_bwd.default
