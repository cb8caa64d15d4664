"""Group normalisation, modulation by scale and shift, and SiLU as one op: the entrance of a U-Net's residual block."""

import math

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_native import DTYPES
from .autograd import first_order

_OP = "group_norm_silu"


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, *, eps: float = 1e-5,
                    scale: Tensor | None = None, shift: Tensor | None = None, silu: bool = True) -> Tensor:
    r"""Normalises groups of channels, modulates them and applies SiLU, reading x from memory once.

    .. math:: y = \mathrm{silu}\big((1 + s) \odot (w \odot \tfrac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + b) + t\big)

    with the mean and the biased variance over the positions and channels of each group. Equivalent to::

        z = F.group_norm(x, num_groups, weight, bias, eps)
        z = z * (1 + scale[..., None, None]) + shift[..., None, None]    # with scale and shift
        F.silu(z)                                                        # with silu

    Statistics and arithmetic are in float32 (float64 for float64), rounded once to x's type; a mean far from zero costs
    no digits. The backward recomputes what it needs from x and two numbers a group: nothing else of x's size is kept.

    Args:
        x:  [B, C, *spatial] float32, bfloat16, float16 or float64. Dimensions behind C that are one run of memory are
            read in place, others from a copy.
        num_groups:  G, a divisor of C.
        weight, bias:  [C] of x's type or float32.
        eps:  added to the variance, 0 or above.
        scale, shift:  [B, C] of x's type or float32, both or neither; rows may be views of a wider matrix.
        silu:  False leaves the activation out.

    Under autocast parameters of any floating type are taken; x keeps its type.

    Returns:
        shaped like x and of its type, contiguous. Gradients reach x, weight, bias, scale and shift. A NaN or an
        infinity stays within its group, and in the gradients of what its channels share.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Wu and He 2018 (arXiv:1803.08494), eq. 1-4; scale and shift as in Dhariwal and Nichol 2021
    (arXiv:2105.05233), sec. 3.1; GLIDE (arXiv:2112.10741).
    """
    _check(x, num_groups, eps, (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)))
    arguments = x, weight, bias, scale, shift, num_groups, float(eps), bool(silu)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments[:5]):
        return _GroupNorm.apply(*arguments)
    return group_norm_fwd(*arguments)[0]


def _check(x, num_groups, eps, parameters) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{_OP}: x is {kind}, it must be a float32, float64, bfloat16 or float16 tensor")
    if x.ndim < 2:
        raise ValueError(f"{_OP}: x has shape {tuple(x.shape)}, it must be [B, C, ...]")
    if isinstance(num_groups, bool) or not isinstance(num_groups, int):
        raise TypeError(f"{_OP}: num_groups is {num_groups!r}, it must be an int")
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError(f"{_OP}: num_groups is {num_groups}, it must be a positive divisor of the {x.shape[1]} "
                         "channels of x")
    if isinstance(eps, Tensor) or not 0 <= eps < math.inf:
        raise ValueError(f"{_OP}: eps is {eps}, it must be a number of 0 or above")
    for name, value in parameters:
        if value is None and name in ("scale", "shift"):
            continue
        _check_parameter(name, value, x, x.shape[1:2] if name in ("weight", "bias") else x.shape[:2])
    (_, scale), (_, shift) = parameters[2:]
    if (scale is None) != (shift is None):
        absent, there = ("shift", "scale") if shift is None else ("scale", "shift")
        raise ValueError(f"{_OP}: {absent} is None and {there} is given, it must be both or neither")


def _check_parameter(name: str, value, x: Tensor, shape) -> None:
    if not isinstance(value, Tensor) or value.dtype not in DTYPES:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{_OP}: {name} is {kind}, it must be a tensor of x's type or float32")
    if value.shape != shape:
        raise ValueError(f"{_OP}: {name} has shape {tuple(value.shape)}, it must be {list(shape)}")
    if value.device != x.device:
        raise ValueError(f"{_OP}: {name} is on {value.device}, it must be on {x.device} with x")
    if value.dtype not in (x.dtype, torch.float32) and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(f"{_OP}: {name} is {value.dtype}, it must be {x.dtype} like x, or torch.float32")


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, num_groups, eps, silu):
        out, statistics = group_norm_fwd(x, weight, bias, scale, shift, num_groups, eps, silu)
        ctx.save_for_backward(x, statistics, weight, bias, scale, shift)
        ctx.silu = silu
        return out

    @staticmethod
    @first_order(_OP)
    def backward(ctx, d_out):
        x, statistics, *parameters = ctx.saved_tensors
        need_x, *needed = ctx.needs_input_grad[:5]
        d_x, affine, modulation = group_norm_bwd(d_out, x, statistics, *parameters, ctx.silu, need_x)
        found = (*affine.unbind(), *(modulation.unbind() if modulation.ndim > 1 else (None, None)))
        found = [(g if g.dtype == p.dtype else g.to(p.dtype)) if wanted else None
                 for g, p, wanted in zip(found, parameters, needed, strict=True)]
        return d_x if need_x else None, *found, None, None, None


