"""The hybrid training loss of `diffusion` and its gradient: sums of a sample's blocks, added in a second kernel in an
order of their own, and one pass for the gradient.

With a = 2 sqrt(2 / pi) (z + 0.044715 z^3) at both ends of a grey level, z = inverse deviation times the end, tanh's
approximation of a Gaussian's mass between them is, S being the logistic function,

    S(a) - S(b) = S(a) S(-b) (1 - exp(-(a - b))),   a - b = 2 sqrt(2 / pi) h (1 + 0.044715 (3 m^2 + h^2 / 4)),

m the z of the level itself and h the difference of the ends': a product without cancellation, whose logarithm is a sum.
"""

import triton
import triton.language as tl

from .diffusion_step import entry, load, place
from .info_nce_tiles import log1p

COLUMNS = tl.constexpr(8)
SCALARS = ["step", "steps", "blocks"]
BITS = tl.constexpr(1.4426950408889634)
ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
LEAST = tl.constexpr(-27.631021115928547)  # log of the least mass, 1e-12


@triton.jit
def _log_logistic(x):
    """(log S(x), S(-x))."""
    shrunk = tl.exp(-tl.abs(x))
    return tl.minimum(x, 0.0) - log1p(shrunk), tl.where(x < 0, 1.0, shrunk) / (1.0 + shrunk)


@triton.jit
def _one_less_exp(x):
    """(exp(-x) / q, log q) of q = 1 - exp(-x) for x >= 0, without cancellation at either end."""
    shrunk = tl.exp(-x)
    series = 0.00138888889 - x * (0.000198412698 - x * (2.48015873e-5 - x * 2.75573192e-6))
    series = 0.166666667 - x * (0.0416666667 - x * (0.00833333333 - x * series))
    series = x * (1.0 - x * (0.5 - x * series))
    small = x < 0.6931472
    q = tl.where(small, series, 1.0 - shrunk)
    # log(1 - y) = -log1p(y / (1 - y))
    y = tl.where(small, 0.0, shrunk)
    return shrunk / q, tl.where(small, tl.log(series), -log1p(y / (1.0 - y)))


@triton.jit
def _likelihood(x0, centred, log_variance):
    """(log-mass of half a grey level around x0, its gradient with respect to the log-variance)."""
    inverse = tl.exp(log_variance * -0.5)
    m, h = inverse * centred, inverse * 0.00784313725490196
    upper, lower = m + 0.5 * h, m - 0.5 * h
    # constants stand on the right: on the left, the interpreter would make constants of the products
    log_above, below_share = _log_logistic(upper * (upper * upper * CUBIC + 1.0) * ROOT)
    log_below, above_share = _log_logistic(-lower * (lower * lower * CUBIC + 1.0) * ROOT)
    squares = (3.0 * m * m + 0.25 * h * h) * CUBIC
    gain, log_q = _one_less_exp(h * (1.0 + squares) * ROOT)
    # z falls by half of itself with the log-variance
    d_above = -0.5 * upper * (upper * upper * 3.0 * CUBIC + 1.0) * ROOT * below_share
    d_below = 0.5 * lower * (lower * lower * 3.0 * CUBIC + 1.0) * ROOT * above_share
    d_q = -0.5 * h * (1.0 + 3.0 * squares) * ROOT * gain
    lowest, highest = x0 < -0.999, x0 > 0.999
    found = tl.where(highest, 0.0, log_above) + tl.where(lowest, 0.0, log_below)
    found += tl.where(lowest | highest, 0.0, log_q)
    # a share of 0 times a cube too large for float32
    slope = tl.where(highest | (below_share == 0.0), 0.0, d_above)
    slope += tl.where(lowest | (above_share == 0.0), 0.0, d_below)
    slope += tl.where(lowest | highest | (gain == 0.0), 0.0, d_q)
    return tl.where(found < LEAST, LEAST, found), tl.where(found < LEAST, 0.0, slope)


