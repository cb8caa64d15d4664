"""window_attention and axial_attention against rolled windows and dense masks, written out with autograd."""

import pytest
import torch
from attention_helpers import check, naive, outputs_and_gradients, tensors

import vlmfast
from vlmfast.ops import axial_attention, dropout_mask, window_attention
from vlmfast.ops.reference.attention import axial_mask, relative_index, window_index


def swin(qkv, table, window, shift, reorder=False):
    """Shifted window attention as Swin writes it: roll, cut, additive mask of -100, put back. 2-D grids."""
    batch, height, width, _, heads, dim = qkv.shape
    wh, ww = window
    rolled = torch.roll(qkv, [-s for s in shift], (1, 2))
    parts = rolled.reshape(batch, height // wh, wh, width // ww, ww, 3, heads, dim).permute(0, 1, 3, 2, 4, 5, 6, 7)
    query, key, value = parts.reshape(-1, wh * ww, 3, heads, dim).unbind(2)
    at = torch.stack(torch.meshgrid(torch.arange(wh), torch.arange(ww), indexing="ij")).flatten(1)
    offset = at[:, :, None] - at[:, None, :]
    index = (offset[0] + wh - 1) * (2 * ww - 1) + offset[1] + ww - 1
    bias = table[index.flatten()].view(wh * ww, wh * ww, heads).permute(2, 0, 1)[None]
    if any(shift):
        image = torch.zeros(height, width)
        for count, rows in enumerate((slice(0, -wh), slice(-wh, -shift[0] or None), slice(-shift[0], None))):
            for other, columns in enumerate((slice(0, -ww), slice(-ww, -shift[1] or None), slice(-shift[1], None))):
                if (shift[0] or count < 2) and (shift[1] or other < 2):
                    image[rows, columns] = 3 * count + other
        cut = image.view(height // wh, wh, width // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)
        mask = (cut[:, :, None] != cut[:, None, :]) * -100.0
        bias = bias + mask[:, None].repeat(batch, 1, 1, 1).to(bias.dtype)
    out, _ = naive(query, key, value, bias=bias, reorder=reorder)
    out = out.reshape(batch, height // wh, width // ww, wh, ww, heads, dim).permute(0, 1, 3, 2, 4, 5, 6)
    return torch.roll(out.reshape(batch, height, width, heads, dim), shift, (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (0, 3), (3, 0)], ids=str)
def test_window_equals_swin(shift, dtype):
    qkv, table = torch.randn(2, 8, 12, 3, 2, 16).to(dtype), torch.randn(49, 2).to(dtype)
    check(lambda x, t: window_attention(x, t, window=4, shift=shift),
          lambda x, t, reorder=False: swin(x, t, (4, 4), shift, reorder), [qkv, table])


def test_window_of_swin_t():
    qkv, table = torch.randn(1, 14, 14, 3, 3, 32), torch.randn(169, 3)
    check(lambda x, t: window_attention(x, t, window=7, shift=3),
          lambda x, t, reorder=False: swin(x, t, (7, 7), (3, 3), reorder), [qkv, table])


def test_window_bias_may_be_given_or_left_out():
    qkv, table = torch.randn(1, 6, 9, 3, 2, 8), torch.randn(25, 2)
    bias = table[relative_index((3, 3)).flatten()].view(9, 9, 2).permute(2, 0, 1)
    given, from_table = (window_attention(qkv, b, window=3, shift=1) for b in (bias, table))
    assert torch.equal(given, from_table)
    plain = window_attention(qkv, window=3)
    assert torch.allclose(plain, window_attention(qkv, torch.zeros(25, 2), window=3), atol=1e-6)


def test_window_in_three_dimensions():
    size, window, shift = (4, 6, 4), (2, 3, 2), (1, 0, 1)
    qkv, table = torch.randn(2, *size, 3, 2, 8), torch.randn(3 * 5 * 3, 2)
    position = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), -1).view(-1, 3)
    shifted = (position - torch.tensor(shift)) % torch.tensor(size)
    same_window = (shifted // torch.tensor(window)).eq((shifted // torch.tensor(window))[:, None]).all(-1)
    # what the roll brought round the end of an axis may not meet what was there
    wrapped = position < torch.tensor(shift)
    live = same_window & wrapped.eq(wrapped[:, None]).all(-1)
    place = shifted % torch.tensor(window)
    offset = place[:, None] - place[None, :] + torch.tensor(window) - 1
    index = (offset[..., 0] * 5 + offset[..., 1]) * 3 + offset[..., 2]
    index = index.masked_fill(~live, 0)

    def formula(x, t, reorder=False):
        query, key, value = x.flatten(1, 3).unbind(2)
        out = naive(query, key, value, bias=t[index].permute(2, 0, 1), live=live, reorder=reorder)[0]
        return out.view(2, *size, 2, 8)

    check(lambda x, t: window_attention(x, t, window=window, shift=shift), formula, [qkv, table])


def test_window_dropout_counts_windows():
    qkv = torch.randn(2, 4, 6, 3, 2, 8)
    rows, _ = window_index((4, 6), (2, 3), (0, 0))
    keep = dropout_mask(9, 2 * 4, 2, 6, 6, 0.3)

    def formula(x, reorder=False):
        query, key, value = (part.flatten(0, 1) for part in x.flatten(1, 2)[:, rows].unbind(3))
        scores = torch.einsum("bihd,bjhd->bhij", query, key) * 8 ** -0.5
        out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1).masked_fill(~keep, 0.0) / 0.7, value)
        return torch.zeros(2, 24, 2, 8, dtype=out.dtype).index_copy(1, rows.flatten(), out.reshape(2, 24, 2, 8)) \
            .view(2, 4, 6, 2, 8)

    check(lambda x: window_attention(x, window=(2, 3), dropout=0.3, seed=9), formula, [qkv])


