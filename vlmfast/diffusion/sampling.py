"""Sampling loops over a model function: from noise to pictures, or with "ddim_reverse" from pictures to noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention_checks import draw_seed
from ..ops.diffusion import denoise_step, diffusion_noise
from ..ops.diffusion_schedule import SAMPLERS, Schedule


class SamplingStep(NamedTuple):
    """A step that was taken: its number from 0, t in the schedule, x after it and the estimate of x0 in it."""
    number: int
    t: int
    x: Tensor
    x0: Tensor


class Recorder:
    """A `callback` of `sample` that keeps estimates of x0 for an animation, the last among them.

    Args:
        steps:  of the schedule.
        frames:  how many to keep, evenly over the steps.
    """

    def __init__(self, steps: int, frames: int = 24):
        if frames < 1:
            raise ValueError(f"Recorder: frames is {frames}, it must be at least 1")
        count = min(frames, steps)
        self._kept = {steps - 1 - round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)}
        self._runs: list[list[Tensor]] = []

    def __call__(self, step: SamplingStep) -> None:
        if step.number == 0:
            self._runs.append([])
        if step.number in self._kept:
            self._runs[-1].append(((step.x0.float() + 1) / 2).clamp(0, 1).cpu())

    @property
    def frames(self) -> list[Tensor]:
        """Each [B, 3, H, W] in [0, 1] on the CPU, those of several calls of `sample` in one batch."""
        return [torch.cat(parts) for parts in zip(*self._runs, strict=True)]


@torch.no_grad()
def sample(model: Callable[[Tensor, Tensor], Tensor], x_T: Tensor | Sequence[int], schedule: Schedule, *,
           sampler: str = "ancestral", eta: float = 0.0, prediction: str = "epsilon", variance: str = "learned_range",
           guidance_scale: float | None = None, clamp: bool | float = True, dynamic_threshold: float | None = None,
           mask: Tensor | None = None, image: Tensor | None = None,
           cond_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
           noise: Callable[[int], Tensor] | None = None, seed=None, offset: int = 0, device=None,
           progress: bool = True, desc: str = "sampling",
           callback: Callable[[SamplingStep], object] | None = None) -> Tensor:
    """Takes every step of a schedule; on a GPU without waiting for it.

    Args:
        model:  (x, timesteps) -> output as `denoise_step` takes it. timesteps is int64 [rows], those of the schedule
            that the model was trained on. With guidance, x comes twice over, for rows with the prompt and rows without.
        x_T:  [B, C, ...] noise (pictures for "ddim_reverse"), or its shape.
        schedule, sampler, eta, prediction, variance, guidance_scale, clamp, dynamic_threshold:  see `denoise_step`.
        mask, image:  what stays, see `denoise_step`.
        cond_fn:  (x, timesteps) -> gradient of a log-probability with respect to x, times its scale; called with
            gradients enabled and x [B, ...] once. CLIP guidance: `NoisedCLIP.cond_fn`.
        noise:  number of the step from 0 -> the noise of that step, shaped like x; in place of drawn noise.
        seed:  of the noise, an int or [] int64 tensor; None draws one from torch's generator. A picture depends on
            the seed, the offset and its place in the batch.
        offset:  tells loops of the same seed apart: x_T is drawn with it, step k with offset + k + 1.
        device:  of x_T given as a shape.
        progress, desc:  whether there is a progress bar, and what it says.
        callback:  called after every step, such as a `Recorder`.

    Returns:
        [B, C, ...] like x_T: pictures in [-1, 1], as far as `clamp` holds them there.

    Raises:
        TypeError, ValueError: those of `denoise_step`.
    """
    from tqdm.auto import tqdm

    if sampler not in SAMPLERS:
        raise ValueError(f"sample: sampler is {sampler!r}, it must be one of {', '.join(SAMPLERS)}")
    if not isinstance(schedule, Schedule):
        raise TypeError(f"sample: schedule is a {type(schedule).__name__}, it must be a vlmfast.diffusion.Schedule")
    if isinstance(x_T, Tensor):
        x, seed = x_T, draw_seed("sample", seed, x_T, noise is None)
    else:
        seed = draw_seed("sample", seed, torch.empty(0, device=device), True)
        x = diffusion_noise(x_T, seed, offset, device=device)
    copies = 1 if guidance_scale is None else 2
    order = range(len(schedule)) if sampler == "ddim_reverse" else range(len(schedule) - 1, -1, -1)
    history: tuple[Tensor, ...] = ()
    for number, t in enumerate(tqdm(order, desc=desc, unit="step", disable=not progress)):
        timesteps = torch.full((copies * len(x),), schedule.model_timesteps(t), dtype=torch.int64, device=x.device)
        output = model(torch.cat([x, x]) if copies == 2 else x, timesteps)
        shift = None
        if cond_fn is not None:
            with torch.enable_grad():
                shift = cond_fn(x, timesteps[:len(x)]).detach()
        found = denoise_step(
            x, output, t, schedule, sampler=sampler, eta=eta, prediction=prediction, variance=variance,
            guidance_scale=guidance_scale, clamp=clamp, dynamic_threshold=dynamic_threshold, mask=mask, image=image,
            mean_shift=shift, history=history, noise=None if noise is None else noise(number), seed=seed,
            offset=offset + number + 1, return_x0=True, return_epsilon=sampler == "plms")
        x = found.x
        if sampler == "plms":
            history = (found.epsilon, *history[:2])
        if callback is not None:
            callback(SamplingStep(number, t, x, found.x0))
    return x
