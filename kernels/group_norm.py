"""Triton backend of the `group_norm` family; `vlmfast.ops.reference.group_norm` is its definition.

A tile is some channels of one group by some positions. Forward: programs sum up their share of a group's tiles, then
each program of the second kernel merges the shares and writes one tile. Backward: sums per channel, their means per
group, then one tile to a program. Nothing is added atomically.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import Variant

SIZES = ["C", "S", "G", "R", "TILES", "PER", "SPLITS"]  # vary from model to model: not worth a compilation each
FEW = 512  # programs that keep a GPU busy
MOST_SPLITS = 32


@triton.jit
def _place(tile, group, C, S, G, R, BC: tl.constexpr, BS: tl.constexpr):
    """(batch, channels [BC], positions [BS], what of the tile is inside) of a tile of group b G + g."""
    across = tl.cdiv(S, BS)
    rows = tile // across * BC + tl.arange(0, BC)
    positions = tile % across * BS + tl.arange(0, BS)
    batch = group // G
    return batch, (group % G) * R + rows, positions, (rows < R)[:, None] & (positions < S)[None, :]


@triton.jit
def _at(start, batch_stride, channel_stride, position_stride, batch, channels, positions):
    return (start + batch.to(tl.int64) * batch_stride + channels.to(tl.int64)[:, None] * channel_stride
            + positions.to(tl.int64)[None, :] * position_stride)


@triton.jit
def _gain(weight, scale, scale_batch, batch, channels, there, MODULATED: tl.constexpr):
    """(weight, 1 + scale) [BC] float32."""
    w = tl.load(weight + channels, mask=there, other=0.0).to(tl.float32)
    scaled = tl.full(w.shape, 1.0, tl.float32)
    if MODULATED:
        scaled += tl.load(scale + batch.to(tl.int64) * scale_batch + channels, mask=there, other=0.0).to(tl.float32)
    return w, scaled


@triton.jit
def _level(bias, shift, shift_batch, batch, channels, there, scaled, MODULATED: tl.constexpr):
    level = tl.load(bias + channels, mask=there, other=0.0).to(tl.float32) * scaled
    if MODULATED:
        level += tl.load(shift + batch.to(tl.int64) * shift_batch + channels, mask=there, other=0.0).to(tl.float32)
    return level


@triton.jit
def _normal(x, mean, rstd):
    """(x - mean) rstd, the float64 mean in two parts, so that one far from zero costs no digits."""
    centre = mean.to(tl.float32)
    return ((x - centre) - (mean - centre.to(tl.float64)).to(tl.float32)) * rstd.to(tl.float32)


@triton.jit
def _gradient_of_z(up, z, SILU: tl.constexpr):
    """d_out silu'(z)."""
    if SILU:
        s = tl.sigmoid(z)
        up = up * (s * (1.0 + z * (1.0 - s)))
    return up


@triton.jit(do_not_specialize=SIZES)
def group_norm_statistics_kernel(x, partial, C, S, G, R, TILES, PER, SPLITS, x_batch, x_channel, x_position,
                                 BC: tl.constexpr, BS: tl.constexpr):
    # x [B, C, S] by strides; partial [B G, SPLITS, 3] float64: count, mean and squared distances from it of PER tiles
    split, group = tl.program_id(0), tl.program_id(1)
    count, mean, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for tile in range(split * PER, tl.minimum((split + 1) * PER, TILES)):
        batch, channels, positions, inside = _place(tile, group, C, S, G, R, BC, BS)
        values = tl.load(_at(x, x_batch, x_channel, x_position, batch, channels, positions), mask=inside,
                         other=0.0).to(tl.float32)
        more = tl.sum(inside.to(tl.float32))
        rough = tl.sum(values) / more
        distance = tl.where(inside, values - rough, 0.0)
        left = tl.sum(distance).to(tl.float64)
        square = tl.sum(distance * distance).to(tl.float64)
        more = more.to(tl.float64)
        # Chan, Golub and LeVeque 1979, eq. 2.1
        apart = rough.to(tl.float64) + left / more - mean
        total = count + more
        mean += apart * (more / total)
        squares += square - left * left / more + apart * apart * (count * more / total)
        count = total
    to = partial + (group.to(tl.int64) * SPLITS + split) * 3
    tl.store(to, count)
    tl.store(to + 1, mean)
    tl.store(to + 2, squares)


