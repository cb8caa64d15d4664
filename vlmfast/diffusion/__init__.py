"""Gaussian diffusion on top of the fused steps of `vlmfast.ops`: noise schedules, schedulers and sampling loops."""

from ..ops.diffusion_schedule import Schedule

__all__ = ["Schedule"]
