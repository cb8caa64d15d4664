"""Fused ops. Each is a function of tensors, with the definition it equals in its docstring."""

from .dispatch import backend, backends
from .gather import gather_with_grad
from .info_nce import cached_loss, info_nce, siglip_loss

__all__ = ["backend", "backends", "cached_loss", "gather_with_grad", "info_nce", "siglip_loss"]
