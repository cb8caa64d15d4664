"""Steps, losses and schedules against numbers of glide-text2im and guided-diffusion."""

import numpy as np
import pytest
import torch

from vlmfast.diffusion import Schedule
from vlmfast.ops import denoise_step, diffusion_loss, q_sample

STEPS = {"steps_cosine_100": {"ddim.clip": 1e-3, "ddim.cond_fn": 1e-3, "ddim.denoised_fn": 2e-3},
         "steps_linear_fast27": {}}
LOSSES = {"loss_mse_vlb_linear": {"losses.vb": 5e-5, "grad.vb": 2e-4, "pred_xstart.clip_True": 2e-4},
          "loss_mse_vlb_cosine": {"grad.vb": 5e-4},
          "loss_rescaled_mse_respaced": {"grad.vb": 2e-4}}


def schedule_of(config) -> Schedule:
    kind = Schedule.linear if config["noise_schedule"] == "linear" else Schedule.cosine
    made = kind(config.get("diffusion_steps") or config["steps"])
    return made.respace(config["timestep_respacing"]) if config["timestep_respacing"] else made


@pytest.fixture(params=STEPS)
def steps(golden, request):
    _, inputs, outputs, metadata = golden(f"generative/glide_diffusion__{request.param}")
    return inputs, outputs, schedule_of(metadata["config"]), STEPS[request.param]


@pytest.fixture(params=LOSSES)
def losses(golden, request):
    _, inputs, outputs, metadata = golden(f"generative/guided_diffusion__{request.param}")
    return inputs, outputs, schedule_of(metadata["config"]), LOSSES[request.param]


def options_of(case, inputs):
    if case == "denoised_fn":
        return {"mask": inputs["known_mask"], "image": inputs["known"]}
    return {"noclip": {"clamp": False}, "cond_fn": {"mean_shift": inputs["cond_grad"]}, "clip": {}}[case]


@pytest.mark.parametrize("case", ["clip", "noclip", "denoised_fn", "cond_fn"])
def test_ancestral_steps(steps, golden_close, case):
    inputs, outputs, schedule, _ = steps
    found = denoise_step(inputs["x"], inputs["model_output"], inputs["t"], schedule, noise=inputs["noise"],
                         return_x0=True, **options_of(case, inputs))
    golden_close(found.x, outputs[f"p_sample.{case}.sample"])
    golden_close(found.x0, outputs[f"p_sample.{case}.pred_xstart"])


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("case", ["clip", "noclip", "denoised_fn", "cond_fn"])
def test_ddim_steps(steps, golden_close, case, eta):
    inputs, outputs, schedule, tolerances = steps
    found = denoise_step(inputs["x"], inputs["model_output"], inputs["t"], schedule, sampler="ddim", eta=eta,
                         noise=inputs["noise"], **options_of(case, inputs))
    golden_close(found, outputs[f"ddim.{case}.eta{eta}.sample"], tolerances.get(f"ddim.{case}", 2e-5))


def test_reversed_ddim_steps(steps, golden_close):
    inputs, outputs, schedule, _ = steps
    found = denoise_step(inputs["x"], inputs["model_output"], inputs["t"], schedule, sampler="ddim_reverse")
    golden_close(found, outputs["ddim_reverse.sample"])


def test_mean_and_variance_of_a_step(steps, golden_close):
    inputs, outputs, schedule, _ = steps
    x, out = inputs["x"].double(), inputs["model_output"].double()
    mean, shifted = (denoise_step(x, out, inputs["t"], schedule, noise=torch.full_like(x, z)) for z in (0.0, 1.0))
    golden_close(mean.float(), outputs["p_mean"])
    later = inputs["t"] > 0  # the first step has no noise to see the variance by
    golden_close(2 * (shifted - mean)[later].log().float(), outputs["p_log_variance"][later])
    level, slope = (torch.from_numpy(a)[inputs["t"]].view(-1, 1, 1, 1) for a in
                    schedule.log_variance_range("learned_range"))
    golden_close((level + slope * out[:, 3:]).float(), outputs["p_log_variance"])


def test_noising(steps, golden_close):
    inputs, outputs, schedule, _ = steps
    golden_close(q_sample(inputs["x_start"], inputs["t"], schedule, noise=inputs["noise"]), outputs["q_sample"])
    golden_close(q_sample(inputs["x_start"], inputs["t"], schedule, noise=torch.zeros_like(inputs["x_start"])),
                 outputs["q_mean"])
    golden_close(torch.from_numpy(np.log(1 - schedule.alphas_cumprod))[inputs["t"]].float(), outputs["q_log_variance"])


