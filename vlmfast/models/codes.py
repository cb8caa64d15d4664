"""What the discrete VAEs share: their output, and the checks of pictures and codes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn


class VAEOutput(NamedTuple):
    """One pass through a discrete VAE.

    Attributes:
        reconstruction: [B, C, H, W] in 0 ... 1, cut off there; losses take `raw`, whose gradient is whole.
        kl: [] float32, `kl_weight` times the mean over positions of KL(softmax(logits) || uniform), in nats.
        codes: int64 [B, h, w].
        raw: what the decoder gave: the picture in the model's own units, or the statistics of its distribution.
        codebook_loss: [] float32, codebook and commitment terms of a nearest-code quantizer; 0 for the others.
    """

    reconstruction: Tensor
    kl: Tensor
    codes: Tensor
    raw: Tensor
    codebook_loss: Tensor


def zero_loss(like: Tensor) -> Tensor:
    return torch.zeros((), dtype=torch.float32, device=like.device)


def check_image(owner: nn.Module, image: Tensor, channels: int, factor: int) -> Tensor:
    """The picture in the type of the model's parameters.

    Raises:
        TypeError: not a floating-point tensor. ValueError: not [B, channels, H, W], or a side that `factor` does not
        divide.
    """
    name = type(owner).__name__
    if not isinstance(image, Tensor) or not image.is_floating_point():
        kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{name}: image is {kind}, must be a floating-point tensor in 0 ... 1")
    if image.ndim != 4 or image.shape[1] != channels:
        raise ValueError(f"{name}: image has shape {list(image.shape)}, must be [B, {channels}, H, W]")
    if not min(image.shape[2:]) or image.shape[2] % factor or image.shape[3] % factor:
        raise ValueError(f"{name}: image is {image.shape[2]} x {image.shape[3]} pixels, "
                         f"both sides must be multiples of {factor}")
    return image.to(next(owner.parameters()).dtype)


def check_codes(owner: nn.Module, codes: Tensor, vocab_size: int) -> Tensor:
    """Codes as int64 [B, h, w]; a row of h·h codes is a square read line by line.

    Raises:
        TypeError: not integers. ValueError: another shape, or a code outside 0 ... vocab_size - 1.
    """
    name = type(owner).__name__
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.dtype in (torch.bool, torch.complex64):
        kind = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"{name}: codes is {kind}, must be a tensor of integers")
    if codes.ndim == 2 and math.isqrt(codes.shape[1]) ** 2 == codes.shape[1]:
        codes = codes.unflatten(1, (math.isqrt(codes.shape[1]), -1)) if codes.shape[1] else codes[:, None]
    if codes.ndim != 3 or not min(codes.shape[1:]):
        raise ValueError(f"{name}: codes has shape {list(codes.shape)}, must be [B, h, w], or [B, n] with n a square")
    codes = codes.long()
    if len(codes):
        least, most = (int(value) for value in codes.aminmax())
        if least < 0 or most >= vocab_size:
            raise ValueError(f"{name}: codes lie in {least} ... {most}, must lie in 0 ... {vocab_size - 1}")
    return codes


def code_vectors(codes: Tensor, codebook: Tensor) -> Tensor:
    """[B, h, w] codes -> [B, D, h, w]: rows of the codebook [V, D]; what a one-hot product would give."""
    return codebook[codes].permute(0, 3, 1, 2)
