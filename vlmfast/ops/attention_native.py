"""The attention family's calls into the native core: addresses, sizes and strides of checked tensors."""

import torch
from torch import Tensor

from .. import _native

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def plane(x: Tensor):
    """Broadcastable to [sequences, H, Sq, Sk]: a dimension of 1 is not walked."""
    return _native.Plane(x.data_ptr(), *(0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True)))


def direction(d, sizes: tuple[int, int, int, int], causal: bool, probs_dropout: bool, seed: Tensor | None, index: int):
    """The native description of one direction of attention; `d` is an `attention_call.Direction`."""
    query, key, value, o = d.query, d.key, d.value, d.options
    batch, heads, sq, sk = sizes
    shape_q, shape_k = query.shape, key.shape
    call = _native.Attention(
        DTYPES[query.dtype], batch, heads, sq, sk, shape_q[-1], value.shape[-1], shape_q[0], shape_k[0],
        shape_q[-3], shape_k[-3], query.data_ptr(), query.stride(), key.data_ptr(), key.stride(), value.data_ptr(),
        value.stride(), d.scale, causal, index)
    if o.lengths_q is not None or o.lengths_k is not None or o.prefix is not None or o.pair_q is not None \
            or o.cu_q is not None:
        call.positions(address(o.lengths_q), address(o.lengths_k), address(o.prefix), address(o.pair_q),
                       address(o.pair_k), address(o.cu_q), address(o.cu_k))
    if o.rows_q is not None:
        call.rows(address(o.rows_q), address(o.rows_k), address(o.regions), o.rows_q.shape[0])
    if o.key_mask is not None:
        strides = o.key_mask.stride()
        call.key_mask(o.key_mask.data_ptr(), strides[0] if len(strides) == 2 else 0, strides[-1])
    if o.mask is not None:
        call.mask(plane(o.mask))
    if d.bias is not None:
        call.bias(plane(d.bias), DTYPES[d.bias.dtype])
    if d.dropout:
        call.dropout(d.dropout, seed.data_ptr(), probs_dropout)
    return call


def outputs(call, out: Tensor, probs: Tensor | None, lse: Tensor | None, kept: Tensor | None) -> None:
    call.outputs(out.data_ptr(), address(probs), address(lse), address(kept))


def gradients(call, d_out: Tensor, d_probs: Tensor | None, d_lse: Tensor | None, kept: Tensor | None, found,
              dtype) -> None:
    """`found` are the tensors for the gradients of query, key, value and bias, None where not needed."""
    bias = found[3]
    call.gradients(d_out.data_ptr(), d_out.stride(), address(d_probs), address(d_lse), address(kept),
                   *map(address, found), DTYPES[dtype], (1, 1, 1, 1) if bias is None else tuple(bias.shape))


def forward(calls: list) -> int:
    """0, or 1 if a length, an offset or an index leaves its stream."""
    return _native.attention_fwd(calls[0], calls[1] if len(calls) > 1 else None, torch.get_num_threads())


def backward(calls: list) -> int:
    return _native.attention_bwd(calls[0], calls[1] if len(calls) > 1 else None, torch.get_num_threads())
