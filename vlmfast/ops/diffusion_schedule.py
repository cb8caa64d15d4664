"""Noise schedules of Gaussian diffusion and what a step of each sampler multiplies by.

Everything is computed in float64 on the host. With beta_t given, alpha_t = 1 - beta_t and abar_t their product, step t
goes from x_t to x_{t-1}; abar before the first step is 1.

Sources: Ho et al. 2020 (arXiv:2006.11239); Nichol and Dhariwal 2021 (arXiv:2102.09672) for the cosine schedule, the
learned range of variances and respacing; Song et al. 2021 (arXiv:2010.02502) for DDIM; Salimans and Ho 2022
(arXiv:2202.00512) for v; Liu et al. 2022 (arXiv:2202.09778) for PLMS.
"""

from __future__ import annotations

import ast
import itertools
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

SAMPLERS = "ancestral", "ddim", "ddim_reverse", "plms"
PREDICTIONS = "epsilon", "x0", "v"
VARIANCES = "learned_range", "learned", "fixed_small", "fixed_large"
LEARNED = VARIANCES[:2]

# Columns of `Schedule.step_table`. With o the (guided) model output, z the noise and g the mean shift:
#   e  = e_x x + e_o o                     the noise that the model sees in x
#   x0 = x0_x x + x0_o o                   then kept pixels, clamping, and x0 += shift_x0 g
#   x' = from_x0 x0 + from_x x + from_o o + shift_mean s^2 g + noise s z,    s^2 = exp(log_variance + log_slope v)
# v being the model's variance channels. PLMS puts a combination of the last e in the place of o.
STEP_COLUMNS = ("x0_x", "x0_o", "from_x0", "from_x", "from_o", "log_variance", "log_slope", "noise", "shift_x0",
                "shift_mean", "e_x", "e_o")
# Columns of `Schedule.loss_table`. With d = output - target and u = spread + spread_slope v the log-variance above the
# posterior's: KL = (u - 1 + exp(-u) (1 + error d^2)) / 2; the target is target_noise noise + target_x0 x0; at t = 0,
# x0 minus its estimate is decoder d, and the log-variance u + floor.
LOSS_COLUMNS = ("target_noise", "target_x0", "error", "spread", "spread_slope", "decoder", "floor", "first")


