"""Gradient kernels of `info_nce` and `siglip_loss`: each recomputes a tile of logits and writes its gradient.

The one-hot of the targets is subtracted in float32 before the gradient is rounded for the GEMMs that follow: once
training has converged, probability and target differ by less than a bfloat16 can hold.
"""

import triton
import triton.language as tl

from .info_nce_tiles import (
    COUNT,
    LSE,
    POSITIVE,
    POSITIVES,
    SIZES,
    SPREAD,
    crosses,
    finite,
    log1p,
    pairs,
    products,
    scaled,
)


@triton.jit(do_not_specialize=["L", "stats_stride", "weight_stride"])
def info_nce_bwd_lines_kernel(stats, weight, terms, L, stats_stride, weight_stride, label_smoothing,
                              LABELS: tl.constexpr, SMOOTHING: tl.constexpr, BL: tl.constexpr):
    # terms [4, L]: normaliser r, weight w, at a positive t, share s; the gradient of a logit z is w e^(z - r) - s, and
    # where the pair is positive, t is added to it (labels) or replaces w e^(z - r) (diagonal)
    lines = tl.program_id(0) * BL + tl.arange(0, BL)
    inside = lines < L
    line_weight = tl.load(weight + lines * weight_stride, mask=inside, other=0.0)
    lse = tl.load(stats + LSE * stats_stride + lines, mask=inside, other=0.0)
    if LABELS:
        positives = tl.load(stats + POSITIVES * stats_stride + lines, mask=inside, other=0.0)
        line_weight = tl.where(positives > 0, line_weight, 0.0)
        normaliser = finite(lse, 0.0)
        at_positive = -line_weight * (1.0 - label_smoothing) / tl.maximum(positives, 1.0)
    else:
        # lse leaves the positive out: its gradient -sigmoid(gap) keeps its relative precision
        target = tl.load(stats + POSITIVE * stats_stride + lines, mask=inside, other=0.0)
        gap = lse - target
        small = tl.exp(-tl.abs(gap))
        normaliser = tl.maximum(lse, target) + log1p(small)
        at_positive = line_weight * (label_smoothing - tl.where(gap >= 0, 1.0, small) / (1.0 + small))
    tl.store(terms + lines, normaliser, mask=inside)
    tl.store(terms + L + lines, line_weight, mask=inside)
    tl.store(terms + 2 * L + lines, at_positive, mask=inside)
    if SMOOTHING:
        count = tl.load(stats + COUNT * stats_stride + lines, mask=inside, other=1.0)
        tl.store(terms + 3 * L + lines, line_weight * label_smoothing / tl.maximum(count, 1.0), mask=inside)


@triton.jit
def _grid_tile(N, M, BM: tl.constexpr, BN: tl.constexpr):
    """Tile of this program: columns advance in bands of 8 row tiles, whose features stay in the L2 cache."""
    program, row_tiles, column_tiles = tl.program_id(0), tl.cdiv(N, BM), tl.cdiv(M, BN)
    band = program // (8 * column_tiles)
    height = tl.minimum(row_tiles - band * 8, 8)
    within = program - band * 8 * column_tiles
    return band * 8 + within % height, within // height


