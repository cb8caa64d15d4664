"""Triton's group_norm kernels, interpreted on the CPU, against the float64 definition."""

import pytest
import torch
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from vlmfast.kernels import group_norm as kernels

from vlmfast.ops import backend, group_norm_silu
from vlmfast.ops.reference import group_norm as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (B, C, G, *spatial): one tile and several, ragged in channels and positions
SHAPES = [(2, 6, 3, 3), (1, 10, 2, 5, 7), (2, 12, 4), (2, 7, 1, 40), (1, 64, 32, 4, 4), (3, 3, 3, 37)]
NAMES = "d_x", "d_weight", "d_bias", "d_scale", "d_shift"


@pytest.fixture(params=["small", "gpu"])
def tiles(request, monkeypatch):
    """Tiles of 4 x 16, so that small shapes have several of them and a ragged last one; or those of a GPU."""
    if request.param == "small":
        monkeypatch.setattr(kernels, "tile_for", lambda channels, positions: kernels.Tile(4, 16, 4))


def case(shape, dtype=torch.float32, modulated=True, parameters=None):
    batch, channels, _, *spatial = shape
    x = (torch.randn(batch, channels, *spatial) * 1.7 + 0.6).to(dtype)
    parts = [torch.randn(channels) * 0.3 + 1, torch.randn(channels) * 0.5]
    parts += [torch.randn(batch, channels) * 0.4 for _ in range(2)] if modulated else []
    parts = [p.to(parameters or dtype) for p in parts]
    return x, parts if modulated else [*parts, None, None]


def widen(parts, dtype=torch.float64):
    return [None if p is None else p.to(dtype) for p in parts]


def check(x, parts, groups, silu=True):
    out, mean, rstd = kernels.forward(x, groups, *parts, 1e-5, silu)
    truth = reference.forward(x.double(), groups, *widen(parts), 1e-5, silu)
    same = reference.forward(x, groups, *parts, 1e-5, silu)
    assert out.dtype == x.dtype and out.is_contiguous()
    for what, our, true, plain in zip(("out", "mean", "rstd"), (out, mean.float(), rstd.float()), truth, same,
                                      strict=True):
        assert_no_worse_than_torch(our, true, plain.to(our.dtype), what=what)
    up = torch.randn(x.shape).to(x.dtype)
    ours = kernels.backward(up, x, mean, rstd, *parts, silu)
    truth = reference.backward(up.double(), x.double(), *truth[1:], *widen(parts), silu)
    same = reference.backward(up, x, *same[1:], *parts, silu)
    for what, our, true, plain in zip(NAMES, ours, truth, same, strict=True):
        assert (our is None) == (true is None), what
        if our is not None:
            assert our.dtype == plain.dtype
            assert_no_worse_than_torch(our, true, plain, factor=3.0, what=what,
                                       size=max(true.norm().item(), 0.1 * x.numel() ** 0.5) if what == "d_x" else None)
            assert_grad_not_dropped(our[:, None], true[:, None], what=what)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "plain"])
@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "affine"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_definition(shape, modulated, silu, tiles):
    x, parts = case(shape, modulated=modulated)
    check(x, parts, shape[2], silu)


@pytest.mark.parametrize("parameters", [None, torch.float32], ids=["alike", "float32 parameters"])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
def test_16_bit_inputs(dtype, parameters, tiles):
    x, parts = case((2, 10, 2, 5, 7), dtype, parameters=parameters)
    check(x, parts, 2)


def test_rows_longer_than_a_tile():
    x, parts = case((1, 2, 1, 4500))
    check(x, parts, 1)


def test_shares_of_a_group_are_merged(monkeypatch):
    """More tiles than shares, so that a program of the sums walks over several and the last has fewer."""
    monkeypatch.setattr(kernels, "tile_for", lambda channels, positions: kernels.Tile(2, 16, 4))
    monkeypatch.setattr(kernels, "MOST_SPLITS", 3)
    x, parts = case((1, 6, 2, 101))
    check(x, parts, 2)


@pytest.mark.parametrize("view", ["channels skipped", "channels last", "rows cut", "expanded"])
def test_strides(view, tiles):
    x, parts = case((2, 12, 3, 5, 6))
    parts = [p[..., ::2] for p in parts]
    x = {"channels skipped": x[:, ::2], "channels last": x[:, :6].to(memory_format=torch.channels_last),
         "rows cut": x[:, 3:9, :, 1:5], "expanded": x[:1, :6].expand(2, -1, -1, -1)}[view]
    found = kernels.forward(x, 3, *parts, 1e-5, True)
    same = kernels.forward(x.contiguous(), 3, *parts, 1e-5, True)
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    for up in (torch.randn(x.shape), torch.ones(()).expand(x.shape)):
        strided = kernels.backward(up, x, *found[1:], *parts, True)
        packed = kernels.backward(up.contiguous(), x.contiguous(), *found[1:], *parts, True)
        assert all(torch.equal(a, b) for a, b in zip(strided, packed, strict=True))


def test_a_large_mean_costs_no_digits(tiles):
    x, parts = case((2, 6, 2, 8, 9))
    x = (x * 256).round() / 256
    near, far = (kernels.forward(v, 2, *parts, 1e-5, True) for v in (x, x + 16384))
    assert (far[0] - near[0]).norm() < 1e-6 * near[0].norm()
    up = torch.randn(x.shape)
    near, far = (kernels.backward(up, v, *s[1:], *parts, True) for v, s in ((x, near), (x + 16384, far)))
    for what, a, b in zip(NAMES, far, near, strict=True):
        assert (a - b).norm() < 2e-6 * b.norm(), what


def test_nan_stays_within_its_group(tiles):
    x, parts = case((2, 6, 3, 5, 7))
    clean = kernels.forward(x, 3, *parts, 1e-5, True)[0]
    x[1, 2, 3, 3] = torch.nan
    out = kernels.forward(x, 3, *parts, 1e-5, True)[0]
    outside = torch.ones(2, 6, dtype=torch.bool)
    outside[1, 2:4] = False
    assert torch.equal(out[outside], clean[outside]) and out[~outside].isnan().all()


@pytest.mark.parametrize("modulated", [True, False], ids=["modulated", "affine"])
def test_the_op_uses_the_kernels(modulated):
    x, parts = case((2, 6, 3, 5, 7), modulated=modulated)
    results = []
    for name in ("triton", "native"):
        leaves = [v.clone().requires_grad_() for v in (x, *parts) if v is not None]
        with backend(name):
            scale, shift = leaves[3:] or (None, None)
            out = group_norm_silu(leaves[0], 3, *leaves[1:3], scale=scale, shift=shift)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("shape", [(0, 6, 3, 4), (2, 0, 3, 4), (2, 6, 3, 0)], ids=str)
def test_empty_dimensions(shape):
    x, parts = case(shape)
    out, mean, rstd = kernels.forward(x, 3, *parts, 1e-5, True)
    found = kernels.backward(torch.ones_like(x), x, mean, rstd, *parts, True)
    for a, b in zip((out, *found), (x, x, *parts), strict=True):
        assert a.shape == b.shape and not a.any()


def test_float64_is_refused():
    with pytest.raises(TypeError, match="x is torch.float64, the Triton backend takes float32"):
        kernels.forward(torch.zeros(1, 2, 3).double(), 1, torch.ones(2), torch.zeros(2), None, None, 1e-5, True)