def test_window_gradcheck():
    qkv = torch.randn(1, 4, 4, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, t: window_attention(x, t, window=2, shift=1), (qkv, table))


def test_window_layouts():
    # a Linear's output is not the only thing that can be viewed as [B, h, w, 3, H, D]
    wide = torch.randn(2, 4, 4, 3, 2, 24)
    view = wide[..., 8:16]
    assert torch.equal(window_attention(view, window=2), window_attention(view.contiguous(), window=2))


MODES = ["row", "col", "conv", "row_only", "corner", "full"]
GRIDS = [(5, (4, 6), 3), (0, (3, 3), 5), (3, (5, 1), 1), (40, (9, 7), 5), (4, (2, 70), 3)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_axial_equals_the_dense_mask(mode, grid):
    text_len, size, kernel = grid
    length = text_len + size[0] * size[1]
    live = axial_mask(text_len, size, mode, kernel)
    leaves = tensors((2, length, 2, 16), (2, length, 2, 16), (2, length, 2, 8))
    check(lambda *x: axial_attention(*x, text_len=text_len, grid=size, mode=mode, kernel=kernel),
          lambda *x, reorder=False: naive(*x, live=live, reorder=reorder)[0], leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_axial_narrow_types(dtype):
    leaves = tensors(*[(1, 30, 2, 16)] * 3, dtype=dtype)
    live = axial_mask(5, (5, 5), "row")
    check(lambda *x: axial_attention(*x, text_len=5, grid=(5, 5)),
          lambda *x, reorder=False: naive(*x, live=live, reorder=reorder)[0], leaves)


def test_axial_dropout_belongs_to_the_whole_sequence():
    leaves = tensors(*[(1, 21, 2, 8)] * 3)
    live = axial_mask(5, (4, 4), "col")
    check(lambda *x: axial_attention(*x, text_len=5, grid=(4, 4), mode="col", dropout=0.3, seed=4),
          lambda *x, reorder=False: naive(*x, live=live, dropout=0.3, seed=4, reorder=reorder)[0], leaves)


def test_axial_truth_tables():
    # a 4 x 4 grid behind one text token: what the image position (2, 1) sees, by rows
    def seen(mode, kernel=3):
        rows = axial_mask(1, (4, 4), mode, kernel)[1 + 9, 1:].view(4, 4)
        return ["".join("x" if v else "." for v in row) for row in rows]

    assert seen("row") == ["....", ".xxx", "xx..", "...."]
    assert seen("row_only") == ["....", "....", "xx..", "...."]
    assert seen("col") == [".x..", ".x..", ".x..", "...."]
    assert seen("conv") == ["....", "xxx.", "xx..", "...."]
    assert seen("corner") == ["xx..", "xx..", "xx..", "...."]
    assert seen("full") == ["xxxx", "xxxx", "xx..", "...."]
    mask = axial_mask(3, (2, 2), "row")
    assert mask[3:, :3].all() and not mask[:3, 3:].any() and torch.equal(mask[:3, :3], torch.ones(3, 3).tril().bool())


@pytest.mark.parametrize("mode,mean,most", [("row", 32.484375, 33), ("col", 16.5, 32), ("conv", 51.126953125, 61)])
def test_axial_masks_have_the_published_densities(mode, mean, most):
    counts = axial_mask(256, (32, 32), mode)[256:, 256:].sum(1)
    assert counts.double().mean() == mean and counts.max() == most


@pytest.mark.parametrize("mode", ["row", "col", "conv"])
def test_axial_future_never_leaks(mode):
    q, k, v = tensors(*[(1, 30, 1, 8)] * 3)
    clean = axial_attention(q, k, v, text_len=5, grid=(5, 5), mode=mode, kernel=3)
    for x in (k, v):
        x[:, 20:] = torch.nan
    dirty = axial_attention(q, k, v, text_len=5, grid=(5, 5), mode=mode, kernel=3)
    assert torch.equal(clean[:, :20], dirty[:, :20])


def test_reference_backend_computes_the_same():
    qkv, table = torch.randn(1, 6, 6, 3, 2, 8), torch.randn(25, 2)
    sequence = tensors(*[(1, 20, 2, 8)] * 3)
    functions = (lambda x, t: window_attention(x, t, window=3, shift=1), (qkv, table)), \
        (lambda *x: axial_attention(*x, text_len=4, grid=(4, 4), mode="conv", kernel=3), sequence)
    for function, leaves in functions:
        native = outputs_and_gradients(function, leaves)
        with vlmfast.backend("reference"):
            plain = outputs_and_gradients(function, leaves)
        for mine, same in zip(native, plain, strict=True):
            for a, b in zip(mine, same, strict=True):
                assert (a - b).norm() <= 1e-6 * b.norm() + 1e-6
