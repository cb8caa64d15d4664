"""Parts of the `attention` kernels: what a program knows of its sequence, which pairs are live, scores, dropout.

A sequence is a sample, a pair of samples, a stretch of a packed stream, or the rows of a sample that a table names.
Rows that may not be read are loaded as zeros. Where some queries of a tile see a key and others do not ("partial"),
what stands in the key must not meet the zeros of the others: non-finite rows are cleaned, and the weights of the pairs
that do see them say so.
"""

from typing import NamedTuple

import triton
import triton.language as tl

WIDE = tl.constexpr(64)


class Inputs(NamedTuple):
    """Tensors of one direction, None where an option is off; the names are those of the definition."""
    query: object
    key: object
    value: object
    lengths_q: object = None
    lengths_k: object = None
    key_mask: object = None
    mask: object = None
    bias: object = None
    prefix: object = None
    pair_q: object = None
    pair_k: object = None
    cu_q: object = None
    cu_k: object = None
    rows_q: object = None
    rows_k: object = None
    regions: object = None
    seed: object = None


class Sizes(NamedTuple):
    """Strides of a sample, a row and a head, of planes also those of queries and keys; then sizes.

    `groups` is the number of sequences in a sample where tables name the rows, and `batch` otherwise, so that a
    sequence modulo `groups` tells which plane of a mask or a bias is its own. `threshold` is that of the definition's
    dropout less 2^31: random words are compared as signed numbers.
    """
    query_b: int
    query_s: int
    query_h: int
    key_b: int
    key_s: int
    key_h: int
    value_b: int
    value_s: int
    value_h: int
    key_mask_b: int
    key_mask_s: int
    mask_b: int
    mask_h: int
    mask_q: int
    mask_k: int
    bias_b: int
    bias_h: int
    bias_q: int
    bias_k: int
    batch: int
    heads: int
    count_q: int
    count_k: int
    groups: int
    threshold: int
    direction: int