# The primitives as ops of torch.library. "statistics" are mean and rstd, [2, B, G] float64; gradients of weight and
# bias are one tensor [2, C], those of scale and shift one [2, B, C]; what is not there is [0].


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lines(x: Tensor) -> tuple[Tensor, int, int]:
    """(x with positions side by side, its strides of batch and channel)."""
    if not x.is_contiguous():
        rows = x[..., None] if x.ndim == 2 else x.flatten(2)
        if rows.shape[2] == 1 or rows.stride(2) == 1:
            return rows, rows.stride(0), rows.stride(1)
        x = x.contiguous()
    positions = math.prod(x.shape[2:])
    return x, x.shape[1] * positions, positions


def _native_call(x, lines, weight, bias, scale, shift, statistics, eps, silu):
    """(the kernel's arguments, the tensors they point into)."""
    wide, (batch, channels, *spatial), parameters = _wide(x), x.shape, []
    for value in (weight, bias, scale, shift):
        value = value if value is None or value.dtype == wide else value.to(wide)
        parameters.append(value if value is None or value.stride(-1) == 1 else value.contiguous())
    weight, bias, scale, shift = parameters
    modulation = (0, 0, 0, 0) if scale is None else (scale.data_ptr(), scale.stride(0), shift.data_ptr(),
                                                     shift.stride(0))
    rows, *strides = lines
    mean, groups = statistics.data_ptr(), statistics.shape[2]
    call = _native.GroupNorm(
        DTYPES[x.dtype], (batch, channels, math.prod(spatial), groups), rows.data_ptr(), *strides, weight.data_ptr(),
        bias.data_ptr(), *modulation, mean, mean + 8 * batch * groups, eps, silu, torch.get_num_threads())
    return call, (rows, parameters)


def _fwd(x, weight, bias, scale, shift, num_groups, eps, silu):
    backend = dispatch.choose("group_norm", x)
    if backend != "native":
        module = dispatch.module("group_norm", backend)
        out, mean, rstd = module.forward(x, num_groups, weight, bias, scale, shift, eps, silu)
        return out, torch.stack((mean, rstd))
    out = torch.empty(x.shape, dtype=x.dtype)
    if not x.numel():
        return out, torch.zeros(2, x.shape[0], num_groups, dtype=torch.float64)
    statistics = torch.empty(2, x.shape[0], num_groups, dtype=torch.float64)
    call, _alive = _native_call(x, _lines(x), weight, bias, scale, shift, statistics, eps, silu)
    _native.group_norm_fwd(call, out.data_ptr())
    return out, statistics


def _bwd(d_out, x, statistics, weight, bias, scale, shift, silu, need_x):
    backend = dispatch.choose("group_norm", x)
    if backend != "native":
        module = dispatch.module("group_norm", backend)
        d_x, d_weight, d_bias, d_scale, d_shift = module.backward(d_out, x, *statistics, weight, bias, scale, shift,
                                                                  silu)
        return d_x if need_x else x.new_empty(0), torch.stack((d_weight, d_bias)), \
            d_weight.new_empty(0) if scale is None else torch.stack((d_scale, d_shift))
    d_x, affine, modulation = found = _gradients(x, scale, need_x)
    if not x.numel():
        return tuple(g.zero_() for g in found)
    lines = _lines(d_out)
    call, _alive = _native_call(x, _lines(x), weight, bias, scale, shift, statistics, 0.0, silu)
    step = 8 if x.dtype == torch.float64 else 4
    d_weight, d_scale = affine.data_ptr(), 0 if scale is None else modulation.data_ptr()
    _native.group_norm_bwd(call, lines[0].data_ptr(), *lines[1:], d_x.data_ptr() if need_x else 0, d_weight,
                           d_weight + step * x.shape[1], d_scale, d_scale and d_scale + step * scale.numel())
    return found


def _gradients(x, scale, need_x):
    wide, (batch, channels) = _wide(x), x.shape[:2]
    return x.new_empty(x.shape if need_x else 0), x.new_empty((2, channels), dtype=wide), \
        x.new_empty(0 if scale is None else (2, batch, channels), dtype=wide)


def _fwd_fake(x, weight, bias, scale, shift, num_groups, eps, silu):
    return x.new_empty(x.shape), x.new_empty((2, x.shape[0], num_groups), dtype=torch.float64)


def _bwd_fake(d_out, x, statistics, weight, bias, scale, shift, silu, need_x):
    return _gradients(x, scale, need_x)


_library = torch.library.Library("vlmfast", "FRAGMENT")
_PARAMETERS = "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, "
_library.define("group_norm_fwd(Tensor x, " + _PARAMETERS + "SymInt num_groups, float eps, bool silu) -> "
                "(Tensor, Tensor)")
_library.define("group_norm_bwd(Tensor d_out, Tensor x, Tensor statistics, " + _PARAMETERS + "bool silu, bool need_x) "
                "-> (Tensor, Tensor, Tensor)")
for _name, _implementation, _fake in (("group_norm_fwd", _fwd, _fwd_fake), ("group_norm_bwd", _bwd, _bwd_fake)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
group_norm_fwd, group_norm_bwd = torch.ops.vlmfast.group_norm_fwd.default, torch.ops.vlmfast.group_norm_bwd.default
