"""DDPMScheduler and DDIMScheduler with the arguments, methods and results of diffusers', each step one fused op.

A step takes the row of its training timestep from one table, made by `set_timesteps`; where the sampler goes from there
is worked into the row. So nothing waits for a GPU, whether timesteps are ints or tensors on it. The tables are computed
in float64, where diffusers' are in float32.

Papers: Ho et al. 2020 (arXiv:2006.11239); Song et al. 2021 (arXiv:2010.02502); Lin et al. 2024 (arXiv:2305.08891) for
timestep spacings and the zero terminal signal-to-noise ratio; Saharia et al. 2022 (arXiv:2205.11487) for thresholding.
"""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..ops.diffusion import denoise_step, q_sample
from ..ops.diffusion_schedule import Schedule

BETA_SCHEDULES = "linear", "scaled_linear", "squaredcos_cap_v2"
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
SPACINGS = "leading", "trailing", "linspace"
# diffusers' logarithms of fixed variances mean the same variances
VARIANCES = {"fixed_small": "fixed_small", "fixed_small_log": "fixed_small", "fixed_large": "fixed_large",
             "fixed_large_log": "fixed_large", "learned": "learned", "learned_range": "learned_range"}


class SchedulerOutput(NamedTuple):
    """prev_sample: the sample one step on; pred_original_sample: the estimate of x0; both like the sample given."""
    prev_sample: Tensor
    pred_original_sample: Tensor


