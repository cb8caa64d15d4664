"""Triton backend of the `quantize` family; `vlmfast.ops.reference.quantize` is its definition.

Forward: programs over positions, each one pass over its logits. Backward: programs over the vocabulary, each one pass
over the logits of its entries, whose noise is drawn again. Nothing of the logits' size is written but their gradient.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .aot import Variant
from .quantize_bwd import quantize_bwd_kernel
from .quantize_fwd import gumbel_noise_kernel, quantize_fwd_kernel

FUSED = {"enable_fp_fusion": True}
NOISE_TILE = {"BM": 16, "BN": 64}
# the interpreter multiplies the bit patterns of bfloat16 operands: there they are widened after each load
INTERPRETED = not isinstance(quantize_fwd_kernel, triton.runtime.JITFunction)


class Tile(NamedTuple):
    """Positions, entries and width of one program, depth of a step of d_z C^T, and launch options."""

    positions: int
    entries: int
    width: int
    depth: int
    warps: int
    stages: int

    def constants(self, step: str) -> dict[str, int | bool]:
        sizes = {"UPCAST": INTERPRETED, "BM": self.positions, "BN": self.entries, "BD": self.width}
        return sizes | ({"BK": self.depth} if step == "backward" else {})

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages} | FUSED


def tile_for(step: str, dtype: torch.dtype, width: int) -> Tile:
    """Tile of "forward" or "backward", which ahead-of-time compilation shows to fit the registers."""
    columns, forward = max(triton.next_power_of_2(width), 16), step == "forward"
    if dtype != torch.float32:
        return Tile(64, 32, min(columns, 128), 64, 8, stages=2 if forward else 3)
    return Tile(32, 32, min(columns, 64 if forward else 32), 32, 8, stages=2 if forward else 1)


def forward(grid: Tensor, codebook: Tensor, given: Tensor | None, seed: Tensor | None, tau: float, want_z: bool,
            want_kl: bool, want_lse: bool):
    """(z [N, D], indices [N], lse [N], plain [N], expected [N]) float32 and int64; empty where not wanted.

    Args:
        grid:  [B, P, V] float32, bfloat16 or float16 logits of any strides.
        codebook:  [V, D], same dtype.
        given:  noise like grid, or None.
        seed:  [] int64 on the device, or None; without `given` and `seed` there is no noise.
    """
    _check(grid)
    (batch, positions, entries), width, device = grid.shape, codebook.shape[1], grid.device
    count = batch * positions
    z = torch.empty((count, width) if want_z else 0, device=device)
    indices = torch.empty(count, dtype=torch.int64, device=device)
    lse = torch.empty(count, device=device)
    plain, expected = (torch.empty(count if want_kl else 0, device=device) for _ in range(2))
    if count:
        tile = tile_for("forward", grid.dtype, width)
        batch, positions, strides = _sequences(grid, given)
        codes = want_z and width > 0
        blocks = triton.cdiv(positions, tile.positions), batch, triton.cdiv(width, tile.width) if codes else 1
        with _guard(device):
            quantize_fwd_kernel[blocks](
                grid, codebook.contiguous(), given, seed, z, indices, lse, plain, expected, tau, positions, entries,
                width, *strides, DRAWN=given is None and seed is not None, GIVEN=given is not None,
                CODES=codes, KL=want_kl, **tile.constants("forward"), **tile.options())
    return z, indices, lse if want_lse else torch.empty(0, device=device), plain, expected


def backward(grid: Tensor, codebook: Tensor, given: Tensor | None, seed: Tensor | None, tau: float, d_z: Tensor | None,
             gain: float, lse: Tensor, mean_code: Tensor | None, plain: Tensor | None, expected: Tensor | None,
             kl: Tensor | None, plain_gain: float, plain_code: Tensor | None, indices: Tensor | None, want_logits: bool,
             want_codebook: bool):
    """(d_logits like grid, d_codebook [V, D] float32); empty where not wanted; see the definition.

    Args:
        d_z, mean_code, plain_code:  [N, D] float32 or None; the codes' means under the two softmaxes.
        lse, plain, expected:  [N] float32 of `forward`.
        kl:  [] the divergence's weight times its gradient, or None.
        indices:  [N] int64 or None.
    """
    _check(grid)
    (batch, positions, entries), width, device = grid.shape, codebook.shape[1], grid.device
    d_logits = torch.empty_like(grid) if want_logits else grid.new_empty(0)
    d_codebook = torch.zeros(codebook.shape if want_codebook else 0, device=device)
    if grid.numel() and (want_logits or d_codebook.numel()):
        tile = tile_for("backward", grid.dtype, width)
        batch, positions, strides = _sequences(grid, given, d_logits if want_logits else None)
        mean, plain_mean = (None if d_z is None or code is None else (d_z * code).sum(-1)
                            for code in (mean_code, plain_code))
        up = None if d_z is None else d_z.to(grid.dtype).contiguous()
        codes = want_codebook and width > 0
        programs = triton.cdiv(entries, tile.entries), triton.cdiv(width, tile.width) if codes else 1
        with _guard(device):
            quantize_bwd_kernel[programs](
                grid, codebook.contiguous(), given, seed, up, lse, mean, plain, expected,
                None if kl is None else kl.float(), plain_mean, indices, d_logits, d_codebook, tau, gain, plain_gain,
                batch, positions, entries, width, *strides,
                DRAWN=given is None and seed is not None, GIVEN=given is not None, UPSTREAM=d_z is not None,
                KL=kl is not None, PLAIN=plain_gain != 0, CHOSEN=indices is not None, LOGITS=want_logits, CODES=codes,
                **tile.constants("backward"), **tile.options())
    return d_logits, d_codebook


def gumbel_noise(count: int, entries: int, seed: Tensor, offset: int = 0) -> Tensor:
    """[count, entries] float32: what the kernels draw, which differs from the definition by its rounding."""
    noise = torch.empty(count, entries, device=seed.device)
    if noise.numel():
        blocks = triton.cdiv(count, NOISE_TILE["BM"]), triton.cdiv(entries, NOISE_TILE["BN"])
        with _guard(seed.device):
            gumbel_noise_kernel[blocks](seed, noise, count, entries, offset, **NOISE_TILE, **FUSED)
    return noise


def _check(grid: Tensor) -> None:
    if grid.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"quantize: logits are {grid.dtype}, the Triton backend takes float32, bfloat16 or float16")


def _sequences(grid: Tensor, *others: Tensor | None) -> tuple[int, int, list[int]]:
    """(B, P, three strides of each tensor, 0 without one): batch and positions as one where all strides allow it."""
    batch, positions, _ = grid.shape
    strides = [(0, 0, 0) if x is None else x.stride() for x in (grid, *(others or (None,)))]
    if all(step == positions * position for step, position, _ in strides):
        batch, positions = 1, batch * positions
    return batch, positions, [step for each in strides for step in each]


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aot_variants(capability: int) -> list[Variant]:
    """What ahead-of-time compilation covers: each dtype, layout, mode and width of the launchers above."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    integers = ("B", "P", "V", "D", "N", "offset")
    strides = [f"{what}_{which}" for what in ("given", "d") for which in ("batch", "position", "entry")]
    strides += ["batch_stride", "position_stride", "entry_stride"]
    variants = []

    def add(kernel, label: str, dtype: torch.dtype, tile: Tile, step: str, nchw: bool, absent: dict, **flags) -> None:
        types = dict.fromkeys(integers, "i32") | dict.fromkeys(strides, "i32") | {
            "seed": "*i64", "indices": "*i64", "tau": "fp32", "gain": "fp32", "plain_gain": "fp32"}
        types |= dict.fromkeys(("logits", "codebook", "d_logits", "d_z"), f"*{names[dtype]}")
        unit = ("position_stride", "d_position", "given_position") if nchw else ("entry_stride", "d_entry",
                                                                                "given_entry")
        constants = {name: 1 for name in unit if name in kernel.arg_names}
        constants |= {name: None for flag, pointers in absent.items() if not flags.get(flag, True)
                      for name in pointers if name in kernel.arg_names}
        aligned = {"D", *strides} - set(constants)
        variants.append(Variant(f"{label} {names[dtype]}", kernel, types, aligned,
                                constants | flags | tile.constants(step), tile.options()))

    absent = {"GIVEN": ("given",), "DRAWN": ("seed",), "CHOSEN": ("indices",), "KL": ("kl",), "PLAIN": ("plain_mean",)}
    for dtype in names:
        for width in (64, 512):
            for nchw in (True, False):
                label = f"{'nchw' if nchw else 'nlc'} {width}"
                common = {"DRAWN": True, "GIVEN": False, "KL": True}
                add(quantize_fwd_kernel, label, dtype, tile_for("forward", dtype, width), "forward", nchw,
                    {name: absent[name] for name in ("GIVEN", "DRAWN")}, CODES=True, **common)
                tile = tile_for("backward", dtype, width)
                add(quantize_bwd_kernel, label, dtype, tile, "backward", nchw, absent, UPSTREAM=True, PLAIN=False,
                    CHOSEN=False, LOGITS=True, CODES=True, **common)
                add(quantize_bwd_kernel, f"reinmax {label}", dtype, tile, "backward", nchw, absent, UPSTREAM=True,
                    PLAIN=True, CHOSEN=True, LOGITS=True, CODES=False, DRAWN=False, GIVEN=False, KL=True)
    variants.append(Variant("fp32", gumbel_noise_kernel, dict.fromkeys(("N", "V", "offset"), "i32") | {"seed": "*i64"},
                            {"V"}, dict(NOISE_TILE), FUSED))
    return variants
