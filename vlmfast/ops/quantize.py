"""Quantization of features to codes: Gumbel-softmax over a codebook without the noise, the softmax or the one-hot in
memory, and the nearest code."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_checks import draw_seed
from .attention_native import DTYPES, address
from .autograd import first_order

MODES = "soft", "straight_through", "reinmax", "argmax"
LAYOUTS = "nchw", "nlc"


class Quantized(NamedTuple):
    """z [B, D, H, W] or [B, L, D] like the codebook's type; indices int64 [B, H, W] or [B, L]; kl [] float32."""
    z: Tensor
    indices: Tensor
    kl: Tensor


def gumbel_quantize(logits: Tensor, codebook: Tensor, *, tau: float = 1.0, mode: str = "soft", kl_weight: float = 0.0,
                    layout: str = "nchw", seed=None, noise: Tensor | None = None) -> Quantized:
    r"""Codes for logits by the Gumbel-softmax trick, fused with the codebook and with the divergence's loss.

    Equivalent, for logits brought to [N, V], to::

        s = (logits + gumbel_noise(logits.shape, seed)) / tau
        y = s.softmax(-1)                                        # "soft"
        y = one_hot(s.argmax(-1)) + y - y.detach()               # "straight_through"
        z = y @ codebook
        q = logits.softmax(-1)
        kl = kl_weight * (q * (q.log() + log(V))).sum(-1).mean()

    but the logits are read once and nothing else of their size is written forward, and only their gradient backward;
    the noise is drawn again there.

    Args:
        logits:  [B, V, H, W] for layout "nchw" or [B, L, V] for "nlc"; float32, bfloat16, float16 or float64. Views
            whose positions or whose entries lie side by side are read as they are.
        codebook:  [V, D] of the same dtype.
        tau:  temperature, above 0.
        mode:  "soft"; "straight_through": the code of the largest score forward, the gradient of "soft" backward;
            "reinmax": the same forward with a second-order gradient (Liu et al. 2023, alg. 2); "argmax": no noise, the
            code of the largest logit, no gradient for the logits but that of the divergence.
        kl_weight:  of the mean over positions of KL(softmax(logits) || uniform), which uses neither noise nor tau;
            0 leaves it out.
        layout:  where the vocabulary is.
        seed:  an int or [] int64 tensor; None draws one number from torch's generator of the device.
        noise:  shaped like logits, used in place of the drawn one.

    Returns:
        Quantized(z, indices, kl). `indices` are those of the largest noisy score. Gradients reach logits and codebook
        through z and kl.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Jang et al. 2017 (arXiv:1611.01144), eq. 2; DALL-E (Ramesh et al. 2021, arXiv:2102.12092), app. A.2;
    ReinMax (Liu et al. 2023, arXiv:2304.08612).
    """
    op = "gumbel_quantize"
    _check_choice(op, "mode", mode, MODES)
    _check_choice(op, "layout", layout, LAYOUTS)
    _check_float(op, "logits", logits, 4 if layout == "nchw" else 3, "[B, V, H, W]" if layout == "nchw" else "[B, L, V]")
    entries = logits.shape[1 if layout == "nchw" else -1]
    _check_codebook(op, codebook, logits, entries)
    if not 0 < tau < math.inf:
        raise ValueError(f"{op}: tau is {tau}, it must be above 0 and finite")
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"{op}: kl_weight is {kl_weight}, it must be 0 or above and finite")
    if noise is not None:
        if not isinstance(noise, Tensor) or noise.shape != logits.shape or not noise.is_floating_point():
            raise ValueError(f"{op}: noise has shape {tuple(getattr(noise, 'shape', ()))}, it must be floating-point "
                             f"and shaped like logits, {tuple(logits.shape)}")
        noise = noise.detach().to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    noisy = mode != "argmax"
    seed = draw_seed(op, seed, logits, noisy and noise is None)
    grid = _grid(logits, layout)
    given = _grid(noise, layout) if noisy and noise is not None else None
    z, indices, kl = _run(grid, codebook, given, seed, float(tau), mode, float(kl_weight))
    if layout == "nchw":
        batch, _, height, width = logits.shape
        return Quantized(z.view(batch, height, width, -1).permute(0, 3, 1, 2), indices.view(batch, height, width), kl)
    return Quantized(z.view(*logits.shape[:2], -1), indices.view(logits.shape[:2]), kl)


