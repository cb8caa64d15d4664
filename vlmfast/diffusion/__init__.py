"""Gaussian diffusion on top of the fused steps of `vlmfast.ops`: noise schedules, schedulers and sampling loops."""

from ..ops.diffusion_schedule import Schedule
from .sampling import Recorder, SamplingStep, sample
from .schedulers import DDIMScheduler, DDPMScheduler

__all__ = ["DDIMScheduler", "DDPMScheduler", "Recorder", "SamplingStep", "Schedule", "sample"]
