"""How the attention ops reach a backend: one call for one or two directions, its gradient, the checks at the door."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import attention_native as native
from . import dispatch
from .attention_native import DTYPES
from .autograd import first_order

CAUSAL, PROBS, PROBS_DROPOUT, LSE, KEEP = 1, 2, 4, 8, 16
# the native backend keeps probabilities with the queries in the last dimension, padded to whole vectors
KEPT_LANES = 16


class Options(NamedTuple):
    """Optional tensors of one direction, in the order in which they cross the op; see `reference.attention.forward`.

    rows_q [G, Sq], rows_k [G, Sk] and regions [G, Sq] are the native backend's: sequence b G + g consists of those
    rows of sample b (-1: no row), and with regions a query sees the keys of its own region.
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
    name: str
    scale: list[float]
    dropout: list[float]
    flags: list[int]


def run(name: str, directions: list[Direction], seed: Tensor | None) -> list[tuple]:
    """[(out, probs or None, lse or None)] of each direction; `flags` say which of the last two are wanted."""
    wants_gradient = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for d in directions for x in d[:4])
    # with plain tensors nobody needs to see the op, whose boxing takes as long as a small call
    if not wants_gradient and type(directions[0].query) is Tensor and not torch.compiler.is_compiling() \
            and not torch._C._len_torch_dispatch_stack():
        return [found[:3] for found in _forward(name, directions, seed)]
    static = _Static(name, *(list(x) for x in zip(*((d.scale, d.dropout, d.flags) for d in directions), strict=True)))
    inputs = [x for d in directions for x in d[:3]]
    bias = [d.bias for d in directions]
    options = [x for d in directions for x in d.options]
    if wants_gradient:
        flat = iter(_Attention.apply(static, *inputs, *bias, *options, seed))
        return [(next(flat), next(flat) if f & PROBS else None, next(flat) if f & LSE else None)
                for f in static.flags]
    outputs = _fwd_op(inputs, bias, options, seed, static.scale, static.dropout, static.flags, name)
    return [(outputs[4 * i], outputs[4 * i + 1] if f & PROBS else None, outputs[4 * i + 2] if f & LSE else None)
            for i, f in enumerate(static.flags)]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, static, *tensors):
        count = len(static.flags)
        inputs, bias = list(tensors[:3 * count]), list(tensors[3 * count:4 * count])
        options, seed = list(tensors[4 * count:-1]), tensors[-1]
        outputs = _fwd_op(inputs, bias, options, seed, static.scale, static.dropout,
                          [f | KEEP for f in static.flags], static.name)
        ctx.static = static
        needs = ctx.needs_input_grad[1:4 * count + 1]
        ctx.needs = [need for i in range(count) for need in (*needs[3 * i:3 * i + 3], needs[3 * count + i])]
        ctx.save_for_backward(*tensors, *outputs[3::4])
        results = []
        for i, flags in enumerate(static.flags):
            results.append(outputs[4 * i])
            if flags & PROBS:
                results.append(outputs[4 * i + 1])
            if flags & LSE:
                results.append(outputs[4 * i + 2])
        return tuple(results)

    @staticmethod
    @first_order("attention")
    def backward(ctx, *upstream):
        static = ctx.static
        count = len(static.flags)
        saved = ctx.saved_tensors
        tensors, kept = saved[:-count], list(saved[-count:])
        flat, gradients = iter(upstream), []
        for flags in static.flags:
            gradients += [next(flat), next(flat) if flags & PROBS else None, next(flat) if flags & LSE else None]
        results = _bwd_op(gradients, list(tensors[:3 * count]), list(tensors[3 * count:4 * count]),
                          list(tensors[4 * count:-1]), tensors[-1], kept, static.scale, static.dropout, static.flags,
                          ctx.needs, static.name)
        results = [g if need else None for g, need in zip(results, ctx.needs, strict=True)]
        d_inputs = [g for i in range(count) for g in results[4 * i:4 * i + 3]]
        return None, *d_inputs, *results[3::4], *[None] * (len(tensors) - 4 * count)


def per_direction(inputs, bias, options, scale, dropout, flags) -> list[Direction]:
    width = len(Options._fields)
    return [Direction(*inputs[3 * i:3 * i + 3], bias[i], Options(*options[width * i:width * (i + 1)]), scale[i],
                      dropout[i], flags[i]) for i in range(len(flags))]


