"""Alignment of two sets of vectors, words and regions for example, by optimal transport."""

import math
import warnings
from functools import cache

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_checks import check_integers
from .attention_native import DTYPES, address
from .reference import alignment as reference


def ipot(cost: Tensor, lengths_x: Tensor | None = None, lengths_y: Tensor | None = None, *,
         mask_x: Tensor | None = None, mask_y: Tensor | None = None, beta: float = 0.5, iterations: int = 50,
         k: int = 1) -> Tensor:
    r"""Transport plan between two uniform distributions, by inexact proximal points (IPOT).

    .. math:: \min_P \langle P, C \rangle, \quad \textstyle\sum_j P_{ij} = 1/n, \; \sum_i P_{ij} = 1/m

    Equivalent, without padding, to::

        plan, sigma = torch.ones_like(cost), torch.full((B, N), 1 / N)
        for _ in range(iterations):
            q = torch.exp(-cost / beta) * plan
            for _ in range(k):
                delta = 1 / (M * torch.einsum("bnm,bn->bm", q, sigma))
                sigma = 1 / (N * torch.einsum("bnm,bm->bn", q, delta))
            plan = sigma[:, :, None] * q * delta[:, None]

    The last scaling makes row sums exact; column sums converge. Computed in float64 whatever the dtype.

    Args:
        cost:  [B, N, M] float32, bfloat16, float16 or float64, any strides.
        lengths_x, lengths_y:  [B] integers, how many rows and columns exist (a prefix of each); None: all.
        mask_x, mask_y:  [B, N] and [B, M] bool in their place, True where a row or column exists, holes allowed.
        beta:  weight of the proximal term in units of the cost; larger is smoother and converges more slowly.
        iterations, k:  outer steps and scalings within one.

    Returns:
        [B, N, M] float32 (float64 for float64), 0 in padding, whatever the cost holds there. An example without rows
        or without columns is 0. The plan carries no gradient. A row or column whose every exp(-cost / beta) vanishes
        beside the example's largest gets no mass.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Xie et al. 2018 (arXiv:1802.04307), alg. 1; UNITER (arXiv:1909.11740), sec. 3.2.
    """
    check_scaling("ipot", beta, iterations, k)
    if not isinstance(cost, Tensor):
        raise TypeError(f"ipot: cost is a {type(cost).__name__}, it must be a tensor")
    if cost.dtype not in DTYPES:
        raise TypeError(f"ipot: cost is {cost.dtype}, it must be float32, float64, bfloat16 or float16")
    if cost.ndim != 3:
        raise ValueError(f"ipot: cost has shape {tuple(cost.shape)}, it must be [B, N, M]")
    padding = check_padding("ipot", cost, cost.shape, lengths_x, lengths_y, mask_x, mask_y)
    return _ipot_op(cost.detach(), *padding, float(beta), iterations, k)


def optimal_transport_distance(x: Tensor, y: Tensor, lengths_x: Tensor | None = None, lengths_y: Tensor | None = None,
                               *, mask_x: Tensor | None = None, mask_y: Tensor | None = None, beta: float = 0.5,
                               iterations: int = 50, k: int = 1, return_plan: bool = False):
    r"""Cost of the best alignment of two sets of vectors, under the cosine distance.

    .. math:: d = \langle P, C \rangle, \quad C_{ij} = 1 - \cos(x_i, y_j), \quad P = \mathrm{IPOT}(C)

    Equivalent, without padding, to::

        cost = 1 - F.normalize(x, dim=-1, eps=1e-5) @ F.normalize(y, dim=-1, eps=1e-5).mT
        (ipot(cost.detach()) * cost).sum((1, 2))

    Args:
        x, y:  [B, N, D] and [B, M, D] of one dtype: float32, bfloat16, float16 or float64.
        lengths_x, lengths_y, mask_x, mask_y, beta, iterations, k:  as in `ipot`.
        return_plan:  also return the plan [B, N, M].

    Returns:
        [B] float32 (float64 for float64), 0 for an example without rows or columns. The plan is a constant for the
        gradient, as in UNITER: it flows to x and y through the cost, and is 0 in padding, whatever x and y hold there.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: UNITER (Chen et al. 2020, arXiv:1909.11740), sec. 3.2, eq. 3; Graph Optimal Transport (arXiv:2006.14744).
    """
    op = "optimal_transport_distance"
    check_scaling(op, beta, iterations, k)
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is a {type(value).__name__}, it must be a tensor")
        if value.dtype not in DTYPES:
            raise TypeError(f"{op}: {name} is {value.dtype}, it must be float32, float64, bfloat16 or float16")
        if value.ndim != 3:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, it must be [B, rows, D]")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{op}: y is {y.dtype}, x is {x.dtype}; they must be equal")
    if x.device != y.device:
        raise ValueError(f"{op}: y is on {y.device}, x on {x.device}; they must be equal")
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"{op}: y has shape {tuple(y.shape)}, x has {tuple(x.shape)}; batch and width must be equal")
    batch, n, m = len(x), x.shape[1], y.shape[1]
    lengths_x, lengths_y, mask_x, mask_y = padding = check_padding(op, x, (batch, n, m), lengths_x, lengths_y, mask_x,
                                                                   mask_y)
    keep_x = reference.keep_of(lengths_x, mask_x, batch, n, x.device)
    keep_y = reference.keep_of(lengths_y, mask_y, batch, m, x.device)
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, y.dtype)
        cost = reference.cosine_cost(x.to(dtype), y.to(dtype), keep_x, keep_y)
        plan = _ipot_op(cost.detach(), *padding, float(beta), iterations, k)
        distance = (plan * cost).sum((1, 2))
    return (distance, plan) if return_plan else distance


