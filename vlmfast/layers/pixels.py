"""The pixel map of the logit-Laplace distribution (DALL-E, arXiv:2102.12092, app. A.3)."""

from torch import Tensor

LOGIT_LAPLACE_EPS = 0.1


def map_pixels(image: Tensor, eps: float = LOGIT_LAPLACE_EPS) -> Tensor:
    """[0, 1] -> [eps, 1 - eps]: keeps the logit finite at black and white."""
    return (1 - 2 * eps) * image + eps


def unmap_pixels(x: Tensor, eps: float = LOGIT_LAPLACE_EPS) -> Tensor:
    """Inverse of `map_pixels`, cut off at 0 and 1."""
    return ((x - eps) / (1 - 2 * eps)).clamp(0, 1)
