"""Contrastive steps: loss of a whole batch, its gradient, and the same in chunks without changing either.

In chunks (GradCache, Gao et al. 2021, arXiv:2101.06983): encode all chunks without a graph, take the loss and its
gradient with respect to the features of the whole batch, then encode each chunk again, with the random numbers of its
first pass, and push its share of the feature gradients through it. Memory is that of one chunk, and the gradient is
that of the whole batch. (Batch norm normalises by the chunk, in both passes.)
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops


@dataclass(frozen=True)
class Objective:
    """The loss on unit features of this process' pairs; with a group, that of the batch of all processes.

    Args:
        kind: "clip" (softmax over rows and columns) or "siglip" (all pairs on their own).
        label_smoothing: of "clip".
        group: process group, or None for this process only.
    """

    kind: str = "clip"
    label_smoothing: float = 0.0
    group: object = None

    def __call__(self, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor | None):
        """[N, D], [N, D], [], [] or None -> (loss [] fp32, in-batch accuracy in 0 ... 1 or None)."""
        if self.kind == "siglip":
            return ops.siglip_loss(image, text, logit_scale, logit_bias, group=self.group), None
        loss, stats = ops.info_nce(image, text, logit_scale, logit_bias=logit_bias, group=self.group,
                                   label_smoothing=self.label_smoothing, return_stats=True)
        return loss, _accuracy(stats)


def _accuracy(stats) -> float | None:
    values = [stats.get(key) for key in ("image_to_text_accuracy", "text_to_image_accuracy")]
    values = [float(value) for value in values if value is not None]
    return sum(values) / len(values) if values else None


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """State of the generators that layers on this device draw from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def keep_buffers(model: nn.Module):
    """Restores the buffers at exit: running statistics must see each batch once."""
    saved = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def chunk_sizes(total: int, chunks: int) -> list[int]:
    """`total` split in at most `chunks` parts that differ by at most one."""
    chunks = max(1, min(chunks, total))
    return [total // chunks + (i < total % chunks) for i in range(chunks)]


def accumulate_gradient(
    model: nn.Module,
    image: Tensor,
    tokens: Tensor,
    objective: Objective,
    chunks: int = 1,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    loss_factor: Tensor | float = 1.0,
) -> tuple[Tensor, float | None]:
    """Adds the gradient of the whole batch's loss to `parameter.grad`, encoding it in `chunks` parts.

    Args:
        model: `model(image, text)` returns unit features and the scale (see `CLIPOutput`); may be wrapped in
            DistributedDataParallel, which then averages the gradients over processes during the last chunk.
        image: [N, 3, H, W]; tokens: [N, T].
        chunks: how many parts; 1 is an ordinary backward.
        autocast: a context for the towers; the loss runs outside it.
        loss_factor: multiplies the gradient (loss scaling), not the returned loss.

    Returns:
        (loss [] detached, in-batch accuracy or None).
    """
    plain = model.module if hasattr(model, "no_sync") else model
    bias = getattr(plain, "logit_bias", None)
    if chunks <= 1 or len(image) <= 1:
        with autocast():
            out = model(image, tokens)
        loss, accuracy = objective(out.image_features, out.text_features, out.logit_scale, bias)
        (loss * loss_factor).backward()
        return loss.detach(), accuracy

    sizes = chunk_sizes(len(image), chunks)
    image_parts, token_parts = image.split(sizes), tokens.split(sizes)
    states, features = [], []
    with torch.no_grad(), keep_buffers(plain):
        for image_part, token_part in zip(image_parts, token_parts, strict=True):
            states.append(random_state(image.device))
            with autocast():
                features.append(plain(image_part, token_part)[:2])
    image_features, text_features = (torch.cat(tower) for tower in zip(*features, strict=True))
    # leaves of their own: the parameters' gradients have to come from the last chunk, where processes average them
    scale = plain.logit_scale.detach().exp().requires_grad_()
    bias_leaf = None if bias is None else bias.detach().requires_grad_()
    result: list = []

    def scaled_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        result[:] = objective(image_features, text_features, logit_scale, bias_leaf)
        return result[0] * loss_factor

    _, d_image, d_text = ops.cached_loss(image_features, text_features, scale, loss=scaled_loss)
    loss, accuracy = result

    last = len(sizes) - 1
    d_parts = zip(image_parts, token_parts, d_image.split(sizes), d_text.split(sizes), states, strict=True)
    for i, (image_part, token_part, d_image_part, d_text_part, state) in enumerate(d_parts):
        set_random_state(state, image.device)
        # gradients of all chunks but the last stay on this process
        with model.no_sync() if model is not plain and i < last else nullcontext():
            with autocast():
                out = model(image_part, token_part)
            surrogate = (out.image_features * d_image_part).sum() + (out.text_features * d_text_part).sum()
            if i == last:
                surrogate = surrogate + out.logit_scale * scale.grad
                if bias is not None:
                    surrogate = surrogate + bias * bias_leaf.grad
            surrogate.backward()
    return loss.detach(), accuracy
