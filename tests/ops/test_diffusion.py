"""Steps of diffusion against the papers' formulas in float64."""

import pytest
import torch
from diffusion_helpers import DTYPES, SCHEDULE, assert_close, case, formula, loss_formula, take

from vlmfast.diffusion import Schedule
from vlmfast.ops import DiffusionLoss, backend, denoise_step, diffusion_loss, diffusion_noise, q_sample

BACKENDS = ["native", "reference"]
T = torch.tensor([0, 7, 49])
OPTIONS = {
    "ancestral": {},
    "guided": {"guidance_scale": 3.0},
    "learned": {"variance": "learned"},
    "fixed small": {"variance": "fixed_small"},
    "fixed large": {"variance": "fixed_large"},
    "x0": {"prediction": "x0"},
    "v": {"prediction": "v", "guidance_scale": 0.5},
    "unclamped": {"clamp": False},
    "wide clamp": {"clamp": 2.5},
    "ddim": {"sampler": "ddim", "guidance_scale": 2.0},
    "ddim, v": {"sampler": "ddim", "prediction": "v"},
    "ddim, noise": {"sampler": "ddim", "eta": 0.6},
    "ddim, all the noise": {"sampler": "ddim", "eta": 1.0, "prediction": "x0"},
    "reverse": {"sampler": "ddim_reverse", "clamp": False},
    "plms": {"sampler": "plms"},
}


def learned_of(options):
    return options.get("sampler", "ancestral") == "ancestral" and "fixed" not in options.get("variance", "")


def compare(x, output, noise, options, t=T, **extra):
    """Every result of the step against the formula in float64 and in float32 rounded to the dtype of x: in 16 bits
    alone the formula overflows."""
    settings = {**options, **{k: v for k, v in extra.items() if not isinstance(v, torch.Tensor)}}
    tensors = {k: v for k, v in extra.items() if isinstance(v, torch.Tensor)}
    ours = denoise_step(x, output, t, SCHEDULE, noise=noise, return_x0=True, return_epsilon=True, **settings, **tensors)
    plain = {"clamp": 1.0, **settings}
    found = [formula(x.to(d), output.to(d), t, SCHEDULE, noise=noise.to(d), **plain,
                     **{k: v.to(d) for k, v in tensors.items()})
             for d in (torch.float64, torch.promote_types(x.dtype, torch.float32))]
    for name, a, truth, eager in zip(("x", "x0", "epsilon"), ours, *found, strict=True):
        assert a.dtype == x.dtype
        assert_close(a, truth, eager, what=name)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_step_is_the_formula(options, dtype, name):
    x, output, noise = case((3, 2, 9, 31), dtype, guided="guidance_scale" in options, learned=learned_of(options))
    # x0 of the last steps leaves float16 where nothing holds it
    t = T if options.get("clamp", True) else torch.tensor([0, 7, 30])
    with backend(name):
        compare(x, output, noise, options, t)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 1), (3, 1, 64), (2, 3, 5, 13), (1, 4, 8, 8, 8), (2, 3, 45, 61)],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(shape, dtype):
    x, output, noise = case(shape, dtype, guided=True)
    compare(x, output, noise, {"guidance_scale": 1.5}, T[:len(x)])
    compare(x, output, noise, {"guidance_scale": 1.5, "sampler": "ddim", "eta": 0.3}, T[:len(x)])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "eta": 0.5, "prediction": "x0"}],
                         ids=str)
def test_kept_pixels_and_a_shifted_mean(options, name):
    x, output, noise = case((3, 3, 6, 11), learned=learned_of(options))
    _, _, image = case((3, 3, 6, 11), seed=1)
    mask = (torch.rand(3, 1, 6, 11, generator=torch.Generator().manual_seed(2)) * 3).round() / 2
    with backend(name):
        compare(x, output, noise, options, mask=mask.clamp(max=1), image=image, mean_shift=image * 0.3)
        compare(x, output, noise, options, mask=mask.clamp(max=1).expand(-1, 3, -1, -1), image=image)
        whole = denoise_step(x, output, T, SCHEDULE, noise=noise, mask=torch.ones(1, 3, 6, 11, dtype=torch.bool),
                             image=image, return_x0=True, clamp=False, **options)
    assert torch.equal(whole.x0, image)


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_plms_extrapolates_the_noise(count, name):
    x, output, noise = case(learned=False)
    history = [case(learned=False, seed=k + 1)[1] for k in range(count)]
    with backend(name):
        ours = denoise_step(x, output, T, SCHEDULE, sampler="plms", history=history, return_epsilon=True)
    truth, _, seen = formula(x.double(), output.double(), T, SCHEDULE, sampler="plms",
                             history=[h.double() for h in history])
    assert_close(ours.x, truth, formula(x, output, T, SCHEDULE, sampler="plms", history=history)[0])
    assert torch.equal(ours.epsilon, output) and (ours.epsilon - seen).abs().max() == 0


