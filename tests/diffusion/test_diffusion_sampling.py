"""Sampling loops: what they hand to the model and to the step, and where they arrive."""

import pytest
import torch

from vlmfast.diffusion import Recorder, Schedule, sample
from vlmfast.ops import denoise_step, diffusion_noise

MEAN, SPREAD = 0.3, 0.2
SCHEDULE = Schedule.cosine(1000).respace("50")
SHAPE = 2, 3, 4, 4


def ideal(x, timesteps, mean=MEAN):
    """The noise that the best model sees in pixels distributed as N(mean, SPREAD^2)."""
    bar = torch.from_numpy(Schedule.cosine(1000).alphas_cumprod)[timesteps].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))
    return (x - bar.sqrt() * mean) * (1 - bar).sqrt() / (bar * SPREAD**2 + 1 - bar)


def with_variance(model):
    return lambda x, timesteps: torch.cat([model(x, timesteps), torch.zeros_like(x)], 1)


@pytest.mark.parametrize(("sampler", "options"),
                         [("ancestral", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("plms", {})],
                         ids=["ancestral", "ddim", "ddim-eta1", "plms"])
def test_the_ideal_model_draws_its_distribution(sampler, options):
    model = with_variance(ideal) if sampler == "ancestral" else ideal
    schedule = Schedule.cosine(1000).respace("200")
    x = sample(model, (16, 3, 16, 16), schedule, sampler=sampler, seed=5, progress=False, **options)
    assert abs(x.mean() - MEAN) < 0.01 and abs(x.std() - SPREAD) < 0.02


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "plms"])
def test_the_loop_is_its_steps(sampler):
    model = with_variance(lambda x, t: torch.tanh(x) + 1e-4 * t.view(-1, 1, 1, 1))
    found = sample(model, SHAPE, SCHEDULE, sampler=sampler, seed=9, progress=False)
    x, history = diffusion_noise(SHAPE, 9), []
    for number, t in enumerate(range(49, -1, -1)):
        out = model(x, torch.full((2,), int(SCHEDULE.timestep_map[t])))
        step = denoise_step(x, out, t, SCHEDULE, sampler=sampler, history=tuple(history), seed=9, offset=number + 1,
                            return_epsilon=True)
        x = step.x
        history = [step.epsilon, *history][:3] if sampler == "plms" else []
    assert torch.equal(found, x)


def test_guidance_shows_the_model_every_sample_twice():
    seen = []

    def model(x, timesteps):
        seen.append((x, timesteps))
        half = len(x) // 2
        return torch.cat([ideal(x[:half], timesteps[:half], 0.5), ideal(x[half:], timesteps[half:], 0.1)])

    plain = sample(lambda x, t: 2.0 * ideal(x, t, 0.5) - 1.0 * ideal(x, t, 0.1), SHAPE, SCHEDULE, sampler="ddim",
                   seed=1, progress=False)
    guided = sample(model, SHAPE, SCHEDULE, sampler="ddim", guidance_scale=2.0, seed=1, progress=False)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-4)
    x, timesteps = seen[0]
    assert torch.equal(x[:2], x[2:]) and timesteps.tolist() == [999] * 4
    assert [int(t[0]) for _, t in seen] == SCHEDULE.timestep_map[::-1].tolist()


def test_a_gradient_pulls_the_samples():
    calls = []

    def toward(x, timesteps):
        calls.append(timesteps.tolist())
        assert torch.is_grad_enabled()
        x = x.detach().requires_grad_()
        return torch.autograd.grad(x.sum(), x)[0]

    shape = 8, 3, 8, 8
    free, pulled = (sample(with_variance(ideal), shape, SCHEDULE, cond_fn=f, seed=2, progress=False)
                    for f in (None, toward))
    assert free.mean() + 0.05 < pulled.mean() < free.mean() + 0.5
    assert calls[0] == [999] * 8 and len(calls) == 50 and not pulled.requires_grad


