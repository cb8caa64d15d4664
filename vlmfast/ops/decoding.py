"""Linear layers while one token is decoded at a time."""

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_native import address
from .reference import decoding as reference

MAX_ROWS = 32  # beyond, a matrix product is no slower


def few_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, fast on the CPU for up to MAX_ROWS rows without gradients: the weights are read once, in order.

    Args:
        x:  [.., K] floating point; float32 and float64 have a kernel.
        weight:  [N, K] with contiguous rows. bias: [N] or None.

    Returns:
        [.., N]. Anything the kernel does not take, gradients and compiled graphs among it, goes to `F.linear`.
    """
    if not _has_kernel(x, weight, bias):
        return reference.few_row_linear(x, weight, bias)
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], len(weight))
    rows = x.numel() // x.shape[-1]
    _native.few_row_linear(x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr(), rows, len(weight),
                           x.shape[-1], weight.stride(0), x.dtype == torch.float64, torch.get_num_threads())
    return out


def _has_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    if not x.ndim or weight.ndim != 2 or not x.numel() or x.numel() > MAX_ROWS * x.shape[-1]:
        return False
    if weight.shape[1] != x.shape[-1] or weight.stride(1) != 1 or torch.is_autocast_enabled("cpu"):
        return False
    if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()):
        return False
    if any(part.dtype != x.dtype or part.device != x.device for part in (weight, bias) if part is not None):
        return False
    return dispatch.choose("decoding", x) == "native"
