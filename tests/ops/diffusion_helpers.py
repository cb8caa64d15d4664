"""The diffusion family's formulas as papers and samplers write them, step by step with tables gathered per sample."""

import math

import torch
from tolerance import assert_no_worse_than_torch

from vlmfast.diffusion import Schedule

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SCHEDULE = Schedule.cosine(1000).respace("50")


def case(shape=(3, 2, 5, 7), dtype=torch.float32, *, guided=False, learned=True, seed=0):
    """(x, model output, noise) of moderate size."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows, channels):
        return torch.randn(rows, channels, *shape[2:], generator=generator, dtype=torch.float64).to(dtype)

    batch, channels = shape[:2]
    return draw(batch, channels), draw(batch * (2 if guided else 1), channels * (2 if learned else 1)), \
        draw(batch, channels)


def assert_close(ours, truth, same_dtype, *, factor=2.0, what="result"):
    """The tolerance rule; in float64, where the formula is no truth, 1e-11."""
    if ours.dtype == torch.float64:
        assert (ours - truth).norm() <= 1e-11 * truth.norm(), what
    else:
        assert_no_worse_than_torch(ours, truth, same_dtype.to(ours.dtype), factor=factor, what=what)


def take(values, t, x):
    """[T] float64 -> [B, 1, ...] in the dtype of x."""
    return torch.from_numpy(values)[t].to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


def formula(x, output, t, schedule, *, sampler="ancestral", eta=0.0, prediction="epsilon", variance="learned_range",
            guidance_scale=None, clamp=1.0, mask=None, image=None, mean_shift=None, history=(), noise=None):
    """(x before, x0, epsilon), everything in the dtype of x."""
    batch, channels = x.shape[:2]
    bar, before = (take(a, t, x) for a in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev))
    beta = take(schedule.betas, t, x)
    if guidance_scale is None:
        eps, values = output[:, :channels], output[:, channels:]
    else:
        given, without = output.chunk(2)
        eps = without[:, :channels] + guidance_scale * (given[:, :channels] - without[:, :channels])
        values = given[:, channels:]
    if prediction == "x0":
        x0 = eps
    elif prediction == "v":
        x0 = bar.sqrt() * x - (1 - bar).sqrt() * eps
    else:
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    seen = eps if prediction == "epsilon" else (x - bar.sqrt() * x0) / (1 - bar).sqrt()
    if sampler == "plms":
        weights = {0: [1], 1: [3 / 2, -1 / 2], 2: [23 / 12, -16 / 12, 5 / 12],
                   3: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}[len(history)]
        eps = sum(w * e for w, e in zip(weights, (seen, *history), strict=True))
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    if mask is not None:
        x0 = x0 * (1 - mask) + image * mask
    x0 = x0.clamp(-clamp, clamp) if clamp else x0
    later = (t > 0).to(x.dtype).view(bar.shape)
    if sampler == "ancestral":
        least = take(schedule.posterior_log_variance_clipped, t, x)
        largest = beta.log()
        if variance == "learned_range":
            share = (values + 1) / 2
            level = share * largest + (1 - share) * least
        elif variance == "learned":
            level = values
        else:
            level = least if variance == "fixed_small" else torch.where(later > 0, largest, least)
        mean = beta * before.sqrt() / (1 - bar) * x0 + (1 - before) * (1 - beta).sqrt() / (1 - bar) * x
        if mean_shift is not None:
            mean = mean + level.exp() * mean_shift
        return mean + later * (level / 2).exp() * noise, x0, seen
    eps = (x - bar.sqrt() * x0) / (1 - bar).sqrt()
    if mean_shift is not None:
        eps = eps - (1 - bar).sqrt() * mean_shift
        x0 = (x - (1 - bar).sqrt() * eps) / bar.sqrt()
    if sampler == "ddim_reverse":
        after = take(torch.tensor([*schedule.alphas_cumprod[1:], 0.0]).double().numpy(), t, x)
        return after.sqrt() * x0 + (1 - after).sqrt() * eps, x0, seen
    sigma = eta * ((1 - before) / (1 - bar)).sqrt() * (1 - bar / before).sqrt()
    then = before.sqrt() * x0 + (1 - before - sigma**2).clamp(min=0).sqrt() * eps
    return then if noise is None else then + later * sigma * noise, x0, seen


def loss_formula(output, noise, x0, t, schedule, *, prediction="epsilon", variance="learned_range"):
    """(mse [B], vb [B]) with the means of both distributions written out."""
    channels = x0.shape[1]
    bar, before, beta = (take(a, t, x0) for a in (schedule.alphas_cumprod, schedule.alphas_cumprod_prev,
                                                  schedule.betas))
    x = bar.sqrt() * x0 + (1 - bar).sqrt() * noise
    values, given = output[:, channels:], output[:, :channels]
    if prediction == "epsilon":
        target, estimate = noise, (x - (1 - bar).sqrt() * given) / bar.sqrt()
    elif prediction == "x0":
        target, estimate = x0, given
    else:
        target, estimate = bar.sqrt() * noise - (1 - bar).sqrt() * x0, bar.sqrt() * x - (1 - bar).sqrt() * given
    mse = (given - target).square().flatten(1).mean(1)
    if not values.shape[1]:
        return mse, torch.zeros_like(mse)
    least = take(schedule.posterior_log_variance_clipped, t, x0)
    share = (values + 1) / 2
    level = share * beta.log() + (1 - share) * least if variance == "learned_range" else values
    first, second = beta * before.sqrt() / (1 - bar), (1 - before) * (1 - beta).sqrt() / (1 - bar)
    mean, truth = (first * a + second * x for a in (estimate.detach(), x0))
    kl = (level - least - 1 + (least - level).exp() + (truth - mean).square() * (-level).exp()) / 2
    inverse = (-level / 2).exp()

    def cdf(a):
        return (1 + (math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)).tanh()) / 2

    upper, lower = cdf(inverse * (x0 - mean + 1 / 255)), cdf(inverse * (x0 - mean - 1 / 255))
    mass = torch.where(x0 < -0.999, upper, torch.where(x0 > 0.999, 1 - lower, upper - lower)).clamp(min=1e-12)
    bound = torch.where((t == 0).view(bar.shape), -mass.log(), kl)
    return mse, bound.flatten(1).mean(1) / math.log(2)
