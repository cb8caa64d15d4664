"""Attention between and within streams: both directions in one call, padding skipped, probabilities out."""

from typing import NamedTuple

import torch
from torch import Tensor

from .attention_call import CAUSAL, LSE, NO_OPTIONS, PROBS, PROBS_DROPOUT, Direction, Options, run
from .attention_checks import (
    check_bias,
    check_broadcast,
    check_integers,
    check_key_mask,
    check_mask,
    check_match,
    check_rate,
    check_scale,
    check_streams,
    draw_seed,
)
from .attention_grid import axial_attention, window_attention
from .attention_shared import BiAttention, bi_attention
from .reference import attention as reference

__all__ = ["Attention", "BiAttention", "CoAttention", "attention", "attention_varlen", "axial_attention",
           "bi_attention", "co_attention", "co_attention_varlen", "cross_attention", "dropout_mask",
           "window_attention"]


class Attention(NamedTuple):
    """out [B, Sq, H, Dv]; probs [B, H, Sq, Sk] and lse [B, H, Sq] where asked for, else None."""
    out: Tensor
    probs: Tensor | None = None
    lse: Tensor | None = None


class CoAttention(NamedTuple):
    """What each stream read from the other: out_a [B, Sa, H, Dv], probs_a [B, H, Sa, Sb], lse_a [B, H, Sa]; b too."""
    out_a: Tensor
    out_b: Tensor
    probs_a: Tensor | None = None
    probs_b: Tensor | None = None
    lse_a: Tensor | None = None
    lse_b: Tensor | None = None