def test_kept_pixels_stay():
    image = torch.full(SHAPE, -0.9)
    mask = torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    x = sample(with_variance(ideal), SHAPE, SCHEDULE, mask=mask, image=image, seed=3, progress=False)
    torch.testing.assert_close(x[..., :2], image[..., :2])
    assert (x[..., 2:] > -0.7).all()


def test_samples_depend_on_the_seed_and_their_place_alone():
    draw = [sample(with_variance(ideal), (n, 3, 4, 4), SCHEDULE, seed=seed, progress=False)
            for n, seed in ((4, 7), (2, 7), (2, 8))]
    assert torch.equal(draw[0][:2], draw[1]) and not torch.equal(draw[1], draw[2])
    assert not torch.equal(draw[1], sample(with_variance(ideal), SHAPE, SCHEDULE, seed=7, offset=100, progress=False))
    torch.manual_seed(3)
    first = sample(ideal, SHAPE, SCHEDULE, sampler="ddim", progress=False)
    torch.manual_seed(3)
    assert torch.equal(first, sample(ideal, SHAPE, SCHEDULE, sampler="ddim", progress=False))


def test_noise_may_be_given():
    draws = torch.randn(50, *SHAPE)
    start = torch.randn(SHAPE)
    asked = []

    def noise(number):
        asked.append(number)
        return draws[number]

    found = sample(with_variance(ideal), start, SCHEDULE, noise=noise, progress=False)
    x = start
    for number, t in enumerate(range(49, -1, -1)):
        x = denoise_step(x, with_variance(ideal)(x, torch.full((2,), int(SCHEDULE.timestep_map[t]))), t, SCHEDULE,
                         noise=draws[number])
    assert torch.equal(found, x) and asked == list(range(50))


def test_reversed_ddim_leads_back():
    schedule = Schedule.cosine(1000)
    picture = MEAN + SPREAD * torch.randn(SHAPE)
    picture = picture.clamp(-0.9, 0.9)
    noise = sample(ideal, picture, schedule, sampler="ddim_reverse", progress=False)
    assert 0.7 < noise.std() < 1.3
    back = sample(ideal, noise, schedule, sampler="ddim", progress=False)
    torch.testing.assert_close(back, picture, rtol=0, atol=0.02)


def test_the_recorder_keeps_frames_over_all_steps():
    recorder, steps = Recorder(50, 8), []

    def callback(step):
        recorder(step)
        steps.append(step)

    x = sample(with_variance(ideal), SHAPE, SCHEDULE, seed=1, progress=False, callback=callback)
    assert len(recorder.frames) == 8 and all(0 <= f.min() and f.max() <= 1 for f in recorder.frames)
    torch.testing.assert_close(recorder.frames[-1], (x + 1) / 2)
    assert [s.number for s in steps] == list(range(50)) and [s.t for s in steps] == list(range(49, -1, -1))
    assert torch.equal(recorder.frames[0], ((steps[0].x0 + 1) / 2).clamp(0, 1))
    short = Recorder(5, 8)
    for _ in range(2):
        sample(ideal, SHAPE, Schedule.cosine(5), sampler="ddim", progress=False, callback=short)
    assert [frame.shape for frame in short.frames] == [(4, 3, 4, 4)] * 5, "two batches side by side"


def test_progress_is_shown_where_wanted(capsys):
    sample(ideal, SHAPE, Schedule.cosine(10), sampler="ddim", progress=True, desc="a red circle")
    assert "a red circle" in capsys.readouterr().err
    sample(ideal, SHAPE, Schedule.cosine(10), sampler="ddim", progress=False)
    assert not capsys.readouterr().err


def test_misuse_is_named():
    with pytest.raises(ValueError, match="sampler is 'euler'"):
        sample(ideal, SHAPE, SCHEDULE, sampler="euler")
    with pytest.raises(TypeError, match="schedule is a int"):
        sample(ideal, SHAPE, 50)
    with pytest.raises(ValueError, match="model_output has shape"):
        sample(ideal, SHAPE, SCHEDULE, progress=False)
    with pytest.raises(ValueError, match="frames is 0"):
        Recorder(10, 0)
