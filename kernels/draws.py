"""Random words in the kernels, and the draws that several families make of them."""

import triton
import triton.language as tl
from triton.language.random import philox_impl

from .info_nce_tiles import log1p


@triton.jit
def words_of(seed, c0, c1, c2, c3):
    """Four random words of each counter, uint32 of one shape; seed is a pointer to an int64."""
    key = tl.load(seed)
    return philox_impl(c0, c1, c2, c3, (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def exponential(words):
    """-log(1 - u) of u = (word + 1/2) / 2^32, exact near both ends: log1p keeps what a logarithm of 1 - u loses where u
    is small, and beyond a half 1 - u is counted from the other end."""
    low = words < 0x80000000
    t = (tl.where(low, words, words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.where(low, log1p(t / (1.0 - t)), -tl.log(t))


@triton.jit
def turn(words):
    """(cosine, sine) of a whole turn times (word + 1/2) / 2^32.

    The quarter turn nearest to the word is taken off in integers, which lose nothing, and series of degree 8 and 9
    serve the eighth of a turn that remains.
    """
    quarter = (words + 0x20000000) >> 30
    angle = ((words - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.4629180792671596e-9
    square = angle * angle
    even = 2.48015873e-5 * square - 1.38888889e-3
    even = even * square + 4.16666667e-2
    even = (even * square - 0.5) * square + 1.0
    odd = 2.75573192e-6 * square - 1.98412698e-4
    odd = odd * square + 8.33333333e-3
    odd = ((odd * square - 0.166666667) * square) * angle + angle
    swapped = (quarter & 1) != 0
    cosine, sine = tl.where(swapped, odd, even), tl.where(swapped, even, odd)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def normal_pair(first, second):
    """Two draws of N(0, 1) from two words (Box and Muller 1958)."""
    radius = tl.sqrt(2.0 * exponential(first))
    cosine, sine = turn(second)
    return radius * cosine, radius * sine