def gumbel_noise(shape, seed, offset: int = 0, *, layout: str = "nlc", dtype: torch.dtype = torch.float32,
                 device=None) -> Tensor:
    """The very noise that `gumbel_quantize` uses with this seed.

    Args:
        shape:  [..., V], or [B, V, H, W] with layout "nchw".
        seed:  an int or [] int64 tensor.
        offset:  of the first position's number.

    Returns:
        Gumbel(0, 1) draws between -3.14 and 22.9, never infinite: entry v of position n is word v % 4 of Philox's
        counter (n + offset, v / 4).
    """
    op = "gumbel_noise"
    shape = torch.Size(shape)
    _check_choice(op, "layout", layout, LAYOUTS)
    if layout == "nchw":
        if len(shape) != 4:
            raise ValueError(f"{op}: shape is {tuple(shape)}, it must be [B, V, H, W]")
        batch, entries, height, width = shape
        drawn = gumbel_noise((batch, height, width, entries), seed, offset, dtype=dtype, device=device)
        return drawn.permute(0, 3, 1, 2)
    if not shape:
        raise ValueError(f"{op}: shape is empty, it must end in the vocabulary's size")
    seed = draw_seed(op, seed, torch.empty(0, device=device), True)
    count, entries = math.prod(shape[:-1]), shape[-1]
    if seed.device.type == "cpu" and dispatch.choose("quantize", seed) == "native":
        out = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        _native.gumbel_noise(count, entries, int(seed) & (2**64 - 1), offset, dtype == torch.float64, out.data_ptr(),
                             torch.get_num_threads())
        return out.to(dtype)
    from .reference import quantize as reference

    return reference.gumbel_noise(count, entries, seed, offset).view(shape).to(dtype)


def encode_indices(features: Tensor, weight: Tensor, bias: Tensor | None = None, *, layout: str = "nchw") -> Tensor:
    """argmax over v of weight[v] · feature + bias[v]: the last 1 x 1 convolution of an encoder without its logits.

    Args:
        features:  [B, C, H, W], or [B, L, C] with layout "nlc"; float32, bfloat16, float16 or float64.
        weight:  [V, C] or [V, C, 1, 1], same dtype.
        bias:  [V] or None.

    Returns:
        int64 [B, H, W] or [B, L]; the first of equal ones. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.
    """
    op = "encode_indices"
    _check_choice(op, "layout", layout, LAYOUTS)
    nchw = layout == "nchw"
    _check_float(op, "features", features, 4 if nchw else 3, "[B, C, H, W]" if nchw else "[B, L, C]")
    width = features.shape[1 if nchw else -1]
    if not isinstance(weight, Tensor) or weight.ndim not in (2, 4) or weight.shape[1] != width \
            or weight.shape[2:].numel() != 1 or not weight.shape[0]:
        raise ValueError(f"{op}: weight has shape {tuple(getattr(weight, 'shape', ()))}, it must be [V, {width}] or "
                         f"[V, {width}, 1, 1]")
    weight = weight.flatten(1)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, it must be [{len(weight)}]")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and (x.dtype != features.dtype or x.device != features.device):
            raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, features {features.dtype} on {features.device}")
    with torch.no_grad():
        grid = _grid(features, layout)
        found = _encode_op(grid, weight, bias)
    return found.view(features.shape[0], *features.shape[2:]) if nchw else found.view(features.shape[:2])