@triton.jit
def _difference(out, noise, x0, table, sample, row, known, e, inside, size, out_batch):
    """(output minus target, [BLOCK] of x0); what has no weight is not looked at."""
    from_noise, from_x0 = entry(table, row, known, 0, COLUMNS), entry(table, row, known, 1, COLUMNS)
    first = entry(table, row, known, 7, COLUMNS)
    clean = load(x0 + sample * size, e, e < tl.where((from_x0 != 0) | (first != 0), size, 0))
    target = from_noise * load(noise + sample * size, e, e < tl.where(from_noise != 0, size, 0)) + from_x0 * clean
    return load(out + sample * out_batch, e, inside) - target, clean


@triton.jit(do_not_specialize=SCALARS)
def diffusion_loss_kernel(out, noise, x0, t, table, squared, bound, step, steps, blocks, size, out_batch, share,
                          LEARNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    # out [B, size or 2 size], rows out_batch apart; noise, x0 [B, size]; squared, bound [B, blocks]
    sample, row, known, start = place(t, step, steps, blocks, BLOCK, WIDE)
    e = start + tl.arange(0, BLOCK)
    inside = e < size
    d, clean = _difference(out, noise, x0, table, sample, row, known, e, inside, size, out_batch)
    tl.store(squared + tl.program_id(0), tl.sum(tl.where(inside, d * d, 0.0), 0) * share)
    if LEARNED:
        variance = load(out + sample * out_batch + size, e, inside)
        u = entry(table, row, known, 3, COLUMNS) + entry(table, row, known, 4, COLUMNS) * variance
        if entry(table, row, known, 7, COLUMNS) > 0:
            each, _ = _likelihood(clean, entry(table, row, known, 5, COLUMNS) * d,
                                  u + entry(table, row, known, 6, COLUMNS))
            each = -each
        else:
            each = 0.5 * (u - 1.0 + tl.exp(-u) * (1.0 + entry(table, row, known, 2, COLUMNS) * d * d))
        tl.store(bound + tl.program_id(0), tl.sum(tl.where(inside, each, 0.0), 0) * (share * BITS))


@triton.jit(do_not_specialize=["blocks"])
def diffusion_loss_sum_kernel(squared, bound, squared_to, bound_to, blocks, LEARNED: tl.constexpr, BLOCK: tl.constexpr):
    # squared, bound [B, blocks] -> [B]
    sample = tl.program_id(0).to(tl.int64)
    squares, bounds = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        squares += load(squared + sample * blocks, at, at < blocks)
        if LEARNED:
            bounds += load(bound + sample * blocks, at, at < blocks)
    tl.store(squared_to + sample, tl.sum(squares, 0))
    if LEARNED:
        tl.store(bound_to + sample, tl.sum(bounds, 0))


@triton.jit(do_not_specialize=SCALARS)
def diffusion_loss_bwd_kernel(d_squared, d_bound, out, noise, x0, t, table, d_out, step, steps, blocks, size, out_batch,
                              d_batch, share, LEARNED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    # d_squared, d_bound [B]; d_out like out, rows d_batch apart; the others as above
    sample, row, known, start = place(t, step, steps, blocks, BLOCK, WIDE)
    e = start + tl.arange(0, BLOCK)
    inside = e < size
    d, clean = _difference(out, noise, x0, table, sample, row, known, e, inside, size, out_batch)
    to = d_out + sample * d_batch + e
    up = tl.load(d_squared + sample).to(tl.float32) * (2.0 * share)
    tl.store(to, (up * d).to(d_out.dtype.element_ty), mask=inside)
    if LEARNED:
        variance = load(out + sample * out_batch + size, e, inside)
        slope = entry(table, row, known, 4, COLUMNS)
        u = entry(table, row, known, 3, COLUMNS) + slope * variance
        if entry(table, row, known, 7, COLUMNS) > 0:
            _, each = _likelihood(clean, entry(table, row, known, 5, COLUMNS) * d,
                                  u + entry(table, row, known, 6, COLUMNS))
            each = -each
        else:
            each = 0.5 * (1.0 - tl.exp(-u) * (1.0 + entry(table, row, known, 2, COLUMNS) * d * d))
        up = tl.load(d_bound + sample).to(tl.float32) * (share * BITS) * slope
        tl.store(to + size, (up * each).to(d_out.dtype.element_ty), mask=inside)
