"""Gradient kernels of `attention`: each computes the probabilities of its tiles again from the forward's statistics.

One kernel walks over the keys for the gradient of a tile of queries, one over the queries for that of a tile of keys
and values, one over the samples for that of a bias. No atomics: what several sequences share is written per sequence
and summed in a fixed order.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .attention_tiles import (
    cleaned,
    kept,
    key_range,
    lines_of,
    load_lines,
    locate,
    open_sequence,
    plane_at,
    products,
    query_range,
    scores,
    start_of,
    store_lines,
    written,
)


class Upstream(NamedTuple):
    """The forward's result and statistics, and the gradients that arrive; d_probs and d_lse may be None.

    inner [B, H, Sq] (packed [N, H]) is sum(p dp) - d_lse, which the query kernel leaves for the others.
    """
    out: object
    stats: object
    d_out: object
    d_probs: object
    d_lse: object
    inner: object


class UpstreamSizes(NamedTuple):
    """Strides; those of lse hold for the statistics, whose second plane is stats_plane away, for d_lse and inner."""
    out_b: int
    out_s: int
    out_h: int
    d_out_b: int
    d_out_s: int
    d_out_h: int
    d_probs_b: int
    d_probs_h: int
    d_probs_q: int
    d_probs_k: int
    lse_b: int
    lse_s: int
    lse_h: int
    stats_plane: int


@triton.jit
def _open_upstream(inputs, sizes, upstream, strides, sequence, head):
    """(d_out, its row stride, offset of the lines, their stride, plane of d_probs) of a sequence and head."""
    d_out = start_of(upstream.d_out, sequence, head, strides.d_out_b, strides.d_out_s, strides.d_out_h, None,
                     inputs.cu_q, inputs.rows_q, sizes.groups)
    line = start_of(0, sequence, head, strides.lse_b, strides.lse_s, strides.lse_h, None, inputs.cu_q, None, 1)
    start = sequence.to(tl.int64) * strides.d_probs_b + head.to(tl.int64) * strides.d_probs_h
    plane = (upstream.d_probs, start, strides.d_probs_q, strides.d_probs_k)
    return d_out, strides.d_out_s, line, strides.lse_s, plane


@triton.jit
def _probabilities(x, live, lines, row_live, upstream, strides):
    """p [BM, BN]."""
    highest = tl.load(upstream.stats + lines, mask=row_live, other=0.0)
    share = tl.load(upstream.stats + strides.stats_plane + lines, mask=row_live, other=0.0)
    return tl.where(live, tl.exp(x - highest[:, None]) * share[:, None], 0.0)


@triton.jit
def _from_probs(d_probs, first_row, first_column, live, BM: tl.constexpr, BN: tl.constexpr):
    plane, start, stride_q, stride_k = d_probs
    at = plane_at(plane + start, stride_q, stride_k, first_row, first_column, BM, BN)
    return tl.load(at, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _score_gradient(p, live, inner, d_out, v, d_out_lines, v_lines, first_row, first_column, keep, gain, d_probs,
                    AFTER: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                    UPCAST: tl.constexpr):
    """(dx, dropped p) [BM, BN]; keep is None without dropout."""
    dp, dropped = products(d_out, v, d_out_lines, v_lines, DV, BV, UPCAST), p
    if d_probs[0] is not None and AFTER:
        dp += _from_probs(d_probs, first_row, first_column, live, BM, BN)
    if keep is not None:
        dp, dropped = tl.where(keep, dp * gain, 0.0), tl.where(keep, p * gain, 0.0)
    if d_probs[0] is not None and not AFTER:
        dp += _from_probs(d_probs, first_row, first_column, live, BM, BN)
    return tl.where(live, p * (dp - inner[:, None]), 0.0), dropped


@triton.jit
def _probs_inner(total, q, q_lines, first_row, row_live, lines, end, keys, pairs, draws, d_probs, upstream, strides,
                 scale, gain, AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """Adds the share of d_probs in sum(p dp) to total."""
    key, key_s, _, _, count_k, table, keep, keep_stride = keys
    for first in range(0, end, BN):
        columns = first + tl.arange(0, BN)
        at, column_live = lines_of(columns, count_k, table, keep, keep_stride)
        k = load_lines(key, key_s, at, column_live, D, BD, UPCAST)
        x, live = scores(q, k, q_lines, (key, key_s, at, column_live), scale, first_row, first, pairs, CAUSAL, D, BD,
                         BM, BN, UPCAST)
        p = _probabilities(x, live, lines, row_live, upstream, strides)
        if AFTER and draws[0] is not None:
            p = tl.where(kept(draws, first_row, first, BM, BN), p * gain, 0.0)
        product = p * _from_probs(d_probs, first_row, first, live, BM, BN)
        total += tl.sum(tl.where(live, product, 0.0), 1)
    return total


@triton.jit
def _pull(d_q, q, d_out, q_lines, d_out_lines, inner, first_row, row_live, lines, start, end, keys, pairs, draws,
          d_probs, upstream, strides, scale, gain, PARTIAL: tl.constexpr, AFTER: tl.constexpr, CAUSAL: tl.constexpr,
          D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          UPCAST: tl.constexpr):
    """Adds dx k of the keys from start to end to d_q."""
    key, key_s, value, value_s, count_k, table, keep, keep_stride = keys
    for first in range(start, end, BN):
        columns = first + tl.arange(0, BN)
        at, column_live = lines_of(columns, count_k, table, keep, keep_stride)
        k = load_lines(key, key_s, at, column_live, D, BD, UPCAST)
        v = load_lines(value, value_s, at, column_live, DV, BV, UPCAST)
        x, live = scores(q, k, q_lines, (key, key_s, at, column_live), scale, first_row, first, pairs, CAUSAL, D, BD,
                         BM, BN, UPCAST)
        p = _probabilities(x, live, lines, row_live, upstream, strides)
        drawn = kept(draws, first_row, first, BM, BN) if draws[0] is not None else None
        dx, _ = _score_gradient(p, live, inner, d_out, v, d_out_lines, (value, value_s, at, column_live), first_row,
                                first, drawn, gain, d_probs, AFTER, DV, BV, BM, BN, UPCAST)
        if PARTIAL:
            k, broken = cleaned(k)
            dx = tl.where(live & broken[None, :], float("nan"), dx)
        d_q = tl.dot(dx.to(k.dtype), k, d_q, input_precision="ieee")
    return d_q


@triton.jit(do_not_specialize=["tiles"])
def attention_bwd_query_kernel(inputs, sizes, upstream, strides, d_query, d_query_b, d_query_s, d_query_h, tiles, scale,
                               gain, AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                               BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                               UPCAST: tl.constexpr):
    # d_query like query, or per pair; writes upstream.inner, from the first walk over the keys if there is d_probs
    sequence, head, tile = locate(tiles, sizes.batch, sizes.heads, inputs.cu_q, BM)
    queries, keys, pairs, draws = open_sequence(inputs, sizes, sequence, head)
    query, query_s, count_q, table = queries
    count_k, mask, bias, regions, offset, prefix = keys[4], pairs[0], pairs[3], pairs[6], pairs[7], pairs[8]
    PARTIAL: tl.constexpr = (mask is not None) or (bias is not None) or (regions is not None)
    d_start, d_stride, line, lse_s, d_probs = _open_upstream(inputs, sizes, upstream, strides, sequence, head)
    first = tile * BM
    rows = first + tl.arange(0, BM)
    at, row_live = lines_of(rows, count_q, table, None, 1)
    lines = line + rows.to(tl.int64) * lse_s
    q = load_lines(query, query_s, at, row_live, D, BD, UPCAST)
    d_out = load_lines(d_start, d_stride, at, row_live, DV, BV, UPCAST)
    out = start_of(upstream.out, sequence, head, strides.out_b, strides.out_s, strides.out_h, None, inputs.cu_q, table,
                   sizes.groups)
    q_lines, d_out_lines = (query, query_s, at, row_live), (d_start, d_stride, at, row_live)
    result = load_lines(out, strides.out_s, at, row_live, DV, BV, UPCAST)
    inner = tl.sum(d_out.to(tl.float32) * result.to(tl.float32), 1)
    whole, end = key_range(first, count_q, count_k, offset, prefix, BM, BN, CAUSAL)
    if d_probs[0] is not None:
        inner = _probs_inner(inner, q, q_lines, first, row_live, lines, end, keys, pairs, draws, d_probs, upstream,
                             strides, scale, gain, AFTER, CAUSAL, D, BD, BM, BN, UPCAST)
    if upstream.d_lse is not None:
        inner -= tl.load(upstream.d_lse + lines, mask=row_live, other=0.0)
    inside = written(rows, count_q, sizes.count_q, inputs.cu_q)
    tl.store(upstream.inner + lines, inner, mask=inside)
    if d_query is not None:
        d_q = tl.zeros((BM, BD), tl.float32)
        d_q = _pull(d_q, q, d_out, q_lines, d_out_lines, inner, first, row_live, lines, 0, whole, keys, pairs, draws,
                    d_probs, upstream, strides, scale, gain, PARTIAL, AFTER, False, D, DV, BD, BV, BM, BN, UPCAST)
        if CAUSAL:
            d_q = _pull(d_q, q, d_out, q_lines, d_out_lines, inner, first, row_live, lines, whole, end, keys, pairs,
                        draws, d_probs, upstream, strides, scale, gain, True, AFTER, True, D, DV, BD, BV, BM, BN,
                        UPCAST)
        d_query = start_of(d_query, sequence, head, d_query_b, d_query_s, d_query_h, None, inputs.cu_q, table,
                           sizes.groups)
        # a padded query has collected zeros times anything
        store_lines(d_query, d_query_s, at, inside, tl.where(row_live[:, None], d_q * scale, 0.0), D, BD)


@triton.jit
def _push(state, k, v, k_lines, v_lines, first_column, start, end, queries, pairs, draws, gradients, upstream,
          strides, scale, gain, PARTIAL: tl.constexpr, AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
          DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
          UPCAST: tl.constexpr):
    """Adds dx^T q and p~^T d_out of the queries from start to end to (d_k, d_v)."""
    d_k, d_v = state
    query, query_s, count_q, table = queries
    d_start, d_stride, line, lse_s, d_probs = gradients
    for first in range(start, end, BM):
        rows = first + tl.arange(0, BM)
        at, row_live = lines_of(rows, count_q, table, None, 1)
        lines = line + rows.to(tl.int64) * lse_s
        q = load_lines(query, query_s, at, row_live, D, BD, UPCAST)
        d_out = load_lines(d_start, d_stride, at, row_live, DV, BV, UPCAST)
        x, live = scores(q, k, (query, query_s, at, row_live), k_lines, scale, first, first_column, pairs, CAUSAL, D,
                         BD, BM, BN, UPCAST)
        p = _probabilities(x, live, lines, row_live, upstream, strides)
        inner = tl.load(upstream.inner + lines, mask=row_live, other=0.0)
        drawn = kept(draws, first, first_column, BM, BN) if draws[0] is not None else None
        dx, dropped = _score_gradient(p, live, inner, d_out, v, (d_start, d_stride, at, row_live), v_lines, first,
                                      first_column, drawn, gain, d_probs, AFTER, DV, BV, BM, BN, UPCAST)
        if PARTIAL:
            q, broken = cleaned(q)
            dx = tl.where(live & broken[:, None], float("nan"), dx)
            d_out, broken = cleaned(d_out)
            dropped = tl.where(live & broken[:, None], float("nan"), dropped)
        d_v = tl.dot(tl.trans(dropped).to(d_out.dtype), d_out, d_v, input_precision="ieee")
        d_k = tl.dot(tl.trans(dx).to(q.dtype), q, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit(do_not_specialize=["tiles"])
def attention_bwd_key_kernel(inputs, sizes, upstream, strides, d_key, d_value, d_key_b, d_key_s, d_key_h, d_value_b,
                             d_value_s, d_value_h, tiles, scale, gain, SHARED: tl.constexpr, AFTER: tl.constexpr,
                             CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
                             BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    # d_key and d_value like key and value, or per pair, or, if sequences SHARED rows, per sequence and position
    sequence, head, tile = locate(tiles, sizes.batch, sizes.heads, inputs.cu_k, BN)
    queries, keys, pairs, draws = open_sequence(inputs, sizes, sequence, head)
    key, key_s, value, value_s, count_k, table, keep, keep_stride = keys
    count_q, mask, bias, regions, offset, prefix = queries[2], pairs[0], pairs[3], pairs[6], pairs[7], pairs[8]
    PARTIAL: tl.constexpr = (mask is not None) or (bias is not None) or (regions is not None)
    gradients = _open_upstream(inputs, sizes, upstream, strides, sequence, head)
    first = tile * BN
    columns = first + tl.arange(0, BN)
    at, column_live = lines_of(columns, count_k, table, keep, keep_stride)
    k = load_lines(key, key_s, at, column_live, D, BD, UPCAST)
    v = load_lines(value, value_s, at, column_live, DV, BV, UPCAST)
    k_lines, v_lines = (key, key_s, at, column_live), (value, value_s, at, column_live)
    state = (tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BV), tl.float32))
    start, whole = query_range(first, count_q, count_k, offset, prefix, BM, BN, CAUSAL)
    if CAUSAL:
        state = _push(state, k, v, k_lines, v_lines, first, start, tl.minimum(whole, count_q), queries, pairs,
                      draws, gradients, upstream, strides, scale, gain, True, AFTER, True, D, DV, BD, BV, BM, BN,
                      UPCAST)
    d_k, d_v = _push(state, k, v, k_lines, v_lines, first, whole, count_q, queries, pairs, draws, gradients,
                     upstream, strides, scale, gain, PARTIAL, AFTER, False, D, DV, BD, BV, BM, BN, UPCAST)
    # a key that may not be read has collected zeros times anything
    d_k = tl.where(column_live[:, None], d_k * scale, 0.0)
    d_v = tl.where(column_live[:, None], d_v, 0.0)
    inside = written(columns, count_k, sizes.count_k, inputs.cu_k)
    if SHARED:
        table, at = None, columns.to(tl.int64)
    d_key = start_of(d_key, sequence, head, d_key_b, d_key_s, d_key_h, None, inputs.cu_k, table, sizes.groups)
    d_value = start_of(d_value, sequence, head, d_value_b, d_value_s, d_value_h, None, inputs.cu_k, table,
                       sizes.groups)
    store_lines(d_key, d_key_s, at, inside, d_k, D, BD)
    store_lines(d_value, d_value_s, at, inside, d_v, DV, BV)


@triton.jit(do_not_specialize=["tiles", "per_split"])
def attention_bwd_bias_kernel(inputs, sizes, upstream, strides, parts, tiles, per_split, scale, gain,
                              AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                              BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                              UPCAST: tl.constexpr):
    # parts [splits, H, Sq, Sk]: dx summed over the per_split sequences of a split, in their order
    tiles_k = tl.cdiv(sizes.count_k, BN)
    split, head, tile = locate(tiles, 0, sizes.heads, None, BM)
    first_row, first_column = tile // tiles_k * BM, tile % tiles_k * BN
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    first_sequence = split * per_split
    for at in range(tl.minimum(per_split, sizes.batch - first_sequence)):
        sequence = first_sequence + at
        queries, keys, pairs, draws = open_sequence(inputs, sizes, sequence, head)
        query, query_s, count_q, table_q = queries
        key, key_s, value, value_s, count_k, table_k, keep, keep_stride = keys
        d_start, d_stride, line, lse_s, d_probs = _open_upstream(inputs, sizes, upstream, strides, sequence, head)
        at_q, row_live = lines_of(rows, count_q, table_q, None, 1)
        at_k, column_live = lines_of(columns, count_k, table_k, keep, keep_stride)
        lines = line + rows.to(tl.int64) * lse_s
        q = load_lines(query, query_s, at_q, row_live, D, BD, UPCAST)
        k = load_lines(key, key_s, at_k, column_live, D, BD, UPCAST)
        d_out = load_lines(d_start, d_stride, at_q, row_live, DV, BV, UPCAST)
        v = load_lines(value, value_s, at_k, column_live, DV, BV, UPCAST)
        x, live = scores(q, k, (query, query_s, at_q, row_live), (key, key_s, at_k, column_live), scale, first_row,
                         first_column, pairs, CAUSAL, D, BD, BM, BN, UPCAST)
        p = _probabilities(x, live, lines, row_live, upstream, strides)
        inner = tl.load(upstream.inner + lines, mask=row_live, other=0.0)
        drawn = kept(draws, first_row, first_column, BM, BN) if draws[0] is not None else None
        dx, _ = _score_gradient(p, live, inner, d_out, v, (d_start, d_stride, at_q, row_live),
                                (value, value_s, at_k, column_live), first_row, first_column, drawn, gain, d_probs,
                                AFTER, DV, BV, BM, BN, UPCAST)
        total += dx
    plane = parts + (split * sizes.heads + head).to(tl.int64) * sizes.count_q * sizes.count_k
    tl.store(plane_at(plane, sizes.count_k, 1, first_row, first_column, BM, BN), total,
             mask=(rows < sizes.count_q)[:, None] & (columns < sizes.count_k)[None, :])


@triton.jit(do_not_specialize=["M", "R", "E"])
def attention_bwd_sum_kernel(parts, order, offsets, out, M, R, E, BE: tl.constexpr):
    # out [B, R, E]: row r is the sum of parts [B, M, E] at order[offsets[r] : offsets[r + 1]], in that order
    blocks = tl.cdiv(E, BE)
    line, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    sample, row = (line // R).to(tl.int64), line % R
    element = block * BE + tl.arange(0, BE)
    total = tl.zeros((BE,), tl.float32)
    for at in range(tl.load(offsets + row), tl.load(offsets + row + 1)):
        source = parts + (sample * M + tl.load(order + at)) * E
        total += tl.load(source + element, mask=element < E, other=0.0).to(tl.float32)
    tl.store(out + line.to(tl.int64) * E + element, total.to(out.dtype.element_ty), mask=element < E)
