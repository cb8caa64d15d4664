"""Forward kernel of `attention`: a program holds a tile of queries and walks over the keys with an online softmax.

Probabilities, where they are wanted, take a second walk, since their normaliser is known at its end only.
"""

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
    scores,
    start_of,
    store_lines,
    written,
)


@triton.jit
def _attend(state, q, q_lines, first_row, start, end, keys, pairs, draws, scale,
            PARTIAL: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
            BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """Adds the keys from start to end to (maximum, sum, weighted values) of the queries."""
    highest, total, out = state
    key, key_s, value, value_s, count_k, table, keep, keep_stride = keys
    for first in range(start, end, BN):
        columns = first + tl.arange(0, BN)
        at, column_live = lines_of(columns, count_k, table, keep, keep_stride)
        k = load_lines(key, key_s, at, column_live, D, BD, UPCAST)
        x, live = scores(q, k, q_lines, (key, key_s, at, column_live), scale, first_row, first, pairs, CAUSAL, D, BD,
                         BM, BN, UPCAST)
        new = tl.maximum(highest, tl.max(x, 1))
        pivot = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp(x - pivot[:, None])
        fade = tl.exp(highest - pivot)
        total = total * fade + tl.sum(p, 1)
        highest = new
        if draws[0] is not None:
            p = tl.where(kept(draws, first_row, first, BM, BN), p, 0.0)
        v = load_lines(value, value_s, at, column_live, DV, BV, UPCAST)
        if PARTIAL:
            v, broken = cleaned(v)
            p = tl.where(live & broken[None, :], float("nan"), p)
        out = tl.dot(p.to(v.dtype), v, out * fade[:, None], input_precision="ieee")
    return highest, total, out


@triton.jit
def _store_probs(probs, probs_q, q, q_lines, highest, share, gain, first_row, inside, end, keys, pairs, draws, scale,
                 count_k, AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                 BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """Writes count_k probabilities of each query; AFTER dropout or before."""
    key, key_s, _, _, valid_k, table, keep, keep_stride = keys
    for first in range(0, count_k, BN):
        columns = first + tl.arange(0, BN)
        p = tl.zeros((BM, BN), tl.float32)
        if first < end:
            at, column_live = lines_of(columns, valid_k, table, keep, keep_stride)
            k = load_lines(key, key_s, at, column_live, D, BD, UPCAST)
            x, live = scores(q, k, q_lines, (key, key_s, at, column_live), scale, first_row, first, pairs, CAUSAL, D,
                             BD, BM, BN, UPCAST)
            p = tl.where(live, tl.exp(x - highest[:, None]) * share[:, None], 0.0)
            if AFTER and draws[0] is not None:
                p = tl.where(kept(draws, first_row, first, BM, BN), p * gain, 0.0)
        tl.store(plane_at(probs, probs_q, 1, first_row, first, BM, BN), p.to(probs.dtype.element_ty),
                 mask=inside[:, None] & (columns < count_k)[None, :])


@triton.jit(do_not_specialize=["tiles"])
def attention_fwd_kernel(inputs, sizes, out, lse, stats, probs, out_b, out_s, out_h, lse_b, lse_s, lse_h, stats_plane,
                         tiles, scale, gain, AFTER: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
                         DV: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                         UPCAST: tl.constexpr):
    # out like query with width DV; lse and the two planes of stats (maximum, sum) [B, H, Sq], packed [N, H];
    # probs [B, H, Sq, Sk]; all but out may be None
    sequence, head, tile = locate(tiles, sizes.batch, sizes.heads, inputs.cu_q, BM)
    queries, keys, pairs, draws = open_sequence(inputs, sizes, sequence, head)
    query, query_s, count_q, table = queries
    count_k, mask, bias, regions, offset, prefix = keys[4], pairs[0], pairs[3], pairs[6], pairs[7], pairs[8]
    PARTIAL: tl.constexpr = (mask is not None) or (bias is not None) or (regions is not None)
    first = tile * BM
    rows = first + tl.arange(0, BM)
    at, row_live = lines_of(rows, count_q, table, None, 1)
    q, q_lines = load_lines(query, query_s, at, row_live, D, BD, UPCAST), (query, query_s, at, row_live)
    state = (tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32), tl.zeros((BM, BV), tl.float32))
    whole, end = key_range(first, count_q, count_k, offset, prefix, BM, BN, CAUSAL)
    state = _attend(state, q, q_lines, first, 0, whole, keys, pairs, draws, scale, PARTIAL, False, D, DV, BD, BV, BM,
                    BN, UPCAST)
    if CAUSAL:
        state = _attend(state, q, q_lines, first, whole, end, keys, pairs, draws, scale, True, True, D, DV, BD, BV,
                        BM, BN, UPCAST)
    highest, total, result = state
    empty = total == 0.0
    highest = tl.where(empty, 0.0, highest)
    share = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, total))

    # a padded query has collected zeros times anything
    result = tl.where(empty[:, None], 0.0, result * (share * gain)[:, None])
    inside = written(rows, count_q, sizes.count_q, inputs.cu_q)
    out = start_of(out, sequence, head, out_b, out_s, out_h, None, inputs.cu_q, table, sizes.groups)
    store_lines(out, out_s, at, inside, result, DV, BV)
    line = start_of(0, sequence, head, lse_b, lse_s, lse_h, None, inputs.cu_q, None, 1) + rows.to(tl.int64) * lse_s
    if lse is not None:
        tl.store(lse + line, tl.where(empty, -float("inf"), highest + tl.log(tl.where(empty, 1.0, total))), mask=inside)
    if stats is not None:
        tl.store(stats + line, highest, mask=inside)
        tl.store(stats + stats_plane + line, share, mask=inside)
    if probs is not None:
        plane = probs + (sequence.to(tl.int64) * sizes.heads + head) * sizes.count_q * sizes.count_k
        _store_probs(plane, sizes.count_k, q, q_lines, highest, share, gain, first, inside, end, keys, pairs, draws,
                     scale, sizes.count_k, AFTER, CAUSAL, D, BD, BM, BN, UPCAST)
