"""Objective of text-conditional diffusion: noise at a random step, and the hybrid loss of what the model sees in it.

GLIDE's training code was never published; its authors point to guided-diffusion for the base model. Sources: GLIDE
(Nichol et al. 2021, arXiv:2112.10741), sec. 4; Nichol and Dhariwal 2021 (arXiv:2102.09672) for the loss; Ho and
Salimans 2022 (arXiv:2207.12598) for training without text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import DiffusionLoss, diffusion_loss, q_sample
from ..ops.diffusion_schedule import Schedule

PADDING = -1


def without_text(tokens: Tensor, share: float, generator: torch.Generator | None = None) -> Tensor:
    """Tokens [B, N] of which a random `share` of the rows is all PADDING."""
    if not share:
        return tokens
    dropped = torch.rand(len(tokens), 1, device=tokens.device, generator=generator) < share
    return tokens.masked_fill(dropped, PADDING)


def random_holes(images: Tensor, nothing: float = 0.25, generator: torch.Generator | None = None) -> Tensor:
    """[B, 1, H, W], 1 but for a rectangle of random place and size, at least a quarter of either side; a share
    `nothing` of the masks is 0 throughout, so that the model still draws from scratch."""
    batch, _, height, width = images.shape
    masks = torch.ones(batch, 1, height, width, device=images.device)
    draws = torch.rand(batch, 5, device=images.device, generator=generator)
    for mask, (top, left, tall, wide, empty) in zip(masks, draws.tolist(), strict=True):
        if empty < nothing:
            mask.zero_()
            continue
        rows, columns = (round(side * (0.25 + 0.75 * part)) for side, part in ((height, tall), (width, wide)))
        first, start = round(top * (height - rows)), round(left * (width - columns))
        mask[:, first : first + rows, start : start + columns] = 0
    return masks


def small_images(images: Tensor, scale: int) -> Tensor:
    """[B, 3, H / scale, W / scale] means of squares: what an upsampler enlarges."""
    return F.avg_pool2d(images, scale)


def text_diffusion_loss(model: nn.Module, schedule: Schedule, images: Tensor, tokens: Tensor, *,
                        prediction: str = "epsilon", padding: int = 0, drop_text: float = 0.0,
                        scale: int | None = None, inpaint: bool = False,
                        generator: torch.Generator | None = None) -> DiffusionLoss:
    """The loss of every image at a step and with noise of its own.

    Args:
        model: `model(x, t, tokens=, mask=, [low_res=, inpaint_image=, inpaint_mask=])` -> [B, 2 C, H, W], as GLIDE.
        schedule: T steps, whose `timestep_map` the model is given.
        images: [B, 3, H, W] in [-1, 1].
        tokens: [B, N] int64, PADDING behind each text.
        prediction: what the model gives, see `vlmfast.ops.denoise_step`.
        padding: the id that the model is given there, which matters where padding has no embedding of its own.
        drop_text: share of the texts left out, which guidance needs; GLIDE was fine-tuned with 0.2.
        scale: of an upsampler, how many times smaller the image is that it enlarges; None for other models.
        inpaint: whether the model is given the image but for a hole.

    Returns:
        DiffusionLoss(loss [B], mse [B], vb [B]).
    """
    if not 0 <= drop_text < 1:
        raise ValueError(f"text_diffusion_loss: drop_text is {drop_text}, it must be at least 0 and below 1")
    device, options = images.device, {}
    t = torch.randint(schedule.num_timesteps, (len(images),), device=device, generator=generator)
    noise = torch.randn(images.shape, dtype=images.dtype, device=device, generator=generator)
    if scale is not None:
        options["low_res"] = small_images(images, scale)
    if inpaint:
        options |= dict(inpaint_image=images, inpaint_mask=random_holes(images, generator=generator))
    tokens = without_text(tokens, drop_text, generator)
    known = tokens != PADDING
    out = model(q_sample(images, t, schedule, noise=noise), schedule.model_timesteps(t),
                tokens=tokens.masked_fill(~known, padding), mask=known, **options)
    return diffusion_loss(out, noise, images, t, schedule, prediction=prediction, rescale=True, return_parts=True)
