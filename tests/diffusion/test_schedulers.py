"""The drop-in schedulers against diffusers itself, step by step with the same model outputs and noise."""

import json

import pytest
import torch

from vlmfast.diffusion import DDIMScheduler, DDPMScheduler

SHAPE = 2, 3, 8, 8


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


def predict(x, t, kind="epsilon", channels=1):
    """A model output of the size that a trained model would give, varying with x and t."""
    wave = torch.tanh(0.7 * x + 0.3 * torch.sin(3 * x.roll(1, -1)) + 1e-3 * int(t))
    out = {"epsilon": wave * 1.1, "sample": wave * 0.8, "v_prediction": wave}[kind]
    return out if channels == 1 else torch.cat([out, torch.sin(5 * x)], 1)


def same_trajectory(ours, theirs, tolerance=1e-4, as_tensor=False, dtype=torch.float32, learned=False, **options):
    """Runs both through their timesteps; what the model says comes from theirs."""
    assert torch.equal(ours.timesteps, theirs.timesteps)
    x = y = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1), dtype=dtype)
    kind, worst = theirs.config.prediction_type, 0.0
    for i, t in enumerate(theirs.timesteps):
        out = predict(y, t, kind, 2 if learned else 1)
        if learned and theirs.config.variance_type == "learned":
            out = torch.cat([out[:, :3], out[:, 3:].abs() * 0.01], 1)
        a = ours.step(out, t if as_tensor else int(t), x, generator=torch.Generator().manual_seed(i), **options)
        b = theirs.step(out, t, y, generator=torch.Generator().manual_seed(i), **options)
        for found, wanted in ((a.prev_sample, b.prev_sample), (a.pred_original_sample, b.pred_original_sample)):
            assert found.dtype == wanted.dtype and found.isfinite().all()
            error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1)
            worst = max(worst, error.item())
            assert error <= tolerance, f"step {i} (timestep {int(t)}) differs by {error:.3g}"
        x, y = a.prev_sample, b.prev_sample
    return worst


def pair(diffusers, kind, steps=50, **config):
    made = []
    for scheduler in ({"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[kind],
                      {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[kind]):
        made.append(scheduler(**config))
        made[-1].set_timesteps(steps)
    return made


COMMON = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    {"clip_sample": False},
    {"clip_sample_range": 0.6},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"thresholding": True},
    {"thresholding": True, "sample_max_value": 1.7, "dynamic_thresholding_ratio": 0.9},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "linspace", "num_train_timesteps": 617},
    {"steps_offset": 1},
    {"trained_betas": [0.001 + 0.00002 * i for i in range(1000)]},
]
named = [pytest.param(config, id="-".join(f"{k}={str(v)[:12]}" for k, v in config.items()) or "defaults")
         for config in COMMON]


@pytest.mark.oracle
@pytest.mark.parametrize("config", named)
def test_ddpm_follows_diffusers(diffusers, config):
    same_trajectory(*pair(diffusers, "ddpm", **config))


@pytest.mark.oracle
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("config", [{}, {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
                                    {"steps_offset": 1, "beta_schedule": "squaredcos_cap_v2"}],
                         ids=["leading", "trailing-v", "offset-cosine"])
def test_ddpm_variances_follow_diffusers(diffusers, variance, config):
    same_trajectory(*pair(diffusers, "ddpm", variance_type=variance, **config), learned=variance.startswith("learned"))


@pytest.mark.oracle
@pytest.mark.parametrize("config", [*named, {"set_alpha_to_one": False},
                                    {"set_alpha_to_one": False, "steps_offset": 1}])
@pytest.mark.parametrize("options", [{}, {"use_clipped_model_output": True}, {"eta": 1.0},
                                     {"eta": 0.4, "use_clipped_model_output": True}],
                         ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain")
def test_ddim_follows_diffusers(diffusers, config, options):
    same_trajectory(*pair(diffusers, "ddim", **config), **options)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_a_largest_threshold_below_one_follows_diffusers(diffusers, kind):
    # every step magnifies differences by 1 / 0.8, hence few of them
    same_trajectory(*pair(diffusers, kind, 10, thresholding=True, sample_max_value=0.8))


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 7, 100, 333])
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_any_number_of_steps_follows_diffusers(diffusers, kind, steps, spacing):
    ours, theirs = pair(diffusers, kind, steps, timestep_spacing=spacing)
    same_trajectory(ours, theirs, 1e-4 if steps <= 100 else 5e-4)


