"""Parts of the `quantize` kernels: a tile of logits, [positions, entries], and its Gumbel noise."""

import triton
import triton.language as tl

from .draws import exponential, words_of

STREAM = tl.constexpr(0x67756D62)  # of the definition's draws
SIZES = ["P", "V"]  # vary from model to model: not worth a compilation each


@triton.jit
def entries_at(start, batch_stride, position_stride, entry_stride, batch, positions, entries):
    """Addresses [positions, entries] of one sequence of a grid."""
    return (start + batch.to(tl.int64) * batch_stride + positions.to(tl.int64)[:, None] * position_stride
            + entries.to(tl.int64)[None, :] * entry_stride)


@triton.jit
def _gumbel(words):
    """-log(-log(1 - u)) of u = (word + 1/2) / 2^32."""
    return -tl.log(exponential(words))


@triton.jit
def gumbel_tile(seed, rows, first_entry, BM: tl.constexpr, BN: tl.constexpr):
    """Draws of rows [BM] and entries first_entry .. first_entry + BN, a multiple of 4: [BM, BN] float32."""
    groups = first_entry // 4 + tl.arange(0, BN // 4)
    nothing = tl.zeros((BM, BN // 4), tl.uint32)
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None], (rows >> 32).to(tl.uint32)[:, None]
    w0, w1, w2, w3 = words_of(seed, nothing + low, nothing + high, nothing + groups.to(tl.uint32)[None, :],
                              nothing + STREAM)
    # the last two dimensions of the join are the bits of the word's number
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return _gumbel(tl.reshape(words, (BM, BN)))


@triton.jit
def noisy(logits, given, given_batch, given_position, given_entry, seed, tau, batch, positions, entries, inside, row,
          first_entry, DRAWN: tl.constexpr, GIVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """(l + g) / tau of a tile of float32 logits."""
    if DRAWN:
        logits += gumbel_tile(seed, row, first_entry, BM, BN)
    elif GIVEN:
        at = entries_at(given, given_batch, given_position, given_entry, batch, positions, entries)
        logits += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return logits / tau


@triton.jit
def zero_if_nothing(norm):
    """A position whose entries are all -inf has a log-sum-exp of -inf, and weights of 0."""
    return tl.where(norm == -float("inf"), 0.0, norm)
