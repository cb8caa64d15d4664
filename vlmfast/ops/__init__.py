"""Fused ops. Each is a function of tensors, with the definition it equals in its docstring."""

from .alignment import ipot, optimal_transport_distance
from .attention import (
    attention,
    attention_varlen,
    axial_attention,
    bi_attention,
    co_attention,
    co_attention_varlen,
    cross_attention,
    dropout_mask,
    window_attention,
)
from .dispatch import backend, backends
from .gather import gather_with_grad
from .info_nce import cached_loss, info_nce, siglip_loss

__all__ = ["attention", "attention_varlen", "axial_attention", "backend", "backends", "bi_attention", "cached_loss",
           "co_attention", "co_attention_varlen", "cross_attention", "dropout_mask", "gather_with_grad", "info_nce",
           "ipot", "optimal_transport_distance", "siglip_loss", "window_attention"]