@triton.jit(do_not_specialize=[*SIZES, "eps"])
def group_norm_fwd_kernel(x, partial, weight, bias, scale, shift, out, mean_out, rstd_out, eps, C, S, G, R, SPLITS,
                          x_batch, x_channel, x_position, scale_batch, shift_batch, MODULATED: tl.constexpr,
                          SILU: tl.constexpr, SHARES: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    # out [B, C, S] packed; mean_out and rstd_out [B G] float64, from the program of the group's first tile
    tile, group = tl.program_id(0), tl.program_id(1)
    share = tl.arange(0, SHARES)
    at = partial + (group.to(tl.int64) * SPLITS + share) * 3
    counts = tl.load(at, mask=share < SPLITS, other=0.0)
    means = tl.load(at + 1, mask=share < SPLITS, other=0.0)
    count = tl.sum(counts)
    mean = tl.sum(counts * means) / count
    apart = means - mean
    squares = tl.sum(tl.where(share < SPLITS, tl.load(at + 2, mask=share < SPLITS, other=0.0)
                              + counts * apart * apart, 0.0))
    rstd = 1.0 / tl.sqrt(squares / count + eps)
    if tile == 0:
        tl.store(mean_out + group, mean)
        tl.store(rstd_out + group, rstd)
    batch, channels, positions, inside = _place(tile, group, C, S, G, R, BC, BS)
    there = channels < (group % G + 1) * R
    w, scaled = _gain(weight, scale, scale_batch, batch, channels, there, MODULATED)
    level = _level(bias, shift, shift_batch, batch, channels, there, scaled, MODULATED)
    values = tl.load(_at(x, x_batch, x_channel, x_position, batch, channels, positions), mask=inside,
                     other=0.0).to(tl.float32)
    z = _normal(values, mean, rstd) * (w * scaled)[:, None] + level[:, None]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(out + (batch.to(tl.int64) * C + channels)[:, None] * S + positions[None, :],
             z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def group_norm_bwd_sums_kernel(d_out, x, mean, rstd, weight, bias, scale, shift, partial, C, S, G, R, PER, SPLITS,
                               x_batch, x_channel, x_position, d_batch, d_channel, d_position, scale_batch, shift_batch,
                               MODULATED: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    # partial [B C, SPLITS, 2]: sums over PER blocks of positions of d_z and of d_z times the normalised x
    block, split, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across = tl.cdiv(S, BS)
    m, r = tl.load(mean + group), tl.load(rstd + group)
    batch, channels, positions, inside = _place(block * across, group, C, S, G, R, BC, BS)
    there = channels < (group % G + 1) * R
    w, scaled = _gain(weight, scale, scale_batch, batch, channels, there, MODULATED)
    level = _level(bias, shift, shift_batch, batch, channels, there, scaled, MODULATED)
    total, weighted = tl.zeros((BC, BS), tl.float32), tl.zeros((BC, BS), tl.float32)
    for step in range(split * PER, tl.minimum((split + 1) * PER, across)):
        batch, channels, positions, inside = _place(block * across + step, group, C, S, G, R, BC, BS)
        values = tl.load(_at(x, x_batch, x_channel, x_position, batch, channels, positions), mask=inside,
                         other=0.0).to(tl.float32)
        up = tl.load(_at(d_out, d_batch, d_channel, d_position, batch, channels, positions), mask=inside,
                     other=0.0).to(tl.float32)
        normal = _normal(values, m, r)
        gradient = _gradient_of_z(up, normal * (w * scaled)[:, None] + level[:, None], SILU)
        gradient = tl.where(inside, gradient, 0.0)
        total += gradient
        weighted += tl.where(inside, gradient * normal, 0.0)
    to = partial + ((batch.to(tl.int64) * C + channels) * SPLITS + split) * 2
    tl.store(to, tl.sum(total, 1), mask=there)
    tl.store(to + 1, tl.sum(weighted, 1), mask=there)


@triton.jit(do_not_specialize=SIZES)
def group_norm_bwd_means_kernel(partial, weight, bias, scale, sums, means, d_scale, d_shift, C, S, G, R, SPLITS,
                                scale_batch, MODULATED: tl.constexpr, SHARES: tl.constexpr, BC: tl.constexpr):
    # sums [2, B C] of d_z and d_z x'; means [B G, 2] of gain d_z and gain d_z x'; d_scale, d_shift [B, C] float32
    group, lines = tl.program_id(0), tl.num_programs(0) * R
    batch = group // G
    first, second = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    share = tl.arange(0, SHARES)
    for start in range(0, R, BC):
        rows = start + tl.arange(0, BC)
        channels, there = (group % G) * R + rows, rows < R
        line = batch.to(tl.int64) * C + channels
        at = partial + (line[:, None] * SPLITS + share[None, :]) * 2
        inside = there[:, None] & (share < SPLITS)[None, :]
        total = tl.sum(tl.load(at, mask=inside, other=0.0), 1)
        weighted = tl.sum(tl.load(at + 1, mask=inside, other=0.0), 1)
        w, scaled = _gain(weight, scale, scale_batch, batch, channels, there, MODULATED)
        first += w * scaled * total
        second += w * scaled * weighted
        tl.store(sums + line, total, mask=there)
        tl.store(sums + lines.to(tl.int64) + line, weighted, mask=there)
        if MODULATED:
            b = tl.load(bias + channels, mask=there, other=0.0).to(tl.float32)
            tl.store(d_scale + line, w * weighted + b * total, mask=there)
            tl.store(d_shift + line, total, mask=there)
    size = R.to(tl.float32) * S.to(tl.float32)
    tl.store(means + group * 2, tl.sum(first) / size)
    tl.store(means + group * 2 + 1, tl.sum(second) / size)


@triton.jit(do_not_specialize=SIZES)
def group_norm_bwd_kernel(d_out, x, mean, rstd, weight, bias, scale, shift, means, d_x, C, S, G, R,
                          x_batch, x_channel, x_position, d_batch, d_channel, d_position, scale_batch, shift_batch,
                          MODULATED: tl.constexpr, SILU: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    # d_x [B, C, S] packed: rstd (gain d_z - first mean - x' second mean)
    tile, group = tl.program_id(0), tl.program_id(1)
    m, r = tl.load(mean + group), tl.load(rstd + group)
    batch, channels, positions, inside = _place(tile, group, C, S, G, R, BC, BS)
    there = channels < (group % G + 1) * R
    w, scaled = _gain(weight, scale, scale_batch, batch, channels, there, MODULATED)
    level = _level(bias, shift, shift_batch, batch, channels, there, scaled, MODULATED)
    gain = (w * scaled)[:, None]
    values = tl.load(_at(x, x_batch, x_channel, x_position, batch, channels, positions), mask=inside,
                     other=0.0).to(tl.float32)
    up = tl.load(_at(d_out, d_batch, d_channel, d_position, batch, channels, positions), mask=inside,
                 other=0.0).to(tl.float32)
    normal = _normal(values, m, r)
    gradient = gain * _gradient_of_z(up, normal * gain + level[:, None], SILU)
    gradient = r.to(tl.float32) * (gradient - tl.load(means + group * 2) - normal * tl.load(means + group * 2 + 1))
    tl.store(d_x + (batch.to(tl.int64) * C + channels)[:, None] * S + positions[None, :],
             gradient.to(d_x.dtype.element_ty), mask=inside)


class Tile(NamedTuple):
    """Channels and positions of one program."""

    channels: int
    positions: int
    warps: int

    @property
    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "enable_fp_fusion": True}

    @property
    def constants(self) -> dict[str, int]:
        return {"BC": self.channels, "BS": self.positions}


def tile_for(channels: int, positions: int) -> Tile:
    """Up to 4096 elements: one long row, or several short ones."""
    width = min(max(triton.next_power_of_2(positions), 16), 4096)
    height = min(triton.next_power_of_2(channels), 4096 // width)
    return Tile(height, width, 8 if height * width >= 2048 else 4)


def forward(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, scale: Tensor | None, shift: Tensor | None,
            eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(out like x, contiguous; mean and rstd [B, G] float64); the arguments of the definition, any strides."""
    _check(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    statistics = torch.empty if x.numel() else torch.zeros
    mean, rstd = (statistics(len(x), num_groups, dtype=torch.float64, device=x.device) for _ in range(2))
    if x.numel():
        rows, sizes, tile = _rows(x), *_sizes(x, num_groups)
        groups, tiles = mean.numel(), triton.cdiv(sizes[3], tile.channels) * triton.cdiv(sizes[1], tile.positions)
        per, splits = _shares(tiles, groups)
        partial = torch.empty(groups, splits, 3, dtype=torch.float64, device=x.device)
        scale, shift, modulation = _modulation(scale, shift)
        with _guard(x.device):
            group_norm_statistics_kernel[splits, groups](rows, partial, *sizes, tiles, per, splits, *rows.stride(),
                                                         **tile.constants, **tile.options)
            group_norm_fwd_kernel[tiles, groups](
                rows, partial, weight.contiguous(), bias.contiguous(), scale, shift, out, mean, rstd, eps, *sizes,
                splits, *rows.stride(), *modulation, MODULATED=scale is not None, SILU=silu,
                SHARES=triton.next_power_of_2(splits), **tile.constants, **tile.options)
    return out, mean, rstd


def backward(d_out: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None,
             shift: Tensor | None, silu: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(d_x like x, d_weight, d_bias [C], d_scale, d_shift [B, C] float32 or None)."""
    _check(x)
    batch, channels = x.shape[:2]
    modulated = scale is not None
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_scale, d_shift = (torch.zeros(batch, channels, device=x.device) if modulated else None for _ in range(2))
    sums = torch.zeros(2, batch, channels, device=x.device)
    if x.numel():
        rows, up, (sizes, tile) = _rows(x), _rows(d_out), _sizes(x, mean.shape[1])
        groups, blocks = mean.numel(), triton.cdiv(sizes[3], tile.channels)
        steps = triton.cdiv(sizes[1], tile.positions)
        per, splits = _shares(steps, groups * blocks)
        partial = torch.empty(batch * channels, splits, 2, device=x.device)
        means = torch.empty(groups, 2, device=x.device)
        weight, bias = weight.contiguous(), bias.contiguous()
        scale, shift, modulation = _modulation(scale, shift)
        inputs = up, rows, mean, rstd, weight, bias, scale, shift
        strides = *rows.stride(), *up.stride(), *modulation
        flags = {"MODULATED": modulated, "SILU": silu} | tile.constants | tile.options
        with _guard(x.device):
            group_norm_bwd_sums_kernel[blocks, splits, groups](*inputs, partial, *sizes, per, splits, *strides, **flags)
            group_norm_bwd_means_kernel[(groups,)](
                partial, weight, bias, scale, sums, means, d_scale, d_shift, *sizes, splits, modulation[0],
                MODULATED=modulated, SHARES=triton.next_power_of_2(splits),
                BC=min(triton.next_power_of_2(sizes[3]), 64))
            group_norm_bwd_kernel[steps * blocks, groups](*inputs, means, d_x, *sizes, *strides, **flags)
        if modulated:
            scaled = 1 + scale.float()
            return d_x, (scaled * sums[1]).sum(0), (scaled * sums[0]).sum(0), d_scale, d_shift
    return d_x, sums[1].sum(0), sums[0].sum(0), d_scale, d_shift


def _check(x: Tensor) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"group_norm: x is {x.dtype}, the Triton backend takes float32, bfloat16 or float16")


def _rows(x: Tensor) -> Tensor:
    """[B, C, S]."""
    return x[..., None] if x.ndim == 2 else x.flatten(2)


def _sizes(x: Tensor, num_groups: int) -> tuple[tuple[int, int, int, int], Tile]:
    """(C, S, G, channels of a group) and the tile for them."""
    channels, positions = x.shape[1], x[0, 0].numel()
    each = channels // num_groups
    return (channels, positions, num_groups, each), tile_for(each, positions)


def _shares(tiles: int, programs: int) -> tuple[int, int]:
    """(tiles to a share, shares), so that there are programs enough."""
    splits = min(tiles, MOST_SPLITS, max(triton.cdiv(FEW, programs), 1))
    per = triton.cdiv(tiles, splits)
    return per, triton.cdiv(tiles, per)


def _modulation(scale: Tensor | None, shift: Tensor | None):
    """(scale, shift, their strides of batch), contiguous along the channels."""
    if scale is None:
        return None, None, (0, 0)
    scale, shift = (v if v.stride(1) == 1 else v.contiguous() for v in (scale, shift))
    return scale, shift, (scale.stride(0), shift.stride(0))


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aot_variants(capability: int) -> list[Variant]:
    """What ahead-of-time compilation covers: each dtype and option of the launchers above, long rows and short ones."""
    integers = dict.fromkeys([*SIZES, "x_batch", "x_channel", "d_batch", "d_channel", "scale_batch", "shift_batch"],
                             "i32") | {"eps": "fp32"}
    wide = dict.fromkeys(("mean", "rstd", "mean_out", "rstd_out"), "*fp64")
    variants = []

    def add(kernel, label: str, tile: Tile, types: dict, absent: tuple[str, ...] = (), **flags) -> None:
        constants = {"x_position": 1, "d_position": 1} | dict.fromkeys(absent) | flags | tile.constants
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        aligned = {name for name in integers if "_" in name} - set(constants)
        variants.append(Variant(label, kernel, integers | wide | types, aligned, constants, tile.options))

    for channels, positions in ((6, 4096), (24, 64)):
        tile = tile_for(channels, positions)
        for name in ("fp32", "bf16", "fp16"):
            types = dict.fromkeys(("x", "d_out", "out", "d_x"), f"*{name}")
            label = f"{channels}x{positions} {name}"
            add(group_norm_statistics_kernel, label, tile, types | {"partial": "*fp64"})
            for modulated, silu in ((True, True), (False, True), (False, False)):
                flags = {"MODULATED": modulated, "SILU": silu, "SHARES": MOST_SPLITS}
                absent = () if modulated else ("scale", "shift", "d_scale", "d_shift")
                full = f"{label}{' mod' if modulated else ''}{' silu' if silu else ''}"
                add(group_norm_fwd_kernel, full, tile, types | {"partial": "*fp64"}, absent, **flags)
                add(group_norm_bwd_sums_kernel, full, tile, types, absent, **flags)
                add(group_norm_bwd_kernel, full, tile, types, absent, **flags)
    for modulated in (True, False):
        absent = () if modulated else ("scale", "d_scale", "d_shift")
        add(group_norm_bwd_means_kernel, "mod" if modulated else "affine", Tile(64, 0, 4), {}, absent,
            MODULATED=modulated, SHARES=MOST_SPLITS)
    return variants
