"""The diffusion family's primitives as ops of torch.library, and their calls into the backends.

Samples are [B, C, S]. What is not wanted comes back empty.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .attention_native import DTYPES, address


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_timesteps(t: Tensor | None, step: int, table: Tensor) -> None:
    """Those on a GPU are not looked at, since that would wait for it; its kernels give NaN outside the schedule."""
    steps = len(table)
    outside = [step] if t is None else t.tolist() if t.device.type == "cpu" else []
    for number in outside:
        if not 0 <= number < steps:
            raise ValueError(f"diffusion: t is {number}, it must lie between 0 and {steps - 1}, the schedule's steps")


def rows_of(table: Tensor, t: Tensor | None, step: int, batch: int) -> Tensor:
    """[B, columns] of the table at each sample's step."""
    return table[step].expand(batch, -1) if t is None else table[t]


def parts(out: Tensor | None, batch: int, channels: int, guided: bool, learned: bool):
    """(conditional, unconditional, variance) of a model output, None where it has none."""
    if out is None:
        return None, None, None
    return (out[:batch, :channels], out[batch:, :channels] if guided else None,
            out[:batch, channels:] if learned else None)


def reference_noise(x: Tensor, noise: Tensor | None, seed: Tensor | None, offset: int) -> Tensor | None:
    from .reference import diffusion as reference

    if noise is not None or seed is None:
        return noise
    return reference.normal_noise(len(x), x[0].numel() if len(x) else 0, seed, offset).view(x.shape)


def _plain(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _empty(x: Tensor, *wanted: bool) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) if want else x.new_empty(0) for want in wanted)


def _denoise(x, out, t, step, table, guidance_scale, guided, learned, clamp, threshold, mask, image, shift, history,
             weights, noise, seed, offset, want_x, want_x0, want_e):
    _check_timesteps(t, step, table)
    backend = dispatch.choose("diffusion", x)
    if backend == "triton":
        return dispatch.module("diffusion", "triton").denoise(
            x, out, t, step, table, guidance_scale, guided, learned, clamp, threshold, mask, image, shift, history,
            weights, noise, seed, offset, want_x, want_x0, want_e)
    if backend == "native":
        found = _empty(x, want_x, want_x0, want_e)
        if x.numel():
            wide = _wide(x)
            # what is made for the call lives until it ends
            extra = [_plain(a, wide) for a in (threshold, image, shift, noise, *history)]
            mask = None if mask is None else mask.to(wide)
            strides = (0, 0) if mask is None else tuple(
                0 if n == 1 else s for n, s in zip(mask.shape[:2], mask.stride(), strict=False))
            _native.denoise_step(
                list(x.shape), x.data_ptr(), DTYPES[x.dtype], address(out), 0 if out is None else DTYPES[out.dtype],
                [0, 0] if out is None else list(out.stride()[:2]), guided, learned, guidance_scale, clamp,
                [address(a) for a in extra[:4]], address(mask), list(strides),
                [address(a) for a in extra[4:]] + [0] * (3 - len(history)), list(weights) + [0.0] * (4 - len(weights)),
                address(t), step, table.data_ptr(), seed is not None, 0 if seed is None else int(seed) & (2**64 - 1),
                offset, [a.data_ptr() if a.numel() else 0 for a in found], torch.get_num_threads())
        return found
    with torch.autocast(x.device.type, enabled=False):
        rows = rows_of(table, t, step, len(x))
        found = dispatch.module("diffusion", "reference").denoise(
            x, *parts(out, len(x), x.shape[1], guided, learned), rows, guidance_scale, clamp, threshold, mask, image,
            shift, history, tuple(weights), reference_noise(x, noise, seed, offset))
    return tuple(a if want else x.new_empty(0) for a, want in zip(found, (want_x, want_x0, want_e), strict=True))


def _denoise_fake(x, out, t, step, table, guidance_scale, guided, learned, clamp, threshold, mask, image, shift,
                  history, weights, noise, seed, offset, want_x, want_x0, want_e):
    return _empty(x, want_x, want_x0, want_e)