@pytest.mark.oracle
def test_given_timesteps_follow_diffusers(diffusers):
    ours, theirs = DDPMScheduler(variance_type="learned_range"), diffusers.DDPMScheduler(variance_type="learned_range")
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[997, 800, 799, 444, 22, 3])
    same_trajectory(ours, theirs, learned=True)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_timesteps_as_tensors_and_float64_follow_diffusers(diffusers, kind):
    same_trajectory(*pair(diffusers, kind, 20), as_tensor=True, dtype=torch.float64)


@pytest.mark.oracle
def test_fixed_large_log_is_fixed_large_where_diffusers_has_nan(diffusers):
    ours, theirs = pair(diffusers, "ddpm", variance_type="fixed_large_log")
    large = DDPMScheduler(variance_type="fixed_large")
    large.set_timesteps(50)
    x, noise = torch.randn(2, *SHAPE)
    t = int(ours.timesteps[3])
    found = ours.step(predict(x, t), t, x, variance_noise=noise)
    assert torch.equal(found.prev_sample, large.step(predict(x, t), t, x, variance_noise=noise).prev_sample)
    assert theirs.step(predict(x, t), t, x).prev_sample.isnan().any()


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_noising_and_velocity_follow_diffusers(diffusers, kind):
    ours, theirs = pair(diffusers, kind, 10, rescale_betas_zero_snr=True)
    x, noise = torch.randn(2, 5, 3, 4, 4)
    t = torch.tensor([0, 1, 500, 998, 999])
    for name, timesteps in (("add_noise", t), ("get_velocity", t), ("add_noise", torch.tensor([700]))):
        found, wanted = (getattr(s, name)(x, noise, timesteps) for s in (ours, theirs))
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["ddpm", "ddim"])
def test_reads_the_config_that_diffusers_writes(diffusers, kind, tmp_path):
    ours, theirs = pair(diffusers, kind, 25, beta_schedule="scaled_linear", steps_offset=1, clip_sample=False)
    theirs.save_config(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    read = type(ours).from_config(config)
    assert read.config == ours.config
    assert {k: v for k, v in theirs.config.items() if not k.startswith("_")} == dict(ours.config)
    assert len(read) == len(theirs) and read.init_noise_sigma == theirs.init_noise_sigma and read.order == theirs.order
    for name in ("betas", "alphas_cumprod"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=0)


@pytest.mark.oracle
def test_a_list_of_generators_draws_the_noise_of_diffusers(diffusers):
    ours, theirs = pair(diffusers, "ddim", 10)
    x = torch.randn(SHAPE)
    found, wanted = (s.step(predict(x, 500), 500, x, eta=1.0,
                            generator=[torch.Generator().manual_seed(i) for i in (3, 4)]) for s in (ours, theirs))
    torch.testing.assert_close(found.prev_sample, wanted.prev_sample, rtol=0, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "options"), [("ddpm", {}), ("ddim", {"eta": 0.5}), ("ddim", {})],
                         ids=["ddpm", "ddim-eta", "ddim"])
def test_one_generator_advances_as_in_diffusers(diffusers, kind, options):
    ours, theirs = pair(diffusers, kind, 10)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    x = y = torch.randn(SHAPE)
    for t in theirs.timesteps:
        out = predict(y, t)
        x, y = (s.step(out, t, sample, generator=g, **options).prev_sample
                for s, g, sample in ((ours, generators[0], x), (theirs, generators[1], y)))
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_a_sampling_loop_without_diffusers():
    scheduler = DDIMScheduler.from_config({"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"})
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(predict(scheduler.scale_model_input(x, t), t), t, x, return_dict=False)
    assert torch.equal(x, x0) and x.abs().max() <= 1  # the last step ends at the estimate


def test_noise_follows_torchs_seed_and_covers_a_unit_normal():
    scheduler = DDPMScheduler(variance_type="fixed_large", clip_sample=False)
    x = torch.zeros(4, 3, 64, 64)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(scheduler.step(x, 500, x).prev_sample / scheduler.betas[500].sqrt())
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert abs(drawn[0].mean()) < 0.02 and abs(drawn[0].std() - 1) < 0.02


def test_rows_may_lie_at_different_timesteps():
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(50)
    x, noise = torch.randn(2, *SHAPE)
    out, t = predict(x, 0), torch.tensor([980, 20])
    both = scheduler.step(out, t, x, variance_noise=noise).prev_sample
    for i in range(2):
        one = scheduler.step(out[i:i + 1], int(t[i]), x[i:i + 1], variance_noise=noise[i:i + 1]).prev_sample
        torch.testing.assert_close(both[i:i + 1], one)


