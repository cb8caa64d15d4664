"""What users run instead of the fused diffusion ops: GLIDE's and guided-diffusion's arithmetic with its costs, formulas
of as few operations as they need, and diffusers' schedulers.

Samples are [B, C, H, W]; a model's output has the variance's channels last and, with guidance, the rows with the prompt
first. Every table here is its own, in float64.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import torch
from torch import Tensor

SCALE = 3.0  # of guidance
STEPS = {"100": 100, "ddim50": 50, "1000": 1000}


@dataclass(frozen=True, eq=False)
class Tables:
    """The cosine schedule of 1000 steps, of which `kept` remain."""

    kept: np.ndarray
    betas: np.ndarray

    def __post_init__(self):
        bar = np.cumprod(1.0 - self.betas)
        before = np.append(1.0, bar[:-1])
        variance = self.betas * (1.0 - before) / (1.0 - bar)
        for name, table in {
                "alphas_cumprod": bar, "alphas_cumprod_prev": before, "posterior_variance": variance,
                "sqrt_alphas_cumprod": np.sqrt(bar), "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - bar),
                "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / bar),
                "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / bar - 1.0),
                "posterior_log_variance_clipped": np.log(np.append(variance[1], variance[1:])),
                "posterior_mean_coef1": self.betas * np.sqrt(before) / (1.0 - bar),
                "posterior_mean_coef2": (1.0 - before) * np.sqrt(1.0 - self.betas) / (1.0 - bar)}.items():
            object.__setattr__(self, name, table)


@functools.cache
def tables(spacing: str) -> Tables:
    level = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    bar = np.cumprod(1.0 - np.minimum(1.0 - level[1:] / level[:-1], 0.999))
    kept = np.arange(0, 1000, 20) if spacing == "ddim50" else np.array(
        [round(i * 999 / (STEPS[spacing] - 1)) for i in range(STEPS[spacing])])
    bar = bar[kept]
    return Tables(kept, 1.0 - bar / np.append(1.0, bar[:-1]))


# GLIDE and guided-diffusion: a table goes to the device for each use of it, and becomes as large as the samples


def extract(array: np.ndarray, t: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    found = torch.from_numpy(array).to(t.device)[t].to(dtype)
    return found.view(-1, *[1] * (len(shape) - 1)) + torch.zeros(shape, dtype=dtype, device=t.device)


def posterior(known: Tables, x0: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x0)."""
    mean = extract(known.posterior_mean_coef1, t, x.shape, x.dtype) * x0 \
        + extract(known.posterior_mean_coef2, t, x.shape, x.dtype) * x
    return (mean, extract(known.posterior_variance, t, x.shape, x.dtype),
            extract(known.posterior_log_variance_clipped, t, x.shape, x.dtype))


