"""Triton's quantize kernels, interpreted on the CPU, against the float64 definition of the primitives."""

import pytest
import torch
import triton
import triton.language as tl
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from vlmfast.kernels import quantize as kernels
from vlmfast.kernels.quantize_tiles import _gumbel

from vlmfast.ops import backend, gumbel_noise, gumbel_quantize
from vlmfast.ops.reference import quantize as reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# (B, P, V, D): one tile and more, ragged or not, in every dimension
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 65, 64, 16), (3, 17, 70, 130), (2, 33, 129, 20)]


@triton.jit
def gumbel_kernel(words, noise, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(noise + at, _gumbel(tl.load(words + at).to(tl.uint32)))


SEED = torch.tensor(-(2**40) - 3)


def grid_of(layout, batch, positions, entries, dtype=torch.float32):
    x = torch.randn(batch, entries, positions) * 2
    x = x.transpose(1, 2)
    return (x if layout == "nchw" else x.contiguous()).to(dtype)


def noise_of(source, grid):
    """(given, seed, what the definition is given)."""
    if source == "none":
        return None, None, None
    count = grid.shape[0] * grid.shape[1]
    drawn = kernels.gumbel_noise(count, grid.shape[2], SEED)
    if source == "drawn":
        return None, SEED, drawn
    return drawn.view(grid.shape).transpose(1, 2).contiguous().transpose(1, 2), None, drawn


def check(ours, truths, sames, names, factor=2.0, sizes=None):
    for name, our, truth, same in zip(names, ours, truths, sames, strict=True):
        assert_no_worse_than_torch(our, truth, same.to(our.dtype), factor=factor, what=name,
                                   size=(sizes or {}).get(name))


@pytest.mark.parametrize("source", ["none", "drawn", "given"])
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_matches_the_definition(shape, layout, source):
    grid, codebook = grid_of(layout, *shape[:3]), torch.randn(shape[2:])
    given, seed, noise = noise_of(source, grid)
    z, indices, lse, plain, expected = kernels.forward(grid, codebook, given, seed, 0.7, True, True, True)
    rows = grid.flatten(0, 1)
    truth = reference.forward(rows.double(), codebook.double(), noise, 0.7, True, True)
    same = reference.forward(rows, codebook, noise, 0.7, True, True)
    pick = (0, 2, 3, 4)
    check((z, lse, plain, expected), [truth[i] for i in pick], [same[i] for i in pick],
          ("z", "lse", "plain", "expected"))
    assert torch.equal(indices, truth[1])
    found = kernels.forward(grid, codebook, given, seed, 0.7, False, False, False)
    assert torch.equal(found[1], indices) and [x.numel() for i, x in enumerate(found) if i != 1] == [0] * 4


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_forward_in_every_dtype(dtype):
    grid, codebook = grid_of("nchw", 2, 30, 90, dtype), torch.randn(90, 40).to(dtype)
    noise = kernels.gumbel_noise(60, 90, SEED)
    ours = kernels.forward(grid, codebook, None, SEED, 1.3, True, False, True)
    truth = reference.forward(grid.flatten(0, 1).double(), codebook.double(), noise, 1.3, True, False)
    eager = (((grid.flatten(0, 1) + noise.to(dtype)) / 1.3).softmax(-1) @ codebook).float()
    assert_no_worse_than_torch(ours[0].to(dtype), truth[0], eager.to(dtype), what="z")


@pytest.mark.parametrize("case", ["soft", "soft without divergence", "hard", "reinmax", "divergence alone"])
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_backward_matches_the_definition(dtype, layout, case):
    shape = (2, 35, 131, 75)
    grid, codebook = grid_of(layout, *shape[:3], dtype), torch.randn(shape[2:]).to(dtype)
    given, seed, noise = noise_of("none" if case in ("reinmax", "divergence alone") else "drawn", grid)
    rows, tau, reinmax = grid.flatten(0, 1), 0.8, case == "reinmax"
    z, indices, lse, plain, expected = reference.forward(rows.double(), codebook.double(), noise, tau, True, True)
    d_z = torch.randn(len(rows), shape[3])
    codes = case.startswith("soft")
    kl = None if case == "soft without divergence" else torch.tensor(0.3)
    mean_code, plain_code, up = z, None, None if case == "divergence alone" else d_z
    if reinmax:
        mean_code = (z + codebook.double()[indices]) / 2
        plain_code = (rows.double() - plain[:, None]).exp() @ codebook.double()
    gain = 0.0 if up is None else 1 / tau

    def narrow(x):
        return None if x is None else x.float()

    d_logits, d_codebook = kernels.backward(
        grid, codebook, given, seed, tau, up, gain, lse.float(), narrow(mean_code), plain.float(), expected.float(), kl,
        0.5 if reinmax else 0.0, narrow(plain_code), indices if reinmax else None, True, codes)
    assert d_logits.dtype == dtype and d_logits.stride() == grid.stride()

    def definition(wide):
        up_or_0 = d_z * 0 if up is None else up
        return reference.backward(
            rows.to(wide), codebook.to(wide), noise, tau, up_or_0.to(wide), gain, lse.to(wide), plain.to(wide),
            expected.to(wide), 0.0 if kl is None else 0.3, 0.5 if reinmax else 0.0, indices if reinmax else None, codes)

    truth, same = definition(torch.float64), definition(torch.float32 if dtype == torch.float32 else dtype)
    assert_no_worse_than_torch(d_logits.flatten(0, 1), truth[0], same[0].to(dtype), factor=3.0, what="d_logits")
    assert_grad_not_dropped(d_logits.flatten(0, 1), truth[0], what="d_logits")
    if codes:
        eager = same[1] if dtype == torch.float32 else (
            ((rows + noise.to(dtype)) / tau).softmax(-1).T @ d_z.to(dtype)).float()
        assert_no_worse_than_torch(d_codebook.to(dtype), truth[1], eager.to(dtype), factor=3.0, what="d_codebook")
    else:
        assert d_codebook.numel() == 0


def test_drawn_noise_is_the_materialised_one():
    grid, codebook = grid_of("nchw", 2, 35, 70), torch.randn(70, 9)
    given, _, _ = noise_of("given", grid)
    for a, b in zip(kernels.forward(grid, codebook, None, SEED, 0.9, True, True, True),
                    kernels.forward(grid, codebook, given, None, 0.9, True, True, True), strict=True):
        assert torch.equal(a, b)


def test_noise_is_that_of_the_definition():
    for offset in (0, 2**32 - 20):
        noise, truth = kernels.gumbel_noise(40, 75, SEED, offset), reference.gumbel_noise(40, 75, SEED, offset)
        assert (noise - truth).abs().max() < 3e-6


def test_extreme_words_give_finite_noise():
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 1234567, 2**32 - 1234567])
    noise = torch.empty(8)
    gumbel_kernel[(1,)](words, noise, BLOCK=8)
    low = words < 2**31
    t = (torch.where(low, words, 2**32 - 1 - words).double() + 0.5) * 2.0**-32
    truth = -torch.where(low, -torch.log1p(-t), -t.log()).log()
    assert ((noise - truth).abs() <= 1e-6 * truth.abs() + 1e-6).all() and noise.max() > 22