def check_scaling(op: str, beta, iterations, k) -> None:
    if isinstance(beta, Tensor) or not (beta > 0 and math.isfinite(beta)):
        raise ValueError(f"{op}: beta is {beta}, it must be a positive number")
    for name, value in (("iterations", iterations), ("k", k)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{op}: {name} is {value!r}, it must be an integer of at least 1")


def check_padding(op: str, like: Tensor, sizes, lengths_x, lengths_y, mask_x, mask_y):
    """(lengths_x, lengths_y, mask_x, mask_y) as the kernel takes them: int64, bool, contiguous."""
    lengths, masks = [], []
    for side, size, count, mask in (("x", sizes[1], lengths_x, mask_x), ("y", sizes[2], lengths_y, mask_y)):
        if count is not None and mask is not None:
            raise ValueError(f"{op}: mask_{side} is given with lengths_{side}, it must be one or the other")
        lengths.append(check_integers(op, f"lengths_{side}", count, like, sizes[0]))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise TypeError(f"{op}: mask_{side} is {kind}, it must be a bool tensor, True where a row exists")
            if mask.shape != (sizes[0], size):
                raise ValueError(f"{op}: mask_{side} has shape {tuple(mask.shape)}, it must be {[sizes[0], size]}")
            if mask.device != like.device:
                raise ValueError(f"{op}: mask_{side} is on {mask.device}, it must be on {like.device}")
            mask = mask.contiguous()
        masks.append(mask)
    return *lengths, *masks


def _refuse_lengths(cost: Tensor, lengths_x: Tensor | None, lengths_y: Tensor | None) -> None:
    for name, lengths, most in (("lengths_x", lengths_x, cost.shape[1]), ("lengths_y", lengths_y, cost.shape[2])):
        if lengths is not None and lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= most:
            raise ValueError(f"ipot: {name} runs from {int(lengths.min())} to {int(lengths.max())}, it must lie in "
                             f"0..{most}")


@cache
def _warn_reference() -> None:
    warnings.warn("alignment: the reference runs: this build has no Triton kernel of the family", stacklevel=5)


def _ipot(cost, lengths_x, lengths_y, mask_x, mask_y, beta, iterations, k):
    batch, n, m = cost.shape
    name = dispatch.choose("alignment", cost)
    if name != "native":
        if name == "triton":
            _warn_reference()
        if cost.device.type == "cpu":
            _refuse_lengths(cost, lengths_x, lengths_y)
        keep_x = reference.keep_of(lengths_x, mask_x, batch, n, cost.device)
        return reference.ipot(cost, keep_x, reference.keep_of(lengths_y, mask_y, batch, m, cost.device), beta,
                              iterations, k)
    if m > 1 and cost.stride(2) != 1:
        cost = cost.contiguous()
    plan = cost.new_empty(cost.shape, dtype=torch.promote_types(cost.dtype, torch.float32))
    status = _native.ipot(cost.data_ptr(), DTYPES[cost.dtype], (batch, n, m, cost.stride(0), cost.stride(1)),
                          address(lengths_x), address(lengths_y), address(mask_x), address(mask_y), beta, iterations, k,
                          plan.data_ptr(), torch.get_num_threads())
    if status:
        _refuse_lengths(cost, lengths_x, lengths_y)
    return plan


def _ipot_fake(cost, lengths_x, lengths_y, mask_x, mask_y, beta, iterations, k):
    return cost.new_empty(cost.shape, dtype=torch.promote_types(cost.dtype, torch.float32))


_library = torch.library.Library("vlmfast", "FRAGMENT")
_library.define("ipot(Tensor cost, Tensor? lengths_x, Tensor? lengths_y, Tensor? mask_x, Tensor? mask_y, float beta, "
                "int iterations, int k) -> Tensor")
_library.impl("ipot", _ipot, "CompositeExplicitAutograd")
torch.library.register_fake("vlmfast::ipot", _ipot_fake, lib=_library)
_ipot_op = torch.ops.vlmfast.ipot.default