def model_distribution(known: Tables, out: Tensor, x: Tensor, t: Tensor, clip: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and log-variance of p(x_{t-1} | x_t)."""
    eps, values = torch.split(out, x.shape[1], dim=1)
    least = extract(known.posterior_log_variance_clipped, t, x.shape, x.dtype)
    largest = extract(np.log(known.betas), t, x.shape, x.dtype)
    share = (values + 1) / 2
    log_variance = share * largest + (1 - share) * least
    variance = torch.exp(log_variance)
    x0 = extract(known.sqrt_recip_alphas_cumprod, t, x.shape, x.dtype) * x \
        - extract(known.sqrt_recipm1_alphas_cumprod, t, x.shape, x.dtype) * eps
    mean, _, _ = posterior(known, x0.clamp(-1, 1) if clip else x0, x, t)
    return mean, variance, log_variance


def sampler_step(x: Tensor, out: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
    """GLIDE's: both halves of the batch take the guided step, and the first is kept."""
    known = tables("100")
    x, t = torch.cat([x, x]), torch.cat([t, t])
    eps, rest = out[:, :x.shape[1]], out[:, x.shape[1]:]
    given, without = torch.split(eps, len(eps) // 2, dim=0)
    guided = without + SCALE * (given - without)
    mean, _, log_variance = model_distribution(known, torch.cat([torch.cat([guided, guided]), rest], 1), x, t, True)
    noise = torch.randn_like(x) if noise is None else torch.cat([noise, noise])
    later = (t != 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    then = mean + later * torch.exp(0.5 * log_variance) * noise
    return then[:len(x) // 2]


def noised(x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    known = tables("1000")
    return extract(known.sqrt_alphas_cumprod, t, x0.shape, x0.dtype) * x0 \
        + extract(known.sqrt_one_minus_alphas_cumprod, t, x0.shape, x0.dtype) * noise


def normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def log_likelihood(x: Tensor, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """Of the grey level x, of 255 between -1 and 1."""
    centred, inverse = x - mean, torch.exp(-log_deviation)
    above, below = normal_cdf(inverse * (centred + 1 / 255)), normal_cdf(inverse * (centred - 1 / 255))
    lowest, highest = torch.log(above.clamp(min=1e-12)), torch.log((1.0 - below).clamp(min=1e-12))
    return torch.where(x < -0.999, lowest,
                       torch.where(x > 0.999, highest, torch.log((above - below).clamp(min=1e-12))))


def training_loss(out: Tensor, noise: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """guided-diffusion's MSE with learned variances."""
    known = tables("1000")
    eps, values = torch.split(out, x.shape[1], dim=1)
    frozen = torch.cat([eps.detach(), values], dim=1)
    true_mean, _, true_log_variance = posterior(known, x0, x, t)
    mean, _, log_variance = model_distribution(known, frozen, x, t, False)
    kl = 0.5 * (-1.0 + log_variance - true_log_variance + torch.exp(true_log_variance - log_variance)
                + (true_mean - mean) ** 2 * torch.exp(-log_variance))
    kl = kl.mean((1, 2, 3)) / np.log(2.0)
    nll = -log_likelihood(x0, mean, 0.5 * log_variance).mean((1, 2, 3)) / np.log(2.0)
    return ((noise - eps) ** 2).mean((1, 2, 3)) + torch.where(t == 0, nll, kl)


# As few operations as the formulas need, on tables that stay on the device


def compiler(formula: Callable) -> Callable:
    return torch.compile(formula, fullgraph=True, dynamic=False)


def resident(columns: np.ndarray, device: str) -> Tensor:
    return torch.from_numpy(columns).to(device, torch.float32)


@functools.cache
def step_columns(op: str) -> np.ndarray:
    """[steps, 7]: of x and the noise in x0; of x0 and of x or the noise in the mean; half the log-variance as a
    constant and for each unit of the model's; whether there is noise."""
    known = tables("ddim50" if op == "ddim" else "100")
    nothing = np.zeros(len(known.betas))
    least, largest = known.posterior_log_variance_clipped, np.log(known.betas)
    mean = (np.sqrt(known.alphas_cumprod_prev), np.sqrt(1 - known.alphas_cumprod_prev)) if op == "ddim" else (
        known.posterior_mean_coef1, known.posterior_mean_coef2)
    return np.stack([known.sqrt_recip_alphas_cumprod, known.sqrt_recipm1_alphas_cumprod, *mean, (least + largest) / 4,
                     (largest - least) / 4, np.append(nothing[:1], nothing[1:] + 1)], 1)


def predicted(x: Tensor, out: Tensor, guided: bool) -> tuple[Tensor, Tensor]:
    """(noise, the model's variance), views where there is nothing to combine."""
    given, channels = out[:len(x)], x.shape[1]
    eps = torch.lerp(out[len(x):, :channels], given[:, :channels], SCALE) if guided else given[:, :channels]
    return eps, given[:, channels:]


def lean_step(op: str) -> Callable[..., Tensor]:
    """In place where it can be, with numbers of Python for the coefficients: all samples are at one step."""
    def run(x: Tensor, out: Tensor, t: int, noise: Tensor | None) -> Tensor:
        from_x, from_eps, from_x0, last, level, slope, noisy = step_columns(op)[t].tolist()
        eps, values = predicted(x, out, op in ("guided_ancestral", "given_noise"))
        x0 = torch.mul(x, from_x).sub_(eps, alpha=from_eps).clamp_(-1, 1)
        if op == "ddim":
            return x0.mul_(from_x0).add_(eps, alpha=last)
        mean = x0.mul_(from_x0).add_(x, alpha=last)
        if not noisy:
            return mean
        noise = torch.randn_like(x) if noise is None else noise
        return mean.addcmul_(torch.mul(values, slope).add_(level).exp_(), noise)

    return run


def compiled_step(op: str, device: str) -> Callable[..., Tensor]:
    """One graph for all steps; its noise comes from torch.randn_like, which is faster than what the compiler makes."""
    def formula(x: Tensor, out: Tensor, t: Tensor, table: Tensor, noise: Tensor | None) -> Tensor:
        columns = (column[:, None, None, None] for column in table[t].unbind(1))
        from_x, from_eps, from_x0, last, level, slope, noisy = columns
        eps, values = predicted(x, out, op in ("guided_ancestral", "given_noise"))
        x0 = (from_x * x - from_eps * eps).clamp(-1, 1)
        if op == "ddim":
            return from_x0 * x0 + last * eps
        return from_x0 * x0 + last * x + noisy * torch.exp(level + slope * values) * noise

    compiled, table = compiler(formula), resident(step_columns(op), device)

    def run(x: Tensor, out: Tensor, t: Tensor, noise: Tensor | None) -> Tensor:
        return compiled(x, out, t, table, torch.randn_like(x) if noise is None and op != "ddim" else noise)

    return run


def noising_by(wrap: Callable, device: str) -> Callable[..., Tensor]:
    """`wrap` compiles, or leaves the formula as it is."""
    known = tables("1000")
    table = resident(np.stack([known.sqrt_alphas_cumprod, known.sqrt_one_minus_alphas_cumprod], 1), device)

    def formula(x0: Tensor, t: Tensor, table: Tensor, noise: Tensor) -> Tensor:
        signal, spread = (column[:, None, None, None] for column in table[t].unbind(1))
        return signal * x0 + spread * noise

    wrapped = wrap(formula)
    return lambda x0, t, noise: wrapped(x0, t, table, noise)


@functools.cache
def loss_columns() -> np.ndarray:
    """[steps, 5]: weight of the squared error in the divergence; log-variance above the posterior's, as a constant and
    for each unit of the model's; error of x0 for each unit of that of the noise; the posterior's log-variance."""
    known = tables("1000")
    least, largest = known.posterior_log_variance_clipped, np.log(known.betas)
    ratio = known.sqrt_recipm1_alphas_cumprod
    return np.stack([(known.posterior_mean_coef1 * ratio) ** 2 * np.exp(-least), (largest - least) / 2,
                     (largest - least) / 2, ratio, least], 1)


def divergence_loss(out: Tensor, noise: Tensor, x0: Tensor, t: Tensor, table: Tensor) -> Tensor:
    """The closed form where no sample is at the first step."""
    weight, spread, slope, _, _ = (column[:, None, None, None] for column in table[t].unbind(1))
    eps, values = torch.split(out, x0.shape[1], dim=1)
    square = (eps - noise) ** 2
    u = spread + slope * values
    each = 0.5 * (u - 1 + torch.exp(-u) * (1 + weight * square.detach()))
    return square.mean((1, 2, 3)) + each.mean((1, 2, 3)) / math.log(2.0)


def closed_loss(out: Tensor, noise: Tensor, x0: Tensor, t: Tensor, table: Tensor) -> Tensor:
    _, spread, slope, ratio, least = (column[:, None, None, None] for column in table[t].unbind(1))
    eps, values = torch.split(out, x0.shape[1], dim=1)
    d = eps - noise
    # at the first step the mean is the estimate of x0
    nll = -log_likelihood(x0, x0 - ratio * d.detach(), 0.5 * (spread + slope * values + least))
    first = (d**2).mean((1, 2, 3)) + nll.mean((1, 2, 3)) / math.log(2.0)
    return torch.where(t == 0, first, divergence_loss(out, noise, x0, t, table))


def loss_by(wrap: Callable, device: str) -> Callable[..., Tensor]:
    """`wrap` compiles, or leaves a formula as it is. Where no sample is at the first step, there is no likelihood."""
    plain, whole, table = wrap(divergence_loss), wrap(closed_loss), resident(loss_columns(), device)

    def run(out: Tensor, noise: Tensor, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return (whole if bool((t == 0).any()) else plain)(out, noise, x0, t, table)

    return run


# diffusers


@functools.cache
def diffusers_missing() -> str | None:
    """Why diffusers' schedulers cannot run, or None."""
    if importlib.util.find_spec("diffusers") is None:
        return "not installed"
    try:
        importlib.import_module("diffusers").DDIMScheduler  # noqa: B018  its modules are loaded when they are named
    except Exception as error:  # what it needs in turn may be missing, old or broken
        lines = str(error).strip().splitlines()
        return f"not installed so that it can be imported: {lines[0][:120] if lines else type(error).__name__}"
    return None


def scheduler_step(op: str) -> Callable[..., Tensor]:
    """`step` of DDIMScheduler or DDPMScheduler, called as a pipeline does; in the default way, in which DDIM keeps the
    noise of an estimate that was clamped."""
    import diffusers

    kept = tables("ddim50" if op == "ddim" else "100").kept
    common = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    if op == "ddim":
        scheduler = diffusers.DDIMScheduler(**common, timestep_spacing="leading")
        scheduler.set_timesteps(len(kept))
    else:
        scheduler = diffusers.DDPMScheduler(**common, variance_type="learned_range")
        scheduler.set_timesteps(timesteps=[int(step) for step in kept[::-1]])
    place = importlib.import_module(type(scheduler).__module__)

    def run(x: Tensor, out: Tensor, t: int, noise: Tensor | None) -> Tensor:
        timestep = scheduler.timesteps[len(kept) - 1 - t]
        if noise is None:
            return scheduler.step(out, timestep, x).prev_sample
        with mock.patch.object(place, "randn_tensor", lambda *shape, **options: noise):
            return scheduler.step(out, timestep, x).prev_sample

    return run