def test_noise_of_the_model_instead_of_the_clamped_one():
    x, output, _ = case(learned=False)
    ours = denoise_step(x.double(), output.double(), 20, SCHEDULE, sampler="ddim", use_clipped_model_output=False)
    bar, before = SCHEDULE.alphas_cumprod[20], SCHEDULE.alphas_cumprod_prev[20]
    x0 = ((x - (1 - bar)**0.5 * output) / bar**0.5).clamp(-1, 1)
    assert torch.allclose(ours, (before**0.5 * x0 + (1 - before)**0.5 * output).double(), atol=1e-5)


@pytest.mark.parametrize("name", BACKENDS)
def test_dynamic_threshold(name):
    x, output, noise = case((3, 2, 9, 11))
    with backend(name):
        ours = denoise_step(x, output, T, SCHEDULE, noise=noise, dynamic_threshold=0.8, return_x0=True)
    _, x0, _ = formula(x.double(), output.double(), T, SCHEDULE, noise=noise.double(), clamp=None)
    bound = torch.quantile(x0.flatten(1).abs(), 0.8, dim=1).clamp(min=1).view(3, 1, 1, 1)
    assert bound.max() > 1
    assert torch.allclose(ours.x0.double(), x0.clamp(-bound, bound) / bound, atol=2e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_one_step_for_all_is_that_step_for_each(name):
    x, output, noise = case()
    with backend(name):
        for one, each in ((4, torch.tensor([4, 4, 4])), (torch.tensor(4), torch.tensor([4, 4, 4], dtype=torch.int32))):
            assert torch.equal(denoise_step(x, output, one, SCHEDULE, noise=noise),
                               denoise_step(x, output, each, SCHEDULE, noise=noise))


def test_views_are_read_where_they_lie():
    x, output, noise = case((2, 3, 4, 6), guided=True)
    wide = torch.randn(4, 12, 4, 6)
    wide[:, 3:9] = output
    expected = denoise_step(x, output, 5, SCHEDULE, noise=noise, guidance_scale=2.0)
    assert torch.equal(denoise_step(x, wide[:, 3:9], 5, SCHEDULE, noise=noise, guidance_scale=2.0), expected)
    across = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    turned = output.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert torch.equal(denoise_step(across, turned, 5, SCHEDULE, noise=noise, guidance_scale=2.0), expected)


def test_a_half_precision_output_with_a_float32_sample():
    x, output, noise = case((2, 3, 4, 6))
    half = output.half()
    assert torch.equal(denoise_step(x, half, 5, SCHEDULE, noise=noise),
                       denoise_step(x, half.float(), 5, SCHEDULE, noise=noise))


def test_nothing_passes_from_the_first_step_or_from_what_has_no_part():
    x, output, noise = case()
    noise[0] = torch.nan
    found = denoise_step(x, output, T, SCHEDULE, noise=noise)
    assert torch.isfinite(found[0]).all()
    output[1] = torch.nan
    assert denoise_step(x, output, T, SCHEDULE, noise=noise)[1].isnan().all()


# Noise


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1), (3, 2, 64), (2, 3, 33, 41)], ids=str)
def test_materialised_noise_is_the_one_in_the_step(shape):
    x, output, _ = case(shape)
    drawn = diffusion_noise(shape, 11, 5)
    assert torch.equal(denoise_step(x, output, 30, SCHEDULE, seed=11, offset=5),
                       denoise_step(x, output, 30, SCHEDULE, noise=drawn))
    assert torch.equal(q_sample(x, 30, SCHEDULE, seed=11, offset=5), q_sample(x, 30, SCHEDULE, noise=drawn))
    with backend("reference"):
        exact = diffusion_noise(shape, 11, 5, dtype=torch.float64)
    assert (drawn - exact).abs().max() < 2e-6
    assert (diffusion_noise(shape, 11, 5, dtype=torch.float64) - exact).abs().max() < 1e-14


def test_noise_is_normal_and_independent():
    drawn = diffusion_noise((4, 250_000), 3).double()
    assert abs(drawn.mean()) < 4e-3 and abs(drawn.var() - 1) < 6e-3
    assert abs((drawn**4).mean() - 3) < 0.05 and abs((drawn**3).mean()) < 0.02
    for lag in (1, 16, 32, 48, 64):
        assert abs((drawn[:, lag:] * drawn[:, :-lag]).mean()) < 5e-3
    assert abs(drawn[0] @ drawn[1]) / 250_000 < 9e-3
    assert abs((drawn > 2).double().mean() - 0.02275) < 6e-4


def test_noise_depends_on_seed_offset_and_sample_alone():
    whole = diffusion_noise((4, 3, 8, 8), 3, 2)
    assert torch.equal(whole[:2], diffusion_noise((2, 3, 8, 8), 3, 2))
    assert torch.equal(whole.flatten(), diffusion_noise((4, 192), torch.tensor(3), 2).flatten())
    others = [diffusion_noise((4, 3, 8, 8), 4, 2), diffusion_noise((4, 3, 8, 8), 3, 1),
              diffusion_noise((4, 3, 8, 8), 3 + 2**40, 2)]
    assert not any(torch.isclose(whole, other).any(dim=(1, 2, 3)).all() for other in others)
    torch.manual_seed(0)
    first = denoise_step(*case()[:2], 9, SCHEDULE)
    torch.manual_seed(0)
    assert torch.equal(first, denoise_step(*case()[:2], 9, SCHEDULE))
    assert not torch.equal(first, denoise_step(*case()[:2], 9, SCHEDULE))


