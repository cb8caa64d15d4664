"""Quantization of features to codes: Gumbel-softmax over a codebook without the noise, the softmax or the one-hot in
memory, and the nearest code."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_checks import draw_seed
from .attention_native import DTYPES
from .autograd import first_order
from .quantize_call import encode, quantize_bwd, quantize_fwd

MODES = "soft", "straight_through", "reinmax", "argmax"
LAYOUTS = "nchw", "nlc"


class VectorQuantized(NamedTuple):
    """z like x; indices int64 [B, H, W] or [B, L]; loss [] float32."""
    z: Tensor
    indices: Tensor
    loss: Tensor


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
    nchw = layout == "nchw"
    _check_float(op, "logits", logits, 4 if nchw else 3, "[B, V, H, W]" if nchw else "[B, L, V]")
    codebook = _autocast(codebook, logits.dtype)
    _check_codebook(op, codebook, logits, logits.shape[1 if nchw else -1])
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
    if nchw:
        batch, _, height, width = logits.shape
        z = z.view(batch, height, width, z.shape[1]).permute(0, 3, 1, 2)
        return Quantized(z, indices.view(batch, height, width), kl)
    return Quantized(z.view(*logits.shape[:2], z.shape[1]), indices.view(logits.shape[:2]), kl)


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
    backend = dispatch.choose("quantize", seed)
    if backend == "native":
        out = torch.empty(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        _native.gumbel_noise(count, entries, int(seed) & (2**64 - 1), offset, dtype == torch.float64, out.data_ptr(),
                             torch.get_num_threads())
        return out.to(dtype)
    return dispatch.module("quantize", backend).gumbel_noise(count, entries, seed, offset).view(shape).to(dtype)


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
    weight, bias = (_autocast(a, features.dtype) for a in (weight.flatten(1), bias))
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, it must be [{len(weight)}]")
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None:
            _check_alike(op, name, x, "features", features)
    with torch.no_grad():
        grid = _grid(features, layout)
        found = encode(grid, weight, bias)
    return found.view(features.shape[0], *features.shape[2:]) if nchw else found.view(features.shape[:2])


def vector_quantize(x: Tensor, codebook: Tensor, *, beta: float = 0.25, codebook_weight: float = 1.0,
                    legacy: bool = False, layout: str = "nchw") -> VectorQuantized:
    r"""The code nearest to each vector, without the distances in memory, and the loss that keeps the two together.

    Equivalent, for x brought to [N, D], to::

        indices = torch.cdist(x, codebook).argmin(-1)
        codes = codebook[indices]
        z = x + (codes - x).detach()
        loss = beta * F.mse_loss(x, codes.detach()) + codebook_weight * F.mse_loss(codes, x.detach())

    Args:
        x:  [B, D, H, W], or [B, L, D] with layout "nlc"; float32, bfloat16, float16 or float64.
        codebook:  [V, D], same dtype.
        beta:  weight of the commitment, which moves x towards its code.
        codebook_weight:  of the term that moves the code towards x; 0 for codes that follow a moving average.
        legacy:  the two weights change places, as in taming-transformers' `legacy=True`, with which its public
            checkpoints were trained.

    Returns:
        VectorQuantized(z, indices, loss). The gradient of z passes to x unchanged, none of it to the codebook.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1-3.
    """
    op = "vector_quantize"
    _check_choice(op, "layout", layout, LAYOUTS)
    nchw = layout == "nchw"
    _check_float(op, "x", x, 4 if nchw else 3, "[B, D, H, W]" if nchw else "[B, L, D]")
    if isinstance(codebook, Tensor):
        x, codebook = (_autocast(a, torch.promote_types(x.dtype, codebook.dtype)) for a in (x, codebook))
    width = x.shape[1 if nchw else -1]
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or codebook.shape[1] != width or not len(codebook):
        raise ValueError(f"{op}: codebook has shape {tuple(getattr(codebook, 'shape', ()))}, it must be [V, {width}]")
    _check_alike(op, "codebook", codebook, "x", x)
    for name, weight in (("beta", beta), ("codebook_weight", codebook_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{op}: {name} is {weight}, it must be 0 or above and finite")
    pull, push = (codebook_weight, beta) if legacy else (beta, codebook_weight)
    rows = x.movedim(1, -1) if nchw else x
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.no_grad():
        # |x - e|^2 is least where x e - |e|^2 / 2 is largest
        found = encode(_grid(x, layout), codebook, codebook.to(wide).square().sum(-1) / -2).view(rows.shape[:-1])
    codes = F.embedding(found, codebook)
    z = codes.detach() + (rows - rows.detach())
    loss = torch.zeros((), dtype=wide, device=x.device)
    if x.numel():
        wide_rows, wide_codes = rows.to(wide), codes.to(wide)
        for weight, moved, target in ((pull, wide_rows, wide_codes), (push, wide_codes, wide_rows)):
            loss = loss + weight * (moved - target.detach()).square().mean() if weight else loss
    return VectorQuantized(z.movedim(-1, 1) if nchw else z, found, loss)


def _check_choice(op: str, name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} is {value!r}, it must be one of {', '.join(choices)}")


def _check_float(op: str, name: str, x, rank: int, layout: str) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{op}: {name} is {kind}, it must be a float32, float64, bfloat16 or float16 tensor")
    if x.ndim != rank:
        raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be {layout}")


def _autocast(x, dtype: torch.dtype):
    """`x` in the type of what it meets, where autocast has made them differ."""
    mixed = isinstance(x, Tensor) and x.dtype != dtype and torch.is_autocast_enabled(x.device.type)
    return x.to(dtype) if mixed and x.dtype in DTYPES else x


def _check_codebook(op: str, codebook, logits: Tensor, entries: int) -> None:
    if not isinstance(codebook, Tensor) or codebook.ndim != 2 or codebook.shape[0] != entries or not entries:
        raise ValueError(f"{op}: codebook has shape {tuple(getattr(codebook, 'shape', ()))}, it must be [V, D] with "
                         f"the V of the logits, {entries}, above 0")
    _check_alike(op, "codebook", codebook, "logits", logits)


def _check_alike(op: str, name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{op}: {name} is {x.dtype} on {x.device}, {like_name} {like.dtype} on {like.device}; they "
                         "must be equal")


def _grid(x: Tensor, layout: str) -> Tensor:
    """A [B, positions, V] view in which either positions or entries lie side by side."""
    grid = x.flatten(2).transpose(1, 2) if layout == "nchw" else x
    if 1 in (grid.stride(1), grid.stride(2)):
        return grid
    return (x.contiguous().flatten(2).transpose(1, 2)) if layout == "nchw" else x.contiguous()


def _run(grid: Tensor, codebook: Tensor, given: Tensor | None, seed: Tensor | None, tau: float, mode: str,
         kl_weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """z [N, D], indices [N], kl [] from logits [B, P, V]."""
    if torch.is_grad_enabled() and (grid.requires_grad or codebook.requires_grad):
        return _Quantize.apply(grid, codebook, given, seed, tau, mode, kl_weight)
    soft = mode == "soft"
    z, indices, _, plain, expected = quantize_fwd(grid, codebook, given, seed, tau, soft, kl_weight > 0, False)
    return _codes(z, indices, codebook, mode), indices, _divergence(plain, expected, grid, kl_weight)


def _codes(z: Tensor, indices: Tensor, codebook: Tensor, mode: str) -> Tensor:
    return z.to(codebook.dtype) if mode == "soft" else codebook[indices]


def _divergence(plain: Tensor, expected: Tensor, grid: Tensor, kl_weight: float) -> Tensor:
    if not kl_weight or not len(plain):
        return torch.zeros((), dtype=torch.promote_types(grid.dtype, torch.float32), device=grid.device)
    # a position without a finite logit has nothing to say
    each = (expected - plain + math.log(grid.shape[2])).masked_fill(plain == -torch.inf, 0.0)
    return kl_weight * each.mean()


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grid, codebook, given, seed, tau, mode, kl_weight):
        soft = mode == "soft"
        z, indices, lse, plain, expected = quantize_fwd(grid, codebook, given, seed, tau, soft, kl_weight > 0, soft)
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
        d_z = d_z.to(torch.promote_types(grid.dtype, torch.float32)).contiguous()

        def gradients(noise, tau, gain, lse, mean, plain, plain_gain=0.0, plain_mean=None, chosen=None, codes=False):
            upstream = d_z if gain else None
            return quantize_bwd(grid, codebook, *noise, tau, upstream, gain, lse, mean, plain, expected, kl, plain_gain,
                                plain_mean, chosen, need_logits, codes)

        def average(noise, tau):
            """(mean code under softmax((l + noise) / tau), that softmax's log-sum-exp)."""
            mean, _, norm, _, _ = quantize_fwd(grid, codebook, *noise, tau, True, False, True)
            return mean, norm

        d_logits = d_codebook = None
        noise, quiet = (given, seed), (None, None)
        if mode == "soft":
            d_logits, d_codebook = gradients(noise, tau, 1 / tau, lse, z, plain, codes=need_codebook)
        elif need_codebook:
            # unlike index_add_ without atomics on CUDA
            d_codebook = torch.ops.aten.embedding_dense_backward(d_z, indices, len(codebook), -1, False)
        if need_logits and mode == "straight_through":
            mean, lse = average(noise, tau)
            d_logits, _ = gradients(noise, tau, 1 / tau, lse, mean, plain)
        elif need_logits and mode == "reinmax":
            relaxed, lse = average(quiet, tau)
            # the divergence's log-sum-exp is that of the logits as they are, too
            mean, plain = (relaxed, lse) if tau == 1 else average(quiet, 1.0)
            half = (relaxed + codebook[indices]) / 2
            d_logits, _ = gradients(quiet, tau, 1.0, lse, half, plain, 0.5, mean, indices)
        elif need_logits and mode == "argmax":
            d_logits = gradients(quiet, 1.0, 0.0, plain, None, plain)[0] if kl_weight else torch.zeros_like(grid)
        return (d_logits if need_logits else None, d_codebook.to(codebook.dtype) if need_codebook else None, None, None,
                None, None, None)
