r"""Definitions of the `diffusion` family in plain PyTorch.

A step of every sampler is the same few operations with other numbers, which a row of `Schedule.step_table` holds (see
its columns): with the guided model output :math:`o = u + s (c - u)`, variance channels v, noise z and mean shift g,

.. math::
    x_0 = a_x x + a_o o, \quad
    x_0 \leftarrow m I + (1 - m) x_0, \quad
    x_0 \leftarrow \mathrm{clamp}(x_0), \quad
    x' = b_0 x_0 + b_x x + b_o o + \sigma^2 g + \sigma z, \quad
    \log \sigma^2 = l + k v

Sources: those of vlmfast/ops/diffusion_schedule.py; guidance, Ho and Salimans 2022 (arXiv:2207.12598); the training
loss, Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 14-16.
"""

import math

import torch
from torch import Tensor

from .attention import philox

STREAM = 0x64696666  # what sets these draws apart from those of other families with the same seed
BLOCK, LANES = 64, 16  # elements that share 16 counters, and how far apart the words of a counter lie
_WORD = 0xFFFFFFFF
BITS = 1 / math.log(2)


def normal_noise(rows: int, size: int, seed, offset: int = 0, device=None) -> Tensor:
    """[rows, size] float64 draws of N(0, 1), finite always.

    Element e of row n is word w = (e / 16) % 4 of the counter (16 (e / 64) + e % 16, n, offset, STREAM). Words 2 k and
    2 k + 1 give r = sqrt(-2 log(1 - u)) and an angle, u of a full turn: r cos is the draw of the first, r sin of the
    second (Box and Muller 1958). With W a word, u = (W + 1/2) / 2^32.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    blocks = (size + BLOCK - 1) // BLOCK
    quad = torch.arange(blocks * LANES, dtype=torch.int64, device=seed.device)[None]
    row = torch.arange(rows, dtype=torch.int64, device=seed.device)[:, None]
    counter = torch.broadcast_tensors(quad & _WORD, row, torch.full_like(quad, offset), torch.full_like(quad, STREAM))
    words = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    draws = []
    for first, second in (words[:2], words[2:]):
        radius = (-2 * torch.log1p(-(first.double() + 0.5) * 2.0**-32)).sqrt()
        angle = (second.double() + 0.5) * (2.0**-31 * math.pi)
        draws += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack([x.unflatten(1, (blocks, LANES)) for x in draws], 2).flatten(1)[:, :size]


def denoise(x: Tensor, conditional: Tensor | None, unconditional: Tensor | None, variance: Tensor | None,
            rows: Tensor, guidance_scale: float, clamp: float, threshold: Tensor | None, mask: Tensor | None,
            image: Tensor | None, shift: Tensor | None, history: list[Tensor], weights: tuple[float, ...],
            noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(x', x0, e), each [B, C, S] like x.

    Args:
        x, image, shift, noise, history:  [B, C, S].
        conditional, unconditional, variance:  [B, C, S] or None.
        rows:  [B, 12], the rows of `Schedule.step_table` at each sample's step.
        clamp:  largest |x0|, infinity for any.
        threshold:  [B], x0 is held within it and divided by it, or None.
        mask:  broadcasts to x; 1 where `image` stays.
        weights:  of e and of the earlier ones in `history`, first the latest, whose sum takes the place of the output.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype, x = x.dtype, x.to(wide)
    c = [column[:, None, None] for column in rows.to(wide).unbind(1)]
    x0_x, x0_o, from_x0, from_x, from_o, log_variance, log_slope, noisy, shift_x0, shift_mean, e_x, e_o = c
    out = torch.zeros_like(x)
    if conditional is not None:
        out = conditional.to(wide)
    if unconditional is not None:
        out = unconditional.to(wide) + guidance_scale * (out - unconditional.to(wide))
    e = e_x * x + e_o * out
    if weights:
        out = weights[0] * e
        for weight, earlier in zip(weights[1:], history, strict=True):
            out = out + weight * earlier.to(wide)
    x0 = x0_x * x + x0_o * out
    if mask is not None:
        mask = mask.to(wide)
        x0 = x0 * (1 - mask) + image.to(wide) * mask
    if threshold is not None:
        bound = threshold.to(wide)[:, None, None]
        x0 = x0.clamp(-bound, bound) / bound
    elif clamp != math.inf:
        x0 = x0.clamp(-clamp, clamp)
    level = log_variance if variance is None else log_variance + log_slope * variance.to(wide)
    deviation = (level / 2).exp()
    if shift is not None:
        x0 = x0 + shift_x0 * shift.to(wide)
    then = from_x0 * x0 + from_x * x + from_o * out
    if shift is not None:
        then = then + shift_mean * deviation.square() * shift.to(wide)
    if noise is not None:
        then = then + noisy * deviation * noise.to(wide)
    return then.to(dtype), x0.to(dtype), e.to(dtype)


def loss(out: Tensor, variance: Tensor | None, noise: Tensor, x0: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean squared error [B], variational bound [B] in bits a dimension), at least float32.

    out, variance, noise, x0 are [B, C, S], variance None for a bound of 0; rows [B, 8] of `Schedule.loss_table`. The
    bound's gradient passes to the variance alone (Nichol and Dhariwal 2021, sec. 3.1).
    """
    wide = torch.promote_types(out.dtype, torch.float32)
    c = [column[:, None, None] for column in rows.to(wide).unbind(1)]
    target_noise, target_x0, error, spread, spread_slope, decoder, floor, first = c
    out, x0 = out.to(wide), x0.to(wide)
    d = out - (target_noise * noise.to(wide) + target_x0 * x0)
    squared = d.square().flatten(1).mean(1)
    if variance is None:
        return squared, torch.zeros_like(squared)
    d = d.detach()
    u = spread + spread_slope * variance.to(wide)
    divergence = (u - 1 + (-u).exp() * (1 + error * d.square())) / 2
    likelihood = discretized_log_likelihood(x0, decoder * d, u + floor)
    bound = torch.where(first > 0, -likelihood, divergence)
    return squared, BITS * bound.flatten(1).mean(1)


def discretized_log_likelihood(x: Tensor, centred: Tensor, log_variance: Tensor) -> Tensor:
    """log of a Gaussian's mass within half a grey level, of 255 between -1 and 1, around x, which lies `centred` from
    the mean; everything beyond the last level belongs to it."""
    inverse = (-log_variance / 2).exp()
    above, below = (_normal_cdf(inverse * (centred + step)) for step in (1 / 255, -1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