@triton.jit
def locate(tiles, batch, heads, cu, BLOCK: tl.constexpr):
    """(sequence, head, tile) of this program; a packed sequence may be given one tile more than it fills."""
    program = tl.program_id(0)
    if cu is not None:
        head, at = program % heads, program // heads
        # sequence b owns the tiles from cu[b] // BLOCK + b to the first of sequence b + 1
        low, high = program * 0, program * 0 + batch
        while high - low > 1:
            middle = (low + high) // 2
            below = (tl.load(cu + middle) // BLOCK).to(tl.int32) + middle <= at
            low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        sequence, tile = low, at - (tl.load(cu + low) // BLOCK).to(tl.int32) - low
    else:
        unit = program // tiles
        sequence, head, tile = unit // heads, unit % heads, program % tiles
    return sequence, head, tile


@triton.jit
def start_of(x, sequence, head, stride_b, stride_s, stride_h, pair, cu, table, groups):
    """Pointer to row 0 of a sequence and head."""
    if cu is not None:
        at = tl.load(cu + sequence).to(tl.int64) * stride_s
    elif pair is not None:
        at = tl.load(pair + sequence).to(tl.int64) * stride_b
    elif table is not None:
        at = (sequence // groups).to(tl.int64) * stride_b
    else:
        at = sequence.to(tl.int64) * stride_b
    return x + (at + head.to(tl.int64) * stride_h)


@triton.jit
def valid_rows(size, sequence, lengths, pair, cu):
    if cu is not None:
        count = (tl.load(cu + sequence + 1) - tl.load(cu + sequence)).to(tl.int32)
    elif lengths is not None:
        at = sequence if pair is None else tl.load(pair + sequence)
        count = tl.load(lengths + at).to(tl.int32)
    else:
        count = sequence * 0 + size
    return count


@triton.jit
def open_sequence(inputs, sizes, sequence, head):
    """(queries, keys, pairs, draws) of a sequence and head, as the functions below take them apart."""
    groups = sizes.groups
    group = sequence % groups
    count_q = valid_rows(sizes.count_q, sequence, inputs.lengths_q, inputs.pair_q, inputs.cu_q)
    count_k = valid_rows(sizes.count_k, sequence, inputs.lengths_k, inputs.pair_k, inputs.cu_k)
    query = start_of(inputs.query, sequence, head, sizes.query_b, sizes.query_s, sizes.query_h, inputs.pair_q,
                     inputs.cu_q, inputs.rows_q, groups)
    key = start_of(inputs.key, sequence, head, sizes.key_b, sizes.key_s, sizes.key_h, inputs.pair_k, inputs.cu_k,
                   inputs.rows_k, groups)
    value = start_of(inputs.value, sequence, head, sizes.value_b, sizes.value_s, sizes.value_h, inputs.pair_k,
                     inputs.cu_k, inputs.rows_k, groups)
    keep, mask, bias, regions = inputs.key_mask, inputs.mask, inputs.bias, inputs.regions
    if keep is not None:
        keep = start_of(keep, sequence, head, sizes.key_mask_b, sizes.key_mask_s, 0, inputs.pair_k, inputs.cu_k,
                        inputs.rows_k, groups)
    if mask is not None:
        mask += group.to(tl.int64) * sizes.mask_b + head.to(tl.int64) * sizes.mask_h
    if bias is not None:
        bias += group.to(tl.int64) * sizes.bias_b + head.to(tl.int64) * sizes.bias_h
    rows_q, rows_k = inputs.rows_q, inputs.rows_k
    if rows_q is not None:
        rows_q += group.to(tl.int64) * sizes.count_q
        rows_k += group.to(tl.int64) * sizes.count_k
    if regions is not None:
        regions += group.to(tl.int64) * sizes.count_q
    prefix = count_q * 0
    if inputs.prefix is not None:
        prefix = tl.load(inputs.prefix + sequence).to(tl.int32)
    queries = (query, sizes.query_s, count_q, rows_q)
    keys = (key, sizes.key_s, value, sizes.value_s, count_k, rows_k, keep, sizes.key_mask_s)
    pairs = (mask, sizes.mask_q, sizes.mask_k, bias, sizes.bias_q, sizes.bias_k, regions, count_k - count_q, prefix)
    draws = (inputs.seed, sequence * sizes.heads + head, sizes.direction, sizes.threshold)
    return queries, keys, pairs, draws


@triton.jit
def lines_of(positions, count, table, keep, keep_stride):
    """(rows in memory, which of them may be read) of positions within a sequence."""
    live, rows = positions < count, positions.to(tl.int64)
    if table is not None:
        rows = tl.load(table + positions, mask=live, other=-1)
        live = live & (rows >= 0)
    if keep is not None:
        live = live & (tl.load(keep + rows * keep_stride, mask=live, other=0) != 0)
    return rows, live


@triton.jit
def written(positions, count, size, cu):
    """Which positions a result has: padded ones too, but those behind a packed sequence are the next one's."""
    return positions < (size if cu is None else count)


@triton.jit
def load_lines(start, stride, rows, live, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr, first=0,
               PART: tl.constexpr = None):
    """[rows, BD] or the PART columns from `first` on, zeros behind the width D and in rows that are not live."""
    depth = first + tl.arange(0, BD if PART is None else PART)
    at = start + (rows[:, None] * stride + depth[None, :])
    if D == BD:
        x = tl.load(at, mask=live[:, None], other=0.0)
    else:
        x = tl.load(at, mask=live[:, None] & (depth < D)[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def products(a, b, a_lines, b_lines, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """a b^T in float32, of [BM, BD] and [BN, BD] that the lines (start, stride, rows, live) hold.

    Wide float32 rows do not fit the registers as operands: they are read again, part by part.
    """
    if BD <= WIDE or a_lines[0].dtype.element_ty != tl.float32:
        x = tl.dot(a, tl.trans(b), input_precision="ieee")
    else:
        x = tl.zeros((a.shape[0], b.shape[0]), tl.float32)
        for first in range(0, BD, WIDE):
            left = load_lines(a_lines[0], a_lines[1], a_lines[2], a_lines[3], D, BD, UPCAST, first, WIDE)
            right = load_lines(b_lines[0], b_lines[1], b_lines[2], b_lines[3], D, BD, UPCAST, first, WIDE)
            x = tl.dot(left, tl.trans(right), x, input_precision="ieee")
    return x


@triton.jit
def store_lines(start, stride, rows, inside, x, D: tl.constexpr, BD: tl.constexpr):
    depth = tl.arange(0, BD)
    at = start + (rows[:, None] * stride + depth[None, :])
    tl.store(at, x.to(start.dtype.element_ty), mask=inside[:, None] & (depth < D)[None, :])


@triton.jit
def cleaned(x):
    """(x with zeros for what is not finite, which rows were not)."""
    finite = tl.abs(x.to(tl.float32)) < float("inf")
    return tl.where(finite, x, 0.0).to(x.dtype), tl.max(tl.where(finite, 0, 1), 1) != 0


@triton.jit
def plane_at(plane, stride_q, stride_k, first_row, first_column, BM: tl.constexpr, BN: tl.constexpr):
    """Pointers to a tile of a plane: 64 bits to where it starts, 32 within it."""
    start = (tl.zeros((), tl.int64) + first_row) * stride_q + (tl.zeros((), tl.int64) + first_column) * stride_k
    return (plane + start) + (tl.arange(0, BM)[:, None] * stride_q + tl.arange(0, BN)[None, :] * stride_k)


@triton.jit
def scores(q, k, q_lines, k_lines, scale, first_row, first_column, pairs, CAUSAL: tl.constexpr, D: tl.constexpr,
           BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr):
    """(scores [BM, BN] in float32, -inf where not live; live)."""
    mask, mask_q, mask_k, bias, bias_q, bias_k, regions, offset, prefix = pairs
    x = products(q, k, q_lines, k_lines, D, BD, UPCAST) * scale
    row_live, column_live = q_lines[3], k_lines[3]
    live = row_live[:, None] & column_live[None, :]
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    if CAUSAL:
        # the prefix is 0 where there is none
        live = live & ((columns[None, :] <= (rows + offset)[:, None]) | (columns < prefix)[None, :])
    if regions is not None:
        own = tl.load(regions + rows, mask=row_live, other=-1)
        other = tl.load(regions + columns, mask=column_live, other=-1)
        live = live & (own[:, None] == other[None, :])
    if mask is not None:
        at = plane_at(mask, mask_q, mask_k, first_row, first_column, BM, BN)
        live = live & (tl.load(at, mask=live, other=0) != 0)
    if bias is not None:
        at = plane_at(bias, bias_q, bias_k, first_row, first_column, BM, BN)
        added = tl.load(at, mask=live, other=-float("inf")).to(tl.float32)
        live = live & (added != -float("inf"))
        x += added
    return tl.where(live, x, -float("inf")), live


@triton.jit
def kept(draws, first_row, first_column, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN], which probabilities dropout keeps: one Philox draw serves four neighbours of a row."""
    seed, unit, direction, threshold = draws
    rows = first_row + tl.arange(0, BM)
    group = first_column // 4 + tl.arange(0, BN // 4)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), unit, direction, rows[:, None], group[None, :])
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BM, BN))
    return (words ^ 0x80000000).to(tl.int32, bitcast=True) >= threshold


@triton.jit
def key_range(first, count_q, count_k, offset, prefix, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """For the query tile at `first`: (end of the key tiles that causality leaves whole, end of all it leaves)."""
    end = tl.where(first < count_q, count_k, 0)
    whole = end
    if CAUSAL:
        last = tl.minimum(tl.maximum(tl.maximum(first + BM + offset, prefix), 0), end)
        every = tl.maximum(tl.maximum(first + offset + 1, prefix), 0)
        whole = tl.minimum(tl.where(every >= end, end, every // BN * BN), last)
        end = last
    return whole, end


@triton.jit
def query_range(first, count_q, count_k, offset, prefix, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """For the key tile at `first`: (start of the query tiles that see any of it, start of those that see all)."""
    start = tl.where(first < count_k, 0, count_q)
    whole = start
    if CAUSAL:
        some = tl.where(first < prefix, 0, tl.maximum(first - offset, 0)) // BM * BM
        every = tl.where(first + BN <= prefix, 0, tl.maximum(first + BN - 1 - offset, 0))
        every = (every + BM - 1) // BM * BM
        start, whole = tl.maximum(start, some), tl.maximum(start, every)
    return start, whole