class SchedulerConfig(dict):
    """The arguments of a scheduler, read as attributes or items."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no {name!r}") from None

    def _frozen(self, *_, **__):
        raise TypeError("a scheduler's config cannot be changed; make another with from_config")

    __setattr__ = __setitem__ = __delitem__ = update = pop = popitem = setdefault = clear = _frozen


@dataclass(frozen=True, eq=False)
class TrainingSteps(Schedule):
    """A step for every training timestep, each to an abar of its own.

    Args:
        levels:  [T] abar of the training timesteps.
        targets:  [T] abar that the step from each of them goes to; NaN where no step starts.
    """

    levels: np.ndarray = None
    targets: np.ndarray = None

    @classmethod
    def to(cls, levels: np.ndarray, targets: np.ndarray) -> TrainingSteps:
        return cls(1 - levels / targets, np.arange(len(levels)), len(levels), levels=levels, targets=targets)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return self.levels

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return self.targets

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        return np.log(np.maximum(self.posterior_variance, 1e-20))


class _Scheduler:
    order = 1
    init_noise_sigma = 1.0

    def __init__(self, arguments: dict):
        self._name = type(self).__name__
        self.config = SchedulerConfig(arguments)
        _check_config(self._name, self.config)
        betas = _betas(self._name, self.config)
        self._levels = np.cumprod(1 - betas)
        self.betas, self.alphas, self.alphas_cumprod = (
            torch.from_numpy(a).float() for a in (betas, 1 - betas, self._levels))
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(len(self) - 1, -1, -1)
        self._follow(list(range(len(self) - 1, -1, -1)))

    @classmethod
    def from_config(cls, config: Mapping, **changes):
        """The scheduler of a config, such as another scheduler's or the contents of a `scheduler_config.json`.

        Keys that start with an underscore are left aside; of others that this scheduler does not take, a warning tells.

        Raises:
            TypeError: config is no mapping.
            ValueError: naming the argument that is out of range.
        """
        if not isinstance(config, Mapping):
            raise TypeError(f"{cls.__name__}.from_config: config is a {type(config).__name__}, it must be a mapping")
        known = inspect.signature(cls).parameters
        given = {name: value for name, value in {**config, **changes}.items() if not name.startswith("_")}
        if ignored := [name for name in given if name not in known]:
            warnings.warn(f"{cls.__name__}.from_config: not taken from the config: {', '.join(ignored)}", stacklevel=2)
        return cls(**{name: value for name, value in given.items() if name in known})

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def scale_model_input(self, sample: Tensor, timestep=None) -> Tensor:
        """`sample` as it is; for loops that serve every scheduler."""
        return sample

    def set_timesteps(self, num_inference_steps: int | None = None, device=None,
                      timesteps: Sequence[int] | None = None) -> None:
        """The timesteps that sampling goes through.

        Args:
            num_inference_steps:  how many, spaced as `timestep_spacing` says.
            device:  where `timesteps` lies afterwards.
            timesteps:  themselves, descending, instead of their number.

        Raises:
            ValueError: both or neither are given, more than there are, or one outside the training timesteps.
        """
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(f"{self._name}: set_timesteps takes num_inference_steps or timesteps, one of them")
        if timesteps is None:
            chosen = self._spaced(num_inference_steps)
            self.num_inference_steps = num_inference_steps
        else:
            chosen = [int(t) for t in timesteps]
            if not chosen or any(a <= b for a, b in zip(chosen, chosen[1:], strict=False)):
                raise ValueError(f"{self._name}: timesteps must be one or more in descending order, got {chosen[:8]}")
            self.num_inference_steps = len(chosen)
        if chosen[-1] < 0 or chosen[0] >= len(self):
            why = f"; steps_offset is {self.config.steps_offset}" if timesteps is None else ""
            raise ValueError(f"{self._name}: timesteps go from {chosen[-1]} to {chosen[0]}, they must lie between 0 "
                             f"and {len(self) - 1}{why}")
        self.timesteps = torch.tensor(chosen, device=device)
        self._follow(chosen, custom=timesteps is not None)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """sqrt(abar) original_samples + sqrt(1 - abar) noise at the training timesteps, an int or int64 [B]."""
        return q_sample(original_samples, self._training_timesteps(timesteps, original_samples), self._schedule,
                        noise=noise.to(original_samples.device))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: int | Tensor) -> Tensor:
        """sqrt(abar) noise - sqrt(1 - abar) sample, what a model of `v_prediction` is trained towards."""
        timesteps = self._training_timesteps(timesteps, sample)
        return q_sample(noise, timesteps, self._schedule, noise=-sample).to(sample.dtype)

    def _spaced(self, count) -> list[int]:
        total, spacing = len(self), self.config.timestep_spacing
        if type(count) is not int or not 1 <= count <= total:
            raise ValueError(f"{self._name}: num_inference_steps is {count!r}, it must lie between 1 and {total}, the "
                             "training timesteps")
        if spacing == "linspace":
            return [int(t) for t in np.linspace(0, total - 1, count).round()[::-1]]
        if spacing == "leading":
            return [i * (total // count) + self.config.steps_offset for i in range(count - 1, -1, -1)]
        return [int(t) - 1 for t in np.round(np.arange(total, 0, -total / count))]

    def _training_timesteps(self, timesteps, samples: Tensor) -> int | Tensor:
        """timesteps on the device of the samples, after a look at those on the host."""
        if isinstance(timesteps, Tensor) and timesteps.device.type != "cpu":
            return timesteps.to(samples.device)
        for t in timesteps.reshape(-1).tolist() if isinstance(timesteps, Tensor) else [operator.index(timesteps)]:
            if not 0 <= t < len(self):
                raise ValueError(f"{self._name}: timestep is {t}, it must lie between 0 and {len(self) - 1}")
        return timesteps.to(samples.device) if isinstance(timesteps, Tensor) else operator.index(timesteps)

    def _row(self, timestep, sample: Tensor) -> int | Tensor:
        """The step of the schedule: the timestep itself, one number where the host knows it."""
        timestep = self._training_timesteps(timestep, sample)
        if isinstance(timestep, Tensor) and timestep.numel() == 1 and timestep.device.type == "cpu":
            timestep = int(timestep)
        numbers = [timestep] if isinstance(timestep, int) else \
            timestep.tolist() if timestep.device.type == "cpu" else []
        for t in numbers:
            if np.isnan(self._schedule.targets[t]):
                raise ValueError(f"{self._name}: timestep is {t}, it must be one of `timesteps`")
        return timestep

    def _denoise(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, noise: Tensor | None,
                 return_dict: bool, **sampler) -> SchedulerOutput | tuple[Tensor, Tensor]:
        config = self.config
        sampler["prediction"] = PREDICTIONS[config.prediction_type]
        arguments = model_output, timestep, self._schedule
        clamp = float(config.clip_sample_range) if config.clip_sample else False
        if config.thresholding and config.sample_max_value == 1:
            clamp = True
        elif config.thresholding:
            # the op's own thresholding knows no largest value, so the kept pixels of inpainting carry x0 instead
            x0 = denoise_step(sample, *arguments, clamp=False, noise=sample, return_x0=True, **sampler).x0
            clamp = False
            sampler |= {"image": self._threshold(x0), "mask": sample.new_ones([1, 1, *sample.shape[2:]])}
        found = denoise_step(sample, *arguments, clamp=clamp, noise=noise, return_x0=True, **sampler)
        return SchedulerOutput(found.x, found.x0) if return_dict else (found.x, found.x0)

    def _threshold(self, x0: Tensor) -> Tensor:
        """x0 within a quantile of its |x0|, at least 1 and at most `sample_max_value`, and divided by it."""
        flat = x0.flatten(1).to(torch.promote_types(x0.dtype, torch.float32))
        # sample by sample, since torch.quantile takes at most 2^24 elements
        bound = torch.stack([torch.quantile(row.abs(), self.config.dynamic_thresholding_ratio) for row in flat])
        bound = bound.clamp(1.0, self.config.sample_max_value)[:, None]
        return (flat.clamp(-bound, bound) / bound).view(x0.shape).to(x0.dtype)


class DDPMScheduler(_Scheduler):
    """Ancestral sampling behind the interface of diffusers' DDPMScheduler.

    Differs from it on purpose: "fixed_large_log" is the variance of "fixed_large", where diffusers gives NaN; a
    "learned" variance below 0 counts as 0; without a `generator` the noise is drawn inside the op, seeded from torch's
    generator, and is not torch.randn's.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas: Sequence[float] | np.ndarray | None = None,
                 variance_type: str = "fixed_small", clip_sample: bool = True, prediction_type: str = "epsilon",
                 thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
                 sample_max_value: float = 1.0, timestep_spacing: str = "leading", steps_offset: int = 0,
                 rescale_betas_zero_snr: bool = False):
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})

    def _follow(self, timesteps: list[int], custom: bool = False) -> None:
        targets = np.full(len(self), np.nan)
        targets[timesteps] = np.append(self._levels[timesteps[1:]], 1.0)
        self._schedule = TrainingSteps.to(self._levels, targets)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, generator=None,
             return_dict: bool = True, *,
             variance_noise: Tensor | None = None) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The sample at the timestep after this one.

        Args:
            model_output:  [B, C, ...], or [B, 2 C, ...] with a learned variance.
            timestep:  one of `timesteps`; a tensor, also [B], on the sample's device is not looked at by the host.
            sample:  [B, C, ...] float32, bfloat16, float16 or float64.
            generator:  a torch.Generator, or one for each sample, that draws the very noise diffusers would.
            return_dict:  False for a plain tuple.
            variance_noise:  shaped like sample, used as the noise.

        Returns:
            SchedulerOutput(prev_sample, pred_original_sample).

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        timestep = self._row(timestep, sample)
        # diffusers draws nothing for the last step
        ends = isinstance(timestep, int) and timestep == 0
        noise = _given_noise(self._name, sample, model_output.dtype, None if ends else generator, variance_noise)
        channels = sample.shape[1]
        if self.config.variance_type == "learned" and model_output.ndim > 1 and model_output.shape[1] == 2 * channels:
            mean, variance = model_output.split(channels, 1)
            variance = variance.to(torch.promote_types(variance.dtype, torch.float32))
            model_output = torch.cat([mean, variance.clamp(min=torch.finfo(variance.dtype).tiny).log()], 1)
        return self._denoise(model_output, timestep, sample, noise, return_dict,
                             variance=VARIANCES[self.config.variance_type])


