"""Objectives of discrete VAEs: the logit-Laplace likelihood, the divergence from the uniform prior, and how weight and
temperature change while training.

Source: DALL-E (Ramesh et al. 2021, arXiv:2102.12092), sec. 2.1 and app. A.2, A.3. The training code was never
published; the weight on the divergence and the schedules are the authors', from the paper and their answers about it.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.pixels import LOGIT_LAPLACE_EPS, map_pixels

SHAPES = "constant", "linear", "half_cosine", "quarter_cosine", "exponential"
RECONSTRUCTIONS = "mse", "l1", "smooth_l1", "logit_laplace"


class VariationalLoss(NamedTuple):
    """total = reconstruction + weight of kl · kl (+ codebook loss), each [] float32."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Annealing:
    """A number that goes from `start` to `end` in `steps` steps and then stays.

    Attributes:
        shape, with a = min(step / steps, 1):
            "constant": `start` throughout;
            "linear": start + (end - start) a;
            "half_cosine": start + (end - start) (1 - cos(πa)) / 2, flat at both ends;
            "quarter_cosine": start + (end - start) (1 - cos(πa/2)), flat at the start only, as in karpathy's
            deep-vector-quantization;
            "exponential": start (end / start)^a.

    Raises:
        ValueError: unknown shape, steps below 1, or an exponential through 0.
    """

    start: float
    end: float
    steps: int
    shape: str = "half_cosine"

    def __post_init__(self):
        if self.shape not in SHAPES:
            raise ValueError(f"Annealing: shape is {self.shape!r}, must be one of {', '.join(SHAPES)}")
        if self.steps < 1:
            raise ValueError(f"Annealing: steps is {self.steps}, must be at least 1")
        if self.shape == "exponential" and not self.start * self.end > 0:
            raise ValueError(f"Annealing: start is {self.start} and end {self.end}, an exponential needs one sign")

    def __call__(self, step: int) -> float:
        """The number at a step, 0 being the first."""
        if step < 0:
            raise ValueError(f"Annealing: step is {step}, must be 0 or more")
        if self.shape == "constant":
            return self.start
        done = min(step / self.steps, 1.0)
        if done == 1:
            return self.end
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** done
        if self.shape == "half_cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        elif self.shape == "quarter_cosine":
            done = 1 - math.cos(math.pi * done / 2)
        return self.start + (self.end - self.start) * done


DALLE_KL_WEIGHT = Annealing(0.0, 6.6, 5000)
DALLE_TEMPERATURE = Annealing(1.0, 1 / 16, 150_000)
DALLE_LEARNING_RATE = Annealing(1e-4, 1.25e-6, 1_200_000)


def logit_laplace_loss(statistics: Tensor, image: Tensor, eps: float = LOGIT_LAPLACE_EPS) -> Tensor:
    r"""Negative logarithm of the logit-Laplace density of the mapped pixels, summed over channels and pixels.

    .. math:: \sum \ln 2b + \ln x + \ln(1 - x) + |\mathrm{logit}(x) - \mu| / b, \quad x = (1 - 2ε)\,\mathrm{image} + ε

    Args:
        statistics:  [B, 2 C, H, W]: μ, then ln b.
        image:  [B, C, H, W] in 0 ... 1.

    Returns:
        [B] float32 (float64 for float64), in nats; negative where the density exceeds 1.

    Raises:
        ValueError: shapes do not fit.

    Source: DALL-E, eq. 2.
    """
    if image.ndim != 4 or statistics.shape != (len(image), 2 * image.shape[1], *image.shape[2:]):
        raise ValueError(f"logit_laplace_loss: statistics has shape {list(statistics.shape)}, must be [B, 2 C, H, W] "
                         f"for an image {list(image.shape)}")
    wide = torch.promote_types(statistics.dtype, torch.float32)
    mean, log_scale = statistics.to(wide).chunk(2, dim=1)
    x = map_pixels(image.to(wide), eps)
    nats = math.log(2) + log_scale + (x * (1 - x)).log() + (x.logit() - mean).abs() * (-log_scale).exp()
    return nats.flatten(1).sum(1)


def dalle_loss(statistics: Tensor, kl: Tensor, image: Tensor, codes: int, kl_weight: float = 6.6) -> VariationalLoss:
    """DALL-E's objective: (logit-Laplace + kl_weight · divergence summed over positions) / (C H W), mean over pictures.

    Args:
        statistics:  [B, 2 C, H, W], `VAEOutput.raw` of a DVAE.
        kl:  [], mean over pictures and positions, with weight 1: `VAEOutput.kl`.
        image:  [B, C, H, W] in 0 ... 1.
        codes:  positions of a picture, h · w.
        kl_weight:  β; the published final value is 6.6, which is 0.034 on the mean over positions.
    """
    numbers = image[0].numel()
    reconstruction = logit_laplace_loss(statistics, image).mean() / numbers
    return VariationalLoss(reconstruction + kl_weight * codes / numbers * kl, reconstruction, kl)


def reconstruction_loss(raw: Tensor, target: Tensor, kind: str = "mse") -> Tensor:
    """Mean over all numbers of the squared, absolute or Huber error ("mse", "l1", "smooth_l1"), [] float32.

    Raises:
        ValueError: unknown kind, or shapes differ.
    """
    losses = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}
    if kind not in losses:
        raise ValueError(f"reconstruction_loss: kind is {kind!r}, must be one of {', '.join(losses)}")
    if raw.shape != target.shape:
        raise ValueError(f"reconstruction_loss: raw has shape {list(raw.shape)}, target {list(target.shape)}")
    wide = torch.promote_types(raw.dtype, torch.float32)
    return losses[kind](raw.to(wide), target.to(wide))


def discrete_vae_loss(raw: Tensor, kl: Tensor, target: Tensor, kind: str = "mse", kl_weight: float = 0.0,
                      codebook_loss: Tensor | None = None) -> VariationalLoss:
    """Reconstruction + kl_weight · kl + codebook_loss.

    Args:
        raw, target:  [B, C, H, W] in the same units: `VAEOutput.raw` and `model.target(image)`.
        kl:  [], mean over positions, with weight 1.
        kind:  see `reconstruction_loss`.
        kl_weight:  DALLE-pytorch sums the divergence over pictures and positions instead (its "batchmean" divides by
            1): its weight w is w · B · h · w' here, B pictures of h x w' codes.
    """
    reconstruction = reconstruction_loss(raw, target, kind)
    total = reconstruction + kl_weight * kl if kl_weight else reconstruction
    return VariationalLoss(total if codebook_loss is None else total + codebook_loss, reconstruction, kl)