def reference_options(direction: Direction, seed: Tensor | None, index: int) -> dict:
    """Keyword arguments of the primitives in `reference.attention`, which every backend module takes."""
    o = direction.options
    return {"lengths_q": o.lengths_q, "lengths_k": o.lengths_k, "key_mask": o.key_mask, "mask": o.mask,
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


def out_shapes(d: Direction, native: bool) -> tuple:
    """Shapes of out, probs, lse and the probabilities kept for the backward; None for what is not wanted."""
    batch, heads, sq, sk = sizes(d)
    dv, options = d.value.shape[-1], d.options
    if options.cu_q is not None:
        return (*d.query.shape[:2], dv), None, (sq, heads) if d.flags & LSE else None, None
    if options.rows_q is not None:
        return (*d.query.shape[:3], dv), None, None, _kept_shape(d, batch, heads, sq, sk) if native else None
    return ((batch, sq, heads, dv), (batch, heads, sq, sk) if d.flags & PROBS else None,
            (batch, heads, sq) if d.flags & LSE else None, _kept_shape(d, batch, heads, sq, sk) if native else None)


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
        out, probs, lse, kept = out_shapes(d, True)
        found = (torch.empty(out, dtype=dtype), None if probs is None else torch.empty(probs, dtype=dtype),
                 None if lse is None else torch.empty(lse, dtype=wide),
                 None if kept is None else torch.empty(kept, dtype=wide))
        call = native.direction(d, sizes(d), bool(d.flags & CAUSAL), bool(d.flags & PROBS_DROPOUT), seed, index)
        call.outputs(*map(native.address, found))
        results.append(found)
        calls.append(call)
    if native.forward(calls):
        _refuse(name, directions)
    return results


def _forward_elsewhere(name: str, backend: str, d: Direction, seed: Tensor | None, index: int) -> tuple:
    device = d.query.device.type
    if device == "cpu":
        check_positions(name, d, index)
    with torch.autocast(device, enabled=False):
        out, probs, lse = dispatch.module("attention", backend).forward(
            d.query, d.key, d.value, **reference_options(d, seed, index))
    return out, probs if d.flags & PROBS else None, lse if d.flags & LSE else None, None


def _fwd(inputs, bias, options, seed, scale, dropout, flags, name):
    found = _forward(name, per_direction(inputs, bias, options, scale, dropout, flags), seed)
    return [inputs[0].new_empty(0) if x is None else x for results in found for x in results]


def _fwd_fake(inputs, bias, options, seed, scale, dropout, flags, name):
    is_native = dispatch.choose("attention", inputs[0]) == "native"
    dtype = inputs[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    results = []
    for d in per_direction(inputs, bias, options, scale, dropout, flags):
        for shape, kind in zip(out_shapes(d, is_native), (dtype, dtype, wide, wide), strict=True):
            results.append(inputs[0].new_empty(0) if shape is None else inputs[0].new_empty(shape, dtype=kind))
    return results


def _bwd(gradients, inputs, bias, options, seed, kept, scale, dropout, flags, needs, name):
    directions = per_direction(inputs, bias, options, scale, dropout, flags)
    # what the native forward kept only the native backward can read
    backend = "native" if any(k.numel() for k in kept) else dispatch.choose("attention", inputs[0])
    results, calls = [], []
    for index, d in enumerate(directions):
        d_out, d_probs, d_lse = gradients[3 * index:3 * index + 3]
        wanted = needs[4 * index:4 * index + 4]
        if backend != "native":
            with torch.autocast(inputs[0].device.type, enabled=False):
                found = dispatch.module("attention", backend).backward(
                    d_out, d_probs, d_lse, d.query, d.key, d.value, **reference_options(d, seed, index))
            results += [g if need else d.query.new_empty(0) for g, need in zip(found, wanted, strict=True)]
            continue
        # rows that several sequences share are summed in the working type
        shared = d.options.pair_q is not None or d.options.rows_q is not None
        dtype = torch.promote_types(d.query.dtype, torch.float32) if shared else d.query.dtype
        found = [torch.empty(x.shape if need else 0, dtype=dtype)
                 for x, need in zip((d.query, d.key, d.value), wanted, strict=False)]
        d_bias = torch.empty(d.bias.shape, dtype=d.bias.dtype) if wanted[3] else d.query.new_empty(0)
        d_out = d_out.to(d.query.dtype)
        d_out = d_out if d_out.stride(-1) == 1 or d_out.shape[-1] <= 1 else d_out.contiguous()
        d_probs, d_lse = (None if g is None else g.contiguous() for g in (d_probs, d_lse))
        call = native.direction(d, sizes(d), bool(d.flags & CAUSAL), bool(d.flags & PROBS_DROPOUT), seed, index)
        call.gradients(native.stream(d_out), native.address(d_probs), native.address(d_lse), kept[index].data_ptr(),
                       *(t.data_ptr() for t in found), d_bias.data_ptr(), DTYPES[dtype],
                       list(d.bias.shape) if wanted[3] else [1, 1, 1, 1])
        calls.append((call, d_out, d_probs, d_lse))
        results += [*found, d_bias]
    if calls:
        if native.backward([call for call, *_ in calls]):
            _refuse(name, directions)
        results = [g if x is None or g.dtype == x.dtype else g.to(x.dtype) for g, x in zip(
            results, [x for d in directions for x in (d.query, d.key, d.value, d.bias)], strict=True)]
    return results


def _bwd_fake(gradients, inputs, bias, options, seed, kept, scale, dropout, flags, needs, name):
    results = []
    for index in range(len(flags)):
        sources = *inputs[3 * index:3 * index + 3], bias[index]
        for source, need in zip(sources, needs[4 * index:4 * index + 4], strict=True):
            like = inputs[0] if source is None else source
            results.append(like.new_empty(source.shape if need else 0))
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


# The checks at the door


def check_streams(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], rank: int = 4) -> tuple[Tensor, ...]:
    """Same dtype, device and rank for all; the last dimension contiguous."""
    first = tensors[0]
    for x in tensors:
        if not (isinstance(x, Tensor) and x.dtype == first.dtype and x.ndim == rank and x.device == first.device
                and (x.stride(-1) == 1 or x.shape[-1] <= 1)):
            return _streams_in_detail(op, names, tensors, rank)
    if first.dtype not in DTYPES:
        raise TypeError(f"{op}: {names[0]} is {first.dtype}, it must be float32, float64, bfloat16 or float16")
    return tensors


def _streams_in_detail(op: str, names: tuple[str, ...], tensors: tuple[Tensor, ...], rank: int) -> tuple[Tensor, ...]:
    layout = {3: "[N, H, D]", 4: "[B, S, H, D]"}.get(rank, f"of {rank} dimensions")
    first = tensors[0]
    for name, x in zip(names, tensors, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is a {type(x).__name__}, it must be a tensor")
        if x.ndim != rank:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {layout}")
        if x.device != first.device:
            raise ValueError(f"{op}: {name} is on {x.device}, {names[0]} on {first.device}; they must be equal")
        if x.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {x.dtype}, it must be float32, float64, bfloat16 or float16")
        if x.dtype != first.dtype and not torch.is_autocast_enabled(first.device.type):
            raise ValueError(f"{op}: {name} is {x.dtype}, {names[0]} is {first.dtype}; they must be equal")
    dtype = first.dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    tensors = tuple(x.to(dtype) for x in tensors)
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous() for x in tensors)


def check_match(op: str, names: tuple[str, str, str], query: Tensor, key: Tensor, value: Tensor, paired: bool) -> None:
    q, k, v = names
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(f"{op}: {v} has shape {tuple(value.shape)}, {k} has {tuple(key.shape)}; they must agree but "
                         "for the last dimension")
    if query.shape[-2:] != key.shape[-2:]:
        raise ValueError(f"{op}: {k} has heads and width {tuple(key.shape[-2:])}, {q} has {tuple(query.shape[-2:])}; "
                         "they must be equal")
    if query.ndim == 4 and not paired and query.shape[0] != key.shape[0]:
        raise ValueError(f"{op}: {k} has batch {key.shape[0]}, {q} has {query.shape[0]}; they must be equal without "
                         "pair indices")


def check_integers(op: str, name: str, x, like: Tensor, count: int | None) -> Tensor | None:
    """int32 or int64 [count] -> int64, contiguous."""
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be an int32 or int64 tensor")
    if x.ndim != 1 or count is not None and x.shape[0] != count:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be [{'P' if count is None else count}]")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")
    return x.long().contiguous()


