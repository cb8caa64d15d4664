"""The alignment family in plain PyTorch: the definition that every backend is tested against, on any device.

Sizes: B batch, N rows (words), M columns (regions), D width. Computed in float64: the plan is about the 50th power of
exp(-cost / beta), whose small entries leave float32's range.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the norms in the cosine cost, as in UNITER's code


def keep_of(lengths: Tensor | None, mask: Tensor | None, batch: int, size: int, device) -> Tensor:
    """[B, size] bool, True where a row exists."""
    if lengths is not None:
        return torch.arange(size, device=device) < lengths[:, None]
    return torch.ones(batch, size, dtype=torch.bool, device=device) if mask is None else mask


def inverse(mass: Tensor, count: Tensor) -> Tensor:
    """1 / (count * mass); 0 for a line without mass: padding, or a kernel that has vanished."""
    there = mass >= torch.finfo(mass.dtype).tiny
    return torch.where(there, 1 / (count * mass.where(there, 1.0)), 0.0)


def ipot(cost: Tensor, keep_x: Tensor, keep_y: Tensor, beta: float = 0.5, iterations: int = 50, k: int = 1) -> Tensor:
    """Transport plan by inexact proximal points (Xie et al. 2018, arXiv:1802.04307, alg. 1).

    Args:
        cost:  [B, N, M]; values in padding do not matter.
        keep_x, keep_y:  [B, N] and [B, M] bool, True where a row or column exists.
        beta, iterations, k:  strength of the proximal term, outer steps, scalings within one.

    Returns:
        [B, N, M] in float32, or float64 for float64, 0 in padding.
    """
    keep = keep_x[:, :, None] & keep_y[:, None]
    wide = cost.double()
    least = wide.masked_fill(~keep, torch.inf).flatten(1).amin(1) if keep[0:1].numel() else wide.new_zeros(len(wide))
    least = least.where(least.isfinite(), 0.0)[:, None, None]  # cancels in the plan, keeps the kernel from vanishing
    kernel = ((least - wide) / beta).exp().masked_fill(~keep, 0)
    n, m = (x.sum(1, keepdim=True).clamp(min=1).double() for x in (keep_x, keep_y))
    plan, sigma = keep.double(), keep_x / n
    for _ in range(iterations):
        q = kernel * plan
        for _ in range(k):
            delta = inverse((q * sigma[:, :, None]).sum(1), m)
            sigma = inverse((q * delta[:, None]).sum(2), n)
        plan = q * delta[:, None] * sigma[:, :, None]
    return plan.to(torch.promote_types(cost.dtype, torch.float32))


def cosine_cost(x: Tensor, y: Tensor, keep_x: Tensor, keep_y: Tensor) -> Tensor:
    """1 - cosine of every pair, [B, N, M]; padded rows count as 0 vectors."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, y = (F.normalize(side.to(dtype).masked_fill(~keep[..., None], 0), dim=-1, eps=EPS)
            for side, keep in ((x, keep_x), (y, keep_y)))
    return 1 - x @ y.transpose(1, 2)


def optimal_transport_distance(x: Tensor, y: Tensor, keep_x: Tensor, keep_y: Tensor, beta: float = 0.5,
                               iterations: int = 50, k: int = 1) -> Tensor:
    """[B] <plan, cost> with the plan held constant (UNITER, arXiv:1909.11740, sec. 3.2)."""
    cost = cosine_cost(x, y, keep_x, keep_y)
    return (ipot(cost.detach(), keep_x, keep_y, beta, iterations, k) * cost).sum((1, 2))
