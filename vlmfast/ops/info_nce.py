"""Contrastive losses over all pairs of a batch, without the N x N logits in memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import dispatch
from .autograd import first_order
from .reference.info_nce import BEST, COUNT, LSE, POSITIVE, POSITIVES, STATS_FULL, STATS_SHORT, SUM, softplus

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_DIRECTIONS = {"both": 3, "image_to_text": 1, "text_to_image": 2}
# memory="auto" keeps the logits for the backward up to this many bytes (N = 4096): beyond, the system's work for fresh
# pages costs as much as computing the logits again
CACHE_BUDGET = 64 << 20


def info_nce(image: Tensor, text: Tensor, logit_scale, *, logit_bias=None, labels: Tensor | None = None,
             text_labels: Tensor | None = None, targets: str | None = None, label_smoothing: float = 0.0,
             weight: Tensor | None = None, mask: Tensor | None = None, direction: str = "both",
             reduction: str = "mean", group=None, comm: str = "auto", memory: str = "auto",
             return_stats: bool = False):
    r"""Symmetric contrastive loss over all pairs.

    .. math:: \mathcal{L} = \tfrac{1}{2N} \sum_i \big[ \mathrm{lse}_j(s\,u_i\!\cdot\!v_j)
              + \mathrm{lse}_j(s\,u_j\!\cdot\!v_i) - 2 s\,u_i\!\cdot\!v_i \big]

    Equivalent to::

        logits = logit_scale * image @ text.T
        target = torch.arange(len(logits))
        (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    Args:
        image:  [N, D] float32, bfloat16, float16 or float64 with a contiguous last dimension; usually L2-normalised.
        text:  [N, D], same dtype and device; [M, D] with `labels` and `text_labels`.
        logit_scale:  the multiplier itself, not its logarithm: a float, a [] tensor, a Parameter or exp(parameter).
        logit_bias:  a float or [] tensor added to every logit; its gradient is exactly 0.
        labels:  [N] integers: every pair with equal labels is positive, all positives of a line share the target
            (UniCL). text_labels: [M] labels of the texts, by default those of the images.
        targets:  "diag" or "labels"; by default "labels" if `labels` are given.
        label_smoothing:  share of the target spread evenly over all pairs of a line (ALIGN), 0 to 1.
        weight:  [N] weight of each pair; "mean" divides by their sum.
        mask:  [N, M] bool, True leaves a negative pair out of both directions (duplicates, for example). With diagonal
            targets the positive pair always counts. A line with nothing left gives loss 0 and gradient 0.
        direction:  "both", "image_to_text" (softmax over texts) or "text_to_image".
        reduction:  "mean"; "sum" over pairs; "none": [N] with one loss a pair.
        group:  a torch.distributed process group over which the batch is the union of all ranks' rows; None means
            this process only. The DDP mean of the gradients is that of the whole batch's loss.
        comm:  "gather", "ring", "auto" or "local" (ignore the group).
        memory:  "recompute" keeps O(N D) for the backward; "cache" keeps N M numbers and saves a quarter of the work
            (native backend); "auto" caches up to `CACHE_BUDGET` bytes.
        return_stats:  also return a dict of detached tensors: row_lse [N], column_lse [M], positive_logit,
            negative_logit (means), and for diagonal targets image_to_text_accuracy, text_to_image_accuracy.

    Returns:
        float32 (float64 for float64 inputs) loss, [] or [N]; (loss, stats) with `return_stats`.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: CLIP (arXiv:2103.00020), Fig. 3; ALIGN (arXiv:2102.05918), eq. 1-2; UniCL (arXiv:2204.03610), eq. 3-5.
    """
    image, text = _check_features("info_nce", image, text)
    n, m = image.shape[0], text.shape[0]
    if targets is not None and targets != ("diag" if labels is None else "labels"):
        raise ValueError(f"info_nce: targets is {targets!r}, it must be 'labels' with labels and 'diag' without")
    if labels is not None or text_labels is not None:
        labels, text_labels = _check_labels(labels, text_labels, n, m, image.device)
    elif n != m:
        raise ValueError(f"info_nce: text has {m} rows, image has {n}; they must be equal without labels")
    if direction not in _DIRECTIONS:
        raise ValueError(f"info_nce: direction is {direction!r}, it must be one of {', '.join(_DIRECTIONS)}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"info_nce: reduction is {reduction!r}, it must be mean, sum or none")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"info_nce: label_smoothing is {label_smoothing}, it must lie between 0 and 1")
    if memory not in ("auto", "recompute", "cache"):
        raise ValueError(f"info_nce: memory is {memory!r}, it must be auto, recompute or cache")
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    logit_scale = _scalar("info_nce", "logit_scale", logit_scale, image, wide)
    if logit_bias is not None:
        logit_bias = _scalar("info_nce", "logit_bias", logit_bias, image, wide)
    if weight is not None:
        weight = _check_weight(weight, n, image.device).to(wide)
    world = _world(group, comm, "info_nce")
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 2 or world == 1 and mask.shape != (n, m)):
        raise ValueError(f"info_nce: mask is {tuple(mask.shape)} {mask.dtype}, it must be [{n}, {m}] bool")
    if world > 1:
        from . import gather

        return gather.info_nce_distributed(image, text, logit_scale, logit_bias, labels, text_labels, label_smoothing,
                                           weight, mask, direction, reduction, group, comm, return_stats)
    if n == 0 or m == 0:
        raise ValueError(f"info_nce: the batch is empty (image {tuple(image.shape)}, text {tuple(text.shape)})")
    if n != m and (reduction == "none" or weight is not None):
        raise ValueError(f"info_nce: reduction 'none' and weight need as many texts ({m}) as images ({n})")

    options = _Options(_DIRECTIONS[direction], reduction, float(label_smoothing),
                       labels is not None or label_smoothing > 0 or return_stats, memory)
    tensors = image, text, logit_scale, logit_bias, labels, text_labels, mask, weight
    if torch.is_grad_enabled() and (image.requires_grad or text.requires_grad or logit_scale.requires_grad
                                    or logit_bias is not None and logit_bias.requires_grad):
        loss, row_stats, column_stats = _InfoNCE.apply(*tensors, options)
    else:
        loss, row_stats, column_stats, _ = _forward(*tensors, options, False)
    if return_stats:
        return loss, statistics(row_stats, column_stats, labels is None)
    return loss


class _Options(NamedTuple):
    direction: int  # 1 rows, 2 columns, 3 both
    reduction: str
    smoothing: float
    full: bool
    memory: str


def _forward(image, text, logit_scale, logit_bias, labels, text_labels, mask, weight, options: _Options, keep: bool):
    loss, row_stats, column_stats, tiles = _fwd_op(
        image, text, logit_scale, logit_bias, labels, text_labels, mask, 0, options.full, keep, options.direction,
        options.smoothing)
    if options.reduction != "mean" or weight is not None:
        loss = reduce_lines(row_stats, column_stats, labels is None, options, weight).to(logit_scale.dtype)
    return loss, row_stats, column_stats, tiles


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, labels, text_labels, mask, weight, options):
        needs = ctx.needs_input_grad
        ctx.needs = needs[0], needs[1], needs[2], needs[3]
        ctx.options = options
        keep = _keeps_tiles(image, text, options.memory) and (needs[0] or needs[1])
        tensors = image, text, logit_scale, logit_bias, labels, text_labels, mask, weight
        loss, row_stats, column_stats, tiles = _forward(*tensors, options, keep)
        ctx.save_for_backward(*tensors, row_stats, column_stats, tiles)
        ctx.mark_non_differentiable(row_stats, column_stats)
        return loss, row_stats, column_stats

    @staticmethod
    @first_order("info_nce")
    def backward(ctx, gradient, _rows, _columns):
        *tensors, weight, row_stats, column_stats, tiles = ctx.saved_tensors
        options = ctx.options
        need_image, need_text, need_scale, need_bias = ctx.needs
        weights = line_weights(gradient, weight, options, row_stats.shape[1], column_stats.shape[1])
        d_image, d_text, d_scale = _bwd_op(
            *tensors, 0, row_stats, column_stats, tiles, *weights, options.smoothing, need_image, need_text,
            need_scale, False)
        d_bias = torch.zeros_like(tensors[3]) if need_bias else None
        return (d_image if need_image else None, d_text if need_text else None, d_scale if need_scale else None,
                d_bias, None, None, None, None, None)


def _keeps_tiles(image: Tensor, text: Tensor, memory: str) -> bool:
    if memory == "recompute":
        return False
    native = dispatch.choose("info_nce", image) == "native"
    if memory == "cache" and not native:
        raise ValueError("info_nce: memory 'cache' needs the native backend, this call runs on "
                         f"{dispatch.choose('info_nce', image)!r}")
    return native and (memory == "cache" or image.shape[0] * text.shape[0] * 4 <= CACHE_BUDGET)


def line_weights(gradient: Tensor, weight: Tensor | None, options: _Options, n: int, m: int):
    """Upstream gradient of the reduced loss -> (row_weight, column_weight) of the primitives, [] or [N] and [M]."""
    if weight is not None:
        gradient = gradient * (weight / weight.sum() if options.reduction == "mean" else weight)
    share = 0.5 if options.direction == 3 else 1.0
    if options.reduction == "mean" and weight is None:
        rows, columns = gradient * (share / n), gradient * (share / m)
    else:
        rows = columns = gradient * share
    return rows if options.direction & 1 else None, columns if options.direction & 2 else None


def line_losses(stats: Tensor, diagonal: bool, smoothing: float) -> Tensor:
    """[K, lines] statistics -> [lines] cross entropies; 0 for a line without positives."""
    loss, target = stats[LSE], stats[POSITIVE]
    if diagonal:
        if smoothing == 0:
            return softplus(loss - target)
        loss = target + softplus(loss - target)
    else:
        target = target / stats[POSITIVES].clamp(min=1)
    loss = loss - (1 - smoothing) * target
    if smoothing:
        loss = loss - smoothing * stats[SUM] / stats[COUNT].clamp(min=1)
    return loss if diagonal else torch.where(stats[POSITIVES] > 0, loss, torch.zeros_like(loss))


def reduce_lines(row_stats: Tensor, column_stats: Tensor, diagonal: bool, options: _Options, weight=None) -> Tensor:
    """Statistics -> the loss, [] or [N]."""
    parts = []
    if options.direction & 1:
        parts.append(line_losses(row_stats, diagonal, options.smoothing))
    if options.direction & 2:
        parts.append(line_losses(column_stats, diagonal, options.smoothing))
    if weight is not None:
        parts = [part * weight for part in parts]
    if options.reduction == "none":
        return sum(parts) / len(parts)
    totals = [part.sum() if options.reduction == "sum" or weight is not None else part.mean() for part in parts]
    loss = sum(totals) / len(totals)
    return loss / weight.sum() if options.reduction == "mean" and weight is not None else loss


def statistics(row_stats: Tensor, column_stats: Tensor, diagonal: bool) -> dict[str, Tensor]:
    """Full statistics of rows and columns -> what people log; see `info_nce`."""
    def lse(stats):
        return torch.logaddexp(stats[LSE], stats[POSITIVE]) if diagonal else stats[LSE]

    count, positives = row_stats[COUNT].sum(), row_stats[POSITIVES].sum()
    positive = row_stats[POSITIVE].sum()
    stats = {
        "row_lse": lse(row_stats),
        "column_lse": lse(column_stats),
        "positive_logit": positive / positives,
        "negative_logit": (row_stats[SUM].sum() - positive) / (count - positives),
    }
    if diagonal:
        for name, lines in (("image_to_text_accuracy", row_stats), ("text_to_image_accuracy", column_stats)):
            stats[name] = (lines[POSITIVE] >= lines[BEST]).to(lines.dtype).mean()
    return stats


def siglip_loss(image: Tensor, text: Tensor, logit_scale, logit_bias=None, *, reduction: str = "mean", group=None,
                comm: str = "auto") -> Tensor:
    r"""Sigmoid loss over all pairs.

    .. math:: \mathcal{L} = -\tfrac{1}{N} \sum_{ij} \log \sigma\big(y_{ij} (s\,u_i\!\cdot\!v_j + b)\big),
              \quad y_{ii} = 1, \; y_{ij} = -1

    Equivalent to::

        logits = logit_scale * image @ text.T + logit_bias
        sign = 2 * torch.eye(N) - 1
        -F.logsigmoid(sign * logits).sum() / N

    Args:
        image, text:  [N, D] float32, bfloat16, float16 or float64 with a contiguous last dimension.
        logit_scale, logit_bias:  a float or a [] tensor; the scale itself, not its logarithm.
        reduction:  "mean" over images, "sum", or "none": [N], each image's loss over all texts.
        group, comm:  as in `info_nce`.

    Returns:
        float32 (float64 for float64 inputs) loss, [] or [N]. The gradients are computed in the forward.

    Raises:
        TypeError, ValueError: naming the argument, what it was and what it must be.

    Source: SigLIP (Zhai et al. 2023, arXiv:2303.15343), eq. 1.
    """
    image, text = _check_features("siglip_loss", image, text)
    n, m = image.shape[0], text.shape[0]
    if n != m:
        raise ValueError(f"siglip_loss: text has {m} rows, image has {n}; they must be equal")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"siglip_loss: reduction is {reduction!r}, it must be mean, sum or none")
    wide = torch.float64 if image.dtype == torch.float64 else torch.float32
    logit_scale = _scalar("siglip_loss", "logit_scale", logit_scale, image, wide)
    if logit_bias is not None:
        logit_bias = _scalar("siglip_loss", "logit_bias", logit_bias, image, wide)
    if _world(group, comm, "siglip_loss") > 1:
        from . import gather

        return gather.siglip_distributed(image, text, logit_scale, logit_bias, reduction, group, comm)
    if n == 0:
        raise ValueError("siglip_loss: the batch is empty")
    if torch.is_grad_enabled() and (image.requires_grad or text.requires_grad or logit_scale.requires_grad
                                    or logit_bias is not None and logit_bias.requires_grad):
        return _SigLip.apply(image, text, logit_scale, logit_bias, reduction)
    rows = siglip_rows(image, text, logit_scale, logit_bias, 0, logit_scale, False, False, False, False)[0]
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


class _SigLip(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, logit_scale, logit_bias, reduction):
        need_image, need_text, need_scale, need_bias, _ = ctx.needs_input_grad
        ctx.needs = need_image, need_text, need_scale or need_bias
        ctx.reduction = reduction
        tensors = image, text, logit_scale, logit_bias
        if reduction == "none":
            ctx.save_for_backward(*tensors)
            return siglip_rows(*tensors, 0, logit_scale, False, False, False, False)[0]
        weight = torch.full((), 1 / len(image) if reduction == "mean" else 1.0, dtype=logit_scale.dtype,
                            device=image.device)
        # kept wider than 16-bit inputs: the upstream gradient is still to come, and they are rounded once
        rows, *gradients = siglip_rows(*tensors, 0, weight, *ctx.needs, True)
        ctx.save_for_backward(*tensors, *gradients)
        return rows.sum() if reduction == "sum" else rows.mean()

    @staticmethod
    @first_order("siglip_loss")
    def backward(ctx, upstream):
        need_image, need_text, need_scale = ctx.needs
        tensors, gradients = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        if ctx.reduction == "none":
            _, d_image, d_text, d_scale, d_bias = siglip_rows(*tensors, 0, upstream, *ctx.needs, False)
        else:
            d_image, d_text, d_scale, d_bias = (None if g is None else upstream * g for g in gradients)
            d_image = d_image.to(tensors[0].dtype) if need_image else None
            d_text = d_text.to(tensors[0].dtype) if need_text else None
        wants = ctx.needs_input_grad
        return d_image, d_text, d_scale if wants[2] else None, d_bias if wants[3] else None, None


def cached_loss(image: Tensor, text: Tensor, logit_scale, *, loss=info_nce, **options):
    """Loss and feature gradients for training in chunks with the whole batch's loss (GradCache).

    Encode the batch in chunks without a graph, call this on the joined features, then encode each chunk again and
    backpropagate its rows of the gradients. Gradients of `logit_scale` and other parameters go to their `.grad`.

    Args:
        image, text:  [N, D] features; they are detached.
        logit_scale, options:  as in `loss`, by default `info_nce`.

    Returns:
        (loss [] detached, d_image [N, D], d_text [N, D])

    Source: Gao et al. 2021 (arXiv:2101.06983).
    """
    image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(image, text, logit_scale, **options)
    value.backward()
    return value.detach(), image.grad, text.grad


def line_statistics(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, full: bool):
    """`reference.info_nce.forward` on the backend in force: (row_stats, column_stats)."""
    return _fwd_op(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, full,
                                          False, 0, 0.0)[1:3]


def line_gradients(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, row_stats,
                   column_stats, row_weight, column_weight, label_smoothing: float, need_image: bool, need_text: bool,
                   need_scale: bool, wide: bool):
    """`reference.info_nce.backward` on the backend in force: (d_image, d_text, d_scale), None where not needed."""
    gradients = _bwd_op(
        image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, row_stats, column_stats,
        logit_scale.new_empty(0), row_weight, column_weight, label_smoothing, need_image, need_text, need_scale, wide)
    return tuple(g if need else None for g, need in zip(gradients, (need_image, need_text, need_scale), strict=True))


def siglip_rows(image, text, logit_scale, logit_bias, offset: int, row_weight, need_image: bool, need_text: bool,
                need_scale: bool, wide: bool):
    """`reference.info_nce.siglip` on the backend in force."""
    rows, *gradients = _siglip_op(image, text, logit_scale, logit_bias, offset, row_weight, need_image,
                                                need_text, need_scale, wide)
    needs = need_image, need_text, need_scale, need_scale
    return rows, *(g if need else None for g, need in zip(gradients, needs, strict=True))


def _check_features(op: str, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("image", image), ("text", text)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} is a {type(x).__name__}, it must be a tensor")
        if x.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {tuple(x.shape)}, it must be [N, D]")
    if image.dtype != text.dtype:
        if not torch.is_autocast_enabled(image.device.type):
            raise ValueError(f"{op}: text is {text.dtype}, image is {image.dtype}; they must be equal")
        dtype = torch.promote_types(image.dtype, text.dtype)
        image, text = image.to(dtype), text.to(dtype)
    if image.dtype not in _DTYPES:
        raise TypeError(f"{op}: image is {image.dtype}, it must be float32, float64, bfloat16 or float16")
    if image.device != text.device:
        raise ValueError(f"{op}: text is on {text.device}, image on {image.device}; they must be equal")
    if image.shape[1] != text.shape[1]:
        raise ValueError(f"{op}: text has width {text.shape[1]}, image has {image.shape[1]}; they must be equal")
    if image.stride(1) != 1 and image.shape[1] > 1:
        image = image.contiguous()
    if text.stride(1) != 1 and text.shape[1] > 1:
        text = text.contiguous()
    return image, text


def _scalar(op: str, name: str, value, like: Tensor, wide: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=wide, device=like.device)
    if value.ndim or value.dtype != wide or value.device != like.device:
        if value.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}, it must be a single number")
        if value.device != like.device and value.device.type != "cpu":
            raise ValueError(f"{op}: {name} is on {value.device}, image on {like.device}; they must be equal")
        value = value.reshape(()).to(device=like.device, dtype=wide)
    return value


def _check_labels(labels, text_labels, n: int, m: int, device) -> tuple[Tensor, Tensor]:
    if labels is None:
        raise ValueError("info_nce: text_labels need labels")
    text_labels = labels if text_labels is None else text_labels
    checked = []
    for name, value, count in (("labels", labels, n), ("text_labels", text_labels, m)):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex():
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"info_nce: {name} is {kind}, it must be an integer tensor")
        if value.shape != (count,):
            raise ValueError(f"info_nce: {name} has shape {tuple(value.shape)}, it must be [{count}]")
        if value.device != device:
            raise ValueError(f"info_nce: {name} is on {value.device}, image on {device}; they must be equal")
        checked.append(value.long().contiguous())
    return checked[0], checked[1]


def _check_weight(weight, n: int, device) -> Tensor:
    if not isinstance(weight, Tensor) or weight.shape != (n,):
        shape = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"info_nce: weight is {shape}, it must be [{n}]")
    if weight.device != device:
        raise ValueError(f"info_nce: weight is on {weight.device}, image on {device}; they must be equal")
    return weight.detach()


def _world(group, comm: str, op: str) -> int:
    if comm not in ("auto", "gather", "ring", "local"):
        raise ValueError(f"{op}: comm is {comm!r}, it must be auto, gather, ring or local")
    if group is None or comm == "local":
        return 1
    world = torch.distributed.get_world_size(group)
    if world < 1:
        raise ValueError(f"{op}: this process is not a member of group")
    return world


_library = torch.library.Library("vlmfast", "FRAGMENT")
_INPUTS = ("Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, Tensor? labels, Tensor? text_labels, "
           "Tensor? mask, int offset")
_library.define(f"info_nce_fwd({_INPUTS}, bool full, bool keep, int direction, float smoothing) "
                "-> (Tensor, Tensor, Tensor, Tensor)")
_library.define(f"info_nce_bwd({_INPUTS}, Tensor row_stats, Tensor column_stats, Tensor tiles, Tensor? row_weight, "
                "Tensor? column_weight, float smoothing, bool need_image, bool need_text, bool need_scale, bool wide) "
                "-> (Tensor, Tensor, Tensor)")
_library.define("siglip(Tensor image, Tensor text, Tensor logit_scale, Tensor? logit_bias, int offset, "
                "Tensor row_weight, bool need_image, bool need_text, bool need_scale, bool wide) "
                "-> (Tensor, Tensor, Tensor, Tensor, Tensor)")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _pairs(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, threads):
    mask_row, mask_column = (0, 0) if mask is None else mask.stride()
    return _native.pairs(image.data_ptr(), text.data_ptr(), _DTYPES[image.dtype], image.shape[0], text.shape[0],
                         image.shape[1], image.stride(0), text.stride(0), logit_scale.data_ptr(), _address(logit_bias),
                         _address(labels), _address(text_labels), _address(mask), mask_row, mask_column, offset,
                         threads)


def _tiles_shape(n, m):
    # the kernel's blocks are whole, and their exponents follow the tiles
    return n + 196, m + 64


def _raise_if_nan(status: int, op: str):
    if status:
        raise ValueError(f"{op}: logit_scale or logit_bias is NaN, it must be a number")


def _info_nce_fwd(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, full, keep, direction,
                  smoothing):
    name = dispatch.choose("info_nce", image)
    dtype = logit_scale.dtype
    if name != "native":
        with torch.autocast(image.device.type, enabled=False):
            row_stats, column_stats = dispatch.module("info_nce", name).forward(
                image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, full)
        options = _Options(direction, "mean", smoothing, full, "recompute")
        loss = reduce_lines(row_stats, column_stats, labels is None, options) if direction else row_stats.new_empty(())
        return loss, row_stats, column_stats, row_stats.new_empty(0)
    n, m, count = image.shape[0], text.shape[0], STATS_FULL if full else STATS_SHORT
    row_stats = torch.empty(count, n, dtype=torch.float64)
    column_stats = torch.empty(count, m, dtype=torch.float64)
    loss = torch.empty((), dtype=dtype)
    threads = torch.get_num_threads()
    tiles = torch.empty(_tiles_shape(n, m) if keep else 0, dtype=dtype)
    if keep:
        tiles[-1, -1] = threads
    status = _native.info_nce_fwd(
        _pairs(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, threads), full,
        row_stats.data_ptr(), column_stats.data_ptr(), tiles.data_ptr() if keep else 0,
        loss.data_ptr() if direction else 0, bool(direction & 1), bool(direction & 2), smoothing)
    _raise_if_nan(status, "info_nce")
    return loss, row_stats, column_stats, tiles


def _info_nce_fwd_fake(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, full, keep, direction,
                       smoothing):
    n, m, count = image.shape[0], text.shape[0], STATS_FULL if full else STATS_SHORT
    new = logit_scale.new_empty
    stats = torch.float64 if dispatch.choose("info_nce", image) == "native" else logit_scale.dtype
    return (new(()), new(count, n, dtype=stats), new(count, m, dtype=stats), new(_tiles_shape(n, m) if keep else 0))


def _info_nce_bwd(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, row_stats, column_stats,
                  tiles, row_weight, column_weight, smoothing, need_image, need_text, need_scale, wide):
    name = dispatch.choose("info_nce", image) if not tiles.numel() else "native"
    # the kernels read weights in the working dtype
    row_weight, column_weight = (w if w is None else w.to(logit_scale.dtype) for w in (row_weight, column_weight))
    if name != "native":
        with torch.autocast(image.device.type, enabled=False):
            gradients = dispatch.module("info_nce", name).backward(
                image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, row_stats, column_stats,
                row_weight, column_weight, smoothing, need_image, need_text, need_scale, wide)
        return tuple(logit_scale.new_empty(0) if g is None else g for g in gradients)
    out = logit_scale.dtype if wide else image.dtype
    kept = tiles.numel() > 0
    # the scale's gradient comes from one tower's sums
    d_image = torch.empty(image.shape if need_image or not need_text else 0, dtype=out)
    d_text = torch.empty(text.shape if need_text else 0, dtype=out)
    d_scale = torch.empty((), dtype=logit_scale.dtype)
    threads = int(tiles[-1, -1]) if kept else torch.get_num_threads()
    status = _native.info_nce_bwd(
        _pairs(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, threads),
        row_stats.data_ptr(), column_stats.data_ptr(), tiles.data_ptr() if kept else 0,
        _address(row_weight), _step(row_weight), _address(column_weight), _step(column_weight), smoothing,
        d_image.data_ptr() if need_image or not need_text else 0, d_text.data_ptr() if need_text else 0, _DTYPES[out],
        d_scale.data_ptr() if need_scale else 0)
    _raise_if_nan(status, "info_nce")
    return d_image if need_image else d_image.new_empty(0), d_text, d_scale


def _info_nce_bwd_fake(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset, row_stats, column_stats,
                       tiles, row_weight, column_weight, smoothing, need_image, need_text, need_scale, wide):
    out = logit_scale.dtype if wide else image.dtype
    return (image.new_empty(image.shape if need_image else 0, dtype=out),
            text.new_empty(text.shape if need_text else 0, dtype=out), logit_scale.new_empty(()))


def _step(weight: Tensor | None) -> int:
    return 0 if weight is None or weight.ndim == 0 else weight.stride(0)


def _siglip(image, text, logit_scale, logit_bias, offset, row_weight, need_image, need_text, need_scale, wide):
    name = dispatch.choose("info_nce", image)
    row_weight = row_weight.to(logit_scale.dtype)
    if name != "native":
        with torch.autocast(image.device.type, enabled=False):
            results = dispatch.module("info_nce", name).siglip(image, text, logit_scale, logit_bias, offset, row_weight,
                                                               need_image, need_text, need_scale, wide)
        return tuple(results[0].new_empty(0) if x is None else x for x in results)
    dtype = logit_scale.dtype
    out = dtype if wide else image.dtype
    rows = torch.empty(image.shape[0], dtype=dtype)
    d_image = torch.empty(image.shape if need_image else 0, dtype=out)
    d_text = torch.empty(text.shape if need_text else 0, dtype=out)
    d_scale, d_bias = torch.empty((), dtype=dtype), torch.empty((), dtype=dtype)
    status = _native.siglip(
        _pairs(image, text, logit_scale, logit_bias, None, None, None, offset, torch.get_num_threads()),
        row_weight.data_ptr(), _step(row_weight), rows.data_ptr(), d_image.data_ptr() if need_image else 0,
        d_text.data_ptr() if need_text else 0, _DTYPES[out], d_scale.data_ptr() if need_scale else 0,
        d_bias.data_ptr() if need_scale else 0)
    _raise_if_nan(status, "siglip_loss")
    return rows, d_image, d_text, d_scale, d_bias


def _siglip_fake(image, text, logit_scale, logit_bias, offset, row_weight, need_image, need_text, need_scale, wide):
    new = logit_scale.new_empty
    out = logit_scale.dtype if wide else image.dtype
    return (new(image.shape[0]), image.new_empty(image.shape if need_image else 0, dtype=out),
            text.new_empty(text.shape if need_text else 0, dtype=out), new(()), new(()))


for _name, _run, _fake in (("info_nce_fwd", _info_nce_fwd, _info_nce_fwd_fake),
                           ("info_nce_bwd", _info_nce_bwd, _info_nce_bwd_fake), ("siglip", _siglip, _siglip_fake)):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlmfast::{_name}", _fake, lib=_library)

# bound once: attribute look-ups on torch.ops cost as much as a small kernel
_fwd_op, _bwd_op = torch.ops.vlmfast.info_nce_fwd.default, torch.ops.vlmfast.info_nce_bwd.default
_siglip_op = torch.ops.vlmfast.siglip.default
