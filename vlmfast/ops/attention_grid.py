"""Attention on grids of tokens: shifted windows (Swin, CoSwin, Video Swin) and the sparse causal kinds of DALL-E."""

from functools import cache

import torch
from torch import Tensor

from . import dispatch
from .attention_call import CAUSAL, Direction, Options, needs_no_op, run
from .attention_checks import check_match, check_rate, check_scale, check_streams, draw_seed
from .reference import attention as reference

AXIAL_MODES = "row", "col", "conv", "row_only", "corner", "full"


def window_attention(qkv: Tensor, bias: Tensor | None = None, *, window, shift=0, scale: float | None = None,
                     dropout: float = 0.0, seed=None) -> Tensor:
    r"""Self-attention within (shifted) windows of a grid, from and to the grid's own layout.

    Equivalent to: roll the grid by -shift, cut it into windows, attend within each window with the relative bias and
    the mask of the regions that the roll brought together, put the windows back and roll by shift. The native and the
    Triton kernels roll, cut and mask nothing in memory.

    Args:
        qkv:  [B, h, w, 3, H, D] or [B, t, h, w, 3, H, D] float32, bfloat16, float16 or float64: a Linear's output,
            viewed.
        bias:  the relative position table [(2 w0 - 1)(2 w1 - 1).., H], or [H, N, N] for the N positions of a window,
            or None. Differentiable.
        window:  an int or one per axis; each must divide its axis.
        shift:  an int or one per axis, 0 <= shift < window.
        scale:  a float, by default 1 / sqrt(D).
        dropout, seed:  as in `co_attention`; a "sequence" of `dropout_mask` is a window, the windows of a sample in
            row-major order.

    Returns:
        [B, h, w, H, D] or [B, t, h, w, H, D], same dtype. The mask equals Swin's additive -100 (exp(-100) is 0).

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: Swin (Liu et al. 2021, arXiv:2103.14030), eq. 4, Fig. 4; Video Swin (Liu et al. 2022, arXiv:2106.13230).
    """
    op = "window_attention"
    if isinstance(qkv, Tensor) and qkv.ndim not in (6, 7):
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}, it must be [B, h, w, 3, H, D] or "
                         "[B, t, h, w, 3, H, D]")
    (qkv,) = check_streams(op, ("qkv",), (qkv,), rank=getattr(qkv, "ndim", 6))
    size, (three, heads, width) = tuple(qkv.shape[1:-3]), qkv.shape[-3:]
    if three != 3:
        raise ValueError(f"{op}: qkv has {three} parts in dimension {qkv.ndim - 3}, it must have 3 (query, key, value)")
    window, shift = _per_axis(op, "window", window, len(size)), _per_axis(op, "shift", shift, len(size))
    for axis, (length, w, s) in enumerate(zip(size, window, shift, strict=True)):
        if w < 1 or length % w:
            raise ValueError(f"{op}: window is {w} on axis {axis}, it must divide the length {length}")
        if not 0 <= s < w:
            raise ValueError(f"{op}: shift is {s} on axis {axis}, it must lie between 0 and {w - 1}")
    bias = _window_bias(op, bias, window, heads, qkv)
    scale = check_scale(op, scale, width)
    dropout = check_rate(op, "dropout", dropout)
    seed = draw_seed(op, seed, qkv, dropout > 0)
    if dispatch.choose("attention", qkv) != "reference":
        cached = needs_no_op(qkv)
        rows, regions = (_window_index if cached else reference.window_index)(size, window, shift, qkv.device)
        query, key, value = qkv.flatten(1, len(size)).unbind(2)
        options = Options(rows_q=rows, rows_k=rows, regions=regions if any(shift) else None)
        bias = None if bias is None else bias[None]
        ((out, _, _),) = run(op, [Direction(query, key, value, bias, options, scale, dropout, 0)], seed)
        return out.view(qkv.shape[0], *size, heads, width)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    return reference.window_attention(qkv, None if bias is None else bias.to(wide), window=window, shift=shift,
                                      scale=scale, dropout=dropout, seed=seed)


