"""Triton backend of the `info_nce` family; `vlmfast.ops.reference.info_nce` is its definition.

Forward: one kernel over strips of rows plus a merge of the columns' partial results. Backward: chunks of rows, for
each one kernel that recomputes the logits and writes their gradient in the inputs' dtype (with the one-hot already
subtracted in float32), then two library GEMMs that accumulate in float32: 8 N M D floating-point operations in all and
a workspace of CHUNK_BYTES. The sigmoid loss needs no statistics, so its forward is the same chunk loop: 6 N M D.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .aot import Variant
from .info_nce_bwd import info_nce_bwd_lines_kernel, info_nce_bwd_logits_kernel, siglip_logits_kernel
from .info_nce_fwd import info_nce_fwd_kernel, info_nce_fwd_merge_kernel

LSE, POSITIVE, POSITIVES, BEST, SUM, COUNT = range(6)
STATS_SHORT, STATS_FULL = 2, 6
# largest gradient of a chunk of logits
CHUNK_BYTES = 256 << 20
# lines a program of info_nce_bwd_lines_kernel takes; parts and lines a step of the merge does
LINES = 256
MERGE_TILE = {"BP": 32, "BL": 32}
# Triton's default is about to change: a * b + c may be one rounding
FUSED = {"enable_fp_fusion": True}

# the interpreter multiplies the bit patterns of bfloat16 operands: there they are widened after each load
INTERPRETED = not isinstance(info_nce_fwd_kernel, triton.runtime.JITFunction)


class Tile(NamedTuple):
    """Logits of one program, features per step, column pieces the epilogue handles one by one, and launch options."""

    rows: int
    columns: int
    depth: int
    pieces: int
    warps: int
    stages: int

    def constants(self) -> dict[str, int | bool]:
        return {"UPCAST": INTERPRETED, "BM": self.rows, "BN": self.columns, "BK": self.depth,
                "PIECES": self.pieces}

    def options(self) -> dict[str, int | bool]:
        return {"num_warps": self.warps, "num_stages": self.stages} | FUSED


def tile_for(step: str, dtype: torch.dtype, mode: str, capability: int) -> Tile:
    """Tile of a kernel: the largest that ahead-of-time compilation shows to fit the registers.

    Args:
        step:  "forward" or "gradient".
        mode:  "plain" (diagonal targets, no mask, short statistics), "full" or "labels".
        capability:  of the device, times ten.
    """
    general = step == "forward" and mode != "plain"
    if dtype == torch.float32:
        pieces, warps = (4, 8) if general else (2, 4) if step == "forward" else (1, 4)
        return Tile(64, 64, 32, pieces, warps, stages=3)
    if general:
        return Tile(64, 64, 64, pieces=4, warps=8, stages=3)
    if mode == "plain" and 90 <= capability < 120:
        return Tile(128, 256, 64, pieces=8, warps=8, stages=3)
    return Tile(128, 128, 64, pieces=4, warps=8, stages=3)


def _mode(labels, mask, full: bool = False) -> str:
    return "labels" if labels is not None else "full" if full or mask is not None else "plain"


def forward(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, full: bool):
    """Line statistics (row_stats [K, N], column_stats [K, M]) float32, K = 6 if `full` else 2; see the definition.

    Args:
        image, text:  [N, D], [M, D] float32, bfloat16 or float16, contiguous last dimension.
        logit_scale, logit_bias:  [], bias or None.
        labels, text_labels:  [N], [M] int64, or None for diagonal targets.
        mask:  [N, M] bool or None.
        offset:  the positive of row i is column i + offset.
    """
    n, m, device = len(image), len(text), image.device
    row_stats = torch.zeros(STATS_FULL if full else STATS_SHORT, n, device=device)
    column_stats = torch.zeros(STATS_FULL if full else STATS_SHORT, m, device=device)
    if n == 0 or m == 0:
        for stats in (row_stats, column_stats):
            stats[LSE] = -torch.inf
            stats[BEST:BEST + 1] = -torch.inf
        return row_stats, column_stats

    tile = tile_for("forward", image.dtype, _mode(labels, mask, full), _capability(device))
    logits = _Logits(tile, image, text, logit_scale, logit_bias, offset, labels, text_labels, mask)
    row_tiles, column_tiles = triton.cdiv(n, tile.rows), triton.cdiv(m, tile.columns)
    per_split = triton.cdiv(column_tiles, _splits(row_tiles, device))
    splits = triton.cdiv(column_tiles, per_split)
    planes = 2 + (labels is not None) + 4 * full
    row_parts = torch.empty(splits, planes, n, device=device)
    column_parts = torch.empty(row_tiles, planes, m, device=device)
    with _guard(device):
        info_nce_fwd_kernel[(row_tiles, splits)](
            *logits.features(0, n), *logits.targets(0, n), row_parts, column_parts, row_stats[POSITIVE],
            column_stats[POSITIVE], *logits.sizes(0, n), logits.mask_stride, per_split, FULL=full, **logits.flags,
            **tile.constants(), **tile.options())
        for parts, stats in ((row_parts, row_stats), (column_parts, column_stats)):
            info_nce_fwd_merge_kernel[(triton.cdiv(stats.shape[1], MERGE_TILE["BL"]),)](
                parts, stats, len(parts), stats.shape[1], LABELS=labels is not None, FULL=full, **MERGE_TILE,
                **FUSED)
    return row_stats, column_stats


def backward(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, row_stats, column_stats,
             row_weight, column_weight, label_smoothing: float, need_image: bool, need_text: bool, need_scale: bool,
             wide: bool = False):
    """(d_image [N, D], d_text [M, D], d_logit_scale [] float32) from the statistics; None where not needed.

    Args:
        row_stats, column_stats:  [K, N], [K, M] float32 of the whole batch; a direction left out may be None.
        row_weight, column_weight:  [N], [M] or []; None leaves the direction out.
        wide:  d_image and d_text in float32 instead of the inputs' dtype.
    """
    device = image.device
    tile = tile_for("gradient", image.dtype, _mode(labels, mask), _capability(device))
    logits = _Logits(tile, image, text, logit_scale, logit_bias, offset, labels, text_labels, mask)
    gain = _gain(image.dtype, row_weight, column_weight)
    smoothing = float(label_smoothing)
    with _guard(device):
        row_terms = _line_terms(row_stats, row_weight, smoothing, labels is not None)
        column_terms = _line_terms(column_stats, column_weight, smoothing, labels is not None)

        def fill(gradient: Tensor, start: int, stop: int) -> None:
            if row_terms is None and column_terms is None:
                gradient.zero_()
                return
            info_nce_bwd_logits_kernel[(logits.tiles(start, stop),)](
                *logits.features(start, stop), *logits.targets(start, stop), gradient, gain,
                None if row_terms is None else row_terms[:, start:stop], column_terms, *logits.sizes(start, stop),
                logits.mask_stride, gradient.stride(0), len(image), ROWS=row_terms is not None,
                COLUMNS=column_terms is not None, SMOOTHING=smoothing != 0, GAIN=gain is not None, **logits.flags,
                **tile.constants(), **tile.options())

        return _feature_gradients(fill, image, text, logits.scale, gain, tile, need_image, need_text, need_scale, wide)


def siglip(image, text, logit_scale, logit_bias, offset: int, row_weight, need_image: bool, need_text: bool,
           need_scale: bool, wide: bool = False):
    """(row_loss [N], d_image, d_text, d_logit_scale [], d_logit_bias []); None where not needed; see the definition."""
    n, m, device = len(image), len(text), image.device
    tile = tile_for("gradient", image.dtype, "plain", _capability(device))
    logits = _Logits(tile, image, text, logit_scale, logit_bias, offset)
    wanted = need_image or need_text or need_scale
    weight = _scalar(row_weight, device) if wanted else None
    gain = _gain(image.dtype, weight)
    row_loss, d_bias = torch.zeros(n, device=device), torch.zeros((), device=device)
    with _guard(device):

        def fill(gradient: Tensor | None, start: int, stop: int) -> None:
            loss_parts = torch.empty(triton.cdiv(m, tile.columns), stop - start, device=device)
            bias_parts = torch.empty_like(loss_parts) if wanted else None
            step = weight.stride(0) if wanted and weight.ndim else 0
            siglip_logits_kernel[(logits.tiles(start, stop),)](
                *logits.features(start, stop), gradient, gain, weight[start:stop] if step else weight, loss_parts,
                bias_parts, *logits.sizes(start, stop), gradient.stride(0) if wanted else 0, step,
                BIAS=logits.bias is not None, GRADIENT=wanted, GAIN=gain is not None, **tile.constants(),
                **tile.options())
            torch.sum(loss_parts, 0, out=row_loss[start:stop])
            if wanted:
                d_bias.add_(bias_parts.sum())

        if wanted:
            gradients = _feature_gradients(fill, image, text, logits.scale, gain, tile, need_image, need_text,
                                           need_scale, wide)
            return row_loss, *gradients, d_bias if need_scale else None
        rows = _chunk_rows(n, m, torch.float32, tile.rows)
        for start in range(0, n if m else 0, rows):
            fill(None, start, min(start + rows, n))
    return row_loss, None, None, None, None


class _Logits:
    """What every logit kernel takes: aligned features, scalars on the device, targets, and their strides."""

    def __init__(self, tile: Tile, image, text, logit_scale, logit_bias, offset: int, labels=None, text_labels=None,
                 mask=None):
        if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(f"info_nce: image is {image.dtype}, the Triton backend takes float32, bfloat16 or float16")
        self.tile, self.offset = tile, offset
        self.image, self.text = _aligned(image, tile.depth), _aligned(text, tile.depth)
        self.scale, self.bias = _scalar(logit_scale, image.device), _scalar(logit_bias, image.device)
        self.labels = None if labels is None else labels.contiguous()
        self.text_labels = None if labels is None else text_labels.contiguous()
        self.mask = None if mask is None else _unit_stride(mask).view(torch.uint8)
        self.mask_stride = 0 if mask is None else self.mask.stride(0)
        self.flags = {"LABELS": labels is not None, "MASK": mask is not None, "BIAS": logit_bias is not None}

    def features(self, start: int, stop: int) -> tuple:
        return self.image[start:stop], self.text, self.scale, self.bias

    def targets(self, start: int, stop: int) -> tuple:
        return (None if self.labels is None else self.labels[start:stop], self.text_labels,
                None if self.mask is None else self.mask[start:stop])

    def sizes(self, start: int, stop: int) -> tuple[int, ...]:
        return (stop - start, len(self.text), self.image.shape[1], self.offset + start, self.image.stride(0),
                self.text.stride(0))

    def tiles(self, start: int, stop: int) -> int:
        return triton.cdiv(stop - start, self.tile.rows) * triton.cdiv(len(self.text), self.tile.columns)


def _line_terms(stats, weight, label_smoothing: float, labels: bool) -> Tensor | None:
    """[4, lines] float32: what the gradient of a logit needs of its row or column; None without a weight."""
    if weight is None:
        return None
    stats, lines = _unit_stride(stats.float()), stats.shape[1]
    weight = _scalar(weight, stats.device)
    terms = torch.empty(4, lines, device=stats.device)
    if lines:
        info_nce_bwd_lines_kernel[(triton.cdiv(lines, LINES),)](
            stats, weight, terms, lines, stats.stride(0), weight.stride(0) if weight.ndim else 0,
            float(label_smoothing), LABELS=labels, SMOOTHING=label_smoothing != 0, BL=LINES, **FUSED)
    return terms


def _feature_gradients(fill, image, text, scale, gain, tile: Tile, need_image, need_text, need_scale, wide):
    """`fill(gradient, start, stop)` writes rows start:stop of the gradient of the logits (times `gain`)."""
    (n, width), m, device = image.shape, len(text), image.device
    rows = _chunk_rows(n, m, image.dtype, tile.rows)
    # rows start on 32 bytes, so that the GEMM library can use its aligned kernels
    # (the interpreter would truncate to bfloat16 where a GPU rounds: there torch rounds)
    buffer = torch.empty(min(rows, n), triton.cdiv(m, 16) * 16, device=device,
                         dtype=torch.float32 if INTERPRETED else image.dtype)
    d_image = torch.empty(n, width, dtype=torch.float32 if wide else image.dtype, device=device) if need_image else None
    pushed = torch.zeros(m, width, device=device) if need_text else None
    # the scale's gradient is sum(image * pulled) = sum(text * pushed): a frozen image tower needs the second only
    d_scale = torch.zeros((), device=device) if need_scale else None
    factor = scale if gain is None else scale / gain
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        gradient = buffer[:stop - start, :m]
        if m:
            fill(gradient, start, stop)
        gradient = gradient.to(image.dtype)
        if need_image or (need_scale and not need_text):
            pulled = _mm(gradient, text)
            if need_image:
                torch.mul(pulled, factor, out=d_image[start:stop])
            if need_scale:
                d_scale += pulled.mul_(image[start:stop]).sum()
        if need_text:
            _accumulate_mm(pushed, gradient.T, image[start:stop])
    if need_scale and need_text and not need_image:
        d_scale = (pushed * text).sum()
    if need_scale and gain is not None:
        d_scale = d_scale / gain
    d_text = None
    if need_text:
        d_text = pushed.mul_(factor).to(torch.float32 if wide else text.dtype)
    return d_image, d_text, d_scale


def _wide_gemm(x: Tensor) -> bool:
    """Whether the library multiplies 16-bit matrices into float32 (CUDA, torch >= 2.8)."""
    return x.is_cuda and x.dtype != torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out")


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    return torch.mm(a, b, out_dtype=torch.float32) if _wide_gemm(a) else torch.mm(a.float(), b.float())


def _accumulate_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32."""
    if _wide_gemm(a):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _chunk_rows(n: int, m: int, dtype: torch.dtype, multiple: int) -> int:
    """Rows of equal chunks whose gradient fits CHUNK_BYTES, a multiple of the tile's; at least one tile."""
    most = max(CHUNK_BYTES // max(m * dtype.itemsize, 1) // multiple, 1) * multiple
    chunks = max(triton.cdiv(n, most), 1)
    return max(triton.cdiv(triton.cdiv(n, chunks), multiple), 1) * multiple


def _splits(row_tiles: int, device: torch.device) -> int:
    """Parts into which the columns are cut so that a few waves of programs fill the device."""
    wanted = 4 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return triton.cdiv(wanted, row_tiles)


def _gain(dtype: torch.dtype, *weights: Tensor | None) -> Tensor | None:
    """[] power of two that lifts weights such as 1 / 2N into the range of float16; the other dtypes need none."""
    sizes = [weight.float().abs().reshape(-1) for weight in weights if weight is not None]
    if dtype != torch.float16 or not sizes:
        return None
    largest = torch.cat([*sizes, sizes[0].new_zeros(1)]).amax().clamp(1e-30, 1e30)
    return torch.exp2(13 - largest.log2().floor())


def _scalar(value, device) -> Tensor | None:
    return None if value is None else torch.as_tensor(value, dtype=torch.float32, device=device)


def _aligned(x: Tensor, depth: int) -> Tensor:
    """Features the logit kernels can load in full vectors: a padded copy where width, stride or address are odd."""
    if x.shape[1] % depth == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_zeros(len(x), triton.cdiv(x.shape[1], depth) * depth)
    padded[:, :x.shape[1]] = x
    return padded


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _capability(device: torch.device) -> int:
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _guard(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aot_variants(capability: int) -> list[Variant]:
    """What ahead-of-time compilation covers: every kernel, dtype and tile of the launchers above, and each branch."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    sizes = ("N", "M", "D", "offset", "image_stride", "text_stride", "mask_stride", "gradient_stride", "row_plane",
             "row_weight_stride", "tiles_per_split", "parts_count", "L", "stats_stride", "weight_stride")
    absent = {"LABELS": ("labels", "text_labels"), "MASK": ("mask",), "BIAS": ("logit_bias",), "GAIN": ("gain",),
              "GRADIENT": ("gradient", "bias_parts", "row_weight"), "ROWS": ("row_terms",),
              "COLUMNS": ("column_terms",)}
    variants = []

    def add(kernel, label: str, dtype: torch.dtype = torch.float32, tile: Tile | None = None, **constants) -> None:
        types = {"labels": "*i64", "text_labels": "*i64", "mask": "*u8", "label_smoothing": "fp32"}
        types |= dict.fromkeys(("image", "text", "gradient"), f"*{names[dtype]}") | dict.fromkeys(sizes, "i32")
        left_out = {name: None for flag, pointers in absent.items() if not constants.get(flag, True)
                    for name in pointers if name in kernel.arg_names}
        variants.append(Variant(f"{label} {names[dtype]}", kernel, types,
                                {"D", "image_stride", "text_stride", "gradient_stride"},
                                constants | left_out | (tile.constants() if tile else {}),
                                tile.options() if tile else FUSED))

    for dtype in names:
        gain = dtype == torch.float16
        for mode in ("plain", "full", "labels"):
            labels, full = mode == "labels", mode != "plain"
            flags = {"LABELS": labels, "MASK": full, "BIAS": labels}
            add(info_nce_fwd_kernel, mode, dtype, tile_for("forward", dtype, mode, capability), FULL=full, **flags)
            add(info_nce_bwd_logits_kernel, mode, dtype, tile_for("gradient", dtype, mode, capability), ROWS=True,
                COLUMNS=True, SMOOTHING=full, GAIN=gain, **flags)
        tile = tile_for("gradient", dtype, "plain", capability)
        for label, rows in (("image_to_text", True), ("text_to_image", False)):
            add(info_nce_bwd_logits_kernel, label, dtype, tile, LABELS=False, MASK=False, BIAS=False, ROWS=rows,
                COLUMNS=not rows, SMOOTHING=False, GAIN=gain)
        for label, gradient in (("loss", False), ("gradient", True)):
            add(siglip_logits_kernel, label, dtype, tile, BIAS=True, GRADIENT=gradient, GAIN=gradient and gain)
    for label, labels, full in (("short", False, False), ("full", False, True), ("labels", True, True)):
        add(info_nce_fwd_merge_kernel, label, LABELS=labels, FULL=full, **MERGE_TILE)
        add(info_nce_bwd_lines_kernel, label, LABELS=labels, SMOOTHING=full, BL=LINES)
    return variants