@dataclass(frozen=True, eq=False)
class Schedule:
    """The betas of T steps, and which step of the model's own schedule each of them is.

    Args:
        betas:  [T] float64, each above 0 and at most 1.
        timestep_map:  [T] int64, the timestep that the model is given at step t.
        original_steps:  length of the schedule that the model was trained on.
        final_alpha_cumprod:  abar before step 0: 1, or abar_0 for samplers that end there.
    """

    betas: np.ndarray
    timestep_map: np.ndarray
    original_steps: int
    final_alpha_cumprod: float = 1.0

    @classmethod
    def from_betas(cls, betas: Sequence[float] | np.ndarray) -> Schedule:
        """A schedule of given betas.

        Raises:
            ValueError: betas is empty, not of one dimension, or leaves (0, 1].
        """
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not betas.size:
            raise ValueError(f"Schedule: betas has shape {betas.shape}, it must be [T] with T above 0")
        if not (np.all(betas > 0) and np.all(betas <= 1)):
            raise ValueError("Schedule: betas must lie above 0 and be at most 1")
        return cls(betas, np.arange(betas.size), betas.size)

    @classmethod
    def linear(cls, steps: int = 1000) -> Schedule:
        """betas from 1e-4 to 0.02 at 1000 steps, scaled for another number (Ho et al. 2020)."""
        _check_steps(steps)
        return cls.from_betas(np.minimum(np.linspace(1e-4, 0.02, steps) * (1000 / steps), 1.0))

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> Schedule:
        """abar following a squared cosine (Nichol and Dhariwal 2021, eq. 17); OpenAI's "squaredcos_cap_v2"."""
        _check_steps(steps)

        def level(i: int) -> float:
            return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

        return cls.from_betas([min(1 - level(i + 1) / level(i), max_beta) for i in range(steps)])

    def respace(self, steps: str | int | Sequence[int]) -> Schedule:
        """The schedule of fewer steps with the same abar at those kept.

        Args:
            steps:  a number, or comma-separated numbers for sections of equal length, spread evenly over each ("100",
                "10,10,3,2,2"); "ddim50" for a constant stride; "fast27" for the 27 steps of GLIDE's upsampler; or a
                sequence of the timesteps to keep.

        Raises:
            ValueError: a string that says none of these, more steps than there are, or a timestep outside.
        """
        kept = sorted(_timesteps(self.num_timesteps, steps))
        bar = self.alphas_cumprod[kept]
        before = np.append(1.0, bar[:-1])
        return Schedule(1 - bar / before, self.timestep_map[kept], self.original_steps)

    @property
    def num_timesteps(self) -> int:
        return len(self.betas)

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(self.final_alpha_cumprod, self.alphas_cumprod[:-1])

    @cached_property
    def posterior_variance(self) -> np.ndarray:
        """Of q(x_{t-1} | x_t, x0): 0 at t = 0."""
        return self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """With that of t = 1 at t = 0, where the variance is 0."""
        if len(self) == 1:
            return np.log(self.betas)
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Of x0 in the mean of q(x_{t-1} | x_t, x0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Of x_t."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)

    def model_timesteps(self, t: int | Tensor) -> int | Tensor:
        """What the model is given at step t: an int for an int, int64 like t for a tensor."""
        if isinstance(t, Tensor):
            return self._on_device("timestep_map", t.device)[t]
        return int(self.timestep_map[t])

    def log_variance_range(self, variance: str) -> tuple[np.ndarray, np.ndarray]:
        """(a, b) of log-variance = a + b v, v being the model's variance channels."""
        least, largest = self.posterior_log_variance_clipped, np.log(self.betas)
        zero = np.zeros(len(self))
        if variance == "learned_range":
            return (least + largest) / 2, (largest - least) / 2
        if variance == "learned":
            return zero, zero + 1
        if variance == "fixed_small":
            return least, zero
        return np.append(least[:1], largest[1:]), zero

    def step_table(self, sampler: str, prediction: str, variance: str, eta: float = 0.0,
                   use_clipped_model_output: bool = True) -> np.ndarray:
        """[T, 12] float64: what a step multiplies by; the columns are STEP_COLUMNS."""
        bar, before, zero = self.alphas_cumprod, self.alphas_cumprod_prev, np.zeros(len(self))
        signal, spread = np.sqrt(bar), np.sqrt(1 - bar)
        x0_x, x0_o, e_x, e_o = {
            "epsilon": (1 / signal, -spread / signal, zero, zero + 1),
            "x0": (zero, zero + 1, 1 / spread, -signal / spread),
            "v": (signal, -spread, spread, signal)}[prediction]
        shift_x0 = shift_mean = from_o = zero
        if sampler == "ancestral":
            from_x0, from_x = self.posterior_mean_coef1, self.posterior_mean_coef2
            log_variance, log_slope = self.log_variance_range(variance)
            noise, shift_mean = zero + 1, zero + 1
        else:
            target = before if sampler != "ddim_reverse" else np.append(bar[1:], 0.0)
            # the variance of eta = 1, and what it leaves of 1 - target, without cancellation
            full = (1 - before) * (1 - bar / before) / (1 - bar)
            rest = (1 - before) ** 2 * bar / (before * (1 - bar))
            eta = eta if sampler == "ddim" else 0.0
            toward = np.sqrt((1 - eta**2) * (1 - target) + eta**2 * rest) if eta else np.sqrt(1 - target)
            if sampler == "plms":
                x0_x, x0_o = 1 / signal, -spread / signal
            if use_clipped_model_output:
                from_x0, from_x = np.sqrt(target) - toward * signal / spread, toward / spread
            else:
                eps_x, eps_o = (zero, zero + 1) if sampler == "plms" else (e_x, e_o)
                from_x0, from_x, from_o = np.sqrt(target), toward * eps_x, toward * eps_o
            noisy = eta > 0 and full > 0
            log_variance, log_slope = np.log(np.where(noisy, eta**2 * full, 1.0)), zero
            noise, shift_x0 = np.where(noisy, 1.0, zero), (1 - bar) / signal
        noise = np.append(0.0, noise[1:])
        return np.stack([x0_x, x0_o, from_x0, from_x, from_o, log_variance, log_slope, noise, shift_x0, shift_mean,
                         e_x, e_o], 1)

    def noising_table(self) -> np.ndarray:
        """[T, 12] float64: x' = sqrt(abar) x + sqrt(1 - abar) z in the columns of `step_table`."""
        table = np.zeros((len(self), len(STEP_COLUMNS)))
        table[:, STEP_COLUMNS.index("from_x")] = np.sqrt(self.alphas_cumprod)
        table[:, STEP_COLUMNS.index("log_variance")] = np.log(1 - self.alphas_cumprod)
        table[:, STEP_COLUMNS.index("noise")] = 1
        return table

    def loss_table(self, prediction: str, variance: str) -> np.ndarray:
        """[T, 8] float64: what the training loss multiplies by; the columns are LOSS_COLUMNS."""
        bar, zero = self.alphas_cumprod, np.zeros(len(self))
        signal, spread = np.sqrt(bar), np.sqrt(1 - bar)
        noise, x0 = {"epsilon": (zero + 1, zero), "x0": (zero, zero + 1), "v": (signal, -spread)}[prediction]
        # x0 minus its estimate, for each unit of output minus target
        decoder = {"epsilon": spread / signal, "x0": zero - 1, "v": spread}[prediction]
        least = self.posterior_log_variance_clipped
        level, slope = self.log_variance_range(variance)
        error = (self.posterior_mean_coef1 * decoder) ** 2 * np.exp(-least)
        first = np.append(1.0, zero[1:])
        return np.stack([noise, x0, error, level - least, slope, decoder, least, first], 1)

    def __post_init__(self):
        object.__setattr__(self, "_number", next(_numbers))
        _schedules[self._number] = self

    def table(self, kind: str, *settings, device: torch.device) -> Tensor:
        """`{kind}_table(*settings)` on a device, kept there: float64 on the CPU, float32 elsewhere."""
        if torch.compiler.is_compiling():
            # numpy and what is kept here are nothing for a tracer
            return torch.ops.vlmfast.diffusion_table(self._number, kind, repr(settings), device)
        key = (kind, settings, device)
        if key not in self._kept:
            with np.errstate(divide="ignore", invalid="ignore"):  # a last beta of 1 leaves nothing of x0
                made = torch.from_numpy(np.ascontiguousarray(getattr(self, f"{kind}_table")(*settings)))
            self._kept[key] = made.to(device, torch.float64 if device.type == "cpu" else torch.float32)
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict:
        return {}

    def _on_device(self, name: str, device: torch.device) -> Tensor:
        key = (name, device)
        if key not in self._kept:
            self._kept[key] = torch.from_numpy(np.ascontiguousarray(getattr(self, name))).to(device)
        return self._kept[key]


_numbers = itertools.count()
_schedules: weakref.WeakValueDictionary[int, Schedule] = weakref.WeakValueDictionary()


def _table(number: int, kind: str, settings: str, device: torch.device) -> Tensor:
    return _schedules[number].table(kind, *ast.literal_eval(settings), device=device).clone()


def _table_fake(number: int, kind: str, settings: str, device: torch.device) -> Tensor:
    columns = len(LOSS_COLUMNS if kind == "loss" else STEP_COLUMNS)
    dtype = torch.float64 if device.type == "cpu" else torch.float32
    return torch.empty(len(_schedules[number]), columns, dtype=dtype, device=device)


_library = torch.library.Library("vlmfast", "FRAGMENT")
_library.define("diffusion_table(int number, str kind, str settings, Device device) -> Tensor")
_library.impl("diffusion_table", _table, "CompositeExplicitAutograd")
torch.library.register_fake("vlmfast::diffusion_table", _table_fake, lib=_library)


def _check_steps(steps) -> None:
    if type(steps) is not int or steps < 1:
        raise ValueError(f"Schedule: steps is {steps!r}, it must be an integer of at least 1")


def _timesteps(total: int, steps) -> set[int]:
    """The timesteps that `Schedule.respace` keeps."""
    op = "Schedule.respace"
    if isinstance(steps, str) and steps.startswith("ddim") and steps[4:].isdecimal():
        wanted = int(steps[4:])
        for stride in range(1, total + 1):
            if len(range(0, total, stride)) == wanted:
                return set(range(0, total, stride))
        raise ValueError(f"{op}: steps is {steps!r}, but no constant stride takes {wanted} of {total} steps")
    if steps == "fast27":
        # the noisiest step of the even spacing gives way to one a little later
        return _timesteps(total, "10,10,3,2,2") - {total - 1} | {total - 3}
    if isinstance(steps, int) and not isinstance(steps, bool):
        steps = str(steps)
    if isinstance(steps, str):
        parts = steps.split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"{op}: steps is {steps!r}, it must be a number, numbers separated by commas, \"ddimN\" "
                             "or \"fast27\"")
        return _sections(total, [int(part) for part in parts])
    try:
        kept = [int(step) for step in steps]
    except (TypeError, ValueError):
        raise TypeError(f"{op}: steps is {steps!r}, it must be a string, a number or a sequence of timesteps") from None
    if not kept or len(set(kept)) < len(kept) or min(kept) < 0 or max(kept) >= total:
        raise ValueError(f"{op}: steps must be distinct timesteps from 0 to {total - 1}, got {kept[:8]}")
    return set(kept)


def _sections(total: int, counts: list[int]) -> set[int]:
    """`counts[i]` timesteps evenly over the i-th of as many sections, both its ends among them."""
    kept, start = set(), 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise ValueError(f"Schedule.respace: steps asks for {count} of the {size} timesteps of a section")
        stride, place = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            kept.add(start + round(place))
            place += stride
        start += size
    return kept