@triton.jit
def _pair_sum(row_term, column_term, PLANE: tl.constexpr, row_plane, M, BM: tl.constexpr, BN: tl.constexpr,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One term of the rows plus that of the columns, [BM, BN]."""
    if ROWS and COLUMNS:
        result = tl.load(row_term + PLANE * row_plane)[:, None] + tl.load(column_term + PLANE * M)[None, :]
    elif ROWS:
        result = tl.load(row_term + PLANE * row_plane)[:, None] + tl.zeros((1, BN), tl.float32)
    else:
        result = tl.load(column_term + PLANE * M)[None, :] + tl.zeros((BM, 1), tl.float32)
    return result


@triton.jit
def _backward_piece(logits, high, shared, labels, text_labels, mask, row_terms, column_terms, rows, first_row,
                    first_column, N, M, offset, mask_stride, row_plane,
                    LABELS: tl.constexpr, MASK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                    SMOOTHING: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Gradient of [BM, BN] logits. Terms are loaded where they are used, since columns fill many registers."""
    columns = first_column + tl.arange(0, BN)
    row_term = row_terms + tl.minimum(rows, N - 1) if ROWS else None
    column_term = column_terms + tl.minimum(columns, M - 1) if COLUMNS else None
    if ROWS and COLUMNS:
        if shared:
            row_factor = tl.load(row_term + row_plane) * tl.exp(high - tl.load(row_term))
            column_factor = tl.load(column_term + M) * tl.exp(high - tl.load(column_term))
            result = tl.exp(logits - high) * (row_factor[:, None] + column_factor[None, :])
        else:
            result = (tl.load(row_term + row_plane)[:, None] * tl.exp(logits - tl.load(row_term)[:, None])
                      + tl.load(column_term + M)[None, :] * tl.exp(logits - tl.load(column_term)[None, :]))
    elif ROWS:
        result = tl.load(row_term + row_plane)[:, None] * tl.exp(logits - tl.load(row_term)[:, None])
    else:
        result = tl.load(column_term + M)[None, :] * tl.exp(logits - tl.load(column_term)[None, :])

    if LABELS or MASK:
        positive, allowed = pairs(rows, columns, N, M, offset, labels, text_labels, mask, mask_stride, LABELS, MASK)
        target = _pair_sum(row_term, column_term, 2, row_plane, M, BM, BN, ROWS, COLUMNS)
        if LABELS:
            result += tl.where(positive, target, 0.0)
        else:
            result = tl.where(positive, target, result)
        if SMOOTHING:
            result -= _pair_sum(row_term, column_term, 3, row_plane, M, BM, BN, ROWS, COLUMNS)
        result = tl.where(allowed, result, 0.0)
    else:
        if crosses(first_row, first_column, offset, BM, BN):
            target = _pair_sum(row_term, column_term, 2, row_plane, M, BM, BN, ROWS, COLUMNS)
            result = tl.where((rows + offset)[:, None] == columns[None, :], target, result)
        if SMOOTHING:
            result -= _pair_sum(row_term, column_term, 3, row_plane, M, BM, BN, ROWS, COLUMNS)
    return result


@triton.jit
def _store_gradient(gradient, result, gain, rows, columns, N, M, gradient_stride, GAIN: tl.constexpr):
    if GAIN:
        result *= tl.load(gain)
    at = gradient + rows.to(tl.int64)[:, None] * gradient_stride + columns[None, :]
    tl.store(at, result.to(gradient.dtype.element_ty), mask=(rows < N)[:, None] & (columns < M)[None, :])


@triton.jit(do_not_specialize=[*SIZES, "row_plane"])
def info_nce_bwd_logits_kernel(image, text, logit_scale, logit_bias, labels, text_labels, mask, gradient, gain,
                               row_terms, column_terms, N, M, D, offset, image_stride, text_stride, mask_stride,
                               gradient_stride, row_plane,
                               LABELS: tl.constexpr, MASK: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr,
                               COLUMNS: tl.constexpr, SMOOTHING: tl.constexpr, GAIN: tl.constexpr,
                               UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
                               PIECES: tl.constexpr):
    # gradient [N, M] of the logits from the terms of info_nce_bwd_lines_kernel, row_terms [4, N] (rows row_plane
    # apart) and column_terms [4, M]; a direction that is left out has none
    WIDTH: tl.constexpr = BN // PIECES
    row_tile, column_tile = _grid_tile(N, M, BM, BN)
    first_row, first_column = row_tile * BM, column_tile * BN
    rows, columns = first_row + tl.arange(0, BM), first_column + tl.arange(0, BN)
    high, shared = 0.0, True
    if ROWS and COLUMNS:
        row_norm = tl.load(row_terms + tl.minimum(rows, N - 1))
        column_norm = tl.load(column_terms + tl.minimum(columns, M - 1))
        high = tl.maximum(tl.max(row_norm, 0), tl.max(column_norm, 0))
        shared = high - tl.minimum(tl.min(row_norm, 0), tl.min(column_norm, 0)) < SPREAD
    tile_products = products(image, text, rows, columns, N, M, D, image_stride, text_stride, UPCAST, BM, BN, BK, PIECES)
    for piece in tl.static_range(PIECES):
        logits = scaled(tile_products[piece], logit_scale, logit_bias, BIAS)
        start = first_column + piece * WIDTH
        result = _backward_piece(logits, high, shared, labels, text_labels, mask, row_terms, column_terms, rows,
                                 first_row, start, N, M, offset, mask_stride, row_plane,
                                 LABELS, MASK, ROWS, COLUMNS, SMOOTHING, BM, WIDTH)
        _store_gradient(gradient, result, gain, rows, start + tl.arange(0, WIDTH), N, M, gradient_stride, GAIN)


@triton.jit(do_not_specialize=[*SIZES, "row_weight_stride"])
def siglip_logits_kernel(image, text, logit_scale, logit_bias, gradient, gain, row_weight, loss_parts, bias_parts,
                         N, M, D, offset, image_stride, text_stride, gradient_stride, row_weight_stride,
                         BIAS: tl.constexpr, GRADIENT: tl.constexpr, GAIN: tl.constexpr, UPCAST: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr):
    # loss_parts [column tiles, N] softplus sums; gradient [N, M], and its row sums in bias_parts [column tiles, N]
    WIDTH: tl.constexpr = BN // PIECES
    row_tile, column_tile = _grid_tile(N, M, BM, BN)
    first_row = row_tile * BM
    rows = first_row + tl.arange(0, BM)
    tile_products = products(image, text, rows, column_tile * BN + tl.arange(0, BN), N, M, D, image_stride, text_stride,
                             UPCAST, BM, BN, BK, PIECES)
    loss, total = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    for piece in tl.static_range(PIECES):
        first_column = column_tile * BN + piece * WIDTH
        columns = first_column + tl.arange(0, WIDTH)
        logits = scaled(tile_products[piece], logit_scale, logit_bias, BIAS)
        diagonal = crosses(first_row, first_column, offset, BM, WIDTH)
        if diagonal:
            logits = tl.where((rows + offset)[:, None] == columns[None, :], -logits, logits)
        # one exp gives softplus and its derivative
        small = tl.exp(-tl.abs(logits))
        inside = (columns < M)[None, :]
        loss += tl.sum(tl.where(inside, tl.maximum(logits, 0.0) + log1p(small), 0.0), 1)
        if GRADIENT:
            weight = tl.load(row_weight + rows * row_weight_stride, mask=rows < N, other=0.0)
            result = weight[:, None] * (tl.where(logits >= 0, 1.0, small) / (1.0 + small))
            if diagonal:
                result = tl.where((rows + offset)[:, None] == columns[None, :], -result, result)
            total += tl.sum(tl.where(inside, result, 0.0), 1)
            _store_gradient(gradient, result, gain, rows, columns, N, M, gradient_stride, GAIN)
    at = column_tile.to(tl.int64) * N + rows
    tl.store(loss_parts + at, loss, mask=rows < N)
    if GRADIENT:
        tl.store(bias_parts + at, total, mask=rows < N)