def co_attention(query_a: Tensor, key_a: Tensor, value_a: Tensor, query_b: Tensor, key_b: Tensor, value_b: Tensor, *,
                 lengths_a: Tensor | None = None, lengths_b: Tensor | None = None, mask_a: Tensor | None = None,
                 mask_b: Tensor | None = None, bias_a: Tensor | None = None, bias_b: Tensor | None = None,
                 scale: float | None = None, dropout_a: float = 0.0, dropout_b: float = 0.0, seed=None,
                 return_probs: bool = False, probs_dropout: bool = False, return_lse: bool = False,
                 pair_a: Tensor | None = None, pair_b: Tensor | None = None,
                 deterministic: bool = True) -> CoAttention:
    r"""Two streams that read each other: queries of a over keys of b, and queries of b over keys of a, in one call.

    Equivalent to::

        def direction(query, key, value, length, mask, bias, dropout):           # [B, S, H, D] -> [B, H, S, D]
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            scores = scale * query @ key.mT + bias
            scores = scores.masked_fill(~(mask & (arange(Sk) < length[:, None]))[:, None, None], -inf)
            return (F.dropout(scores.softmax(-1), dropout) @ value).transpose(1, 2)

        out_a = direction(query_a, key_b, value_b, lengths_b, mask_b, bias_a, dropout_a)
        out_b = direction(query_b, key_a, value_a, lengths_a, mask_a, bias_b, dropout_b)

    Args:
        query_a, key_a, value_a:  [B, Sa, H, D] float32, bfloat16, float16 or float64, for example the text; value
            [B, Sa, H, Dv]. Any strides with a contiguous last dimension, so views of a Linear's output need no copy.
        query_b, key_b, value_b:  [B, Sb, H, D], for example the image regions; same dtype, device and heads.
        lengths_a, lengths_b:  [B] int32 or int64, how many leading positions of a sample are valid. Padded keys are
            never read; padded queries are skipped, their rows are 0.
        mask_a, mask_b:  [B, S] bool, True where a position may be read as a key; holes are allowed.
        bias_a, bias_b:  added to the scores of direction a [B|1, H|1, Sa|1, Sb|1] and b [.., Sb|1, Sa|1]; finite values
            are honoured literally, -inf excludes. Differentiable, the gradient has the given shape.
        scale:  a float, by default 1 / sqrt(D); the order is scale, bias, mask, softmax.
        dropout_a, dropout_b:  probability of dropping a probability of direction a or b; the kept ones are multiplied
            by 1 / (1 - dropout). `dropout_mask` gives the exact mask.
        seed:  an int or [] int64 tensor; None draws one number from torch's generator of the device.
        return_probs:  also return the normalised probabilities, differentiable; before dropout, or after it with
            probs_dropout=True.
        return_lse:  also return the log-sum-exp of each query's scores, differentiable.
        pair_a, pair_b:  [P] int32 or int64 row indices: the result is that of a[pair_a], b[pair_b], without the copies.
            lengths and masks stay those of the streams, biases are [P|1, ...]. Both or neither.
        deterministic:  accepted for symmetry; all backends are deterministic.

    Returns:
        CoAttention. A query without a single key to read has output 0, lse -inf and gradient 0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: ViLBERT (Lu et al. 2019, arXiv:1908.02265), Fig. 2; LXMERT (Tan and Bansal 2019, arXiv:1908.07490), 3.1.
    """
    op = "co_attention"
    names = "query_a", "key_a", "value_a", "query_b", "key_b", "value_b"
    query_a, key_a, value_a, query_b, key_b, value_b = check_streams(
        op, names, (query_a, key_a, value_a, query_b, key_b, value_b))
    if (pair_a is None) != (pair_b is None):
        raise ValueError(f"{op}: pair_a and pair_b go together, one of them is None")
    paired = pair_a is not None
    shape_a, shape_b = query_a.shape, query_b.shape
    (batch_a, sa, heads, width), (batch_b, sb) = shape_a, shape_b[:2]
    if not (key_a.shape == value_a.shape == shape_a and key_b.shape == value_b.shape == shape_b
            and shape_b == (batch_a, sb, heads, width)):
        check_match(op, ("query_a", "key_b", "value_b"), query_a, key_b, value_b, paired)
        check_match(op, ("query_b", "key_a", "value_a"), query_b, key_a, value_a, paired)
        for name, query, key in (("a", query_a, key_a), ("b", query_b, key_b)):
            if query.shape[:2] != key.shape[:2]:
                raise ValueError(f"{op}: key_{name} has batch and length {tuple(key.shape[:2])}, query_{name} has "
                                 f"{tuple(query.shape[:2])}; they must be equal")
    over_b = over_a = NO_OPTIONS
    # a small call takes as long as its checks
    if not (pair_a is pair_b is lengths_a is lengths_b is mask_a is mask_b is bias_a is bias_b is None):
        pair_a = check_integers(op, "pair_a", pair_a, query_a, None)
        pair_b = check_integers(op, "pair_b", pair_b, query_a, None if pair_a is None else pair_a.shape[0])
        lengths_a = check_integers(op, "lengths_a", lengths_a, query_a, batch_a)
        lengths_b = check_integers(op, "lengths_b", lengths_b, query_a, batch_b)
        mask_a = check_key_mask(op, "mask_a", mask_a, query_a, (batch_a, sa))
        mask_b = check_key_mask(op, "mask_b", mask_b, query_a, (batch_b, sb))
        batch = batch_a if pair_a is None else pair_a.shape[0]
        bias_a = check_bias(op, "bias_a", bias_a, query_a, (batch, heads, sa, sb))
        bias_b = check_bias(op, "bias_b", bias_b, query_a, (batch, heads, sb, sa))
        over_b = Options(lengths_a, lengths_b, mask_b, pair_q=pair_a, pair_k=pair_b)
        over_a = Options(lengths_b, lengths_a, mask_a, pair_q=pair_b, pair_k=pair_a)
    scale = check_scale(op, scale, width)
    dropout_a, dropout_b = check_rate(op, "dropout_a", dropout_a), check_rate(op, "dropout_b", dropout_b)
    seed = draw_seed(op, seed, query_a, dropout_a > 0 or dropout_b > 0)
    flags = PROBS * return_probs | PROBS_DROPOUT * probs_dropout | LSE * return_lse
    a = Direction(query_a, key_b, value_b, bias_a, over_b, scale, dropout_a, flags)
    b = Direction(query_b, key_a, value_a, bias_b, over_a, scale, dropout_b, flags)
    (out_a, probs_a, lse_a), (out_b, probs_b, lse_b) = run(op, [a, b], seed)
    return CoAttention(out_a, out_b, probs_a, probs_b, lse_a, lse_b)


