"""Bidirectional attention from one score matrix (GLIP, GroundingDINO)."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import attention_native as native
from . import dispatch
from .attention_call import LSE, PROBS, Direction, Options, run
from .attention_checks import (
    check_bias,
    check_integers,
    check_key_mask,
    check_rate,
    check_scale,
    check_streams,
    draw_seed,
)
from .autograd import first_order
from .reference import attention as reference


class BiAttention(NamedTuple):
    """out_a [B, Sa, H, Dv'], out_b [B, Sb, H, Dv]; where asked for, else None: probs_a [B, H, Sa, Sb], probs_b
    [B, H, Sb, Sa], lse_a [B, H, Sa], lse_b [B, H, Sb]."""
    out_a: Tensor
    out_b: Tensor
    probs_a: Tensor | None = None
    probs_b: Tensor | None = None
    lse_a: Tensor | None = None
    lse_b: Tensor | None = None


def bi_attention(query_b: Tensor, key_a: Tensor, value_a: Tensor, value_b: Tensor, *,
                 lengths_a: Tensor | None = None, lengths_b: Tensor | None = None, mask_a: Tensor | None = None,
                 mask_b: Tensor | None = None, bias: Tensor | None = None, scale: float | None = None,
                 dropout_a: float = 0.0, dropout_b: float = 0.0, seed=None, return_probs: bool = False,
                 return_lse: bool = False, deterministic: bool = True) -> BiAttention:
    r"""Both streams read each other through one score matrix and two softmaxes.

    Equivalent to::

        scores = scale * query_b @ key_a.mT + bias             # [B, H, Sb, Sa], from [B, S, H, D] inputs
        out_b = scores.softmax(-1) @ value_a                   # b reads a
        out_a = scores.mT.softmax(-1) @ value_b                # a reads b

    Args:
        query_b:  [B, Sb, H, D] float32, bfloat16, float16 or float64, for example the image tokens.
        key_a:  [B, Sa, H, D], for example the text.
        value_a:  [B, Sa, H, Dv]; value_b: [B, Sb, H, Dv'].
        lengths_a, lengths_b:  [B] int32 or int64 valid leading positions; rows behind them are 0.
        mask_a, mask_b:  [B, S] bool, True where a position takes part; the output of one that does not is 0.
        bias:  broadcastable [B|1, H|1, Sb|1, Sa|1], added to the scores; differentiable; -inf excludes.
        scale:  a float, by default 1 / sqrt(D).
        dropout_a, dropout_b:  of the probabilities with which a reads b, and b reads a (directions 0 and 1).
        seed, return_probs, return_lse, deterministic:  as in `co_attention`; probabilities are those before dropout.

    Returns:
        BiAttention. A line without a partner has output 0, lse -inf and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: GLIP (Li et al. 2022, arXiv:2112.03857), eq. 4-6; Grounding DINO (arXiv:2303.05499), Fig. 3.
    """
    op = "bi_attention"
    query_b, key_a, value_a, value_b = check_streams(op, ("query_b", "key_a", "value_a", "value_b"),
                                                     (query_b, key_a, value_a, value_b))
    if query_b.shape[0] != key_a.shape[0] or query_b.shape[2:] != key_a.shape[2:]:
        raise ValueError(f"{op}: key_a has shape {tuple(key_a.shape)}, query_b has {tuple(query_b.shape)}; batch, "
                         "heads and width must be equal")
    for name, value, other, like in (("value_a", value_a, "key_a", key_a), ("value_b", value_b, "query_b", query_b)):
        if value.shape[:3] != like.shape[:3]:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, {other} has {tuple(like.shape)}; they must "
                             "agree but for the last dimension")
    batch, sb, heads, width = query_b.shape
    sa = key_a.shape[1]
    lengths_a = check_integers(op, "lengths_a", lengths_a, query_b, batch)
    lengths_b = check_integers(op, "lengths_b", lengths_b, query_b, batch)
    mask_a = check_key_mask(op, "mask_a", mask_a, query_b, (batch, sa))
    mask_b = check_key_mask(op, "mask_b", mask_b, query_b, (batch, sb))
    bias = check_bias(op, "bias", bias, query_b, (batch, heads, sb, sa))
    scale = check_scale(op, scale, width)
    dropout_a, dropout_b = check_rate(op, "dropout_a", dropout_a), check_rate(op, "dropout_b", dropout_b)
    seed = draw_seed(op, seed, query_b, dropout_a > 0 or dropout_b > 0)
    backend = dispatch.choose("attention", query_b)
    if backend == "triton":
        # two kernels that compute the scores once each: a mask of queries is a plane of pairs
        over_b = Options(lengths_a, lengths_b, mask_b, None if mask_a is None else mask_a[:, None, :, None])
        over_a = Options(lengths_b, lengths_a, mask_a, None if mask_b is None else mask_b[:, None, :, None])
        flags = PROBS * return_probs | LSE * return_lse
        a = Direction(key_a, query_b, value_b, None if bias is None else bias.mT, over_b, scale, dropout_a, flags)
        b = Direction(query_b, key_a, value_a, bias, over_a, scale, dropout_b, flags)
        (out_a, probs_a, lse_a), (out_b, probs_b, lse_b) = run(op, [a, b], seed)
        return BiAttention(out_a, out_b, probs_a, probs_b, lse_a, lse_b)
    live_a = _live(op, "lengths_a", lengths_a, mask_a, sa)
    live_b = _live(op, "lengths_b", lengths_b, mask_b, sb)
    rates = scale, dropout_a, dropout_b
    if bias is not None or return_probs or backend != "native":
        found = reference.bi_attention(query_b, key_a, value_a, value_b, live_a=live_a, live_b=live_b, bias=bias,
                                       scale=scale, dropout_a=dropout_a, dropout_b=dropout_b, seed=seed)
        return BiAttention(*found[:2], *(found[2:4] if return_probs else (None, None)),
                           *(found[4:] if return_lse else (None, None)))
    tensors = query_b, key_a, value_a, value_b, live_a, live_b, seed
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors[:4]):
        out_a, out_b, lse_a, lse_b = _BiAttention.apply(rates, *tensors)
    else:
        out_a, out_b, lse_a, lse_b, _, _ = _fwd_op(*tensors, *rates)
    return BiAttention(out_a, out_b, None, None, *((lse_a, lse_b) if return_lse else (None, None)))


class _BiAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rates, *tensors):
        out_a, out_b, lse_a, lse_b, *stats = _fwd_op(*tensors, *rates)
        ctx.rates = rates
        ctx.save_for_backward(*tensors, out_a, *stats)
        return out_a, out_b, lse_a, lse_b

    @staticmethod
    @first_order("bi_attention")
    def backward(ctx, *gradients):
        found = _bwd_op(*gradients, *ctx.saved_tensors, *ctx.rates)
        return None, *(g if need else None for g, need in zip(found, ctx.needs_input_grad[1:5], strict=True)), \
            None, None, None


def _live(op: str, name: str, lengths: Tensor | None, mask: Tensor | None, count: int) -> Tensor | None:
    """Lengths and mask -> [B, S] bool."""
    if lengths is None:
        return mask
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling() and len(lengths):
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > count:
            raise ValueError(f"{op}: {name} reaches from {low} to {high}, it must lie between 0 and {count}")
    within = torch.arange(count, device=lengths.device) < lengths[:, None]
    return within if mask is None else within & mask


_library = torch.library.Library("vlmfast", "FRAGMENT")
_INPUTS = "Tensor query_b, Tensor key_a, Tensor value_a, Tensor value_b, Tensor? live_a, Tensor? live_b, Tensor? seed, "
_RATES = "float scale, float dropout_a, float dropout_b"
_library.define(f"bi_attention_fwd({_INPUTS}{_RATES}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define(f"bi_attention_bwd(Tensor d_out_a, Tensor d_out_b, Tensor d_lse_a, Tensor d_lse_b, {_INPUTS}"
                f"Tensor out_a, Tensor stats_a, Tensor stats_b, {_RATES}) -> (Tensor, Tensor, Tensor, Tensor)")


def _call(query_b, key_a, value_a, value_b, live_a, live_b, seed, scale, dropout_a, dropout_b):
    batch, sb, heads, width = query_b.shape
    sizes = batch, heads, key_a.shape[1], sb, width, value_a.shape[3], value_b.shape[3]
    live_a, live_b = (None if x is None else x.contiguous() for x in (live_a, live_b))
    streams = [part for x in (query_b, key_a, value_a, value_b) for part in (x.data_ptr(), x.stride())]
    call = _native.BiAttention(native.DTYPES[query_b.dtype], sizes, *streams, native.address(live_a),
                               native.address(live_b), scale, dropout_a, dropout_b, native.address(seed))
    return call, (live_a, live_b)


def _shapes(query_b, key_a, value_a, value_b):
    """Of out_a, out_b, lse_a, lse_b, stats_a, stats_b."""
    batch, sb, heads, _ = query_b.shape
    sa = key_a.shape[1]
    return ((batch, sa, heads, value_b.shape[3]), (batch, sb, heads, value_a.shape[3]), (batch, heads, sa),
            (batch, heads, sb), (2, batch, heads, sa), (2, batch, heads, sb))


def _fwd(query_b, key_a, value_a, value_b, live_a, live_b, seed, scale, dropout_a, dropout_b):
    wide = torch.float64 if query_b.dtype == torch.float64 else torch.float32
    kinds = query_b.dtype, query_b.dtype, wide, wide, wide, wide
    found = [torch.empty(shape, dtype=kind) for shape, kind in zip(_shapes(query_b, key_a, value_a, value_b), kinds,
                                                                   strict=True)]
    call, _alive = _call(query_b, key_a, value_a, value_b, live_a, live_b, seed, scale, dropout_a, dropout_b)
    call.outputs(*(x.data_ptr() for x in found))
    _native.bi_attention_fwd(call, torch.get_num_threads())
    return tuple(found)


def _fwd_fake(query_b, key_a, value_a, value_b, live_a, live_b, seed, scale, dropout_a, dropout_b):
    wide = torch.promote_types(query_b.dtype, torch.float32)
    kinds = query_b.dtype, query_b.dtype, wide, wide, wide, wide
    return tuple(query_b.new_empty(shape, dtype=kind)
                 for shape, kind in zip(_shapes(query_b, key_a, value_a, value_b), kinds, strict=True))


def _bwd(d_out_a, d_out_b, d_lse_a, d_lse_b, query_b, key_a, value_a, value_b, live_a, live_b, seed, out_a, stats_a,
         stats_b, scale, dropout_a, dropout_b):
    d_out_a, d_out_b = (g if g.dtype == query_b.dtype and g.stride(-1) == 1 else g.to(query_b.dtype).contiguous()
                        for g in (d_out_a, d_out_b))
    d_lse_a, d_lse_b = d_lse_a.contiguous(), d_lse_b.contiguous()
    found = [torch.empty(x.shape, dtype=x.dtype) for x in (query_b, key_a, value_a, value_b)]
    call, _alive = _call(query_b, key_a, value_a, value_b, live_a, live_b, seed, scale, dropout_a, dropout_b)
    call.outputs(out_a.data_ptr(), 0, 0, 0, stats_a.data_ptr(), stats_b.data_ptr())
    call.gradients(d_out_a.data_ptr(), d_out_a.stride(), d_out_b.data_ptr(), d_out_b.stride(), d_lse_a.data_ptr(),
                   d_lse_b.data_ptr(), *(x.data_ptr() for x in found))
    _native.bi_attention_bwd(call, torch.get_num_threads())
    return tuple(found)


def _bwd_fake(d_out_a, d_out_b, d_lse_a, d_lse_b, query_b, key_a, value_a, value_b, *_rest):
    return tuple(x.new_empty(x.shape) for x in (query_b, key_a, value_a, value_b))


for _name, _run, _fake in (("bi_attention_fwd", _fwd, _fwd_fake), ("bi_attention_bwd", _bwd, _bwd_fake)):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
_fwd_op, _bwd_op = torch.ops.vlmfast.bi_attention_fwd.default, torch.ops.vlmfast.bi_attention_bwd.default
