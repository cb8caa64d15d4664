r"""Definitions of the `info_nce` family in plain PyTorch.

`info_nce` and `siglip_loss` are the losses as the papers write them, N x M logits included; every backend is tested
against them in float64. `forward`, `backward` and `siglip` are the primitives that a
backend provides; here they are the plain formulae, used on devices that have no kernel.

Line statistics (a "line" is a row or a column of the logits) have shape [STATS, lines] in the order of the constants
below; here they have the logits' dtype, the native backend gives float64. With diagonal targets the positive of row i
is column i + offset; it is left out of the log-sum-exp, so that the loss softplus(lse - positive) and the probability
gap sigmoid(lse - positive) keep their relative precision when training has converged.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LSE, POSITIVE, POSITIVES, BEST, SUM, COUNT = range(6)
STATS_SHORT, STATS_FULL = 2, 6


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); torch's own is linear above 20, an error of 2e-9 that float64 shows."""
    return torch.logaddexp(x, x.new_zeros(()))


def logits_of(image: Tensor, text: Tensor, logit_scale, logit_bias=None) -> Tensor:
    """[N, D], [M, D] -> [N, M] in float32 at least."""
    wide = torch.promote_types(image.dtype, torch.float32)
    logits = logit_scale * (image.to(wide) @ text.to(wide).T)
    return logits if logit_bias is None else logits + logit_bias