def test_posterior(steps, golden_close):
    inputs, outputs, schedule, _ = steps
    t = inputs["t"]
    mean = denoise_step(inputs["x"], inputs["x_start"], t, schedule, prediction="x0", variance="fixed_small",
                        clamp=False, noise=torch.zeros_like(inputs["x"]))
    golden_close(mean, outputs["q_posterior_mean"])
    golden_close(torch.from_numpy(schedule.posterior_variance)[t].float(), outputs["q_posterior_variance"])
    golden_close(torch.from_numpy(schedule.posterior_log_variance_clipped)[t].float(),
                 outputs["q_posterior_log_variance_clipped"])


def test_the_models_timesteps(steps):
    inputs, outputs, schedule, _ = steps
    assert torch.equal(schedule.model_timesteps(inputs["t"]), outputs["model_timesteps"])
    assert [schedule.model_timesteps(int(t)) for t in inputs["t"]] == outputs["model_timesteps"].tolist()


def test_training_losses(losses, golden_close):
    inputs, outputs, schedule, tolerances = losses
    out = inputs["model_output"].requires_grad_()
    rescale = "respaced" in next(name for name, value in LOSSES.items() if value is tolerances)
    found = diffusion_loss(out, inputs["noise"], inputs["x_start"], inputs["t"], schedule, rescale=rescale,
                           return_parts=True)
    golden_close(found.loss, outputs["losses.loss"])
    golden_close(found.mse, outputs["losses.mse"])
    # guided-diffusion reports the bound with its weight
    weight = schedule.num_timesteps / 1000 if rescale else 1.0
    golden_close(found.vb * weight, outputs["losses.vb"], tolerances.get("losses.vb", 2e-5))
    golden_close(found.vb, outputs["vb_terms_bpd.clip_False"], tolerances.get("losses.vb", 2e-5))
    of_loss, of_bound = (torch.autograd.grad(a.sum(), out, retain_graph=True)[0]
                         for a in (found.loss, found.vb * weight))
    golden_close(of_loss, outputs["grad.model_output.of_loss_sum"])
    golden_close(of_bound, outputs["grad.model_output.of_vb_sum"], tolerances["grad.vb"])


def test_estimates_in_training(losses, golden_close):
    inputs, outputs, schedule, tolerances = losses
    t, out = inputs["t"], inputs["model_output"]
    x_t = q_sample(inputs["x_start"], t, schedule, noise=inputs["noise"])
    golden_close(x_t, outputs["x_t"])
    for clamp in (True, False):
        x0 = denoise_step(outputs["x_t"], out, t, schedule, clamp=clamp, seed=0, return_x0=True).x0
        name = f"pred_xstart.clip_{clamp}"
        golden_close(x0, outputs[name], tolerances.get(name, 2e-5))
    posterior = denoise_step(outputs["x_t"], inputs["x_start"], t, schedule, prediction="x0", variance="fixed_small",
                             clamp=False, noise=torch.zeros_like(x_t))
    golden_close(posterior, outputs["q_posterior_mean"])
    assert torch.equal(schedule.model_timesteps(t), outputs["model_timesteps"])


@pytest.mark.parametrize("name", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("respacing", ["", "100", "fast27", "ddim50"])
def test_schedule_tables(golden, golden_close, name, respacing):
    _, _, outputs, _ = golden("generative/guided_diffusion__schedules_1000")
    schedule = (Schedule.linear if name == "linear" else Schedule.cosine)(1000)
    schedule = schedule.respace(respacing) if respacing else schedule
    prefix = f"{name}_1000." + (f"respace_{respacing}." if respacing else "")
    derived = {"sqrt_recip_alphas_cumprod": np.sqrt(1 / schedule.alphas_cumprod),
               "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / schedule.alphas_cumprod - 1)}
    checked = 0
    for key, wanted in outputs.items():
        table = key.removeprefix(prefix)
        if not key.startswith(prefix) or "." in table:
            continue
        found = torch.from_numpy(np.array(derived[table] if table in derived else getattr(schedule, table)))
        assert found.dtype == wanted.dtype
        if wanted.is_floating_point():
            golden_close(found, wanted, 1e-12)
        else:
            assert torch.equal(found, wanted), table
        checked += 1
    assert checked == (6 if respacing else 9)
