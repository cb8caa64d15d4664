"""Gradient kernel of `quantize`: a program owns entries of the vocabulary and walks over all positions, so that the
gradient of a code is summed in its registers and nothing is added atomically.
"""

import triton
import triton.language as tl

from .quantize_tiles import SIZES, entries_at, noisy, zero_if_nothing


@triton.jit
def _upstream(d_z, codebook, row, kept, entries, V, D, UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BK: tl.constexpr):
    """d_z C^T of a tile, [BM, BN]."""
    product = tl.zeros((BM, BN), tl.float32)
    for start in range(0, D, BK):
        columns = start + tl.arange(0, BK)
        up = tl.load(d_z + row[:, None] * D + columns[None, :], mask=kept[:, None] & (columns < D)[None, :], other=0.0)
        codes = tl.load(codebook + entries.to(tl.int64)[None, :] * D + columns[:, None],
                        mask=(entries < V)[None, :] & (columns < D)[:, None], other=0.0)
        if UPCAST:
            up, codes = up.to(tl.float32), codes.to(tl.float32)
        product = tl.dot(up, codes, product, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=[*SIZES, "B", "tau", "gain", "plain_gain"])
def quantize_bwd_kernel(logits, codebook, given, seed, d_z, lse, mean, plain, expected, kl, plain_mean, indices,
                        d_logits, d_codebook, tau, gain, plain_gain, B, P, V, D,
                        batch_stride, position_stride, entry_stride, given_batch, given_position, given_entry,
                        d_batch, d_position, d_entry,
                        DRAWN: tl.constexpr, GIVEN: tl.constexpr, UPSTREAM: tl.constexpr, KL: tl.constexpr,
                        PLAIN: tl.constexpr, CHOSEN: tl.constexpr, LOGITS: tl.constexpr, CODES: tl.constexpr,
                        UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr):
    # logits and d_logits [B, P, V] by strides, codebook and d_codebook [V, D], d_z [B P, D], the others [B P], kl [];
    # a program has BN entries and BD of the width, and the first of those writes the gradient of the logits
    first_entry, first_column = tl.program_id(0) * BN, tl.program_id(1) * BD
    entries, columns = first_entry + tl.arange(0, BN), first_column + tl.arange(0, BD)
    sums = tl.zeros((BN, BD), tl.float32)
    blocks = tl.cdiv(P, BM)
    for block in range(0, B * blocks):
        batch = block // blocks
        positions = (block - batch * blocks) * BM + tl.arange(0, BM)
        kept = positions < P
        row = batch.to(tl.int64) * P + positions
        inside = kept[:, None] & (entries < V)[None, :]
        at = entries_at(logits, batch_stride, position_stride, entry_stride, batch, positions, entries)
        values = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32)
        result = tl.zeros((BM, BN), tl.float32)
        weights = result
        if UPSTREAM:
            scores = noisy(values, given, given_batch, given_position, given_entry, seed, tau, batch, positions,
                           entries, inside, row, first_entry, DRAWN, GIVEN, BM, BN)
            norm = zero_if_nothing(tl.load(lse + row, mask=kept, other=0.0))
            weights = tl.exp(scores - norm[:, None])
        if CODES:
            up = tl.load(d_z + row[:, None] * D + columns[None, :], mask=kept[:, None] & (columns < D)[None, :],
                         other=0.0)
            if UPCAST:
                up = up.to(tl.float32)
            sums = tl.dot(tl.trans(weights).to(up.dtype), up, sums, input_precision="ieee")
        if LOGITS and first_column == 0:
            if UPSTREAM:
                x = _upstream(d_z, codebook, row, kept, entries, V, D, UPCAST, BM, BN, BK)
                lead = x - tl.load(mean + row, mask=kept, other=0.0)[:, None]
                result = gain * weights * lead
                if CHOSEN:
                    chosen = tl.load(indices + row, mask=kept, other=-1)[:, None] == entries[None, :]
                    result += tl.where(chosen & (values != -float("inf")), lead, 0.0)
            if KL or PLAIN:
                norm = zero_if_nothing(tl.load(plain + row, mask=kept, other=0.0))
                q = tl.exp(values - norm[:, None])
                term = tl.zeros((BM, BN), tl.float32)
                if KL:
                    term = tl.load(kl) * (values - tl.load(expected + row, mask=kept, other=0.0)[:, None])
                if PLAIN:
                    term -= plain_gain * (x - tl.load(plain_mean + row, mask=kept, other=0.0)[:, None])
                result += tl.where(q == 0.0, 0.0, q * term)
            out = entries_at(d_logits, d_batch, d_position, d_entry, batch, positions, entries)
            tl.store(out, result.to(d_logits.dtype.element_ty), mask=inside)
    if CODES:
        tl.store(d_codebook + entries.to(tl.int64)[:, None] * D + columns[None, :], sums,
                 mask=(entries < V)[:, None] & (columns < D)[None, :])
