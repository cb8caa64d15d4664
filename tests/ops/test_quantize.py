"""gumbel_quantize and its noise against formulas in float64, on the native kernels and on the reference."""

import math

import pytest
import torch
from quantize_helpers import DTYPES, MODES, SHAPES, case, compare, formula, gradients, rows_of
from tolerance import assert_grad_not_dropped

from vlmfast.ops import backend, gumbel_noise, gumbel_quantize
from vlmfast.ops.reference import quantize as reference


def quantize(**options):
    def run(logits, codebook):
        found = gumbel_quantize(logits, codebook, **options)
        return found.z, found.kl

    return run


@pytest.mark.parametrize("layout", ["nchw", "nlc"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_shape_matches_the_formula(shape, mode, layout):
    logits, codebook, noise = case(shape, layout=layout)
    options = {"tau": 0.7, "mode": mode, "kl_weight": 0.3, "layout": layout}
    mine, truth = compare(quantize(noise=noise, **options), logits, codebook, noise, **options)
    indices = gumbel_quantize(logits, codebook, noise=noise, **options).indices
    assert torch.equal(indices.flatten(), formula(logits.double(), codebook.double(), noise, **options)[2])
    assert indices.shape == (logits.shape[:1] + logits.shape[2:] if layout == "nchw" else logits.shape[:2])
    if mode == "soft" and shape[1] > 1:
        assert_grad_not_dropped(rows_of(mine[2], layout), rows_of(truth[2], layout), what="d_logits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kl_weight", [0.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["native", "reference"])
def test_every_dtype_matches_the_formula(name, mode, kl_weight, dtype):
    for layout in ("nchw", "nlc"):
        logits, codebook, noise = case((2, 150, 6, 7, 20), dtype, layout)
        options = {"tau": 1.3, "mode": mode, "kl_weight": kl_weight, "layout": layout}
        with backend(name):
            compare(quantize(noise=noise, **options), logits, codebook, noise, what=layout, **options)


@pytest.mark.parametrize("tau", [1.0, 1 / 16])
@pytest.mark.parametrize("mode", MODES)
def test_reinmax_and_the_rest_at_other_temperatures(mode, tau):
    logits, codebook, noise = case((1, 90, 5, 5, 8), torch.float64)
    options = {"tau": tau, "mode": mode, "kl_weight": 0.5, "layout": "nchw"}
    mine, truth = compare(quantize(noise=noise, **options), logits, codebook, noise, **options)
    assert all((a - b).norm() <= 1e-12 * b.norm() + 1e-14 for a, b in zip(mine, truth, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_gradcheck(mode, layout):
    logits, codebook, noise = case((2, 9, 2, 2, 3), torch.float64, layout)
    if mode == "soft":
        leaves = logits.requires_grad_(), codebook.requires_grad_()
        options = {"tau": 0.8, "mode": mode, "layout": layout, "noise": noise.double(), "kl_weight": 0.4}
        assert torch.autograd.gradcheck(quantize(**options), leaves)
    else:  # a hard choice is flat in the logits: only the codebook and the divergence can be checked
        leaves = codebook.requires_grad_(),
        options = {"tau": 0.8, "mode": mode, "layout": layout, "noise": noise.double()}
        assert torch.autograd.gradcheck(lambda c: gumbel_quantize(logits, c, **options).z, leaves)
        leaves = logits.clone().requires_grad_(),
        assert torch.autograd.gradcheck(
            lambda x: gumbel_quantize(x, codebook.detach(), kl_weight=0.4, **options).kl, leaves)


def strided(x, how):
    """The same numbers behind other strides."""
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if how == "slice":
        wide = torch.full((x.shape[0], x.shape[1] + 5, *x.shape[2:]), torch.nan, dtype=x.dtype)
        wide[:, 2:-3] = x
        return wide[:, 2:-3]
    if how == "every other":
        wide = torch.full((*x.shape, 2), torch.nan, dtype=x.dtype)
        wide[..., 0] = x
        return wide[..., 0]
    if how == "batch last":
        return x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    if how == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x[:1].expand(x.shape)


@pytest.mark.parametrize("mode", ["soft", "straight_through"])
@pytest.mark.parametrize("how", ["channels_last", "slice", "every other", "batch last", "turned", "expanded"])
def test_views_equal_their_copies(how, mode):
    logits, codebook, _ = case((2, 37, 3, 5, 7))
    view = strided(logits, how)
    run = quantize(mode=mode, tau=0.9, kl_weight=0.2, seed=4)

    def of(x):
        x = x.detach().requires_grad_()
        z, kl = run(x, codebook)
        return z, kl, torch.autograd.grad(z.square().sum() + kl, x)[0]

    for ours, plain in zip(of(view), of(view.contiguous()), strict=True):
        assert ours.isfinite().all()
        assert (ours - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.parametrize("shape", [(0, 5, 2, 2, 3), (2, 5, 0, 2, 3), (2, 5, 2, 2, 0)])
def test_empty_dimensions(shape):
    batch, entries, height, width, dim = shape
    for mode in MODES:
        logits = torch.randn(batch, entries, height, width, requires_grad=True)
        codebook = torch.randn(entries, dim, requires_grad=True)
        found = gumbel_quantize(logits, codebook, mode=mode, kl_weight=1.0)
        assert found.z.shape == (batch, dim, height, width) and found.indices.shape == (batch, height, width)
        (found.z.sum() + found.kl).backward()
        assert found.kl.isfinite() and logits.grad.isfinite().all() and codebook.grad.isfinite().all()
        if not logits.numel():
            assert found.kl == 0 and not codebook.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nlc"])
def test_the_drawn_noise_is_the_materialised_one_bit_for_bit(layout, dtype):
    for name in ("native", "reference"):
        logits, codebook, _ = case((2, 37, 4, 5, 7), dtype, layout)
        with backend(name):
            noise = gumbel_noise(logits.shape, 11, layout=layout, dtype=dtype)
            assert noise.shape == logits.shape and noise.dtype == dtype
            for mode in ("soft", "straight_through"):
                drawn = gradients(quantize(seed=11, mode=mode, layout=layout, kl_weight=1.0), (logits, codebook))
                given = gradients(quantize(noise=noise, mode=mode, layout=layout, kl_weight=1.0), (logits, codebook))
                assert all(torch.equal(a, b) for a, b in zip(drawn, given, strict=True))


def test_noise_is_independent_of_the_layout_and_continues_by_its_offset():
    whole = gumbel_noise((7, 13), 5)
    assert torch.equal(gumbel_noise((4, 13), 5, offset=3), whole[3:])
    assert torch.equal(gumbel_noise((1, 13, 7, 1), 5, layout="nchw"), whole.T[None, :, :, None])
    assert torch.equal(gumbel_noise((7, 9), 5), whole[:, :9])
    assert not torch.equal(gumbel_noise((7, 13), 6), whole)
    high = gumbel_noise((3, 13), 5, offset=2**32 - 1)
    assert torch.equal(high[1:], gumbel_noise((2, 13), 5, offset=2**32))
    assert not torch.equal(high[1], whole[0])


def test_noise_has_gumbel_moments_and_no_correlation():
    noise = gumbel_noise((512, 1024), 3).double()
    count = noise.numel()
    assert abs(noise.mean() - 0.5772156649) < 5 * 1.2825 / math.sqrt(count)
    assert abs(noise.var() - math.pi**2 / 6) < 0.02
    # quantiles of exp(-exp(-g)), which is uniform
    uniform = (-(-noise).exp()).exp().flatten().sort().values
    assert (uniform - (torch.arange(count) + 0.5) / count).abs().max() < 2 / math.sqrt(count)
    centred = noise - noise.mean()
    for a, b in ((centred[1:], centred[:-1]), (centred[:, 1:], centred[:, :-1]), (centred[:, 4:], centred[:, :-4])):
        assert abs((a * b).mean()) < 0.02


def test_no_word_gives_infinite_noise(monkeypatch):
    """The extreme words of 32 bits, whose noise would be infinite if they were rounded to 0 or 1."""
    words = torch.tensor([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    monkeypatch.setattr(reference, "philox", lambda counter, key: [words[:, None]] * 4)
    noise = reference.gumbel_noise(len(words), 4, 1)
    assert noise.isfinite().all()
    assert noise.min() > -3.2 and 22 < noise.max() < 23
    assert (noise[1:, 0] < noise[:-1, 0]).all()
    exact = [-math.log(-math.log1p(-(int(r) + 0.5) * 2.0**-32)) for r in words[:4]]
    assert torch.allclose(noise[:4, 0], torch.tensor(exact, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_native_noise_is_the_reference_in_its_tails():
    """Over 2^21 draws, the native noise in float32 keeps the precision of the large and of the small ones."""
    noise = gumbel_noise((2048, 1024), 9)
    truth = reference.gumbel_noise(2048, 1024, 9)
    assert truth.max() > 13 and truth.min() < -2.5
    assert (noise - truth).abs().max() < 3e-6
    assert ((noise - truth).abs() <= 1e-6 * truth.abs() + 3e-7).all()
    assert noise.isfinite().all()


def test_seeds_follow_the_generator():
    logits, codebook, _ = case((1, 40, 4, 4, 3))
    torch.manual_seed(3)
    first, second = gumbel_quantize(logits, codebook), gumbel_quantize(logits, codebook)
    torch.manual_seed(3)
    again = gumbel_quantize(logits, codebook)
    assert torch.equal(first.z, again.z) and not torch.equal(first.z, second.z)
    tensor = gumbel_quantize(logits, codebook, seed=torch.tensor(-5))
    assert torch.equal(tensor.z, gumbel_quantize(logits, codebook, seed=-5).z)


@pytest.mark.parametrize("mode", MODES)
def test_bits_do_not_depend_on_the_number_of_threads(mode):
    logits, codebook, _ = case((3, 700, 9, 17, 40))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(gradients(quantize(mode=mode, seed=1, kl_weight=0.5), (logits, codebook)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_masked_entries_have_no_weight_and_no_gradient(mode, name, dtype):
    logits, codebook, noise = case((2, 41, 4, 5, 7), dtype)
    masked = torch.rand(logits.shape) < 0.4
    masked[:, 3] = False
    masked[:, 30] = True
    logits = logits.masked_fill(masked, -torch.inf)
    with backend(name):
        z, kl, d_logits, d_codebook = gradients(quantize(noise=noise, mode=mode, kl_weight=0.7), (logits, codebook))
        indices = gumbel_quantize(logits, codebook, noise=noise, mode=mode).indices
    assert z.isfinite().all() and kl.isfinite() and d_logits.isfinite().all() and d_codebook.isfinite().all()
    assert not d_logits[masked].any() and not d_codebook[30].any()
    assert d_logits[~masked].any()
    assert not masked.gather(1, indices[:, None]).any()
    # a finite number far below does the same
    low = gradients(quantize(noise=noise, mode=mode, kl_weight=0.7),
                    (logits.masked_fill(masked, -1e4), codebook))
    for ours, plain in zip((z, kl, d_logits, d_codebook), low, strict=True):
        assert (ours.double() - plain.double()).norm() <= (1e-6 if dtype != torch.bfloat16 else 1e-2) * plain.norm()


@pytest.mark.parametrize("name", ["native", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_a_position_without_entries_has_no_gradient(mode, name):
    logits, codebook, _ = case((1, 41, 3, 5, 7))
    logits[:, :, 1, 2] = -torch.inf
    with backend(name):
        z, kl, d_logits, d_codebook = gradients(quantize(seed=2, mode=mode, kl_weight=0.7), (logits, codebook))
    assert z.isfinite().all() and kl.isfinite() and d_logits.isfinite().all() and d_codebook.isfinite().all()
    assert not d_logits[:, :, 1, 2].any() and d_logits.any()
    if mode == "soft":
        assert not z[:, :, 1, 2].any()


@pytest.mark.parametrize("mode", MODES)
def test_large_logits_do_not_overflow(mode):
    logits, codebook, noise = case((1, 60, 4, 4, 7), scale=3e4)
    mine = gradients(quantize(noise=noise, mode=mode, kl_weight=0.1), (logits, codebook))
    truth = gradients(lambda x, c: formula(x, c, noise.double(), tau=1.0, mode=mode, kl_weight=0.1, layout="nchw")[:2],
                      (logits.double(), codebook.double()))
    for at in (0, 1, 3):
        assert (mine[at] - truth[at]).norm() <= 2e-6 * truth[at].norm()
    assert (mine[2] - truth[2]).norm() < 1e-6  # nearly all terms of size 1 cancel


@pytest.mark.parametrize("mode", ["soft", "straight_through", "reinmax"])
def test_a_sure_choice_gives_no_gradient_however_small_tau(mode):
    """Rounding errors of the size of one unit in the last place, divided by tau, would drown everything else."""
    _, codebook, _ = case((1, 300, 5, 5, 37))
    logits = torch.zeros(1, 300, 5, 5)
    logits.scatter_(1, torch.randint(300, (1, 1, 5, 5)), 1e3)
    found = gradients(quantize(mode=mode, tau=1e-6, seed=3), (logits, codebook))
    assert found[3].any() and not found[2].any()


def test_a_sure_choice_has_the_divergence_log_v_and_an_even_one_none():
    codebook = torch.randn(64, 3)
    sure = torch.zeros(1, 64, 2, 2)
    sure[:, 5] = 200.0
    assert gumbel_quantize(sure, codebook, kl_weight=2.0).kl == pytest.approx(2 * math.log(64), rel=1e-6)
    assert abs(gumbel_quantize(sure * 0 + 3, codebook, kl_weight=2.0).kl) < 1e-5
    assert gumbel_quantize(sure, codebook, kl_weight=0.0).kl == 0


@pytest.mark.parametrize("mode", MODES)
def test_only_the_wanted_gradients_are_found(mode):
    logits, codebook, _ = case((1, 30, 3, 3, 4))
    both = gradients(quantize(mode=mode, seed=1, kl_weight=0.1), (logits, codebook))
    x, c = logits.clone().requires_grad_(), codebook.clone().requires_grad_()
    upstream = torch.randn(both[0].shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).float()
    for leaf, at, arguments in ((x, 2, (x, codebook)), (c, 3, (logits, c))):
        found = gumbel_quantize(*arguments, mode=mode, seed=1, kl_weight=0.1)
        ((found.z * upstream).sum() + 3 * found.kl).backward()
        assert (leaf.grad - both[at]).norm() <= 1e-6 * both[at].norm()
    assert not gumbel_quantize(logits, codebook, mode=mode).z.requires_grad