def _check_choice(op: str, name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, it must be one of {', '.join(choices)}")


def _check_float(op: str, name: str, x, rank: int, layout: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a float32, float64, bfloat16 or float16 tensor")
    if x.ndim != rank:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {layout}")


def _check_codebook(op: str, codebook, logits: Tensor, entries: int) -> None:
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or codebook.shape[0] != entries or not entries:
        raise ValueError(f"{op}: codebook has shape {tuple(getattr(codebook, 'shape', ()))}, it must be [V, D] with "
                         f"the V of the logits, {entries}, above 0")
    if codebook.dtype != logits.dtype or codebook.device != logits.device:
        raise ValueError(f"{op}: codebook is {codebook.dtype} on {codebook.device}, logits {logits.dtype} on "
                         f"{logits.device}; they must be equal")


def _grid(x: Tensor, layout: str) -> Tensor:
    """A [B, positions, V] view in which either positions or entries lie side by side."""
    grid = x.flatten(2).transpose(1, 2) if layout == "nchw" else x
    if 1 in (grid.stride(1), grid.stride(2)):
        return grid
    return (x.contiguous().flatten(2).transpose(1, 2)) if layout == "nchw" else x.contiguous()


def _native_grid(x: Tensor | None):
    if x is None:
        return _native.Grid(0, 0, 0, 0, 0)
    strides = x.stride()
    # a single position or entry has any stride; the kernel asks which of the two is 1
    position = 1 if x.shape[1] == 1 and strides[2] != 1 else strides[1]
    return _native.Grid(x.data_ptr(), DTYPES[x.dtype], strides[0], position, strides[2])


def _run(grid: Tensor, codebook: Tensor, given: Tensor | None, seed: Tensor | None, tau: float, mode: str,
         kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, D], indices [N], kl [] from logits [B, P, V]."""
    if torch.is_grad_enabled() and (grid.requires_grad or codebook.requires_grad):
        return _Quantize.apply(grid, codebook, given, seed, tau, mode, kl_weight)
    z, indices, _, plain, expected = _fwd_op(grid, codebook, given, seed, tau, mode == "soft", kl_weight > 0, False)
    return _codes(z, indices, codebook, mode), indices, _divergence(plain, expected, grid, kl_weight)


def _codes(z: Tensor, indices: Tensor, codebook: Tensor, mode: str) -> Tensor:
    return z.to(codebook.dtype) if mode == "soft" else codebook[indices]


def _divergence(plain: Tensor, expected: Tensor, grid: Tensor, kl_weight: float) -> Tensor:
    if not kl_weight or not len(plain):
        return torch.zeros((), dtype=torch.promote_types(grid.dtype, torch.float32), device=grid.device)
    return kl_weight * (expected - plain + math.log(grid.shape[2])).mean()


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, codebook, given, seed, tau, mode, kl_weight):
        soft = mode == "soft"
        z, indices, lse, plain, expected = _fwd_op(grid, codebook, given, seed, tau, soft, kl_weight > 0, soft)
        ctx.save_for_backward(grid, codebook, given, seed, z, indices, lse, plain, expected)
        ctx.settings = tau, mode, kl_weight
        ctx.mark_non_differentiable(indices)
        return _codes(z, indices, codebook, mode), indices, _divergence(plain, expected, grid, kl_weight)

    @staticmethod
    @first_order("gumbel_quantize")
    def backward(ctx, d_z, _, d_kl):
        grid, codebook, given, seed, z, indices, lse, plain, expected = ctx.saved_tensors
        tau, mode, kl_weight = ctx.settings
        need_logits, need_codebook = ctx.needs_input_grad[:2]
        kl = d_kl * (kl_weight / max(grid.shape[0] * grid.shape[1], 1)) if kl_weight else None
        d_codebook = None
        if need_codebook and mode != "soft":
            wide = torch.promote_types(codebook.dtype, torch.float32)
            d_codebook = torch.zeros(codebook.shape, dtype=wide, device=codebook.device)
            d_codebook.index_add_(0, indices, d_z.to(wide))
        d_z = d_z.to(z.dtype if z is not None and z.numel() else torch.promote_types(d_z.dtype, torch.float32))
        d_z = d_z.contiguous()

        def average(tau, given, seed):
            """(mean of x under softmax((l + noise) / tau), that softmax's log-sum-exp): x averages to d_z · z."""
            soft, _, norm, _, _ = _fwd_op(grid, codebook, given, seed, tau, True, False, True)
            return (d_z * soft).sum(-1), norm

        d_logits = None
        if mode == "soft":
            found = _bwd_op(grid, codebook, given, seed, tau, d_z, 1 / tau, lse, (d_z * z).sum(-1), plain, expected, kl,
                            0.0, None, None, need_logits, need_codebook)
            d_logits, d_codebook = found
        elif need_logits and mode == "straight_through":
            mean, lse = average(tau, given, seed)
            d_logits, _ = _bwd_op(grid, codebook, given, seed, tau, d_z, 1 / tau, lse, mean, plain, expected, kl, 0.0,
                                  None, None, True, False)
        elif need_logits and mode == "reinmax":
            relaxed, lse = average(tau, None, None)
            chosen = (d_z * codebook[indices]).sum(-1)
            if tau == 1:
                plain_mean, norm = relaxed, lse
            else:
                plain_mean, norm = average(1.0, None, None)
            d_logits, _ = _bwd_op(grid, codebook, None, None, tau, d_z, 1.0, lse, (relaxed + chosen) / 2, norm, expected,
                                  kl, 0.5, plain_mean, indices, True, False)
        elif need_logits and kl_weight:
            d_logits, _ = _bwd_op(grid, codebook, None, None, 1.0, None, 0.0, plain, None, plain, expected, kl, 0.0,
                                  None, None, True, False)
        elif need_logits:
            d_logits = torch.zeros_like(grid)
        return (d_logits if need_logits else None, d_codebook.to(codebook.dtype) if need_codebook else None, None, None,
                None, None, None)


# The primitives as ops of torch.library. What is not wanted comes back empty.


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _reference_noise(grid: Tensor, given: Tensor | None, seed: Tensor | None) -> Tensor | None:
    from .reference import quantize as reference

    if given is not None:
        return given.flatten(0, 1)
    if seed is None:
        return None
    return reference.gumbel_noise(grid.shape[0] * grid.shape[1], grid.shape[2], seed)


def _native_call(grid, codebook, given, seed, tau, z, indices, lse, plain, expected):
    sizes = [*grid.shape, codebook.shape[1]]
    number = 0 if seed is None else int(seed) & (2**64 - 1)
    return _native.Quantize(sizes, _native_grid(grid), _native_grid(given), seed is not None, number, 0,
                            codebook.data_ptr(), tau, torch.get_num_threads(), *map(address, (z, indices, lse, plain,
                                                                                            expected)))


def _fwd(grid, codebook, given, seed, tau, want_z, want_kl, want_lse):
    wide, count = _wide(grid), grid.shape[0] * grid.shape[1]
    backend = dispatch.choose("quantize", grid)
    if backend == "native":
        z, indices, lse, plain, expected = _empty(grid, codebook, want_z, want_kl, want_lse)
        codes = codebook.to(wide).contiguous()
        if count:
            some = [x if x.numel() else None for x in (z, indices, lse, plain, expected)]
            _native.quantize_fwd(_native_call(grid, codes, given, seed, tau, *some))
        return z, indices, lse, plain, expected
    if backend == "triton":
        return dispatch.module("quantize", "triton").forward(grid, codebook, given, seed, tau, want_z, want_kl, want_lse)
    with torch.autocast(grid.device.type, enabled=False):
        found = dispatch.module("quantize", "reference").forward(
            grid.flatten(0, 1), codebook, _reference_noise(grid, given, seed), tau, want_z, want_kl)
    z, indices, lse, plain, expected = found
    return tuple(grid.new_empty(0, dtype=wide) if x is None else x
                 for x in (z, indices, lse if want_lse else None, plain, expected))


def _empty(grid, codebook, want_z, want_kl, want_lse):
    wide, count = _wide(grid), grid.shape[0] * grid.shape[1]
    shapes = (count, codebook.shape[1]) if want_z else 0, (count,) if want_lse else 0, *((count,) if want_kl else 0,) * 2
    z, lse, plain, expected = (grid.new_empty(shape, dtype=wide) for shape in shapes)
    return z, grid.new_empty(count, dtype=torch.int64), lse, plain, expected


def _bwd(grid, codebook, given, seed, tau, d_z, gain, lse, mean, plain, expected, kl, plain_gain, plain_mean, indices,
         want_logits, want_codebook):
    wide = _wide(grid)
    backend = dispatch.choose("quantize", grid)
    arguments = (grid, codebook, given, seed, tau, d_z, gain, lse, mean, plain, expected, kl, plain_gain, plain_mean,
                 indices, want_logits, want_codebook)
    if backend == "triton":
        return dispatch.module("quantize", "triton").backward(*arguments)
    if backend == "native":
        d_logits = torch.empty_like(grid) if want_logits else grid.new_empty(0)
        if want_logits and 1 not in d_logits.stride()[1:]:
            d_logits = torch.empty(grid.shape, dtype=grid.dtype)
        d_codebook = grid.new_empty(codebook.shape if want_codebook else 0, dtype=wide)
        codes = codebook.to(wide).contiguous()
        mean, plain_mean = (None if x is None else x.contiguous() for x in (mean, plain_mean))
        plain, expected = (x if x is not None and x.numel() else None for x in (plain, expected))
        call = _native_call(grid, codes, given, seed, tau, None, indices, lse, plain, expected)
        _native.quantize_bwd(call, *map(address, (d_z, mean, plain_mean)), gain, 0.0 if kl is None else float(kl),
                             plain_gain, _native_grid(d_logits if want_logits else None),
                             d_codebook.data_ptr() if want_codebook else 0)
        return d_logits, d_codebook
    if d_z is None:
        d_z, mean = codebook.new_zeros(lse.shape[0], codebook.shape[1]), torch.zeros_like(lse)
    with torch.autocast(grid.device.type, enabled=False):
        d_logits, d_codebook = dispatch.module("quantize", "reference").backward(
            grid.flatten(0, 1), codebook, _reference_noise(grid, given, seed), tau, d_z, gain, lse, mean,
            plain if plain is not None and plain.numel() else None, expected, 0.0 if kl is None else kl, plain_gain,
            plain_mean, indices, want_codebook)
    return d_logits.view(grid.shape) if want_logits else grid.new_empty(0), \
        grid.new_empty(0, dtype=wide) if d_codebook is None else d_codebook


def _bwd_fake(grid, codebook, given, seed, tau, d_z, gain, lse, mean, plain, expected, kl, plain_gain, plain_mean,
              indices, want_logits, want_codebook):
    return torch.empty_like(grid) if want_logits else grid.new_empty(0), \
        grid.new_empty(codebook.shape if want_codebook else 0, dtype=_wide(grid))


def _encode(grid, weight, bias):
    wide = _wide(grid)
    if dispatch.choose("quantize", grid) == "native":
        indices = grid.new_empty(grid.shape[0] * grid.shape[1], dtype=torch.int64)
        weight = weight.to(wide).contiguous()
        bias = None if bias is None else bias.to(wide).contiguous()
        if indices.numel():
            _native.encode_indices([*grid.shape[:2], *weight.shape], _native_grid(grid), weight.data_ptr(),
                                   address(bias), wide == torch.float64, indices.data_ptr(), torch.get_num_threads())
        return indices
    return dispatch.module("quantize", "reference").encode_indices(grid.flatten(0, 1), weight, bias)


def _encode_fake(grid, weight, bias):
    return grid.new_empty(grid.shape[0] * grid.shape[1], dtype=torch.int64)


def _fwd_fake(grid, codebook, given, seed, tau, want_z, want_kl, want_lse):
    return _empty(grid, codebook, want_z, want_kl, want_lse)


_library = torch.library.Library("vlmfast", "FRAGMENT")
_ARGUMENTS = "Tensor grid, Tensor codebook, Tensor? given, Tensor? seed, float tau, "
_library.define("quantize_fwd(" + _ARGUMENTS + "bool want_z, bool want_kl, bool want_lse) -> "
                "(Tensor, Tensor, Tensor, Tensor, Tensor)")
_library.define("quantize_bwd(" + _ARGUMENTS + "Tensor? d_z, float gain, Tensor lse, Tensor? mean, Tensor? plain, "
                "Tensor? expected, Tensor? kl, float plain_gain, Tensor? plain_mean, Tensor? indices, bool want_logits, "
                "bool want_codebook) -> (Tensor, Tensor)")
_library.define("encode_indices(Tensor grid, Tensor weight, Tensor? bias) -> Tensor")
for _name, _implementation, _fake in (("quantize_fwd", _fwd, _fwd_fake), ("quantize_bwd", _bwd, _bwd_fake),
                                      ("encode_indices", _encode, _encode_fake)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
_fwd_op, _bwd_op = torch.ops.vlmfast.quantize_fwd.default, torch.ops.vlmfast.quantize_bwd.default
_encode_op = torch.ops.vlmfast.encode_indices.default
