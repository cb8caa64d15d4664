"""How much of a DiscreteVAE's training step is its quantizer: the step with ours, and with the formula users have.

The shape is that of the quantizer's logits and codes, (B, V, side, D); pictures have eight pixels to a code. The
quantizer alone is measured by `bench.quantize` as "soft_kl" of the same shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import quantize
from .harness import Floor, Peer, Workload

NAME = "quantize"
OP = "dvae_step"
SHAPE, QUICK_SHAPE = (1, 8192, 32, 512), (1, 512, 8, 64)
HIDDEN = 64  # DALLE-pytorch's default
OURS = "vlmfast"
EAGER = quantize.DALLE_KL


@functools.lru_cache(maxsize=1)
def model(shape: tuple[int, ...]) -> torch.nn.Module:
    from vlmfast.models import DiscreteVAE, DiscreteVAEConfig

    _, entries, side, width = shape
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return DiscreteVAE(DiscreteVAEConfig(image_size=8 * side, num_tokens=entries, codebook_dim=width,
                                             hidden_dim=HIDDEN))


def inputs(workload: Workload) -> tuple[Tensor, ...]:
    """A picture and what is learned, so that the step has the gradient of every weight."""
    batch, _, side, _ = workload.shape
    net = model(workload.shape).to(workload.device)
    image = torch.rand(batch, 3, 8 * side, 8 * side, generator=torch.Generator().manual_seed(1))
    return image.to(workload.device), *net.parameters()


def _ours(workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    net = model(workload.shape)

    def run(image, *weights):
        out = net(image, quantize.TAU, kl_weight=1.0)
        return ((out.raw - net.target(image)).square().mean() + out.kl,)

    return run


def _eager(workload: Workload) -> Callable[..., tuple[Tensor, ...]]:
    net = model(workload.shape)
    formula = quantize.eager(quantize.exponential_noise, divergence=quantize.dalle_divergence)

    def run(image, *weights):
        z, divergence = formula(net.logits(image), net.codebook.weight)
        return ((net.decoder(z) - net.target(image)).square().mean() + divergence,)

    return run


def truth(workload: Workload, tensors) -> None:
    """None: both draw noise of their own."""


def peers(workload: Workload, quick: bool = False) -> list[Peer]:
    return [Peer(OURS, _ours, ours=True), Peer(EAGER, _eager)]


def floors(workload: Workload) -> list[Floor]:
    return []
