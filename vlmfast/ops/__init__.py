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
from .diffusion import Denoised, DiffusionLoss, denoise_step, diffusion_loss, diffusion_noise, q_sample
from .dispatch import backend, backends
from .gather import gather_with_grad
from .group_norm import group_norm_silu
from .info_nce import cached_loss, info_nce, siglip_loss
from .quantize import Quantized, VectorQuantized, encode_indices, gumbel_noise, gumbel_quantize, vector_quantize
from .sampling import sample_tokens

__all__ = ["Denoised", "DiffusionLoss", "Quantized", "VectorQuantized", "attention", "attention_varlen",
           "axial_attention", "backend", "backends", "bi_attention", "cached_loss", "co_attention",
           "co_attention_varlen", "cross_attention", "denoise_step", "diffusion_loss", "diffusion_noise",
           "dropout_mask", "encode_indices", "gather_with_grad", "group_norm_silu", "gumbel_noise", "gumbel_quantize",
           "info_nce", "ipot", "optimal_transport_distance", "q_sample", "sample_tokens", "siglip_loss",
           "vector_quantize", "window_attention"]