@cache
def _window_index(size, window, shift, device) -> tuple[Tensor, Tensor]:
    rows, regions = reference.window_index(size, window, shift, device)
    return rows.contiguous(), regions.contiguous()


def _per_axis(op: str, name: str, value, axes: int) -> tuple[int, ...]:
    values = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(values) != axes or not all(isinstance(v, int) for v in values):
        raise ValueError(f"{op}: {name} is {value!r}, it must be an int or {axes} of them")
    return values


def _window_bias(op: str, bias, window: tuple[int, ...], heads: int, qkv: Tensor) -> Tensor | None:
    """The table or the bias itself -> [H, N, N]."""
    if bias is None:
        return None
    if not isinstance(bias, Tensor) or not bias.is_floating_point():
        kind = bias.dtype if isinstance(bias, Tensor) else type(bias).__name__
        raise TypeError(f"{op}: bias is {kind}, it must be a floating-point tensor")
    if bias.device != qkv.device:
        raise ValueError(f"{op}: bias is on {bias.device}, it must be on {qkv.device}")
    count = rows = 1
    for width in window:
        count, rows = count * width, rows * (2 * width - 1)
    if bias.shape == (rows, heads):
        index = reference.relative_index(window, qkv.device)
        return bias[index.flatten()].view(count, count, heads).permute(2, 0, 1)
    if bias.shape != (heads, count, count):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, it must be the table [{rows}, {heads}] or "
                         f"[{heads}, {count}, {count}]")
    return bias


def axial_attention(query: Tensor, key: Tensor, value: Tensor, *, text_len: int, grid: tuple[int, int],
                    mode: str = "row", kernel: int = 11, scale: float | None = None, dropout: float = 0.0,
                    seed=None) -> Tensor:
    """Causal attention over text and then an image grid, where an image position reads all text and few others.

    Equivalent to `cross_attention(query, key, value, mask=axial_mask(text_len, grid, mode)[None])`.

    Args:
        query, key, value:  [B, text_len + height width, H, D], value [.., Dv]; any strides with a contiguous last
            dimension.
        text_len:  text positions, causal among themselves.
        grid:  (height, width) of the image, row-major.
        mode:  "row": the last `width` positions; "col": its own column; "conv": `kernel` columns centred on it in its
            row and the rows above; "row_only": its own row; "corner": the square up and left of it; "full": all.
            Always only positions up to itself.
        kernel:  side of the square for "conv" (odd) and "corner".
        scale:  a float, by default 1 / sqrt(D).
        dropout, seed:  as in `co_attention`.

    Returns:
        [B, text_len + height width, H, Dv].

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: DALL-E (Ramesh et al. 2021, arXiv:2102.12092), Fig. 11.
    """
    op = "axial_attention"
    query, key, value = check_streams(op, ("query", "key", "value"), (query, key, value))
    check_match(op, ("query", "key", "value"), query, key, value, False)
    height, width = _per_axis(op, "grid", tuple(grid), 2)
    if not isinstance(text_len, int) or text_len < 0 or height < 0 or width < 0:
        raise ValueError(f"{op}: text_len is {text_len!r} and grid {grid!r}, they must not be negative")
    length = text_len + height * width
    for name, x in (("query", query), ("key", key)):
        if x.shape[1] != length:
            raise ValueError(f"{op}: {name} has length {x.shape[1]}, it must be {length}, text_len + height * width")
    if mode not in AXIAL_MODES:
        raise ValueError(f"{op}: mode is {mode!r}, it must be one of {', '.join(AXIAL_MODES)}")
    if kernel < 1 or mode == "conv" and kernel % 2 == 0:
        raise ValueError(f"{op}: kernel is {kernel}, it must be positive, and odd for mode 'conv'")
    scale = check_scale(op, scale, query.shape[3])
    dropout = check_rate(op, "dropout", dropout)
    seed = draw_seed(op, seed, query, dropout > 0)
    if dispatch.choose("attention", query) != "reference":
        return _axial_groupwise(query, key, value, text_len, (height, width), mode, kernel, scale, dropout, seed)
    return reference.axial_attention(query, key, value, text_len=text_len, grid=(height, width), mode=mode,
                                     kernel=kernel, scale=scale, dropout=dropout, seed=seed)


