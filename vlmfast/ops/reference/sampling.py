"""Definition of `sample_tokens` in plain PyTorch."""

import torch
from torch import Tensor


def filtered(logits: Tensor, unconditional: Tensor | None, guidance_scale: float, temperature: float, top_k: int,
             top_p: float) -> Tensor:
    """[B, V] guided scores over the temperature, -inf where they are filtered out; at least float32.

    Guidance is u + s (c - u) (Ho and Salimans 2022, arXiv:2207.12598, for logits). top_k keeps the k largest and what
    equals the last of them; top_p of these the fewest whose probabilities reach p (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    x = logits.to(wide)
    if unconditional is not None:
        x = unconditional.to(wide).lerp(x, guidance_scale)
    if temperature:
        x = x / temperature
    if 0 < top_k < x.shape[-1]:
        least = x.topk(top_k, -1).values[:, -1:]
        x = x.masked_fill(x < least, -torch.inf)
    if top_p < 1:
        ordered, order = x.sort(stable=True, dim=-1, descending=True)
        share = ordered.softmax(-1)
        drop = share.cumsum(-1) - share >= top_p  # what comes before already reaches p
        x = x.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)
    return x


def sample_tokens(logits: Tensor, unconditional: Tensor | None, guidance_scale: float, temperature: float, top_k: int,
                  top_p: float, noise: Tensor | None) -> Tensor:
    """argmax of the filtered scores plus Gumbel noise [B, V]: a draw from their softmax; without noise the largest."""
    x = filtered(logits, unconditional, guidance_scale, temperature, top_k, top_p)
    return (x if noise is None else x + noise.to(x.dtype)).argmax(-1)
