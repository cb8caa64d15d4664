r"""Definitions of the `quantize` family in plain PyTorch.

Logits here are [N, V], one row a position; the public ops bring other layouts to it. With Gumbel noise g,

.. math:: s = (l + g) / \tau, \quad y = \mathrm{softmax}(s), \quad z = y C, \quad i = \arg\max s

and the divergence of q = softmax(l) from the uniform distribution, without noise and temperature,

.. math:: \mathrm{KL} = \sum_v q_v l_v - \mathrm{lse}(l) + \log V

Sources: Jang et al. 2017 (arXiv:1611.01144) and Maddison et al. 2017 (arXiv:1611.00712) for the relaxation; Liu et al.
2023 (arXiv:2304.08612), alg. 2, for `reinmax`; DALL-E (Ramesh et al. 2021, arXiv:2102.12092), app. A.2.
"""

import torch
from torch import Tensor

from .attention import philox

STREAM = 0x67756D62  # what sets these draws apart from those of other families with the same seed
_WORD = 0xFFFFFFFF


def gumbel_noise(count: int, vocabulary: int, seed, offset: int = 0, device=None) -> Tensor:
    """[count, vocabulary] float64 Gumbel(0, 1) draws, finite always.

    Entry v of row n is word v % 4 of the counter (n + offset, v / 4, STREAM). With r the word and
    u = (r + 1/2) / 2^32, the draw is -log(-log(1 - u)), where 1 - u is counted from the other end beyond a half.
    """
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    n = torch.arange(offset, offset + count, dtype=torch.int64, device=seed.device)[:, None]
    group = torch.arange((vocabulary + 3) // 4, dtype=torch.int64, device=seed.device)[None]
    counter = torch.broadcast_tensors(n & _WORD, n >> 32, group, torch.full_like(group, STREAM))
    r = torch.stack(philox(counter, (seed & _WORD, (seed >> 32) & _WORD)), -1).flatten(-2)[:, :vocabulary]
    low = r < 2**31
    t = (torch.where(low, r, _WORD - r).double() + 0.5) * 2.0**-32
    return -torch.where(low, -torch.log1p(-t), -t.log()).log()


def forward(logits: Tensor, codebook: Tensor, noise: Tensor | None, tau: float, want_z: bool, want_kl: bool):
    """(z [N, D] or None, indices [N], lse of s [N], lse of l [N] or None, sum of q l [N] or None), at least float32.

    An entry of -inf has no weight; without any other entry all weights are 0, the log-sum-exp is -inf and the index 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits.to(wide)
    s = (logits if noise is None else logits + noise.to(wide)) / tau
    lse = s.logsumexp(-1)
    z = _weights(s, lse) @ codebook.to(wide) if want_z else None
    if not want_kl:
        return z, s.argmax(-1), lse, None, None
    plain = logits.logsumexp(-1)
    return z, s.argmax(-1), lse, plain, (_weights(logits, plain) * _left_out_as_zero(logits)).sum(-1)


def _weights(s: Tensor, lse: Tensor) -> Tensor:
    return (s - _left_out_as_zero(lse)[:, None]).exp()


def _left_out_as_zero(x: Tensor) -> Tensor:
    return x.masked_fill(x == -torch.inf, 0.0)


def backward(logits: Tensor, codebook: Tensor, noise: Tensor | None, tau: float, d_z: Tensor, gain: float, lse: Tensor,
             plain: Tensor | None, expected: Tensor | None, kl: float, plain_gain: float, indices: Tensor | None,
             want_codebook: bool):
    """(d_logits [N, V], d_codebook [V, D] or None).

    With x = d_z C^T, y = exp(s - lse), q = exp(l - plain), <p, x> = sum p x and m = <y, x>:
    d_logits = gain y (x - m) + q (kl (l - expected) - plain_gain (x - <q, x>)). With `indices`, m is the mean of <y, x>
    and of the x there, and x - m is added there. d_codebook = y^T d_z.
    """
    dtype, wide = logits.dtype, torch.promote_types(logits.dtype, torch.float32)
    logits, d_z = logits.to(wide), d_z.to(wide)
    s = (logits if noise is None else logits + noise.to(wide)) / tau
    y = _weights(s, lse)
    x = d_z @ codebook.to(wide).T
    mean = (y * x).sum(-1, keepdim=True)
    if indices is not None:
        at = indices[:, None]
        x_at = x.gather(1, at)
        mean = (mean + x_at) / 2
    d_logits = gain * y * (x - mean)
    if indices is not None:
        d_logits = d_logits.scatter_add(1, at, (x_at - mean).masked_fill(logits.gather(1, at) == -torch.inf, 0.0))
    if plain is not None:
        q = _weights(logits, plain)
        if kl:
            d_logits = d_logits + q * kl * (_left_out_as_zero(logits) - expected[:, None])
        if plain_gain:
            d_logits = d_logits - q * plain_gain * (x - (q * x).sum(-1, keepdim=True))
    return d_logits.to(dtype), y.T @ d_z if want_codebook else None


def encode_indices(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """features [N, C], weight [V, C], bias [V] -> the entry of the largest of weight f + bias [N]."""
    wide = torch.promote_types(features.dtype, torch.float32)
    logits = features.to(wide) @ weight.to(wide).T
    return (logits if bias is None else logits + bias.to(wide)).argmax(-1)