def check_mask(op: str, name: str, x, like: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype != torch.bool:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a bool tensor, True where a key is kept")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")


def check_key_mask(op: str, name: str, x, like: Tensor, shape: tuple[int, ...]) -> Tensor | None:
    if x is None:
        return None
    check_mask(op, name, x, like)
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {list(shape)}")
    return x


def check_broadcast(op: str, name: str, x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """x with as many dimensions as `shape`, each of them equal or 1."""
    full = x.view((1,) * (4 - x.ndim) + x.shape) if x.ndim < 4 else x
    if full.ndim != 4 or any(have not in (1, want) for have, want in zip(full.shape, shape, strict=True)):
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must broadcast to {list(shape)} "
                         "(sequences, heads, queries, keys)")
    return full


def check_bias(op: str, name: str, x, like: Tensor, shape: tuple[int, int, int, int]) -> Tensor | None:
    if x is None:
        return None
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a floating-point tensor that is added to the scores")
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}, it must be on {like.device}")
    return check_broadcast(op, name, x, shape)


def check_rate(op: str, name: str, rate) -> float:
    if not 0 <= rate <= 1:
        raise ValueError(f"{op}: {name} is {rate}, it must lie between 0 and 1")
    return float(rate)


def check_scale(op: str, scale, width: int) -> float:
    if scale is None:
        return 1 / math.sqrt(width) if width else 1.0
    if isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale is a tensor, it must be a number; multiply the queries to learn it")
    if math.isnan(scale):
        raise ValueError(f"{op}: scale is NaN, it must be a number")
    return float(scale)


def draw_seed(op: str, seed, like: Tensor, needed: bool) -> Tensor | None:
    """The [] int64 seed tensor: the given one, or one draw from torch's generator of the device."""
    if not needed:
        return None
    if seed is None:
        return torch.empty((), dtype=torch.int64, device=like.device).random_()
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise TypeError(f"{op}: seed is {tuple(seed.shape)} {seed.dtype}, it must be one int64")
        return seed.reshape(()).to(like.device)
    if not -2**63 <= seed < 2**63:
        raise ValueError(f"{op}: seed is {seed}, it must fit in 64 bits with its sign")
    return torch.tensor(seed, dtype=torch.int64, device=like.device)
