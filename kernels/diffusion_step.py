"""A step of any sampler of `diffusion` as one pass over its tensors; what depends on the step alone is in a table."""

import triton
import triton.language as tl

from .draws import normal_pair, words_of

STREAM = tl.constexpr(0x64696666)  # of the definition's draws
LANES = tl.constexpr(16)  # counters whose four words serve 64 elements, a word of each in turn
COLUMNS = tl.constexpr(12)
# vary from step to step: not worth a compilation each
SCALARS = ["step", "steps", "batch", "blocks", "guidance_scale", "clamp", "w0", "w1", "w2", "w3", "offset"]


@triton.jit
def place(t, step, steps, blocks, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """(sample, row of the table, whether the table has it, first of BLOCK elements of the sample) of this program."""
    program = tl.program_id(0)
    sample = program // blocks
    first = program - sample * blocks
    if WIDE:
        first = first.to(tl.int64)
    sample = sample.to(tl.int64)
    at = sample * 0 + step
    if t is not None:
        at = tl.load(t + sample)
    known = (at >= 0) & (at < steps)
    return sample, tl.where(known, at, 0), known, first * BLOCK


@triton.jit
def entry(table, row, known, column: tl.constexpr, columns: tl.constexpr):
    """A number of the table; NaN, which every result then is, where it has no such row."""
    return tl.load(table + row * columns + column, mask=known, other=float("nan"))


@triton.jit
def load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def normal_tile(seed, sample, offset, first, BLOCK: tl.constexpr):
    """Draws of BLOCK elements of a sample from `first` on, a multiple of 64: [BLOCK] float32."""
    nothing = tl.zeros((BLOCK // 4,), tl.uint32)
    quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    w0, w1, w2, w3 = words_of(seed, quads, nothing + sample.to(tl.uint32), nothing + offset.to(tl.uint32),
                              nothing + STREAM)
    z0, z1 = normal_pair(w0, w1)
    z2, z3 = normal_pair(w2, w3)
    # the last two dimensions of the join are the bits of the word's number
    words = tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), (BLOCK // 64, LANES, 4))
    return tl.reshape(tl.permute(words, (0, 2, 1)), (BLOCK,))


@triton.jit(do_not_specialize=SCALARS)
def denoise_step_kernel(x, out, t, table, threshold, mask, image, shift, earlier_1, earlier_2, earlier_3, noise, seed,
                        then_to, x0_to, e_to, step, steps, batch, blocks, size, inner, out_batch, mask_batch,
                        guidance_scale, clamp, w0, w1, w2, w3, offset, GUIDED: tl.constexpr, LEARNED: tl.constexpr,
                        CLAMP: tl.constexpr, COMBINED: tl.constexpr, MASK_CHANNELS: tl.constexpr, WIDE: tl.constexpr,
                        BLOCK: tl.constexpr):
    # x, image, shift, earlier_*, noise, then_to, x0_to, e_to [B, size]; out [B or 2 B, size or 2 size], rows out_batch
    # apart; mask [B or 1, size or inner]; t, threshold [B]; table [steps, 12]; a program has BLOCK elements of a sample
    sample, row, known, first = place(t, step, steps, blocks, BLOCK, WIDE)
    e = first + tl.arange(0, BLOCK)
    inside = e < size
    start = sample * size
    xs = load(x + start, e, inside)
    o = tl.zeros((BLOCK,), tl.float32)
    if out is not None:
        given = out + sample * out_batch
        o = load(given, e, inside)
        if GUIDED:
            without = load(given + batch.to(tl.int64) * out_batch, e, inside)
            o = without + guidance_scale * (o - without)
    seen = entry(table, row, known, 10, COLUMNS) * xs + entry(table, row, known, 11, COLUMNS) * o
    if e_to is not None:
        tl.store(e_to + start + e, seen.to(e_to.dtype.element_ty), mask=inside)
    if COMBINED:
        o = w0 * seen
        if earlier_1 is not None:
            o += w1 * load(earlier_1 + start, e, inside)
        if earlier_2 is not None:
            o += w2 * load(earlier_2 + start, e, inside)
        if earlier_3 is not None:
            o += w3 * load(earlier_3 + start, e, inside)
    x0 = entry(table, row, known, 0, COLUMNS) * xs + entry(table, row, known, 1, COLUMNS) * o
    if mask is not None:
        m = load(mask + sample * mask_batch, e if MASK_CHANNELS else e % inner, inside)
        x0 = x0 * (1.0 - m) + load(image + start, e, inside) * m
    # comparisons, since a minimum would lose NaN
    if threshold is not None:
        bound = tl.load(threshold + sample).to(tl.float32)
        x0 = tl.where(x0 > bound, bound, tl.where(x0 < -bound, -bound, x0)) / bound
    elif CLAMP:
        x0 = tl.where(x0 > clamp, clamp, tl.where(x0 < -clamp, -clamp, x0))
    level = tl.zeros((BLOCK,), tl.float32) + entry(table, row, known, 5, COLUMNS)
    if LEARNED:
        level += entry(table, row, known, 6, COLUMNS) * load(given + size, e, inside)
    deviation = tl.exp(level * 0.5)
    if shift is not None:
        g = load(shift + start, e, inside)
        x0 += entry(table, row, known, 8, COLUMNS) * g
    if x0_to is not None:
        tl.store(x0_to + start + e, x0.to(x0_to.dtype.element_ty), mask=inside)
    if then_to is not None:
        then = entry(table, row, known, 2, COLUMNS) * x0 + entry(table, row, known, 3, COLUMNS) * xs
        then += entry(table, row, known, 4, COLUMNS) * o
        if shift is not None:
            then += entry(table, row, known, 9, COLUMNS) * (deviation * deviation) * g
        noisy = entry(table, row, known, 7, COLUMNS)
        if noise is not None:
            then += noisy * deviation * load(noise + start, e, e < tl.where(noisy != 0, size, 0))
        elif seed is not None:
            # a step without noise, such as the last, skips the draw
            if noisy != 0:
                then += noisy * deviation * normal_tile(seed, sample, offset, first, BLOCK)
        tl.store(then_to + start + e, then.to(then_to.dtype.element_ty), mask=inside)
