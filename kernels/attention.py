"""Triton backend of the `attention` family; `vlmfast.ops.reference.attention` is its definition.

Forward: one kernel, an online softmax over tiles of keys; it keeps two numbers per query, from which the backward
computes the probabilities again. Backward: one kernel per tile of queries, one per tile of keys, and one per tile of a
bias that needs a gradient. All options are read where they lie: views, masks, lengths, packed streams, pair indices
and tables of rows; dropout draws the definition's numbers.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .aot import Variant
from .attention_bwd import (
    Upstream,
    UpstreamSizes,
    attention_bwd_bias_kernel,
    attention_bwd_key_kernel,
    attention_bwd_query_kernel,
    attention_bwd_sum_kernel,
)
from .attention_fwd import attention_fwd_kernel
from .attention_tiles import Inputs, Sizes

WIDEST = 256
SUM_BLOCK = 1024
# Triton's default is about to change: a * b + c may be one rounding
FUSED = {"enable_fp_fusion": True}
# the interpreter multiplies the bit patterns of bfloat16 operands and truncates where a GPU rounds: there tiles are
# widened after each load, and results are rounded by torch
INTERPRETED = not isinstance(attention_fwd_kernel, triton.runtime.JITFunction)


class Tile(NamedTuple):
    """Queries and keys of a step, and launch options."""

    rows: int
    columns: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int]:
        return {"BM": self.rows, "BN": self.columns}

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages} | FUSED


# of each step and size of an element: for heads up to 64, 128 and 256 wide the tiles without extras, with one and with
# more, which ahead-of-time compilation shows to fit the registers, and the shared memory of the small architectures too
TILES = {
    ("forward", 2): {64: (Tile(128, 64, 8, 3), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
                     128: (Tile(128, 64, 8, 3), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
                     256: (Tile(64, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1))},
    ("query", 2): {64: (Tile(64, 64, 4, 2), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
                   128: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(16, 32, 8, 1)),
                   256: (Tile(32, 32, 4, 1), Tile(32, 32, 8, 2), Tile(16, 32, 8, 1))},
    ("key", 2): {64: (Tile(64, 64, 4, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
                 128: (Tile(64, 64, 8, 2), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
                 256: (Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 8, 1))},
    ("bias", 2): {64: (Tile(64, 32, 8, 1),) * 3,
                  128: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1)),
                  256: (Tile(16, 32, 4, 1), Tile(16, 32, 4, 1), Tile(16, 32, 8, 1))},
    ("forward", 4): {64: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 2), Tile(32, 32, 8, 1)),
                     128: (Tile(32, 32, 8, 2), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
                     256: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1))},
    ("query", 4): {64: (Tile(32, 32, 8, 1), Tile(16, 32, 8, 1), Tile(16, 32, 8, 1)),
                   128: (Tile(16, 32, 8, 2), Tile(16, 32, 8, 1), Tile(32, 16, 8, 1)),
                   256: (Tile(16, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 16, 8, 2))},
    ("key", 4): {64: (Tile(32, 16, 8, 1), Tile(16, 32, 8, 1), Tile(16, 16, 8, 1)),
                 128: (Tile(32, 32, 8, 2), Tile(32, 16, 8, 1), Tile(32, 32, 8, 1)),
                 256: (Tile(32, 32, 8, 1), Tile(16, 16, 4, 1), Tile(16, 16, 8, 1))},
    ("bias", 4): {64: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(16, 32, 8, 1)),
                  128: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 2)),
                  256: (Tile(32, 32, 8, 1),) * 3},
}


def padded(width: int) -> int:
    return max(triton.next_power_of_2(width), 16)


def tile_for(step: str, dtype: torch.dtype, width: int, extras: int, rows: int, columns: int) -> Tile:
    """Tile of a kernel for heads of `width`, no larger than the streams.

    Args:
        step:  "forward", "query", "key" or "bias".
        extras:  how many of causality or dropout; a plane or a table; two planes there are; 2 for probabilities.
    """
    table = TILES[step, dtype.itemsize]
    tile = table[min(limit for limit in table if width <= limit)][min(extras, 2)]
    return tile._replace(rows=min(tile.rows, padded(rows)), columns=min(tile.columns, padded(columns)))


class _Call:
    """One direction: what every kernel takes, and how its results are laid out."""

    def __init__(self, query, key, value, *, lengths_q=None, lengths_k=None, key_mask=None, mask=None, bias=None,
                 prefix=None, pair_q=None, pair_k=None, cu_q=None, cu_k=None, rows_q=None, rows_k=None, regions=None,
                 seed=None, scale: float = 1.0, causal: bool = False, dropout: float = 0.0, direction: int = 0,
                 probs_dropout: bool = False):
        for name, x in (("query", query), ("value", value)):
            if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise TypeError(f"attention: {name} is {x.dtype}, the Triton backend takes float32, bfloat16 or "
                                "float16")
            if x.shape[-1] > WIDEST:
                raise ValueError(f"attention: {name} has width {x.shape[-1]}, the Triton backend takes {WIDEST} at "
                                 "most")
        self.query, self.key, self.value, self.bias = query, key, value, bias
        self.pair_q, self.pair_k, self.packed, self.rows_k = pair_q, pair_k, cu_q is not None, rows_k
        self.heads, self.d, self.dv = query.shape[-2], query.shape[-1], value.shape[-1]
        self.shared = rows_q is not None and rows_q.shape != rows_k.shape
        self.scale, self.causal, self.after = float(scale), causal, probs_dropout
        self.gain = 1 / (1 - dropout) if dropout < 1 else 0.0
        if self.packed:
            self.batch, self.count_q, self.count_k = len(cu_q) - 1, len(query), len(key)
        elif rows_q is not None:
            (groups, self.count_q), self.count_k = rows_q.shape, rows_k.shape[1]
            self.batch = query.shape[0] * groups
        else:
            self.batch = len(query if pair_q is None else pair_q)
            self.count_q, self.count_k = query.shape[1], key.shape[1]
        groups = self.batch if rows_q is None else len(rows_q)
        planes = groups, self.heads, self.count_q, self.count_k
        # what makes a tile hold more than its scores
        planes_given = sum(x is not None for x in (mask, bias))
        self.extras = (causal or dropout > 0) + (planes_given > 0 or rows_q is not None) + (planes_given > 1)
        mask = None if mask is None else mask.expand(planes).view(torch.uint8)
        wide = None if bias is None else bias.expand(planes)
        if key_mask is not None:
            key_mask = key_mask.view(torch.uint8)
        self.inputs = Inputs(query, key, value, lengths_q, lengths_k, key_mask, mask, wide, prefix, pair_q, pair_k,
                             cu_q, cu_k, rows_q, rows_k, regions, seed if dropout else None)
        self.sizes = Sizes(
            *_strides(query), *_strides(key), *_strides(value), *_strides(key_mask, 2), *_strides(mask, 4),
            *_strides(wide, 4), self.batch, self.heads, self.count_q, self.count_k, max(groups, 1),
            min(int(dropout * 2**32), 2**32 - 1) - 2**31, direction)

    def line_shape(self) -> tuple[int, ...]:
        return (self.count_q, self.heads) if self.packed else (self.batch, self.heads, self.count_q)

    def line_strides(self) -> tuple[int, int, int]:
        """Of sequence, row and head."""
        return (0, self.heads, 1) if self.packed else (self.heads * self.count_q, 1, self.count_q)

    def lines(self) -> int:
        return self.batch * self.heads * self.count_q if not self.packed else self.heads * self.count_q

    def empty(self, shape, dtype=torch.float32) -> Tensor:
        """Memory for a result; rows behind the last packed sequence stay 0."""
        make = torch.zeros if self.packed else torch.empty
        return make(shape, dtype=torch.float32 if INTERPRETED else dtype, device=self.query.device)

    def constants(self, step: str, probs: bool) -> tuple[Tile, dict]:
        """Tile and constants of a kernel; `probs` says whether it also reads or writes probabilities."""
        bd, bv = padded(self.d), padded(self.dv)
        tile = tile_for(step, self.query.dtype, max(bd, bv), self.extras + 2 * probs, self.count_q, self.count_k)
        return tile, {"D": self.d, "DV": self.dv, "BD": bd, "BV": bv, "CAUSAL": self.causal, "UPCAST": INTERPRETED,
                      "AFTER": self.after} | tile.constants() | tile.options()

    def grid(self, count: int, block: int) -> tuple[int, int]:
        """(tiles of a sequence, programs)"""
        tiles = triton.cdiv(count, block)
        if self.batch == 0:
            return tiles, 0
        return tiles, (count // block + self.batch if self.packed else tiles * self.batch) * self.heads


def forward(query, key, value, **options):
    """(out, probs, lse) of one direction; see the definition. float32, bfloat16 or float16, widths up to 256."""
    return forward_with_statistics(query, key, value, options.get("cu_q") is None, True, False, **options)[:3]


def forward_with_statistics(query, key, value, probs: bool, lse: bool, stats: bool, **options):
    """(out, probs, lse, stats), None where not wanted; stats are what `backward` needs beside out.

    Of each query the largest score and the inverse of the sum of exponentials, float32 [2, B, H, Sq]; packed
    [2, N, H]. Beside the options of the definition, rows_q [G, Sq], rows_k [G, Sk] and regions [G, Sq] as in
    `ops.attention_call.Options`, and then planes of a mask or a bias belong to the G groups.
    """
    call = _Call(query, key, value, **options)
    device, dtype = query.device, query.dtype
    out = call.empty((*query.shape[:-1], call.dv) if call.pair_q is None else
                     (call.batch, *query.shape[1:-1], call.dv), dtype)
    weights = call.empty((call.batch, call.heads, call.count_q, call.count_k), dtype) if probs else None
    sums = torch.full(call.line_shape(), -torch.inf, device=device) if lse else None
    kept = call.empty((2, *call.line_shape())) if stats else None
    tile, constants = call.constants("forward", probs)
    tiles, programs = call.grid(call.count_q, tile.rows)
    if programs and call.count_q:
        with _guard(device):
            attention_fwd_kernel[(programs,)](call.inputs, call.sizes, out, sums, kept, weights, *_strides(out),
                                              *call.line_strides(), call.lines(), tiles, call.scale, call.gain,
                                              **constants)
    return out.to(dtype), None if weights is None else weights.to(dtype), sums, kept


def backward(d_out, d_probs, d_lse, query, key, value, *, saved=None, needs=(True, True, True, True), **options):
    """(d_query, d_key, d_value, d_bias), None where not needed or without a bias; see the definition.

    Args:
        saved:  (out, stats) of `forward_with_statistics`, or None, and they are computed again.
        needs:  which of the four are wanted.
    """
    out, stats = saved or forward_with_statistics(query, key, value, False, False, True, **options)[::3]
    call = _Call(query, key, value, **options)
    need_query, need_key, need_value, need_bias = needs
    d_out = _unit_stride(d_out.to(query.dtype))
    inner = call.empty(call.line_shape())
    upstream = Upstream(out, stats, d_out, d_probs, None if d_lse is None else d_lse.float().contiguous(), inner)
    strides = UpstreamSizes(*_strides(out), *_strides(d_out), *_strides(d_probs, 4), *call.line_strides(),
                            call.lines())
    arguments = call.inputs, call.sizes, upstream, strides
    with _guard(query.device):
        # needed or not: it also computes `inner`
        d_query = _query_gradient(call, arguments, d_probs is not None, need_query)
        d_key = d_value = d_bias = None
        if need_key or need_value:
            d_key, d_value = _key_gradients(call, arguments, d_probs is not None)
        if need_bias and call.bias is not None:
            d_bias = _bias_gradient(call, arguments, d_probs is not None)
    return d_query, d_key if need_key else None, d_value if need_value else None, d_bias


def _query_gradient(call: _Call, arguments, probs: bool, needed: bool) -> Tensor | None:
    query, pair = call.query, call.pair_q
    found = None
    if needed:
        found = call.empty(query.shape, query.dtype) if pair is None else call.empty((call.batch, *query.shape[1:]))
    tile, constants = call.constants("query", probs)
    tiles, programs = call.grid(call.count_q, tile.rows)
    if programs and call.count_q:
        attention_bwd_query_kernel[(programs,)](*arguments, found, *_strides(found), tiles, call.scale, call.gain,
                                                **constants)
    if needed and pair is not None:
        found = _summed(found[None], pair, len(query), query)
    return found if found is None else found.to(query.dtype)


def _key_gradients(call: _Call, arguments, probs: bool) -> list[Tensor]:
    found = []
    for x in (call.key, call.value):
        if call.shared or call.pair_k is not None:
            found.append(call.empty((call.batch, call.count_k, *x.shape[2:])))
        else:
            found.append(call.empty(x.shape, x.dtype))
    tile, constants = call.constants("key", probs)
    tiles, programs = call.grid(call.count_k, tile.columns)
    if programs and call.count_k:
        attention_bwd_key_kernel[(programs,)](*arguments, *found, *_strides(found[0]), *_strides(found[1]), tiles,
                                              call.scale, call.gain, SHARED=call.shared, **constants)
    if call.pair_k is not None:
        found = [_summed(parts[None], call.pair_k, len(x), x)
                 for parts, x in zip(found, (call.key, call.value), strict=True)]
    elif call.shared:
        found = [_summed(parts.view(x.shape[0], -1, *x.shape[2:]), call.rows_k.flatten(), x.shape[1], x)
                 for parts, x in zip(found, (call.key, call.value), strict=True)]
    return [g.to(x.dtype) for g, x in zip(found, (call.key, call.value), strict=True)]


def _bias_gradient(call: _Call, arguments, probs: bool) -> Tensor:
    bias = call.bias
    shape = (1,) * (4 - bias.ndim) + bias.shape
    tile, constants = call.constants("bias", probs)
    tiles = triton.cdiv(call.count_q, tile.rows) * triton.cdiv(call.count_k, tile.columns)
    splits = call.batch if shape[0] > 1 else min(call.batch, _splits(tiles * call.heads, bias.device))
    per_split = triton.cdiv(call.batch, max(splits, 1))
    splits = triton.cdiv(call.batch, max(per_split, 1))
    parts = call.empty((splits, call.heads, call.count_q, call.count_k))
    if parts.numel():
        attention_bwd_bias_kernel[(splits * call.heads * tiles,)](*arguments, parts, tiles, per_split, call.scale,
                                                                  call.gain, **constants)
    if shape[0] > 1:
        # with tables, a plane belongs to the same group of every sample
        parts = parts.view(-1, shape[0], *parts.shape[1:]).sum(0)
    return parts.sum_to_size(shape).view(bias.shape).to(bias.dtype)


def _summed(parts: Tensor, index: Tensor, rows: int, like: Tensor) -> Tensor:
    """parts [B, M, ...] of rows index [M] (-1: of none) -> their sums, shaped like `like`, whose rows they are."""
    order = index.argsort(stable=True)
    offsets = torch.searchsorted(index[order], torch.arange(rows + 1, device=index.device))
    batch, count = parts.shape[:2]
    width = like.numel() // max(batch * rows, 1)
    out = torch.empty(batch, rows, width, dtype=torch.float32 if INTERPRETED else like.dtype, device=like.device)
    if out.numel():
        attention_bwd_sum_kernel[(batch * rows * triton.cdiv(width, SUM_BLOCK),)](
            parts, order, offsets, out, count, rows, width, BE=SUM_BLOCK, **FUSED)
    return out.view(like.shape)


def _strides(x: Tensor | None, count: int = 3) -> tuple[int, ...]:
    """Of sample, row and head of [B, S, H, D] or [N, H, D]; with `count` those of all dimensions, zeros in front."""
    if x is None:
        return (0,) * count
    strides = x.stride()[:-1] if count == 3 else x.stride()
    return (0,) * (count - len(strides)) + strides


def _splits(programs: int, device: torch.device) -> int:
    """Parts into which the sequences are cut so that a few waves of programs fill the device."""
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(triton.cdiv(wanted, max(programs, 1)), 1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aot_variants(capability: int) -> list[Variant]:
    """What ahead-of-time compilation covers: every kernel and tile, without options and with all that go together."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    integers = dict.fromkeys(("lengths_q", "lengths_k", "prefix", "seed"), "*i64")
    planes = {"key_mask": "*u8", "mask": "*u8", "bias": "*fp32"}
    modes = {"plain": {}, "probs": {}, "all": integers | planes | {"causal": True, "after": True},
             "pairs": {"pair_q": "*i64", "pair_k": "*i64", "causal": True} | integers,
             "packed": {"cu_q": "*i64", "cu_k": "*i64", "causal": True},
             "windows": {"rows_q": "*i64", "rows_k": "*i64", "regions": "*i64", "bias": "*fp32"}}
    variants = []

    def add(step: str, mode: str, dtype: torch.dtype, width: int) -> None:
        kind, given = f"*{names[dtype]}", dict(modes[mode])
        causal, after = given.pop("causal", False), given.pop("after", False)
        probs, packed = mode in ("all", "probs"), mode == "packed"
        tile = tile_for(step, dtype, width, {"plain": 0, "probs": 2, "all": 2}.get(mode, 1), 4096, 4096)
        kernel = {"forward": attention_fwd_kernel, "query": attention_bwd_query_kernel, "key": attention_bwd_key_kernel,
                  "bias": attention_bwd_bias_kernel}[step]
        strides = UpstreamSizes(*["i32"] * len(UpstreamSizes._fields))._replace(d_probs_k=1)
        sizes = Sizes(*["i32"] * len(Sizes._fields))._replace(key_mask_s=1, mask_k=1, bias_k=1)
        types = {"inputs": Inputs(kind, kind, kind, **given), "sizes": sizes,
                 "upstream": Upstream(kind, "*fp32", kind, kind if probs else None, "*fp32" if probs else None,
                                      "*fp32"), "strides": strides, "scale": "fp32", "gain": "fp32"}
        types |= dict.fromkeys(("out", "probs", "d_query", "d_key", "d_value"), kind)
        rest = [name for name in kernel.arg_names if name.endswith(("_b", "_s", "_h", "_plane", "tiles", "per_split"))]
        types |= dict.fromkeys(rest, "i32")
        aligned = [name for name in (*Sizes._fields, *UpstreamSizes._fields, *rest)
                   if name.endswith(("_b", "_s", "_h")) and not name.startswith(("lse", "key_mask", "mask", "bias"))]
        constants = {"D": width, "DV": width, "BD": padded(width), "BV": padded(width), "CAUSAL": causal,
                     "AFTER": after, "UPCAST": False} | tile.constants()
        if step == "forward":
            constants |= {} if probs else {"probs": None}
            constants |= {"lse": None} if packed else {}
        if step == "key":
            constants["SHARED"] = False
        variants.append(Variant(f"{mode} {names[dtype]} {width}", kernel, types, aligned, constants, tile.options()))

    for step in ("forward", "query", "key"):
        for width in (64, 128, 256):
            for mode in ("plain", "all"):
                add(step, mode, torch.float32, width)
            # the widest heads are the rarest
            for mode in modes if width < 256 else ("plain", "all"):
                add(step, mode, torch.bfloat16, width)
        add(step, "all", torch.float16, 128)
    for width in (64, 128, 256):
        add("bias", "all", torch.float32, width)
        add("bias", "windows", torch.bfloat16, width)
    for label, dtype in names.items():
        variants.append(Variant(f"sum {dtype}", attention_bwd_sum_kernel,
                                {"order": "*i64", "offsets": "*i64", "M": "i32", "R": "i32", "E": "i32",
                                 "out": f"*{names[label]}"}, (), {"BE": SUM_BLOCK}, FUSED))
    return variants
