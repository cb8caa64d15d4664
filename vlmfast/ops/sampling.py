"""One step of sampling from scores: guidance, temperature, filters and draw."""

import math

import torch
from torch import Tensor

from .attention_checks import draw_seed
from .quantize import gumbel_noise
from .reference import sampling as reference


def sample_tokens(logits: Tensor, *, unconditional: Tensor | None = None, guidance_scale: float = 1.0,
                  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, noise: Tensor | None = None,
                  offset: int = 0, seed=None) -> Tensor:
    """A token for each row of scores.

    Equivalent to::

        x = unconditional + guidance_scale * (logits - unconditional)
        x = x / temperature
        x[x < x.topk(top_k).values[:, -1:]] = -inf
        x[beyond the first whose probabilities reach top_p] = -inf
        (x + gumbel_noise(x.shape, seed, offset)).argmax(-1)             # a draw from x.softmax(-1)

    Args:
        logits:  [B, V] float32, bfloat16, float16 or float64.
        unconditional:  [B, V] scores without the prompt, or None.
        guidance_scale:  1 is no guidance, 0 ignores the prompt.
        temperature:  0 takes the largest score and draws nothing.
        top_k:  how many of the largest stay; 0: all.
        top_p:  share of the probability that stays, largest first; 1: all. At least one token stays.
        noise:  [B, V] used in place of the drawn noise.
        offset:  number of the first row; with a seed, step t of B rows is offset t B.
        seed:  an int or [] int64 tensor; None draws one from torch's generator.

    Returns:
        int64 [B].

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "sample_tokens"
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        kind = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"{op}: logits is {kind}, it must be a floating-point tensor")
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"{op}: logits has shape {tuple(logits.shape)}, it must be [B, V] with V above 0")
    for name, x in (("unconditional", unconditional), ("noise", noise)):
        if x is not None and (x.shape != logits.shape or x.device != logits.device):
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)} on {x.device}, logits "
                             f"{tuple(logits.shape)} on {logits.device}; they must be equal")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"{op}: guidance_scale is {guidance_scale}, it must be finite")
    if unconditional is None and guidance_scale != 1:
        raise ValueError(f"{op}: guidance_scale is {guidance_scale} without unconditional scores, it must be 1")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}, it must be 0 or above and finite")
    if type(top_k) is not int or top_k < 0:
        raise ValueError(f"{op}: top_k is {top_k!r}, it must be an integer of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p is {top_p}, it must be above 0 and at most 1")
    if temperature == 0:
        noise = None
    elif noise is None:
        seed = draw_seed(op, seed, logits, True)
        wide = torch.promote_types(logits.dtype, torch.float32)
        noise = gumbel_noise(logits.shape, seed, offset, dtype=wide, device=logits.device)
    with torch.no_grad():
        return reference.sample_tokens(logits, unconditional, guidance_scale, temperature, top_k, top_p, noise)
