"""The group_norm family in plain PyTorch: the definition that every backend is tested against, on any device.

Sizes: B batch, C channels, G groups, S positions of one channel. Computed in float32, or float64 for float64
activations.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def lines(x: Tensor) -> Tensor:
    """[B, C, *spatial] -> [B, C, S]."""
    return x[..., None] if x.ndim == 2 else x.flatten(2)


def statistics(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """(mean, rstd) [B, G] float64 of x [B, C, S]. The second mean repairs what rounding the first one cost."""
    batch, channels, spatial = x.shape
    if not x.numel():
        return x.new_zeros(batch, num_groups, dtype=torch.float64), x.new_zeros(batch, num_groups, dtype=torch.float64)
    groups = x.reshape(batch, num_groups, channels // num_groups * spatial)
    groups = groups.to(torch.promote_types(x.dtype, torch.float32))
    mean = groups.mean(2, keepdim=True)
    rest = (groups - mean).mean(2, keepdim=True)
    variance = (groups - mean - rest).square().mean(2)
    return (mean.double() + rest)[..., 0], (variance.double() + eps).rsqrt()


def _coefficients(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
                  shift: Tensor | None) -> tuple[Tensor, ...]:
    """(normalised x [B, C, S], weight and bias [1, C, 1], scale and shift [B, C, 1] or 0), all in the wide type."""
    wide = torch.promote_types(x.dtype, torch.float32)
    each = x.shape[1] // mean.shape[1] if mean.shape[1] else 0
    mean, rstd = (v.repeat_interleave(each, 1)[..., None] for v in (mean, rstd))
    centre = mean.to(wide)
    normal = (x.to(wide) - centre - (mean - centre).to(wide)) * rstd.to(wide)
    weight, bias = (v.to(wide)[None, :, None] for v in (weight, bias))
    scale, shift = (0.0 if v is None else v.to(wide)[..., None] for v in (scale, shift))
    return normal, weight, bias, scale, shift


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
            eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """silu(GroupNorm(x) (1 + scale) + shift) (Wu and He 2018, arXiv:1803.08494; Dhariwal and Nichol 2021,
    arXiv:2105.05233, sec. 3.1).

    Args:
        x:  [B, C, *spatial].
        weight, bias:  [C]. scale, shift: [B, C], or None both.

    Returns:
        (out like x, contiguous; mean and rstd [B, G] float64).
    """
    mean, rstd = statistics(lines(x), num_groups, eps)
    normal, weight, bias, scale, shift = _coefficients(lines(x), mean, rstd, weight, bias, scale, shift)
    z = (normal * weight + bias) * (1 + scale) + shift
    return (F.silu(z) if silu else z).to(x.dtype).reshape(x.shape), mean, rstd


def backward(d_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
             shift: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(d_x like x, d_weight, d_bias [C], d_scale, d_shift [B, C] or None), the parameters' in the wide type."""
    rows, up = lines(x), lines(d_out)
    normal, weight, bias, scale, shift = _coefficients(rows, mean, rstd, weight, bias, scale, shift)
    d_z = up.to(normal.dtype)
    if silu:
        z = (normal * weight + bias) * (1 + scale) + shift
        s = z.sigmoid()
        d_z = d_z * s * (1 + z * (1 - s))
    total, weighted = d_z.sum(2, keepdim=True), (d_z * normal).sum(2, keepdim=True)  # [B, C, 1]
    gain, groups = weight * (1 + scale), (len(x), mean.shape[1], -1)
    size = max(x[0].numel() // max(mean.shape[1], 1), 1) if len(x) else 1
    if x.numel():
        each = x.shape[1] // mean.shape[1]
        first, second = ((gain * v).reshape(groups).sum(2).repeat_interleave(each, 1)[..., None] / size
                         for v in (total, weighted))
        spread = rstd.to(normal.dtype).repeat_interleave(each, 1)[..., None]
        d_x = (spread * (gain * d_z - first - normal * second)).to(x.dtype).reshape(x.shape)
    else:
        d_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    d_weight, d_bias = (((1 + scale) * v).sum((0, 2)) for v in (weighted, total))
    if isinstance(scale, float):
        return d_x, d_weight, d_bias, None, None
    return d_x, d_weight, d_bias, (weight * weighted + bias * total)[..., 0], total[..., 0]