def _loss(out, noise, x0, t, step, table, learned):
    _check_timesteps(t, step, table)
    backend = dispatch.choose("diffusion", out)
    if backend == "triton":
        return dispatch.module("diffusion", "triton").loss(out, noise, x0, t, step, table, learned)
    if backend == "native":
        squared, bound = _loss_fake(out, noise, x0, t, step, table, learned)
        _native.diffusion_loss(*_loss_arguments(out, noise, x0, t, step, table, learned, (squared, bound)))
        return squared, bound
    channels = noise.shape[1]
    with torch.autocast(out.device.type, enabled=False):
        return dispatch.module("diffusion", "reference").loss(
            out[:, :channels], out[:, channels:] if learned else None, noise, x0, rows_of(table, t, step, len(out)))


def _loss_arguments(out, noise, x0, t, step, table, learned, found):
    inputs = [(a.data_ptr(), DTYPES[a.dtype]) for a in (out, noise, x0)]
    return (list(noise.shape), *(part for pair in inputs for part in pair), list(out.stride()[:2]), address(t), step,
            table.data_ptr(), learned, [a.data_ptr() for a in found], torch.get_num_threads())


def _loss_fake(out, noise, x0, t, step, table, learned):
    return tuple(out.new_empty(len(out), dtype=_wide(out)) for _ in range(2))


def _loss_bwd(d_squared, d_bound, out, noise, x0, t, step, table, learned):
    backend = dispatch.choose("diffusion", out)
    if backend == "triton":
        return dispatch.module("diffusion", "triton").loss_backward(d_squared, d_bound, out, noise, x0, t, step, table,
                                                                    learned)
    if backend == "native":
        d_out = torch.empty(out.shape, dtype=out.dtype)
        upstream = [_plain(a, _wide(out)) for a in (d_squared, d_bound)]
        _native.diffusion_loss_bwd(*_loss_arguments(out, noise, x0, t, step, table, learned, (*upstream, d_out)))
        return d_out
    channels = noise.shape[1]
    with torch.enable_grad(), torch.autocast(out.device.type, enabled=False):
        out = out.detach().requires_grad_()
        squared, bound = dispatch.module("diffusion", "reference").loss(
            out[:, :channels], out[:, channels:] if learned else None, noise, x0, rows_of(table, t, step, len(out)))
        return torch.autograd.grad((squared, bound), out, (d_squared, d_bound), materialize_grads=True)[0] \
            if bound.requires_grad else torch.autograd.grad(squared, out, d_squared)[0]


def _loss_bwd_fake(d_squared, d_bound, out, noise, x0, t, step, table, learned):
    return torch.empty(out.shape, dtype=out.dtype, device=out.device)


_library = torch.library.Library("vlmfast", "FRAGMENT")
_library.define("denoise_step(Tensor x, Tensor? out, Tensor? t, int step, Tensor table, float guidance_scale, "
                "bool guided, bool learned, float clamp, Tensor? threshold, Tensor? mask, Tensor? image, "
                "Tensor? shift, Tensor[] history, float[] weights, Tensor? noise, Tensor? seed, int offset, "
                "bool want_x, bool want_x0, bool want_e) -> (Tensor, Tensor, Tensor)")
_LOSS_INPUTS = "Tensor out, Tensor noise, Tensor x0, Tensor? t, int step, Tensor table, bool learned"
_library.define(f"diffusion_loss({_LOSS_INPUTS}) -> (Tensor, Tensor)")
_library.define(f"diffusion_loss_bwd(Tensor d_squared, Tensor d_bound, {_LOSS_INPUTS}) -> Tensor")
for _name, _implementation, _fake in (("denoise_step", _denoise, _denoise_fake), ("diffusion_loss", _loss, _loss_fake),
                                      ("diffusion_loss_bwd", _loss_bwd, _loss_bwd_fake)):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)
denoise = torch.ops.vlmfast.denoise_step.default
loss_fwd, loss_bwd = torch.ops.vlmfast.diffusion_loss.default, torch.ops.vlmfast.diffusion_loss_bwd.default