def _axial_groupwise(query, key, value, text_len, grid, mode, kernel, scale, dropout, seed) -> Tensor:
    """Text reads text, and a few lines of the image at a time read the text and the union of what they see."""
    op, causal = "axial_attention", Direction(query, key, value, None, Options(), scale, dropout, CAUSAL)
    if mode == "full" or grid[0] * grid[1] == 0:
        return run(op, [causal], seed)[0][0]
    cached = needs_no_op(query)
    if dropout:
        # the draws belong to positions of the whole sequence
        mask = (_axial_mask if cached else reference.axial_mask)(text_len, grid, mode, kernel, query.device)[None, None]
        return run(op, [Direction(query, key, value, None, Options(mask=mask), scale, dropout, 0)], seed)[0][0]
    rows_q, rows_k, mask = (_axial_groups if cached else axial_groups)(text_len, grid, mode, kernel, query.device)
    options = Options(rows_q=rows_q, rows_k=rows_k, mask=mask)
    image = Direction(query[:, text_len:], key, value, None, options, scale, 0.0, 0)
    if not text_len:
        return run(op, [image], seed)[0][0]
    text = causal._replace(query=query[:, :text_len], key=key[:, :text_len], value=value[:, :text_len])
    (out_text, *_), (out_image, *_) = run(op, [text, image], seed)
    return torch.cat([out_text, out_image], 1)


def axial_groups(text_len: int, grid: tuple[int, int], mode: str, kernel: int,
                 device=None) -> tuple[Tensor, Tensor, Tensor]:
    """For each group of lines: rows of its queries [G, Nq] and keys [G, Nk], -1 for none, and mask [G, 1, Nq, Nk]."""
    height, width = grid
    at = torch.arange(height * width, device=device).view(height, width)
    lines = at.T if mode == "col" else at
    # about 64 queries share one reading of the text
    count = max(n for n in range(1, len(lines) + 1) if len(lines) % n == 0 and n <= max(1, 64 // lines.shape[1]))
    rows_q = lines.reshape(len(lines) // count, -1).contiguous()
    seen = reference.axial_mask(0, grid, mode, kernel, device)[rows_q]  # [G, Nq, N]
    used = seen.any(1)
    above = {"row": 1, "row_only": 0, "col": 0, "conv": kernel // 2, "corner": kernel - 1}[mode]
    width_k = min(count + above, len(lines)) * lines.shape[1]
    order = torch.where(used, at.flatten(), height * width).sort(1).values[:, :width_k]
    missing = order == height * width
    keys = order.masked_fill(missing, 0)
    mask = seen.gather(2, keys[:, None].expand(-1, rows_q.shape[1], -1)) & ~missing[:, None]
    text = torch.arange(text_len, device=device).expand(len(rows_q), -1)
    rows_k = torch.cat([text, (keys + text_len).masked_fill(missing, -1)], 1)
    if rows_k.shape == rows_q.shape:
        # one more column, which is no key: equal sizes would say that no key is shared
        rows_k = torch.cat([rows_k, rows_k.new_full((len(rows_k), 1), -1)], 1)
        mask = torch.cat([mask, mask.new_zeros(*mask.shape[:2], 1)], 2)
    mask = torch.cat([mask.new_ones(*mask.shape[:2], text_len), mask], 2)
    return rows_q, rows_k.contiguous(), mask[:, None].contiguous()


_axial_groups, _axial_mask = cache(axial_groups), cache(reference.axial_mask)