def test_ddim_takes_timesteps_that_diffusers_cannot():
    """GLIDE's 27 steps through the drop-in scheduler and through its respaced schedule."""
    from vlmfast.diffusion import Schedule
    from vlmfast.ops import denoise_step

    schedule = Schedule.linear(1000).respace("fast27")
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(timesteps=schedule.timestep_map[::-1])
    x = y = torch.randn(SHAPE)
    for i, t in zip(range(26, -1, -1), scheduler.timesteps, strict=True):
        out = predict(y, t)
        x = scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
        y = denoise_step(y, out, i, schedule, sampler="ddim")
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_a_thousand_ancestral_steps_drift_less_than_a_thousandth_from_float64():
    """The ideal model of pixels distributed as N(0.3, 0.2^2), its own output fed back, learned range of variances."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="learned_range")
    scheduler.set_timesteps(1000)
    bars = scheduler._schedule.alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPE, generator=generator)
    y, worst = x.double(), 0.0

    def model(x, t):
        bar = float(bars[t])
        noise = (x - bar**0.5 * 0.3) * ((1 - bar) ** 0.5 / (bar * 0.04 + 1 - bar))
        return torch.cat([noise + 0.05 * torch.sin(4 * x), torch.cos(2 * x)], 1)

    for t in scheduler.timesteps.tolist():
        noise = torch.randn(SHAPE, generator=generator)
        x = scheduler.step(model(x, t), t, x, variance_noise=noise).prev_sample
        y = scheduler.step(model(y, t), t, y, variance_noise=noise.double()).prev_sample
        worst = max(worst, (x - y).abs().max().item())
    assert 0 < worst < 1e-3, f"drift {worst:.3g}"
    assert abs(x.mean() - 0.3) < 0.2 and x.std() < 0.5  # it ends at pictures, not at noise


@pytest.mark.parametrize(("arguments", "message"), [
    ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid'"),
    ({"prediction_type": "flow"}, "prediction_type is 'flow'"),
    ({"timestep_spacing": "log"}, "timestep_spacing is 'log'"),
    ({"num_train_timesteps": 0}, "num_train_timesteps is 0"),
    ({"beta_end": 1.5}, "beta_end is 1.5"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas has shape"),
    ({"sample_max_value": 0}, "sample_max_value is 0"),
    ({"dynamic_thresholding_ratio": 2.0}, "dynamic_thresholding_ratio is 2.0"),
    ({"steps_offset": -1}, "steps_offset is -1"),
])
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


def test_misuse_is_named():
    x = torch.randn(SHAPE)
    with pytest.raises(ValueError, match="variance_type is 'none'"):
        DDPMScheduler(variance_type="none")
    ddpm, ddim = DDPMScheduler(), DDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        ddim.step(x, 3, x)
    for scheduler in (ddpm, ddim):
        with pytest.raises(ValueError, match="num_inference_steps is 1001"):
            scheduler.set_timesteps(1001)
        with pytest.raises(ValueError, match="one of them"):
            scheduler.set_timesteps(10, timesteps=[3, 2])
        with pytest.raises(ValueError, match="descending"):
            scheduler.set_timesteps(timesteps=[2, 3])
        with pytest.raises(ValueError, match="between 0 and 999"):
            scheduler.set_timesteps(timesteps=[1000, 3])
    ddpm.set_timesteps(10)
    with pytest.raises(ValueError, match="timestep is 17, it must be one of"):
        ddpm.step(x, 17, x)
    with pytest.raises(ValueError, match="timestep is 1000, it must lie between"):
        ddpm.add_noise(x, x, torch.tensor([1000, 3]))
    with pytest.raises(ValueError, match="both given"):
        ddpm.step(x, 100, x, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="model_output has shape"):
        DDPMScheduler(variance_type="learned_range").step(x, 100, x)
    with pytest.raises(ValueError, match="steps_offset is 5"):
        offset = DDPMScheduler(steps_offset=5)
        offset.set_timesteps(1000)
    with pytest.raises(TypeError, match="cannot be changed"):
        ddpm.config["clip_sample"] = False
    with pytest.warns(UserWarning, match="variance_type"):
        DDIMScheduler.from_config(ddpm.config)
