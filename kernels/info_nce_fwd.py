"""Forward kernels of `info_nce`: line statistics in one pass over the logits.

A program walks a strip of rows through its share of the columns. The rows' (maximum, sum) stay in registers; the
columns' are written once per strip and merged by a second kernel in a fixed order: no atomics.
"""

import triton
import triton.language as tl

from .info_nce_tiles import (
    BEST,
    COUNT,
    LSE,
    POSITIVE,
    POSITIVES,
    SIZES,
    SPREAD,
    SUM,
    crosses,
    finite,
    pairs,
    products,
    scaled,
)


@triton.jit
def _store_diagonal(target, row_positive, column_positive, rows, columns, first_row, first_column, N, M, offset,
                    BM: tl.constexpr, BN: tl.constexpr):
    """Positive logits of the lines whose positive lies in this tile."""
    at = rows + offset
    tl.store(row_positive + rows, tl.sum(target, 1),
             mask=(rows < N) & (at >= first_column) & (at < tl.minimum(first_column + BN, M)))
    at = columns - offset
    tl.store(column_positive + columns, tl.sum(target, 0),
             mask=(columns < M) & (at >= first_row) & (at < tl.minimum(first_row + BM, N)))


@triton.jit
def _forward_piece(logits, state, column_part, labels, text_labels, mask, row_positive, column_positive, rows,
                   first_row, first_column, N, M, offset, mask_stride,
                   LABELS: tl.constexpr, MASK: tl.constexpr, FULL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Adds [BM, BN] logits to the rows' state and writes the columns' part."""
    row_max, row_sum, row_target, row_positives, row_best, row_total, row_count = state
    columns = first_column + tl.arange(0, BN)
    inside = columns < M
    column_part += columns
    diagonal = crosses(first_row, first_column, offset, BM, BN)
    if not (LABELS or MASK or FULL):
        # most pieces are full and off the diagonal: they need no mask at all
        if diagonal | (first_row + BM > N) | (first_column + BN > M):
            positive, allowed = pairs(rows, columns, N, M, offset, labels, text_labels, mask, mask_stride, LABELS,
                                      MASK)
            _store_diagonal(tl.where(positive, logits, 0.0), row_positive, column_positive, rows, columns, first_row,
                            first_column, N, M, offset, BM, BN)
            logits = tl.where(allowed & (positive == 0), logits, -float("inf"))
    else:
        positive, allowed = pairs(rows, columns, N, M, offset, labels, text_labels, mask, mask_stride, LABELS, MASK)
        if LABELS:
            target = tl.where(positive, logits, 0.0)
            row_target += tl.sum(target, 1)
            tl.store(column_part + 2 * M, tl.sum(target, 0), mask=inside)
        elif diagonal:
            _store_diagonal(tl.where(positive, logits, 0.0), row_positive, column_positive, rows, columns, first_row,
                            first_column, N, M, offset, BM, BN)
        negative = tl.where(allowed & (positive == 0), logits, -float("inf"))
        if FULL:
            extra = column_part + (2 + LABELS) * M
            row_positives += tl.sum(positive.to(tl.float32), 1)
            tl.store(extra, tl.sum(positive.to(tl.float32), 0), mask=inside)
            row_best = tl.maximum(row_best, tl.max(negative, 1))
            tl.store(extra + M, tl.max(negative, 0), mask=inside)
            counted = tl.where(allowed, logits, 0.0)
            row_total += tl.sum(counted, 1)
            tl.store(extra + 2 * M, tl.sum(counted, 0), mask=inside)
            row_count += tl.sum(allowed.to(tl.float32), 1)
            tl.store(extra + 3 * M, tl.sum(allowed.to(tl.float32), 0), mask=inside)
        logits = tl.where(allowed, logits, -float("inf")) if LABELS else negative

    piece_max = tl.max(logits, 1)
    new_max = tl.maximum(row_max, piece_max)
    column_max = tl.max(logits, 0)
    high = finite(tl.max(column_max, 0), 0.0)
    low = tl.min(finite(column_max, high), 0)
    if high - low < SPREAD:
        # rows take e^(z - their maximum); a factor per row and one per column turn it into the columns' exponential
        pivot = finite(piece_max, high)
        exponential = tl.exp(logits - pivot[:, None])
        row_add = tl.sum(exponential, 1) * tl.exp(piece_max - finite(new_max, 0.0))
        column_sum = tl.sum(exponential * tl.exp(pivot - high)[:, None], 0)
        column_sum *= tl.exp(high - finite(column_max, high))
    else:
        row_add = tl.sum(tl.exp(logits - finite(new_max, 0.0)[:, None]), 1)
        column_sum = tl.sum(tl.exp(logits - finite(column_max, 0.0)[None, :]), 0)
    row_sum = row_sum * tl.exp(row_max - finite(new_max, 0.0)) + row_add
    tl.store(column_part, column_max, mask=inside)
    tl.store(column_part + M, column_sum, mask=inside)
    return new_max, row_sum, row_target, row_positives, row_best, row_total, row_count


@triton.jit(do_not_specialize=[*SIZES, "tiles_per_split"])
def info_nce_fwd_kernel(image, text, logit_scale, logit_bias, labels, text_labels, mask,
                        row_parts, column_parts, row_positive, column_positive,
                        N, M, D, offset, image_stride, text_stride, mask_stride, tiles_per_split,
                        LABELS: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, FULL: tl.constexpr,
                        UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                        PIECES: tl.constexpr):
    # row_parts [splits, planes, N], column_parts [row tiles, planes, M]: planes are maximum, sum, then with labels the
    # positives' sum, then if FULL positives, best negative, sum, count. row_positive [N] and column_positive [M]
    # receive a diagonal positive from the one piece that holds it.
    PLANES: tl.constexpr = 2 + LABELS + 4 * FULL
    WIDTH: tl.constexpr = BN // PIECES
    row_tile, split = tl.program_id(0), tl.program_id(1)
    first_row = row_tile * BM
    rows = first_row + tl.arange(0, BM)
    lowest, nothing = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    state = (lowest, nothing, nothing, nothing, lowest, nothing, nothing)
    column_part = column_parts + row_tile.to(tl.int64) * PLANES * M
    first_tile = split * tiles_per_split
    for tile in range(first_tile, tl.minimum(first_tile + tiles_per_split, tl.cdiv(M, BN))):
        tile_products = products(image, text, rows, tile * BN + tl.arange(0, BN), N, M, D, image_stride, text_stride,
                                 UPCAST, BM, BN, BK, PIECES)
        for piece in tl.static_range(PIECES):
            logits = scaled(tile_products[piece], logit_scale, logit_bias, BIAS)
            state = _forward_piece(logits, state, column_part, labels, text_labels, mask, row_positive, column_positive,
                                   rows, first_row, tile * BN + piece * WIDTH, N, M, offset, mask_stride,
                                   LABELS, MASK, FULL, BM, WIDTH)

    inside = rows < N
    row_part = row_parts + split.to(tl.int64) * PLANES * N + rows
    tl.store(row_part, state[0], mask=inside)
    tl.store(row_part + N, state[1], mask=inside)
    if LABELS:
        tl.store(row_part + 2 * N, state[2], mask=inside)
    if FULL:
        for plane in tl.static_range(4):
            tl.store(row_part + (2 + LABELS + plane) * N, state[3 + plane], mask=inside)


@triton.jit
def _fold(parts, stats, lines, parts_count, L, PLANE: tl.constexpr, PLANES: tl.constexpr, STAT: tl.constexpr,
          MAXIMUM: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr):
    """Sum or maximum of one plane over the parts, into one line of the statistics."""
    empty: tl.constexpr = -float("inf") if MAXIMUM else 0.0
    result = tl.full((BL,), empty, tl.float32)
    for start in range(0, parts_count, BP):
        part = start + tl.arange(0, BP)
        at = parts + (part.to(tl.int64)[:, None] * PLANES + PLANE) * L + lines[None, :]
        value = tl.load(at, mask=(part < parts_count)[:, None] & (lines < L)[None, :], other=empty)
        result = tl.maximum(result, tl.max(value, 0)) if MAXIMUM else result + tl.sum(value, 0)
    tl.store(stats + STAT * L + lines, result, mask=lines < L)


@triton.jit(do_not_specialize=["parts_count", "L"])
def info_nce_fwd_merge_kernel(parts, stats, parts_count, L, LABELS: tl.constexpr, FULL: tl.constexpr,
                              BP: tl.constexpr, BL: tl.constexpr):
    # parts [parts_count, planes, L] as info_nce_fwd_kernel writes them -> stats [6 or 2, L]
    PLANES: tl.constexpr = 2 + LABELS + 4 * FULL
    lines = tl.program_id(0) * BL + tl.arange(0, BL)
    maximum = tl.full((BL,), -float("inf"), tl.float32)
    total = tl.zeros((BL,), tl.float32)
    for start in range(0, parts_count, BP):
        part = start + tl.arange(0, BP)
        inside = (part < parts_count)[:, None] & (lines < L)[None, :]
        at = parts + part.to(tl.int64)[:, None] * PLANES * L + lines[None, :]
        part_max = tl.load(at, mask=inside, other=-float("inf"))
        part_sum = tl.load(at + L, mask=inside, other=0.0)
        new_max = tl.maximum(maximum, tl.max(part_max, 0))
        pivot = finite(new_max, 0.0)
        total = total * tl.exp(maximum - pivot) + tl.sum(part_sum * tl.exp(part_max - pivot[None, :]), 0)
        maximum = new_max
    tl.store(stats + LSE * L + lines, maximum + tl.log(tl.where(total == 0.0, 1.0, total)), mask=lines < L)
    if LABELS:
        _fold(parts, stats, lines, parts_count, L, 2, PLANES, POSITIVE, False, BP, BL)
    if FULL:
        _fold(parts, stats, lines, parts_count, L, 2 + LABELS, PLANES, POSITIVES, False, BP, BL)
        _fold(parts, stats, lines, parts_count, L, 3 + LABELS, PLANES, BEST, True, BP, BL)
        _fold(parts, stats, lines, parts_count, L, 4 + LABELS, PLANES, SUM, False, BP, BL)
        _fold(parts, stats, lines, parts_count, L, 5 + LABELS, PLANES, COUNT, False, BP, BL)