def targets_of(logits: Tensor, labels=None, text_labels=None, mask=None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """(positive pairs, pairs that count): two bool matrices like `logits`."""
    n, m = logits.shape
    rows, columns = torch.arange(n, device=logits.device), torch.arange(m, device=logits.device)
    if labels is None:
        positive = rows[:, None] + offset == columns
        allowed = torch.ones_like(positive) if mask is None else ~mask | positive
    else:
        positive = labels[:, None] == text_labels
        allowed = torch.ones_like(positive) if mask is None else ~mask
        positive = positive & allowed
    return positive, allowed


def line_losses(logits: Tensor, positive: Tensor, allowed: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each row against its positives, [N]; a row without positives gives 0."""
    zero = logits.new_zeros(())
    lse = logits.masked_fill(~allowed, -torch.inf).logsumexp(1)
    target = torch.where(positive, logits, zero).sum(1) / positive.sum(1).clamp(min=1)
    uniform = torch.where(allowed, logits, zero).sum(1) / allowed.sum(1).clamp(min=1)
    loss = lse - (1 - label_smoothing) * target - label_smoothing * uniform
    return torch.where(positive.any(1), loss, zero)


def info_nce(image, text, logit_scale, *, logit_bias=None, labels=None, text_labels=None, label_smoothing=0.0,
             weight=None, mask=None, direction="both", reduction="mean") -> Tensor:
    """The loss itself: cross entropy over rows, over columns, or their mean."""
    logits = logits_of(image, text, logit_scale, logit_bias)
    if labels is not None and text_labels is None:
        text_labels = labels
    positive, allowed = targets_of(logits, labels, text_labels, mask)
    parts = []
    if direction != "text_to_image":
        parts.append(line_losses(logits, positive, allowed, label_smoothing))
    if direction != "image_to_text":
        parts.append(line_losses(logits.T, positive.T, allowed.T, label_smoothing))
    if reduction == "none":
        return sum(parts) / len(parts) if weight is None else weight * sum(parts) / len(parts)
    if weight is None:
        return sum(part.mean() if reduction == "mean" else part.sum() for part in parts) / len(parts)
    total = sum((weight * part).sum() for part in parts) / len(parts)
    return total / weight.sum() if reduction == "mean" else total


def siglip_loss(image, text, logit_scale, logit_bias=None, *, reduction="mean") -> Tensor:
    """Sigmoid loss over all pairs: -sum_ij log sigmoid(z_ij), z = +logit on the diagonal, -logit elsewhere."""
    logits = logits_of(image, text, logit_scale, logit_bias)
    sign = 2 * torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device) - 1
    rows = -F.logsigmoid(sign * logits).sum(1)
    return rows if reduction == "none" else rows.sum() if reduction == "sum" else rows.mean()


def _statistics(logits: Tensor, positive: Tensor, allowed: Tensor, diagonal: bool, full: bool) -> Tensor:
    counted = allowed & ~positive if diagonal else allowed
    zero = logits.new_zeros(())
    rows = [logits.masked_fill(~counted, -torch.inf).logsumexp(1), torch.where(positive, logits, zero).sum(1)]
    if full:
        negative = allowed & ~positive
        rows += [positive.sum(1), F.pad(logits.masked_fill(~negative, -torch.inf), (0, 1), value=-torch.inf).amax(1),
                 torch.where(allowed, logits, zero).sum(1), allowed.sum(1)]
    return torch.stack([row.to(logits.dtype) for row in rows])


def forward(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, full: bool):
    """Line statistics of the logits.

    Args:
        image, text:  [N, D], [M, D].
        logit_scale, logit_bias:  [], bias or None.
        labels, text_labels:  [N], [M] int64, or None for diagonal targets.
        mask:  [N, M] bool, True leaves a pair out (a diagonal positive always counts); or None.
        offset:  the positive of row i is column i + offset (it may lie outside).
        full:  all six statistics instead of the first two; labels, smoothing and in-batch accuracy need them.

    Returns:
        (row_stats [K, N], column_stats [K, M]): the log-sum-exp (without the positive when targets are diagonal),
        sum of positive logits, and if `full` the number of positives, the best negative logit (-inf if none), the
        sum and the number of the logits that count.
    """
    logits = logits_of(image, text, logit_scale, logit_bias)
    positive, allowed = targets_of(logits, labels, text_labels, mask, offset)
    diagonal = labels is None
    return (_statistics(logits, positive, allowed, diagonal, full),
            _statistics(logits.T, positive.T, allowed.T, diagonal, full))


def _line_gradient(logits, positive, allowed, stats, weight, diagonal: bool, smoothing: float) -> Tensor:
    """weight_i * d loss_i / d logits, given the statistics of the rows."""
    lse = stats[LSE][:, None]
    if diagonal:
        gap = lse - stats[POSITIVE][:, None]
        normaliser = stats[POSITIVE][:, None] + softplus(gap)
        probability = torch.where(positive, -torch.sigmoid(gap), (logits - normaliser).exp())
        target = torch.where(positive, -1.0, 0.0) if smoothing else 0.0
        count = stats[COUNT][:, None] if smoothing else 1.0
        gradient = probability - smoothing * (target + 1.0 / count)
    else:
        positives = stats[POSITIVES][:, None]
        target = (1 - smoothing) * positive.to(logits.dtype) / positives.clamp(min=1)
        target = target + smoothing / stats[COUNT][:, None].clamp(min=1)
        gradient = torch.where(positives > 0, (logits - lse).exp() - target, 0.0)
    return torch.where(allowed, weight.expand(len(logits))[:, None] * gradient, 0.0)


def backward(image, text, logit_scale, logit_bias, labels, text_labels, mask, offset: int, row_stats, column_stats,
             row_weight, column_weight, label_smoothing: float, need_image: bool, need_text: bool, need_scale: bool,
             wide: bool = False):
    """Gradients of sum_i row_weight_i row_loss_i + sum_j column_weight_j column_loss_j.

    The statistics are those of the whole batch (a distributed caller has merged them). Weights are [N] and [M], or []
    for one value; None leaves the direction out. With `label_smoothing` and with labels the statistics are `full`.

    Returns:
        (d_image [N, D], d_text [M, D], d_logit_scale []); what is not needed is None. d_image and d_text have the
        inputs' dtype, or that of the statistics if `wide` (partial sums that are still to be added up).
    """
    logits = logits_of(image, text, logit_scale, logit_bias)
    positive, allowed = targets_of(logits, labels, text_labels, mask, offset)
    diagonal = labels is None
    gradient = torch.zeros_like(logits)
    if row_weight is not None:
        gradient += _line_gradient(logits, positive, allowed, row_stats, row_weight, diagonal, label_smoothing)
    if column_weight is not None:
        gradient += _line_gradient(logits.T, positive.T, allowed.T, column_stats, column_weight, diagonal,
                                   label_smoothing).T
    return _feature_gradients(gradient, image, text, logit_scale, need_image, need_text, need_scale, wide)


def _feature_gradients(gradient, image, text, logit_scale, need_image, need_text, need_scale, wide):
    dtype = gradient.dtype
    pulled = gradient @ text.to(dtype)
    d_scale = (image.to(dtype) * pulled).sum() if need_scale else None
    d_image = (logit_scale * pulled).to(dtype if wide else image.dtype) if need_image else None
    d_text = (logit_scale * (gradient.T @ image.to(dtype))).to(dtype if wide else text.dtype) if need_text else None
    return d_image, d_text, d_scale


def siglip(image, text, logit_scale, logit_bias, offset: int, row_weight, need_image: bool, need_text: bool,
           need_scale: bool, wide: bool = False):
    """Row losses and, in the same pass, the gradients of sum_i row_weight_i row_loss_i.

    The sigmoid loss has no normaliser, so nothing has to be known before the gradient. Arguments as in `backward`;
    the scale's and the bias' gradients come together.

    Returns:
        (row_loss [N], d_image, d_text, d_logit_scale [], d_logit_bias []); what is not needed is None.
    """
    logits = logits_of(image, text, logit_scale, logit_bias)
    positive, _ = targets_of(logits, offset=offset)
    sign = torch.where(positive, 1.0, -1.0).to(logits.dtype)
    row_loss = softplus(-sign * logits).sum(1)
    if not (need_image or need_text or need_scale):
        return row_loss, None, None, None, None
    gradient = row_weight.expand(len(logits))[:, None] * -sign * torch.sigmoid(-sign * logits)
    d_image, d_text, d_scale = _feature_gradients(gradient, image, text, logit_scale, need_image, need_text,
                                                  need_scale, wide)
    return row_loss, d_image, d_text, d_scale, gradient.sum() if need_scale else None