class DDIMScheduler(_Scheduler):
    """Sampling without or with some noise behind the interface of diffusers' DDIMScheduler.

    As there, a step goes to the timestep that is num_train_timesteps // num_inference_steps lower, whichever comes next
    in `timesteps`. Beyond it, `set_timesteps` takes timesteps themselves, and a step then goes to the next of them; and
    without a `generator` the noise is drawn inside the op, seeded from torch's generator, and is not torch.randn's.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
                 beta_schedule: str = "linear", trained_betas: Sequence[float] | np.ndarray | None = None,
                 clip_sample: bool = True, set_alpha_to_one: bool = True, steps_offset: int = 0,
                 prediction_type: str = "epsilon", thresholding: bool = False,
                 dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
                 sample_max_value: float = 1.0, timestep_spacing: str = "leading",
                 rescale_betas_zero_snr: bool = False):
        super().__init__({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        self.final_alpha_cumprod = torch.tensor(self._final, dtype=torch.float32)

    @property
    def _final(self) -> float:
        return 1.0 if self.config.set_alpha_to_one else float(self._levels[0])

    def _follow(self, timesteps: list[int], custom: bool = False) -> None:
        if custom:
            targets = np.full(len(self), np.nan)
            targets[timesteps] = np.append(self._levels[timesteps[1:]], self._final)
        else:
            stride = len(self) // (self.num_inference_steps or len(self))
            targets = np.append(np.full(stride, self._final), self._levels[:-stride])
        self._schedule = TrainingSteps.to(self._levels, targets)

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, eta: float = 0.0,
             use_clipped_model_output: bool = False, generator=None, variance_noise: Tensor | None = None,
             return_dict: bool = True) -> SchedulerOutput | tuple[Tensor, Tensor]:
        """The sample one stride lower; see `DDPMScheduler.step` for what is not told here.

        Args:
            model_output:  [B, C, ...]; channels of a learned variance after them are ignored.
            eta:  0 draws no noise, 1 as much as ancestral sampling.
            use_clipped_model_output:  the noise is worked out again from the clipped x0.

        Returns:
            SchedulerOutput(prev_sample, pred_original_sample), or a plain tuple with return_dict=False.

        Raises:
            TypeError, ValueError: naming the argument, what it was and what it must be.
        """
        if self.num_inference_steps is None:
            raise ValueError("DDIMScheduler: num_inference_steps is None, call set_timesteps before step")
        timestep = self._row(timestep, sample)
        noise = None
        if eta:
            noise = _given_noise(self._name, sample, model_output.dtype, generator, variance_noise)
        return self._denoise(model_output, timestep, sample, noise, return_dict, sampler="ddim", eta=float(eta),
                             use_clipped_model_output=use_clipped_model_output)


def _betas(name: str, config: SchedulerConfig) -> np.ndarray:
    total, kind = config.num_train_timesteps, config.beta_schedule
    if config.trained_betas is not None:
        betas = np.array(config.trained_betas, dtype=np.float64)
        if betas.shape != (total,) or not (np.all(betas > 0) and np.all(betas <= 1)):
            raise ValueError(f"{name}: trained_betas has shape {betas.shape}, it must hold num_train_timesteps = "
                             f"{total} numbers above 0 and at most 1")
    elif kind == "linear":
        betas = np.linspace(config.beta_start, config.beta_end, total)
    elif kind == "scaled_linear":
        betas = np.linspace(math.sqrt(config.beta_start), math.sqrt(config.beta_end), total) ** 2
    else:
        betas = Schedule.cosine(total).betas
    return _without_last_signal(betas) if config.rescale_betas_zero_snr else betas


def _without_last_signal(betas: np.ndarray) -> np.ndarray:
    """Betas whose sqrt(abar) is shifted to end at 0 and scaled to start as before (Lin et al. 2024, algorithm 1)."""
    signal = np.sqrt(np.cumprod(1 - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    bar = signal**2
    return 1 - np.append(bar[0], bar[1:] / bar[:-1])


def _check_config(name: str, config: SchedulerConfig) -> None:
    choices = {"beta_schedule": BETA_SCHEDULES, "prediction_type": PREDICTIONS, "timestep_spacing": SPACINGS,
               "variance_type": VARIANCES}
    for key, allowed in choices.items():
        if key in config and config[key] not in allowed:
            raise ValueError(f"{name}: {key} is {config[key]!r}, it must be one of {', '.join(allowed)}")
    for key, least in (("num_train_timesteps", 2 if config.rescale_betas_zero_snr else 1), ("steps_offset", 0)):
        if type(config[key]) is not int or config[key] < least:
            raise ValueError(f"{name}: {key} is {config[key]!r}, it must be an integer of at least {least}")
    for key in ("beta_start", "beta_end"):
        if not 0 < config[key] < 1:
            raise ValueError(f"{name}: {key} is {config[key]!r}, it must lie between 0 and 1")
    if not 0 <= config.dynamic_thresholding_ratio <= 1:
        raise ValueError(f"{name}: dynamic_thresholding_ratio is {config.dynamic_thresholding_ratio!r}, it must lie "
                         "between 0 and 1")
    for key in ("clip_sample_range", "sample_max_value"):
        if not config[key] > 0:
            raise ValueError(f"{name}: {key} is {config[key]!r}, it must be above 0")


def _given_noise(name: str, sample: Tensor, dtype: torch.dtype, generator, noise: Tensor | None) -> Tensor | None:
    """The noise handed over or drawn as diffusers draws it; None leaves it to the op."""
    if noise is not None and generator is not None:
        raise ValueError(f"{name}: generator and variance_noise are both given, only one of them may be")
    if generator is None:
        return noise
    generators = list(generator) if isinstance(generator, list | tuple) else [generator]
    if len(generators) not in (1, len(sample)):
        raise ValueError(f"{name}: generator has {len(generators)} entries, it must be one or one for each of the "
                         f"{len(sample)} samples")
    shape = [len(sample) // len(generators), *sample.shape[1:]]
    return torch.cat([torch.randn(shape, generator=g, device=g.device, dtype=dtype).to(sample.device)
                      for g in generators])
