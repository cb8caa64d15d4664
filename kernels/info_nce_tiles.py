"""Parts of the `info_nce` kernels: a tile of logits, which of its pairs are positive, and small maths."""

import triton
import triton.language as tl

LSE, POSITIVE, POSITIVES, BEST, SUM, COUNT = (tl.constexpr(plane) for plane in range(6))  # planes of the statistics

# One exp per logit serves both directions as long as the exponents of the lines in a tile differ by less than this:
# what underflows (below e^-87) then has a share below e^-47 in every line it belongs to.
SPREAD = tl.constexpr(40.0)

SIZES = ["N", "M", "offset"]  # vary from batch to batch: not worth a compilation each


@triton.jit
def products(image, text, rows, columns, N, M, D, image_stride, text_stride,
              UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PIECES: tl.constexpr):
    """image @ text.T in float32, a tuple of [BM, BN / PIECES] from left to right; lanes past the end repeat a line.

    The pieces hold one tile in registers, and what follows works on one piece at a time: its temporaries are that much
    smaller. D is a multiple of BK and rows are aligned (the launcher pads), so that every load is a full vector.
    """
    depth = tl.arange(0, BK)
    left = image + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * image_stride + depth[None, :]
    right = text + tl.minimum(columns, M - 1).to(tl.int64)[None, :] * text_stride + depth[:, None]
    product = tl.zeros((BM, BN), tl.float32)
    for _ in range(0, D, BK):
        a, b = tl.load(left), tl.load(right)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision="ieee")
        left += BK
        right += BK
    if PIECES == 1:
        return (product,)
    elif PIECES == 2:
        return _halves(product, BM, BN)
    elif PIECES == 4:
        return _quarters(product, BM, BN)
    else:
        left_half, right_half = _halves(product, BM, BN)
        p0, p1, p2, p3 = _quarters(left_half, BM, BN // 2)
        p4, p5, p6, p7 = _quarters(right_half, BM, BN // 2)
        return p0, p1, p2, p3, p4, p5, p6, p7


@triton.jit
def _halves(x, R: tl.constexpr, C: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (R, 2, C // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, R: tl.constexpr, C: tl.constexpr):
    left_half, right_half = _halves(x, R, C)
    first, second = _halves(left_half, R, C // 2)
    third, fourth = _halves(right_half, R, C // 2)
    return first, second, third, fourth


@triton.jit
def scaled(product, logit_scale, logit_bias, BIAS: tl.constexpr):
    logits = product * tl.load(logit_scale)
    if BIAS:
        logits += tl.load(logit_bias)
    return logits


@triton.jit
def crosses(first_row, first_column, offset, BM: tl.constexpr, BN: tl.constexpr):
    """Whether some row of the tile has its diagonal positive in it."""
    return (first_row + BM + offset > first_column) & (first_row + offset < first_column + BN)


@triton.jit
def pairs(rows, columns, N, M, offset, labels, text_labels, mask, mask_stride,
           LABELS: tl.constexpr, MASK: tl.constexpr):
    """(positive, allowed) of a tile; lanes past the end are neither."""
    allowed = (rows < N)[:, None] & (columns < M)[None, :]
    if LABELS:
        row_label = tl.load(labels + rows, mask=rows < N, other=0)
        column_label = tl.load(text_labels + columns, mask=columns < M, other=0)
        positive = row_label[:, None] == column_label[None, :]
    else:
        positive = (rows + offset)[:, None] == columns[None, :]
    positive = positive & allowed
    if MASK:
        at = mask + rows.to(tl.int64)[:, None] * mask_stride + columns[None, :]
        kept = tl.load(at, mask=allowed, other=1) == 0
        if LABELS:
            allowed = allowed & kept
            positive = positive & kept
        else:
            allowed = allowed & (kept | positive)
    return positive, allowed


@triton.jit
def finite(maximum, instead):
    """-inf (nothing counted yet) would turn into NaN when it is subtracted from itself."""
    return tl.where(maximum == -float("inf"), instead, maximum)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1 to 1.6e-7 relative: Chebyshev interpolation of log1p(x) / x of degree 9."""
    y = -0.00317605705 * x + 0.0195425274
    y = y * x - 0.0563736132
    y = y * x + 0.105436238
    y = y * x - 0.152696671
    y = y * x + 0.196632743
    y = y * x - 0.249516163
    y = y * x + 0.333297105
    y = y * x - 0.499998926
    return (y * x + 0.999999995) * x
