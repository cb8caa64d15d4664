"""Forward kernels of `quantize`: the softmax of noisy logits times the codebook in one pass over the logits.

A program keeps a block of positions and walks over the vocabulary, as attention does over its keys (FlashAttention-2),
with scores that are read instead of computed and the codebook for values.
"""

import triton
import triton.language as tl

from .quantize_tiles import SIZES, entries_at, gumbel_tile, noisy, zero_if_nothing


@triton.jit
def _grow(x, top, total):
    """(e^(x - new maximum), new maximum, factor of the earlier sums, new sum)."""
    new_top = tl.maximum(top, tl.max(x, 1))
    base = zero_if_nothing(new_top)
    weights = tl.exp(x - base[:, None])
    factor = tl.exp(top - base)
    return weights, new_top, factor, total * factor + tl.sum(weights, 1)


@triton.jit(do_not_specialize=[*SIZES, "tau"])
def quantize_fwd_kernel(logits, codebook, given, seed, z, indices, lse, plain, expected, tau, P, V, D,
                        batch_stride, position_stride, entry_stride, given_batch, given_position, given_entry,
                        DRAWN: tl.constexpr, GIVEN: tl.constexpr, CODES: tl.constexpr, KL: tl.constexpr,
                        UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    # logits [B, P, V] by strides, codebook [V, D], z [B P, D], indices, lse, plain and expected [B P]; a program has BM
    # positions of one sequence and BD of the width, and the first of those writes the statistics
    batch, first_column = tl.program_id(1), tl.program_id(2) * BD
    positions = tl.program_id(0) * BM + tl.arange(0, BM)
    row = batch.to(tl.int64) * P + positions
    columns = first_column + tl.arange(0, BD)
    lowest, nothing = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    top, total, best, best_at = lowest, nothing, lowest, tl.zeros((BM,), tl.int32)
    plain_top, plain_total, moment = lowest, nothing, nothing
    sums = tl.zeros((BM, BD), tl.float32)
    for first_entry in range(0, V, BN):
        entries = first_entry + tl.arange(0, BN)
        inside = (positions < P)[:, None] & (entries < V)[None, :]
        at = entries_at(logits, batch_stride, position_stride, entry_stride, batch, positions, entries)
        values = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        scores = noisy(values, given, given_batch, given_position, given_entry, seed, tau, batch, positions, entries,
                       inside, row, first_entry, DRAWN, GIVEN, BM, BN)
        tile_best, tile_at = tl.max(scores, 1, return_indices=True)
        best_at = tl.where(tile_best > best, first_entry + tile_at, best_at)
        best = tl.maximum(best, tile_best)
        weights, top, factor, total = _grow(scores, top, total)
        if CODES:
            codes_at = codebook + entries.to(tl.int64)[:, None] * D + columns[None, :]
            codes = tl.load(codes_at, mask=(entries < V)[:, None] & (columns < D)[None, :], other=0.0)
            if UPCAST:
                codes = codes.to(tl.float32)
            sums = tl.dot(weights.to(codes.dtype), codes, sums * factor[:, None], input_precision="ieee")
        if KL:
            weights, plain_top, factor, plain_total = _grow(values, plain_top, plain_total)
            moment = moment * factor + tl.sum(tl.where(weights == 0.0, 0.0, weights * values), 1)

    kept = positions < P
    share = tl.where(total == 0.0, 0.0, 1.0 / total)
    if CODES:
        tl.store(z + row[:, None] * D + columns[None, :], sums * share[:, None],
                 mask=kept[:, None] & (columns < D)[None, :])
    if first_column == 0:
        tl.store(indices + row, best_at.to(tl.int64), mask=kept)
        tl.store(lse + row, top + tl.log(tl.where(total == 0.0, 1.0, total)), mask=kept)
        if KL:
            tl.store(plain + row, plain_top + tl.log(tl.where(plain_total == 0.0, 1.0, plain_total)), mask=kept)
            tl.store(expected + row, tl.where(plain_total == 0.0, 0.0, moment / plain_total), mask=kept)


@triton.jit(do_not_specialize=["N", "V", "offset"])
def gumbel_noise_kernel(seed, noise, N, V, offset, BM: tl.constexpr, BN: tl.constexpr):
    # noise [N, V]
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first_entry = tl.program_id(1) * BN
    entries = first_entry + tl.arange(0, BN)
    tl.store(noise + rows[:, None] * V + entries[None, :], gumbel_tile(seed, rows + offset, first_entry, BM, BN),
             mask=(rows < N)[:, None] & (entries < V)[None, :])
