"""Steps of Gaussian diffusion: noising, denoising by any sampler, and the training loss, each in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_checks import draw_seed
from .attention_native import DTYPES
from .autograd import first_order
from .diffusion_call import denoise, loss_bwd, loss_fwd, parts, reference_noise, rows_of
from .diffusion_schedule import LEARNED, PREDICTIONS, SAMPLERS, VARIANCES, Schedule

# Adams-Bashforth: weights of this step's noise and of the earlier ones, for as many as there are
PLMS_WEIGHTS = (1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24)


class Denoised(NamedTuple):
    """x at the step before; x0 and epsilon as far as asked for, else None; all like the x given."""
    x: Tensor
    x0: Tensor | None
    epsilon: Tensor | None


class DiffusionLoss(NamedTuple):
    """loss [B], and its parts: mse [B] and vb [B], the variational bound in bits a dimension before its weight."""
    loss: Tensor
    mse: Tensor
    vb: Tensor


def denoise_step(x: Tensor, model_output: Tensor, t: int | Tensor, schedule: Schedule, *, sampler: str = "ancestral",
                 eta: float = 0.0, prediction: str = "epsilon", variance: str = "learned_range",
                 guidance_scale: float | None = None, clamp: bool | float = True,
                 dynamic_threshold: float | None = None, mask: Tensor | None = None, image: Tensor | None = None,
                 mean_shift: Tensor | None = None, history: tuple[Tensor, ...] = (),
                 use_clipped_model_output: bool = True, noise: Tensor | None = None, seed=None, offset: int = 0,
                 return_x0: bool = False, return_epsilon: bool = False) -> Tensor | Denoised:
    r"""x at the step before t: guidance, the estimate of x0, clamping, the sampler's mean, variance and noise at once.

    Equivalent for sampler "ancestral" to::

        output = unconditional + guidance_scale * (conditional - unconditional)
        x0 = (x - sqrt(1 - abar) * output) / sqrt(abar)                  # prediction "epsilon"
        x0 = x0 * (1 - mask) + image * mask
        x0 = x0.clamp(-1, 1)
        log_variance = f * log(beta) + (1 - f) * log(posterior variance),  f = (v + 1) / 2
        x = posterior mean(x0, x) + exp(log_variance) * mean_shift + (t > 0) * exp(log_variance / 2) * noise

    Args:
        x:  [B, C, ...] float32, bfloat16, float16 or float64.
        model_output:  [B, C, ...], or [2 B, C, ...] with guidance: with the prompt, then without. [.., 2 C, ...] where
            the variance is learned: its channels last, of which those with the prompt count.
        t:  step of the schedule, an int or int64 [B].
        schedule:  a `vlmfast.diffusion.Schedule`.
        sampler:  "ancestral" (DDPM); "ddim"; "ddim_reverse", from t to t + 1; "plms", DDIM with the noise extrapolated
            from `history`.
        eta:  of "ddim": 0 draws no noise, 1 as much as "ancestral".
        prediction:  what the model gives: "epsilon", "x0", or "v" = sqrt(abar) epsilon - sqrt(1 - abar) x0.
        variance:  of "ancestral": "learned_range" (between the posterior's and beta), "learned" (its logarithm),
            "fixed_small" (the posterior's) or "fixed_large" (beta). The others ignore the variance's channels.
        guidance_scale:  s above, or None without guidance.
        clamp:  x0 to [-1, 1], or to a bound given as a number; False leaves it.
        dynamic_threshold:  a share, such as 0.995: x0 is held within that quantile of |x0| of its sample, but at least
            1, and divided by it (Saharia et al. 2022, sec. 2.3). Takes the place of `clamp`, and a second pass.
        mask, image:  where mask, broadcasting to x, is 1, x0 is `image`, shaped like x.
        mean_shift:  shaped like x: the gradient of a classifier's log-probability with respect to x, times its scale.
        history:  of "plms": the `epsilon` of the up to three steps before, the latest first.
        use_clipped_model_output:  of "ddim" and "plms": the noise is worked out again from the clamped x0.
        noise:  shaped like x, used in place of the drawn one.
        seed:  an int or [] int64 tensor; None draws one number from torch's generator of the device.
        offset:  tells draws with the same seed apart, such as the number of the step.
        return_x0, return_epsilon:  whether those are wanted, too.

    Returns:
        x like the one given, or Denoised(x, x0, epsilon). Where a gradient is wanted, plain PyTorch runs.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be. A t on a GPU outside the schedule
            gives NaN instead.

    Source: GLIDE (Nichol et al. 2021, arXiv:2112.10741); the samplers' are in vlmfast/ops/diffusion_schedule.py.
    """
    op = "denoise_step"
    for name, value, choices in (("sampler", sampler, SAMPLERS), ("prediction", prediction, PREDICTIONS),
                                 ("variance", variance, VARIANCES)):
        if value not in choices:
            raise ValueError(f"{op}: {name} is {value!r}, it must be one of {', '.join(choices)}")
    _check_schedule(op, schedule)
    _check_samples(op, "x", x)
    t, step = _check_step(op, t, x, schedule)
    guided, learned = guidance_scale is not None, sampler == "ancestral" and variance in LEARNED
    out = _check_output(op, model_output, x, guided, learned, sampler != "ancestral")
    if guided and not math.isfinite(guidance_scale):
        raise ValueError(f"{op}: guidance_scale is {guidance_scale}, it must be finite or None")
    if not 0 <= eta <= 1:
        raise ValueError(f"{op}: eta is {eta}, it must lie between 0 and 1")
    if eta and sampler != "ddim":
        raise ValueError(f"{op}: eta is {eta} with sampler {sampler!r}, only \"ddim\" takes it")
    if len(history) > 3 or history and sampler != "plms":
        raise ValueError(f"{op}: history has {len(history)} entries with sampler {sampler!r}, only \"plms\" takes it, "
                         "and at most 3")
    flat = _lines(x)
    noise, image, mean_shift = (_like(op, name, a, x, flat) for name, a in
                                (("noise", noise), ("image", image), ("mean_shift", mean_shift)))
    history = [_like(op, "history", a, x, flat) for a in history]
    if (mask is None) != (image is None):
        missing = "mask" if mask is None else "image"
        raise ValueError(f"{op}: {missing} is missing, mask and image go together")
    mask = None if mask is None else _check_mask(op, mask, x)
    random = sampler == "ancestral" or eta > 0
    seed, offset = draw_seed(op, seed, x, random and noise is None), _check_offset(op, offset)
    table = schedule.table("step", sampler, prediction, variance, float(eta), bool(use_clipped_model_output),
                           device=x.device)
    weights = list(PLMS_WEIGHTS[len(history)]) if sampler == "plms" else []
    scale = float(guidance_scale) if guided else 1.0

    def run(bound, threshold, noise, seed, want_x, want_x0, want_e):
        extra = threshold, mask, image, mean_shift, history, weights
        inputs = [a for a in (x, model_output, noise, image, mean_shift, *history) if a is not None]
        if torch.is_grad_enabled() and any(a.requires_grad for a in inputs):
            from .reference import diffusion as reference

            return reference.denoise(flat, *parts(out, len(x), x.shape[1], guided, learned),
                                     rows_of(table, t, step, len(x)), scale, bound, *extra,
                                     reference_noise(flat, noise, seed, offset))
        return denoise(flat, out, t, step, table, scale, guided, learned, bound, *extra, noise, seed, offset, want_x,
                       want_x0, want_e)

    threshold = None
    if dynamic_threshold is not None:
        if not 0 < dynamic_threshold <= 1:
            raise ValueError(f"{op}: dynamic_threshold is {dynamic_threshold}, it must be above 0 and at most 1")
        x0 = run(math.inf, None, None, None, False, True, False)[1]
        threshold = _quantile(x0, dynamic_threshold).clamp(min=1.0)
    found = run(_bound(op, clamp), threshold, noise if random else None, seed, True, return_x0, return_epsilon)
    then, x0, epsilon = (a.view(x.shape) if a.numel() == x.numel() else None for a in found)
    if not (return_x0 or return_epsilon):
        return then
    return Denoised(then, x0 if return_x0 else None, epsilon if return_epsilon else None)


def q_sample(x0: Tensor, t: int | Tensor, schedule: Schedule, *, noise: Tensor | None = None, seed=None,
             offset: int = 0) -> Tensor:
    """sqrt(abar_t) x0 + sqrt(1 - abar_t) noise: x0 with the noise of step t.

    Args:
        x0:  [B, C, ...] float32, bfloat16, float16 or float64.
        t:  step of the schedule, an int or int64 [B].
        noise:  shaped like x0; None draws it from seed and offset as `denoise_step` does.

    Returns:
        like x0.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Ho et al. 2020 (arXiv:2006.11239), eq. 4.
    """
    op = "q_sample"
    _check_schedule(op, schedule)
    _check_samples(op, "x0", x0)
    t, step = _check_step(op, t, x0, schedule)
    flat = _lines(x0)
    noise = _like(op, "noise", noise, x0, flat)
    seed, offset = draw_seed(op, seed, x0, noise is None), _check_offset(op, offset)
    table = schedule.table("noising", device=x0.device)
    if torch.is_grad_enabled() and (x0.requires_grad or noise is not None and noise.requires_grad):
        from .reference import diffusion as reference

        found = reference.denoise(flat, None, None, None, rows_of(table, t, step, len(x0)), 1.0, math.inf, None, None,
                                  None, None, [], (), reference_noise(flat, noise, seed, offset))
    else:
        found = denoise(flat, None, t, step, table, 1.0, False, False, math.inf, None, None, None, None, [], [], noise,
                        seed, offset, True, False, False)
    return found[0].view(x0.shape)


def diffusion_noise(shape, seed, offset: int = 0, *, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
    """The very noise that `denoise_step` and `q_sample` draw with this seed and offset.

    Args:
        shape:  [B, C, ...].
        seed:  an int or [] int64 tensor.

    Returns:
        Draws of N(0, 1), none beyond 6.8. Those of a sample depend on its number in the batch, not on the batch's size.
        Which word of Philox's stream an element takes: vlmfast/ops/reference/diffusion.py.
    """
    op = "diffusion_noise"
    shape = torch.Size(shape)
    if not shape:
        raise ValueError(f"{op}: shape is empty, it must be [B, ...]")
    wide = torch.promote_types(dtype, torch.float32)
    seed = draw_seed(op, seed, torch.empty(0, device=device), True)
    nothing = torch.zeros(shape, dtype=wide, device=seed.device)
    flat = nothing.view(shape[0], 1, shape[1:].numel())
    table = _UNIT.table("noising", device=seed.device)
    return denoise(flat, None, None, 0, table, 1.0, False, False, math.inf, None, None, None, None, [], [], None, seed,
                   _check_offset(op, offset), True, False, False)[0].view(shape).to(dtype)


def diffusion_loss(model_output: Tensor, noise: Tensor, x0: Tensor, t: int | Tensor, schedule: Schedule, *,
                   prediction: str = "epsilon", variance: str = "learned_range", rescale: bool = False,
                   return_parts: bool = False) -> Tensor | DiffusionLoss:
    r"""The hybrid loss of a diffusion model whose input was q_sample(x0, t, noise), one for each sample.

    Equivalent to::

        mse = (output - target).square().mean()                          # target: noise, for prediction "epsilon"
        vb = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)).mean() / log(2)  # at t = 0: -log p(x0 | x_1), 256 grey levels
        loss = mse + vb * (T / 1000 if rescale else 1)

    where the bound's gradient reaches the variance alone. With a fixed variance the loss is mse.

    Args:
        model_output:  [B, C, ...], or [B, 2 C, ...] with the variance's channels last where it is learned; float32,
            bfloat16, float16 or float64.
        noise, x0:  [B, C, ...].
        t:  step of the schedule, an int or int64 [B].
        prediction, variance:  as in `denoise_step`.
        rescale:  weight of the bound for respaced schedules (guided-diffusion's RESCALED_MSE).
        return_parts:  whether mse and vb are wanted, too.

    Returns:
        [B] float32 (float64 for float64), or DiffusionLoss(loss, mse, vb). Gradients reach model_output.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 14-16; Ho et al. 2020 (arXiv:2006.11239), eq. 13.
    """
    op = "diffusion_loss"
    for name, value, choices in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
        if value not in choices:
            raise ValueError(f"{op}: {name} is {value!r}, it must be one of {', '.join(choices)}")
    _check_schedule(op, schedule)
    _check_samples(op, "x0", x0)
    t, step = _check_step(op, t, x0, schedule)
    learned = variance in LEARNED
    out = _check_output(op, model_output, x0, False, learned, False)
    flat = _lines(x0)
    noise = _like(op, "noise", noise, x0, flat, required=True)
    if torch.is_grad_enabled() and (noise.requires_grad or flat.requires_grad):
        raise ValueError(f"{op}: noise or x0 wants a gradient, which is not implemented; detach it")
    table = schedule.table("loss", prediction, variance, device=x0.device)
    mse, vb = _Loss.apply(out, noise, flat, t, step, table, learned)
    loss = mse + vb * (schedule.num_timesteps / 1000 if rescale else 1.0) if learned else mse
    return DiffusionLoss(loss, mse, vb) if return_parts else loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, noise, x0, t, step, table, learned):
        ctx.save_for_backward(out, noise, x0, t, table)
        ctx.settings = step, learned
        return loss_fwd(out, noise, x0, t, step, table, learned)

    @staticmethod
    @first_order("diffusion_loss")
    def backward(ctx, d_mse, d_vb):
        out, noise, x0, t, table = ctx.saved_tensors
        step, learned = ctx.settings
        return loss_bwd(d_mse, d_vb, out, noise, x0, t, step, table, learned), None, None, None, None, None, None


# abar is 0 at its only step: nothing of x, all of the noise
_UNIT = Schedule.from_betas([1.0])


def _lines(x: Tensor) -> Tensor:
    """[B, C, ...] -> [B, C, S] contiguous."""
    return x.contiguous().flatten(2) if x.ndim > 2 else x.contiguous().unsqueeze(-1)


def _bound(op: str, clamp) -> float:
    if clamp is True or clamp is False:
        return 1.0 if clamp else math.inf
    if not isinstance(clamp, int | float) or not clamp > 0:
        raise ValueError(f"{op}: clamp is {clamp!r}, it must be True, False or a bound above 0")
    return float(clamp)


def _quantile(x0: Tensor, share: float) -> Tensor:
    """[B], of |x0|, interpolated; by sorting, since torch.quantile takes at most 2^24 elements."""
    if not x0.numel():
        return x0.new_ones(len(x0))
    values = x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32)).sort(1).values
    place = share * (values.shape[1] - 1)
    low = int(place)
    high = min(low + 1, values.shape[1] - 1)
    return torch.lerp(values[:, low], values[:, high], place - low)


def _check_schedule(op: str, schedule) -> None:
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{op}: schedule is a {type(schedule).__name__}, it must be a vlmfast.diffusion.Schedule")


def _check_offset(op: str, offset) -> int:
    if type(offset) is not int or not 0 <= offset < 2**32:
        raise ValueError(f"{op}: offset is {offset!r}, it must be an integer from 0 to 2^32 - 1")
    return offset


def _check_samples(op: str, name: str, x) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a float32, float64, bfloat16 or float16 tensor")
    if x.ndim < 2:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be [B, C, ...]")


def _check_step(op: str, t, x: Tensor, schedule: Schedule) -> tuple[Tensor | None, int]:
    """(int64 [B], 0) or (None, the step of every sample)."""
    if isinstance(t, Tensor):
        if t.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{op}: t is {t.dtype}, it must be int64")
        if t.ndim > 1 or t.numel() not in (1, len(x)):
            raise ValueError(f"{op}: t has shape {tuple(t.shape)}, it must be [{len(x)}]")
        if t.device != x.device:
            raise ValueError(f"{op}: t is on {t.device}, it must be on {x.device}")
        return t.long().reshape(-1).expand(len(x)).contiguous(), 0
    if not isinstance(t, int) or isinstance(t, bool):
        raise TypeError(f"{op}: t is a {type(t).__name__}, it must be an int or an int64 tensor")
    if not 0 <= t < len(schedule):
        raise ValueError(f"{op}: t is {t}, it must lie between 0 and {len(schedule) - 1}, the schedule's steps")
    return None, t


def _check_output(op: str, out, x: Tensor, guided: bool, learned: bool, either: bool) -> Tensor:
    """[B or 2 B, C or 2 C, S], contiguous within a channel and from channel to channel."""
    if not isinstance(out, Tensor) or out.dtype not in DTYPES:
        kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{op}: model_output is {kind}, it must be a float32, float64, bfloat16 or float16 tensor")
    batch, channels = x.shape[:2]
    rows = batch * (2 if guided else 1)
    counts = (channels, 2 * channels) if either else (channels * (2 if learned else 1),)
    if out.ndim != x.ndim or out.shape[0] != rows or out.shape[2:] != x.shape[2:] or out.shape[1] not in counts:
        why = f"{' or '.join(map(str, counts))} channels" + (" of noise and variance" if learned else "")
        why += " and the rows with the prompt before those without" if guided else ""
        shape = [rows, counts[-1], *x.shape[2:]]
        raise ValueError(f"{op}: model_output has shape {tuple(out.shape)}, it must be {shape}: {why}")
    if out.device != x.device:
        raise ValueError(f"{op}: model_output is on {out.device}, it must be on {x.device}")
    size = x.shape[2:].numel()
    flat = out.flatten(2) if out.ndim > 2 else out.unsqueeze(-1)
    # a channel's elements and the channels of a sample follow each other
    dense = (size <= 1 or flat.stride(2) == 1) and (flat.shape[1] <= 1 or flat.stride(1) == max(size, 1))
    return flat if dense else flat.contiguous()


def _like(op: str, name: str, a, x: Tensor, flat: Tensor, required: bool = False) -> Tensor | None:
    if a is None and not required:
        return None
    if not isinstance(a, Tensor) or not a.is_floating_point():
        kind = a.dtype if isinstance(a, Tensor) else type(a).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a floating-point tensor")
    if a.shape != x.shape or a.device != x.device:
        raise ValueError(f"{op}: {name} has shape {tuple(a.shape)} on {a.device}, it must be {tuple(x.shape)} on "
                         f"{x.device}")
    return a.contiguous().view(flat.shape)


def _check_mask(op: str, mask, x: Tensor) -> Tensor:
    """[B or 1, C or 1, S], contiguous within a channel."""
    if not isinstance(mask, Tensor) or mask.is_complex():
        raise TypeError(f"{op}: mask is a {type(mask).__name__}, it must be a tensor, 1 where `image` stays")
    fits = mask.ndim == x.ndim and mask.shape[2:] == x.shape[2:] and mask.shape[0] in (1, len(x)) \
        and mask.shape[1] in (1, x.shape[1])
    if not fits or mask.device != x.device:
        raise ValueError(f"{op}: mask has shape {tuple(mask.shape)} on {mask.device}, it must be "
                         f"{[len(x), 1, *x.shape[2:]]} or {list(x.shape)} on {x.device}")
    mask = mask if mask.is_floating_point() else mask.to(torch.promote_types(x.dtype, torch.float32))
    return _lines(mask)