def test_threads_do_not_change_a_bit():
    x, output, noise = case((3, 3, 90, 91), guided=True)
    clean = case((3, 3, 90, 91), seed=4)[0]
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaf = output[:3].clone().requires_grad_()
            loss = diffusion_loss(leaf, noise, clean, T, SCHEDULE)
            loss.sum().backward()
            found.append((denoise_step(x, output, T, SCHEDULE, guidance_scale=2.0, seed=1), loss.detach(), leaf.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Noising and the loss


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noising_is_the_formula(dtype, name):
    x0, _, noise = case((3, 2, 9, 31), dtype)
    with backend(name):
        ours = q_sample(x0, T, SCHEDULE, noise=noise)

    def truth(d):
        bar = take(SCHEDULE.alphas_cumprod, T, x0.to(d))
        return bar.sqrt() * x0.to(d) + (1 - bar).sqrt() * noise.to(d)

    assert_close(ours, truth(torch.float64), truth(dtype))


LOSSES = {"hybrid": {}, "learned": {"variance": "learned"}, "x0": {"prediction": "x0"}, "v": {"prediction": "v"},
          "mse": {"variance": "fixed_small"}, "mse of v": {"variance": "fixed_large", "prediction": "v"}}


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_loss_is_the_formula(options, dtype, name):
    schedule, t = Schedule.linear(1000), torch.tensor([0, 3, 999, 0, 500])
    x0, output, noise = case((5, 2, 7, 33), dtype, learned="fixed" not in options.get("variance", ""))
    x0 = (x0 / 1.5).clamp(-1, 1)
    if options.get("variance") == "learned":
        output[:, 2:] = output[:, 2:] - take(schedule.betas, t, x0.double()).rsqrt().log().to(dtype) * 2
    # near the truth, as a trained model is, so that no bound is astronomic
    target = {"epsilon": noise, "x0": x0, "v": take(schedule.alphas_cumprod, t, x0).sqrt() * noise
              - (1 - take(schedule.alphas_cumprod, t, x0)).sqrt() * x0}[options.get("prediction", "epsilon")]
    # and no likelihood is at its floor, where what is left of it is rounding alone
    output[:, :2] = target + output[:, :2] * (0.002 if options.get("prediction") == "x0" else 0.05)
    leaf = output.clone().requires_grad_()
    with backend(name):
        found = diffusion_loss(leaf, noise, x0, t, schedule, return_parts=True, **options)
        assert isinstance(found, DiffusionLoss) and found.loss.dtype == torch.promote_types(dtype, torch.float32)
        (mine,) = torch.autograd.grad(found.loss.sum(), leaf)

    def truth(d, exact=False):
        inner = output.to(d).requires_grad_()
        a, b = loss_formula(inner, noise.to(d), x0.to(d), t, schedule, **options)
        return a.detach(), b.detach(), torch.autograd.grad((a + b).sum(), inner)[0]

    eager = truth(torch.promote_types(dtype, torch.float32))
    for what, ours, exact, theirs, factor in zip(("mse", "vb", "gradient"), (found.mse, found.vb, mine),
                                                 truth(torch.float64), eager, (2.0, 2.0, 3.0), strict=True):
        assert_close(ours.detach(), exact, theirs, factor=factor, what=what)


def test_gradients_in_float64():
    x0, output, noise = case((4, 2, 3, 3), torch.float64)
    t, schedule = torch.tensor([0, 5, 49, 20]), SCHEDULE
    leaf = output.requires_grad_()
    for options in ({}, {"variance": "learned"}, {"variance": "fixed_small", "prediction": "v"}):
        chosen = leaf if "fixed" not in options.get("variance", "") else leaf[:, :2]

        def loss(a, options=options):
            return diffusion_loss(a, noise, x0.clamp(-1, 1), t, schedule, rescale=True, return_parts=True, **options)

        # the bound sees the mean as a constant, so only the sum of squares has a derivative there
        mse, vb = loss(chosen)[1:]
        fast = torch.autograd.grad(mse.sum() + vb.sum(), leaf)[0]
        truth = loss_formula(chosen, noise, x0.clamp(-1, 1), t, schedule, **options)
        (slow,) = torch.autograd.grad(truth[0].sum() + truth[1].sum(), leaf)
        assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-12)


def test_differentiable_through_the_step():
    x, output, noise = (a.requires_grad_() for a in case((2, 1, 2, 3), torch.float64))
    t = torch.tensor([3, 40])

    def step(x, output):
        return denoise_step(x, output, t, SCHEDULE, noise=noise.detach(), clamp=False)

    assert torch.autograd.gradcheck(step, (x, output))
    assert torch.autograd.gradcheck(lambda x: q_sample(x, t, SCHEDULE, seed=3), (x,))
    with torch.no_grad():
        assert torch.allclose(step(x, output), denoise_step(x.detach(), output.detach(), t, SCHEDULE, noise=noise,
                                                            clamp=False))