def co_attention_varlen(query_a: Tensor, key_a: Tensor, value_a: Tensor, query_b: Tensor, key_b: Tensor,
                        value_b: Tensor, cu_a: Tensor, cu_b: Tensor, *, mask_a: Tensor | None = None,
                        mask_b: Tensor | None = None, scale: float | None = None, dropout_a: float = 0.0,
                        dropout_b: float = 0.0, seed=None, return_lse: bool = False,
                        deterministic: bool = True) -> CoAttention:
    """`co_attention` of streams packed without padding; the same values as padded, dropout included.

    Args:
        query_a, key_a, value_a:  [Na, H, D], the samples one behind the other.
        query_b, key_b, value_b:  [Nb, H, D].
        cu_a, cu_b:  [B + 1] int32 or int64 offsets, from 0 up to at most N: sample i holds rows cu[i] to cu[i + 1].
            Empty samples are legal; the rows behind the last one are written 0.
        mask_a, mask_b:  [N] bool, True where a position may be read as a key.
        scale, dropout_a, dropout_b, seed, deterministic:  as in `co_attention`.
        return_lse:  also return lse_a [Na, H] and lse_b [Nb, H].

    Returns:
        CoAttention with out_a [Na, H, Dv] and out_b [Nb, H, Dv]; probs are None.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "co_attention_varlen"
    names = "query_a", "key_a", "value_a", "query_b", "key_b", "value_b"
    query_a, key_a, value_a, query_b, key_b, value_b = check_streams(
        op, names, (query_a, key_a, value_a, query_b, key_b, value_b), rank=3)
    check_match(op, ("query_a", "key_b", "value_b"), query_a, key_b, value_b, False)
    check_match(op, ("query_b", "key_a", "value_a"), query_b, key_a, value_a, False)
    for name, query, key in (("a", query_a, key_a), ("b", query_b, key_b)):
        if query.shape[0] != key.shape[0]:
            raise ValueError(f"{op}: key_{name} has {key.shape[0]} rows, query_{name} has {query.shape[0]}; they must "
                             "be equal")
    cu_a = _offsets(op, "cu_a", cu_a, query_a, None)
    cu_b = _offsets(op, "cu_b", cu_b, query_a, cu_a.shape[0])
    mask_a = check_key_mask(op, "mask_a", mask_a, query_a, key_a.shape[:1])
    mask_b = check_key_mask(op, "mask_b", mask_b, query_a, key_b.shape[:1])
    scale = check_scale(op, scale, query_a.shape[2])
    dropout_a, dropout_b = check_rate(op, "dropout_a", dropout_a), check_rate(op, "dropout_b", dropout_b)
    seed = draw_seed(op, seed, query_a, dropout_a > 0 or dropout_b > 0)
    flags = LSE * return_lse
    over_b, over_a = Options(key_mask=mask_b, cu_q=cu_a, cu_k=cu_b), Options(key_mask=mask_a, cu_q=cu_b, cu_k=cu_a)
    a = Direction(query_a, key_b, value_b, None, over_b, scale, dropout_a, flags)
    b = Direction(query_b, key_a, value_a, None, over_a, scale, dropout_b, flags)
    (out_a, _, lse_a), (out_b, _, lse_b) = run(op, [a, b], seed)
    return CoAttention(out_a, out_b, None, None, lse_a, lse_b)


def cross_attention(query: Tensor, key: Tensor, value: Tensor, *, lengths_q: Tensor | None = None,
                    lengths_k: Tensor | None = None, mask: Tensor | None = None, bias: Tensor | None = None,
                    scale: float | None = None, dropout: float = 0.0, seed=None, causal: bool = False, prefix=None,
                    return_probs: bool = False, probs_dropout: bool = False, return_lse: bool = False,
                    pair_q: Tensor | None = None, pair_k: Tensor | None = None,
                    deterministic: bool = True) -> Attention:
    """One direction of attention, with the options of `co_attention`.

    Args:
        query:  [B, Sq, H, D] float32, bfloat16, float16 or float64, any strides with a contiguous last dimension.
        key, value:  [B, Sk, H, D] and [B, Sk, H, Dv]; for example a cache with room behind `lengths_k` rows.
        lengths_q, lengths_k:  [B] int32 or int64 valid leading positions.
        mask:  bool, True where a key may be read: [B, Sk], [B|1, Sq|1, Sk|1] for all heads, or [B|1, H|1, Sq|1, Sk|1].
        bias:  added to the scores, broadcastable [B|1, H|1, Sq|1, Sk|1]; differentiable; -inf excludes.
        scale, dropout, seed, return_probs, probs_dropout, return_lse, deterministic:  as in `co_attention`;
            dropout is that of direction 0.
        causal:  query i sees key j up to i + (valid keys - valid queries): the last query sees the last key, so that
            queries behind a cache of keys need nothing else.
        prefix:  an int or [B] integers: keys before it are seen by every query, the rest is causal (prefix LM).
        pair_q, pair_k:  [P] row indices as in `co_attention`; lengths and a [B, Sk] mask belong to the streams, other
            masks, biases and prefix to the P pairs.

    Returns:
        Attention(out [B, Sq, H, Dv], probs [B, H, Sq, Sk] or None, lse [B, H, Sq] or None).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), eq. 1; METER (arXiv:2111.02387); SimVLM (arXiv:2108.10904), eq. 3.
    """
    return _one("cross_attention", query, key, value, lengths_q, lengths_k, mask, bias, scale, dropout, seed, causal,
                prefix, return_probs, probs_dropout, return_lse, pair_q, pair_k)


def attention(query: Tensor, key: Tensor, value: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None,
              bias: Tensor | None = None, scale: float | None = None, dropout: float = 0.0, seed=None,
              causal: bool = False, prefix=None, return_probs: bool = False, probs_dropout: bool = False,
              return_lse: bool = False, deterministic: bool = True) -> Attention:
    """Self-attention: `cross_attention` whose `lengths` [B] hold for queries and keys."""
    return _one("attention", query, key, value, lengths, lengths, mask, bias, scale, dropout, seed, causal, prefix,
                return_probs, probs_dropout, return_lse, None, None)


def attention_varlen(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor | None = None, *,
                     mask: Tensor | None = None, scale: float | None = None, dropout: float = 0.0, seed=None,
                     causal: bool = False, return_lse: bool = False, deterministic: bool = True) -> Attention:
    """`cross_attention` of packed streams: query [Nq, H, D], key and value [Nk, H, D], offsets as in
    `co_attention_varlen`; cu_k=None is self-attention. mask is [Nk] bool.

    Returns:
        Attention(out [Nq, H, Dv], None, lse [Nq, H] or None)
    """
    op = "attention_varlen"
    query, key, value = check_streams(op, ("query", "key", "value"), (query, key, value), rank=3)
    check_match(op, ("query", "key", "value"), query, key, value, False)
    cu_q = _offsets(op, "cu_q", cu_q, query, None)
    cu_k = cu_q if cu_k is None else _offsets(op, "cu_k", cu_k, query, cu_q.shape[0])
    mask = check_key_mask(op, "mask", mask, query, key.shape[:1])
    dropout = check_rate(op, "dropout", dropout)
    seed = draw_seed(op, seed, query, dropout > 0)
    flags = CAUSAL * bool(causal) | LSE * return_lse
    options = Options(key_mask=mask, cu_q=cu_q, cu_k=cu_k)
    scale = check_scale(op, scale, query.shape[2])
    (found,) = run(op, [Direction(query, key, value, None, options, scale, dropout, flags)], seed)
    return Attention(*found)


def _offsets(op: str, name: str, cu, like: Tensor, count: int | None) -> Tensor:
    if cu is None:
        raise TypeError(f"{op}: {name} is None, it must be an int32 or int64 tensor")
    cu = check_integers(op, name, cu, like, count)
    if cu.shape[0] == 0:
        raise ValueError(f"{op}: {name} has shape (0,), it must be [B + 1]")
    return cu


def _one(op, query, key, value, lengths_q, lengths_k, mask, bias, scale, dropout, seed, causal, prefix, return_probs,
         probs_dropout, return_lse, pair_q, pair_k) -> Attention:
    query, key, value = check_streams(op, ("query", "key", "value"), (query, key, value))
    if (pair_q is None) != (pair_k is None):
        raise ValueError(f"{op}: pair_q and pair_k go together, one of them is None")
    check_match(op, ("query", "key", "value"), query, key, value, pair_q is not None)
    pair_q = check_integers(op, "pair_q", pair_q, query, None)
    pair_k = check_integers(op, "pair_k", pair_k, query, None if pair_q is None else pair_q.shape[0])
    suffix = "" if op == "attention" else "_q"
    lengths_q = check_integers(op, f"lengths{suffix}", lengths_q, query, query.shape[0])
    lengths_k = lengths_q if op == "attention" else check_integers(op, "lengths_k", lengths_k, query, key.shape[0])
    batch = query.shape[0] if pair_q is None else pair_q.shape[0]
    shape = batch, query.shape[2], query.shape[1], key.shape[1]
    key_mask = None
    if mask is not None:
        check_mask(op, "mask", mask, query)
        if mask.ndim == 2:
            key_mask, mask = check_key_mask(op, "mask", mask, query, key.shape[:2]), None
        else:
            mask = check_broadcast(op, "mask", mask[:, None] if mask.ndim == 3 else mask, shape)
    bias = check_bias(op, "bias", bias, query, shape)
    if prefix is not None:
        if isinstance(prefix, int):
            prefix = query.new_full((batch,), prefix, dtype=torch.int64)
        prefix, causal = check_integers(op, "prefix", prefix, query, batch), True
    dropout = check_rate(op, "dropout", dropout)
    seed = draw_seed(op, seed, query, dropout > 0)
    options = Options(lengths_q, lengths_k, key_mask, mask, prefix, pair_q, pair_k)
    flags = CAUSAL * bool(causal) | PROBS * return_probs | PROBS_DROPOUT * probs_dropout | LSE * return_lse
    scale = check_scale(op, scale, query.shape[3])
    (found,) = run(op, [Direction(query, key, value, bias, options, scale, dropout, flags)], seed)
    return Attention(*found)


def dropout_mask(seed, batch: int, heads: int, sq: int, sk: int, p: float, direction: int = 0, device=None) -> Tensor:
    """The keep mask that an op of this family uses: [batch, heads, sq, sk] bool, True where a probability is kept.

    Args:
        seed:  int or [] int64 tensor, as given to the op.
        batch, heads, sq, sk:  sizes; `batch` counts pairs where the op has pair indices.
        p:  probability of dropping, 0 to 1, honoured to 2^-32.
        direction:  0 for a (or the only one), 1 for b.

    The mask depends on nothing but the seed and the position within the sequence, so padding, packing, threads,
    tiling and backend do not change it. Source: Philox4x32-10 (Salmon et al. 2011).
    """
    check_rate("dropout_mask", "p", p)
    return reference.dropout_mask(seed, batch, heads, sq, sk, p, direction, device)