@pytest.mark.parametrize("mode", ["soft", "straight_through", "reinmax", "argmax"])
def test_masked_entries_and_positions_without_entries(mode):
    logits, codebook = torch.randn(1, 40, 5, 7), torch.randn(40, 6)
    masked = torch.rand(logits.shape) < 0.3
    masked[:, :, 2, 3] = True
    logits = logits.masked_fill(masked, -torch.inf)
    results = []
    for name in ("triton", "native"):
        x, c = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
        with backend(name):
            found = gumbel_quantize(x, c, mode=mode, kl_weight=0.5, seed=4)
            (found.z.square().sum() + found.kl).backward()
        assert found.z.isfinite().all() and found.kl.isfinite() and c.grad.isfinite().all()
        assert x.grad.isfinite().all() and not x.grad[masked].any()
        results.append((found.z.detach(), found.kl.detach(), x.grad, c.grad))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_the_op_uses_the_kernels_noise():
    logits, codebook = torch.randn(2, 40, 3, 5), torch.randn(40, 6)
    with backend("triton"):
        noise = gumbel_noise(logits.shape, 4, layout="nchw")
        for mode in ("soft", "straight_through"):
            drawn, given = gumbel_quantize(logits, codebook, mode=mode, seed=4), gumbel_quantize(
                logits, codebook, mode=mode, noise=noise)
            assert torch.equal(drawn.z, given.z) and torch.equal(drawn.indices, given.indices)


@pytest.mark.parametrize("shape", [(0, 3, 5, 4), (2, 0, 5, 4), (2, 3, 5, 0)])
def test_empty_dimensions(shape):
    grid, codebook = grid_of("nlc", *shape[:3]), torch.randn(shape[2:])
    z, indices, lse, plain, expected = kernels.forward(grid, codebook, None, SEED, 1.0, True, True, True)
    assert z.shape == (shape[0] * shape[1], shape[3]) and len(indices) == len(lse) == len(plain)
    d_logits, d_codebook = kernels.backward(grid, codebook, None, SEED, 1.0, torch.ones_like(z), 1.0, lse, z, plain,
                                            expected, torch.tensor(0.1), 0.0, None, None, True, True)
    assert d_logits.shape == grid.shape and d_codebook.shape == codebook.shape and not d_codebook.any()


def test_float64_is_refused():
    with pytest.raises(TypeError, match="logits are torch.float64, the Triton backend takes float32"):
        kernels.forward(torch.zeros(1, 2, 3, dtype=torch.float64), torch.zeros(3, 2), None, SEED, 1.0, True, True, True)
