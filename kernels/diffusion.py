"""Triton backend of the `diffusion` family; `vlmfast.ops.reference.diffusion` is its definition.

A step is one launch over all its tensors, whatever the sampler; the loss is one for its sums and a small one that adds
them up, and one for its gradient. Nothing is read back: a timestep outside the schedule gives NaN.
"""

import math
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from .aot import Variant
from .diffusion_loss import diffusion_loss_bwd_kernel, diffusion_loss_kernel, diffusion_loss_sum_kernel
from .diffusion_step import denoise_step_kernel

BLOCK, SUM_BLOCK = 1024, 256
OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}
SUM_OPTIONS = OPTIONS | {"num_warps": 2}


def denoise(x: Tensor, out: Tensor | None, t: Tensor | None, step: int, table: Tensor, guidance_scale: float,
            guided: bool, learned: bool, clamp: float, threshold: Tensor | None, mask: Tensor | None,
            image: Tensor | None, shift: Tensor | None, history: list[Tensor], weights: list[float],
            noise: Tensor | None, seed: Tensor | None, offset: int, want_x: bool, want_x0: bool,
            want_e: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(x', x0, e), each like x; empty where not wanted.

    Args:
        x, image, shift, history, noise:  [B, C, S] contiguous, float32, bfloat16 or float16.
        out:  [B or (guided) 2 B, C or 2 C, S], contiguous within a sample, or None for zeros.
        t:  [B] int64 on the device, or None for `step`.
        table:  [steps, 12], the columns of `Schedule.step_table`.
        threshold:  [B].
        mask:  [B or 1, C or 1, S] contiguous.
        weights:  as many as history has entries, and one more; or none.
        seed:  [] int64 on the device; without `noise` and `seed` there is none.
    """
    _check("x", x)
    found = tuple(torch.empty_like(x) if want else x.new_empty(0) for want in (want_x, want_x0, want_e))
    if not x.numel():
        return found
    batch, channels, inner = x.shape
    masked_channels = mask is not None and mask.shape[1] == channels
    mask_batch = 0 if mask is None or len(mask) == 1 else mask[0].numel()
    arguments = (x, out, t, table.float(), threshold, mask, image, shift, *history, *[None] * (3 - len(history)), noise,
                 seed, *(a if a.numel() else None for a in found), step, len(table), batch, _blocks(x),
                 channels * inner, inner, 0 if out is None else out.stride(0), mask_batch, guidance_scale,
                 clamp if math.isfinite(clamp) else 0.0, *weights, *[0.0] * (4 - len(weights)), offset)
    with _guard(x.device):
        denoise_step_kernel[batch * _blocks(x),](
            *arguments, GUIDED=guided, LEARNED=learned, CLAMP=clamp != math.inf, COMBINED=bool(weights),
            MASK_CHANNELS=masked_channels, WIDE=_wide(x), BLOCK=BLOCK, **OPTIONS)
    return found


def loss(out: Tensor, noise: Tensor, x0: Tensor, t: Tensor | None, step: int, table: Tensor,
         learned: bool) -> tuple[Tensor, Tensor]:
    """(mean squared error [B], variational bound [B] in bits a dimension, 0 unless learned), float32.

    Args:
        out:  [B, C or (learned) 2 C, S], contiguous within a sample, float32, bfloat16 or float16.
        noise, x0:  [B, C, S] contiguous.
        t:  [B] int64 on the device, or None for `step`.
        table:  [steps, 8], the columns of `Schedule.loss_table`.
    """
    _check("model_output", out)
    batch, device = len(out), out.device
    if not noise.numel():
        return tuple(torch.full((batch,), value, device=device) for value in (math.nan, math.nan if learned else 0.0))
    blocks = _blocks(noise)
    squared, bound = torch.empty(batch, device=device), torch.zeros(batch, device=device)
    # a single block has the whole mean
    parts = (squared, bound) if blocks == 1 else torch.empty(2, batch, blocks, device=device).unbind()
    with _guard(device):
        diffusion_loss_kernel[batch * blocks,](
            out, noise, x0, t, table.float(), *parts, step, len(table), blocks, noise[0].numel(), out.stride(0),
            1 / noise[0].numel(), LEARNED=learned, WIDE=_wide(noise), BLOCK=BLOCK, **OPTIONS)
        if blocks > 1:
            diffusion_loss_sum_kernel[batch,](*parts, squared, bound, blocks, LEARNED=learned, BLOCK=SUM_BLOCK,
                                              **SUM_OPTIONS)
    return squared, bound


def loss_backward(d_squared: Tensor, d_bound: Tensor, out: Tensor, noise: Tensor, x0: Tensor, t: Tensor | None,
                  step: int, table: Tensor, learned: bool) -> Tensor:
    """Gradient of `loss` with respect to out, contiguous; the bound's reaches the variance alone."""
    _check("model_output", out)
    d_out = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if noise.numel():
        with _guard(out.device):
            diffusion_loss_bwd_kernel[len(out) * _blocks(noise),](
                d_squared.contiguous(), d_bound.contiguous(), out, noise, x0, t, table.float(), d_out, step, len(table),
                _blocks(noise), noise[0].numel(), out.stride(0), d_out.stride(0), 1 / noise[0].numel(),
                LEARNED=learned, WIDE=_wide(noise), BLOCK=BLOCK, **OPTIONS)
    return d_out


def _check(name: str, x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"diffusion: {name} is {x.dtype}, the Triton backend takes float32, bfloat16 or float16")


def _blocks(x: Tensor) -> int:
    """Programs that a sample takes."""
    return triton.cdiv(x[0].numel(), BLOCK)


def _wide(x: Tensor) -> bool:
    """Whether numbers of a sample's elements need 64 bits."""
    return x[0].numel() + BLOCK > 2**31


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aot_variants(capability: int) -> list[Variant]:
    """What ahead-of-time compilation covers: each dtype, and the samplers and options of the launchers above."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    integers = ("step", "steps", "batch", "blocks", "size", "inner", "out_batch", "mask_batch", "d_batch", "offset")
    floats = ("guidance_scale", "clamp", "w0", "w1", "w2", "w3", "share")
    samples = ("x", "out", "image", "shift", "earlier_1", "earlier_2", "earlier_3", "noise", "x0", "then_to", "x0_to",
               "e_to", "d_out")
    optional = {"threshold", "mask", "image", "shift", "earlier_1", "earlier_2", "earlier_3", "noise", "seed", "x0_to",
                "e_to"}
    variants = []

    def add(kernel, label: str, dtype: torch.dtype, absent: set[str], options: dict, aligned: bool = True,
            wide: bool = False, **constants) -> None:
        types = dict.fromkeys(integers, "i32") | dict.fromkeys(floats, "fp32") | {"t": "*i64", "seed": "*i64"}
        types |= dict.fromkeys(samples, f"*{names[dtype]}")
        if wide:
            types |= dict.fromkeys(("size", "inner", "out_batch", "mask_batch", "d_batch", "offset"), "i64")
        constants |= {name: None for name in absent if name in kernel.arg_names}
        if "WIDE" in kernel.arg_names:
            constants["WIDE"] = wide
        multiples = {"size", "inner", "out_batch", "mask_batch", "d_batch"} if aligned else set()
        variants.append(Variant(f"{label} {names[dtype]}", kernel, types, multiples, constants, options))

    def step(label: str, dtype: torch.dtype, present: set[str], absent: set[str] = frozenset(), **flags) -> None:
        flags = {"GUIDED": False, "LEARNED": False, "CLAMP": True, "COMBINED": False, "MASK_CHANNELS": False} | flags
        add(denoise_step_kernel, label, dtype, optional - present | set(absent), OPTIONS, BLOCK=BLOCK, **flags)

    history = {"earlier_1", "earlier_2", "earlier_3"}
    for dtype in names:
        guided = {"GUIDED": True, "LEARNED": True}
        step("ancestral", dtype, {"seed"}, **guided)
        step("ancestral odd", dtype, {"seed"}, aligned=False, **guided)
        step("given noise", dtype, {"noise"}, {"t"}, **guided)
        step("inpaint", dtype, {"seed", "mask", "image", "x0_to"}, **guided)
        step("all", dtype, optional - history - {"noise"}, MASK_CHANNELS=True, **guided)
        step("wide", dtype, {"seed", "mask", "image"}, wide=True, **guided)
        # sizes of 1 are constants
        step("single", dtype, {"seed", "mask", "image"}, aligned=False, size=1, inner=1, out_batch=1, mask_batch=1,
             **guided)
        step("ddim", dtype, {"x0_to"}, GUIDED=True)
        step("plms", dtype, history | {"x0_to", "e_to"}, GUIDED=True, COMBINED=True)
        step("q_sample", dtype, {"seed"}, {"out"}, CLAMP=False)
        for learned in (True, False):
            kind = "learned" if learned else "fixed"
            for kernel in (diffusion_loss_kernel, diffusion_loss_bwd_kernel):
                add(kernel, kind, dtype, set(), OPTIONS, LEARNED=learned, BLOCK=BLOCK)
        for kernel in (diffusion_loss_kernel, diffusion_loss_bwd_kernel):
            add(kernel, "wide", dtype, set(), OPTIONS, aligned=False, wide=True, LEARNED=True, BLOCK=BLOCK)
    for learned in (True, False):
        add(diffusion_loss_sum_kernel, "learned" if learned else "fixed", torch.float32, set(), SUM_OPTIONS,
            LEARNED=learned, BLOCK=SUM_BLOCK)
    return variants
