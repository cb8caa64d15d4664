"""encode_indices and vector_quantize: the largest score and the nearest code, without scores or distances in memory."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse_than_torch

from vlmfast.ops import backend, encode_indices, vector_quantize

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, C, H, W, V): no block divides them; several blocks of positions, of entries and of the width
SHAPES = [(1, 1, 1, 1, 1), (2, 33, 5, 6, 700), (1, 16, 16, 17, 16), (3, 5, 1, 1, 112), (1, 700, 3, 5, 130),
          (1, 1025, 2, 9, 225)]


def gap(scores, indices):
    """How far the chosen entries' scores lie below the largest."""
    return scores.max(-1).values - scores.gather(-1, indices[..., None])[..., 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_indices_of_the_largest_score(shape, layout, dtype):
    batch, channels, height, width, entries = shape
    features = torch.randn(batch, channels, height, width).to(dtype)
    weight, bias = torch.randn(entries, channels).to(dtype), torch.randn(entries).to(dtype)
    if layout == "nlc":
        features = features.flatten(2).transpose(1, 2).contiguous()
    rows = (features.movedim(1, -1) if layout == "nchw" else features).double()
    for name in ("native", "reference"):
        for b in (bias, None):
            with backend(name):
                found = encode_indices(features, weight, b, layout=layout)
            scores = rows @ weight.double().T + (0 if b is None else b.double())
            assert found.dtype == torch.int64 and found.shape == scores.shape[:-1]
            if dtype == torch.float64:
                assert torch.equal(found, scores.argmax(-1))
            # 16-bit numbers are multiplied exactly and summed in float32
            assert gap(scores, found).max() <= 1e-6 * channels**0.5 * scores.abs().max()


def test_equal_scores_give_the_first_entry():
    weight = torch.randn(5, 8).repeat(60, 1)
    features = torch.randn(1, 8, 4, 5)
    found = encode_indices(features, weight)
    assert (found < 5).all() and torch.equal(found, encode_indices(features, weight[:5]))


def test_a_convolution_weight_and_a_view_give_the_same():
    features, weight, bias = torch.randn(2, 20, 6, 6), torch.randn(40, 20, 1, 1), torch.randn(40)
    truth = F.conv2d(features, weight, bias).argmax(1)
    assert torch.equal(encode_indices(features, weight, bias), truth)
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.equal(encode_indices(last, weight, bias), truth)
    wide = torch.full((2, 25, 6, 12), torch.nan)
    wide[:, 3:-2, :, ::2] = features
    assert torch.equal(encode_indices(wide[:, 3:-2, :, ::2], weight, bias), truth)
    assert encode_indices(features[:0], weight).shape == (0, 6, 6)
    assert not encode_indices(features[:, :0], weight[:, :0]).any()


def test_bits_do_not_depend_on_the_number_of_threads():
    features, weight = torch.randn(3, 70, 15, 11), torch.randn(900, 70)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(encode_indices(features, weight))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_nearest_code_is_that_of_the_distances(layout, name):
    x, codebook = torch.randn(2, 24, 9, 11, dtype=torch.float64), torch.randn(513, 24, dtype=torch.float64) + 0.5
    rows = x.movedim(1, -1)
    truth = torch.cdist(rows.reshape(-1, 24), codebook).argmin(-1).view(rows.shape[:-1])
    with backend(name):
        if layout == "nchw":
            found = vector_quantize(x, codebook)
            assert torch.equal(found.z, codebook[truth].movedim(-1, 1))
        else:
            found = vector_quantize(rows.flatten(1, 2), codebook, layout="nlc")
            assert torch.equal(found.z, codebook[truth].flatten(1, 2))
    assert torch.equal(found.indices.flatten(), truth.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nearest_code_in_other_dtypes_is_as_near(dtype):
    x, codebook = torch.randn(1, 32, 12, 12).to(dtype), torch.randn(400, 32).to(dtype)
    found = vector_quantize(x, codebook)
    distances = torch.cdist(x.movedim(1, -1).double().flatten(0, -2), codebook.double()).square()
    assert (-gap(-distances, found.indices.flatten())).abs().max() <= 1e-5 * distances.max()
    assert found.z.dtype == dtype and found.loss.dtype == torch.float32
    assert torch.equal(found.z, codebook[found.indices].movedim(-1, 1))  # the code itself, not x + (code - x)


def plain(x, codebook, beta, legacy):
    """The formula of taming-transformers' VectorQuantizer2, in [N, D]."""
    codes = codebook[torch.cdist(x.detach(), codebook.detach()).argmin(-1)]
    commitment, own = (codes.detach() - x).square().mean(), (codes - x.detach()).square().mean()
    return x + (codes - x).detach(), commitment + beta * own if legacy else beta * commitment + own


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_loss_and_gradients_match_the_formula(dtype, legacy):
    x, codebook = torch.randn(3, 50, 8, dtype=dtype, requires_grad=True), torch.randn(40, 8, dtype=dtype,
                                                                                     requires_grad=True)
    upstream = torch.randn(150, 8, dtype=torch.float64)

    def of(run, leaves):
        z, loss = run(*leaves)
        return z, loss, *torch.autograd.grad((z * upstream.to(z.dtype)).sum() + 5 * loss, leaves)

    def ours(x, c):
        found = vector_quantize(x, c, beta=0.3, legacy=legacy, layout="nlc")
        return found.z.flatten(0, 1), found.loss

    def formula(x, c):
        return plain(x.flatten(0, 1), c, 0.3, legacy)

    mine, truth = of(ours, (x, codebook)), of(formula, (x.detach().double().requires_grad_(),
                                                        codebook.detach().double().requires_grad_()))
    for name, a, b, same in zip(("z", "loss", "d_x", "d_codebook"), mine, truth, of(formula, (x, codebook)),
                                strict=True):
        if dtype == torch.float64:
            assert (a - b).norm() <= 1e-14 * b.norm()
        else:
            assert_no_worse_than_torch(a.detach(), b.detach(), same.detach(), factor=3.0, what=name)


def test_commitment_moves_x_and_not_the_codes():
    x, codebook = torch.randn(1, 20, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True)

    def sides(**options):
        found = vector_quantize(x, codebook, layout="nlc", **options)
        d_x, d_codes = torch.autograd.grad(found.loss, (x, codebook), allow_unused=True)
        return [0.0 if g is None else g.norm().item() for g in (d_x, d_codes)]

    base = sides(beta=0.25)
    assert sides(beta=0.5) == pytest.approx([2 * base[0], base[1]])
    assert sides(beta=0.5, legacy=True) == pytest.approx([4 * base[0], base[1] / 2])
    assert sides(beta=0.25, codebook_weight=0.0) == pytest.approx([base[0], 0.0])
    assert sides(beta=0.0) == pytest.approx([0.0, base[1]])


def test_gradient_of_z_passes_unchanged():
    x, codebook = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(2, 4, 3, 3)
    z = vector_quantize(x, codebook).z
    d_x, d_codes = torch.autograd.grad(z, (x, codebook), upstream, allow_unused=True)
    assert torch.equal(d_x, upstream) and d_codes is None


def test_no_position_has_no_loss():
    codebook = torch.randn(6, 4, requires_grad=True)
    found = vector_quantize(torch.randn(2, 4, 0, 3, requires_grad=True), codebook)
    assert found.z.shape == (2, 4, 0, 3) and found.loss == 0
