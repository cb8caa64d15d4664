"""Codebooks between an encoder and a decoder: the nearest code, and the Gumbel-softmax.

Keys are those of taming-transformers: `embedding.weight` (and `embedding.cluster_size`, `embedding.embed_avg` for codes
that follow a moving average) below `VectorQuantizer`; `proj.weight`, `proj.bias` and `embed.weight` below
`GumbelQuantizer`.

Sources: van den Oord et al. 2017 (arXiv:1711.00937), eq. 1-3 and app. A.1; Jang et al. 2017 (arXiv:1611.01144).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import Quantized, VectorQuantized, encode_indices, gumbel_quantize, vector_quantize


class VectorQuantizer(nn.Module):
    """The nearest of `codes` vectors of `width` numbers.

    Args:
        beta, legacy:  see `vector_quantize`.
        decay:  None: the codes are learned by the loss. Else they follow the mean of the vectors assigned to them, with
            this weight of the past; the loss then has the commitment alone, and training updates the codes in place.
        eps:  added to each code's count, so that a code without vectors does not divide by 0.
        layout:  "nchw" or "nlc".
    """

    def __init__(self, codes: int, width: int, beta: float = 0.25, legacy: bool = False, decay: float | None = None,
                 eps: float = 1e-5, layout: str = "nchw"):
        super().__init__()
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"VectorQuantizer: decay is {decay}, it must be None or lie in [0, 1)")
        if decay is not None and legacy:
            raise ValueError("VectorQuantizer: legacy is True, it must be False with a decay: codes that follow a "
                             "moving average have no term of their own to change places with")
        self.beta, self.legacy, self.layout = beta, legacy, layout
        self.embedding = nn.Embedding(codes, width) if decay is None else MovingCodebook(codes, width, decay, eps)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        if decay is not None:
            self.embedding.embed_avg.copy_(self.embedding.weight)

    def forward(self, x: Tensor) -> VectorQuantized:
        """x [B, D, H, W] or [B, L, D] -> (z like x, indices [B, H, W] or [B, L], loss [])."""
        moving = isinstance(self.embedding, MovingCodebook)
        found = vector_quantize(x, self.embedding.weight, beta=self.beta, legacy=self.legacy, layout=self.layout,
                                codebook_weight=0.0 if moving else 1.0)
        if moving and self.training:
            rows = x.movedim(1, -1) if self.layout == "nchw" else x
            self.embedding.update(rows.detach().flatten(0, -2), found.indices.flatten())
        return found

    def decode(self, indices: Tensor) -> Tensor:
        """[B, H, W] -> [B, D, H, W], or [B, L] -> [B, L, D]."""
        return _lookup(self.embedding.weight, indices, self.layout)


class MovingCodebook(nn.Module):
    """Codes that are moving averages: `embed_avg` [V, D] over `cluster_size` [V]."""

    def __init__(self, codes: int, width: int, decay: float, eps: float):
        super().__init__()
        self.decay, self.eps = decay, eps
        self.register_buffer("weight", torch.zeros(codes, width))
        # with a count of 0 a code that nothing is assigned to would fly away at the first step
        self.register_buffer("cluster_size", torch.ones(codes))
        self.register_buffer("embed_avg", torch.zeros(codes, width))

    @torch.no_grad()
    def update(self, rows: Tensor, indices: Tensor) -> None:
        """rows [N, D] and the codes they were given [N]; the sums are those of all processes of the default group."""
        counts = torch.bincount(indices, minlength=len(self.weight)).to(self.cluster_size)
        # the gradient of a look-up is the sum by code, without atomics on CUDA
        sums = torch.ops.aten.embedding_dense_backward(rows.to(self.embed_avg), indices, len(self.weight), -1, False)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for part in (counts, sums):
                torch.distributed.all_reduce(part)
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + len(self.weight) * self.eps) * total
        self.weight.copy_(self.embed_avg / smoothed[:, None])


class GumbelQuantizer(nn.Module):
    """A 1 x 1 convolution to logits, and the Gumbel-softmax over the codes.

    Args:
        channels:  of the features.
        codes, width:  of the codebook.
        tau:  temperature; an attribute, so that a schedule may set it.
        kl_weight:  of the divergence from the uniform distribution.
        straight_through:  train on single codes with the relaxation's gradient instead of on mixtures.
    """

    def __init__(self, channels: int, codes: int, width: int, tau: float = 1.0, kl_weight: float = 5e-4,
                 straight_through: bool = True):
        super().__init__()
        self.tau, self.kl_weight, self.straight_through = tau, kl_weight, straight_through
        self.proj = nn.Conv2d(channels, codes, 1)
        self.embed = nn.Embedding(codes, width)

    def forward(self, x: Tensor, tau: float | None = None, seed=None, noise: Tensor | None = None) -> Quantized:
        """x [B, channels, H, W] -> (z [B, width, H, W], indices [B, H, W], kl []).

        Outside training single codes are drawn whatever `straight_through` says. `kl` is weighted.
        """
        mode = "straight_through" if self.straight_through or not self.training else "soft"
        return gumbel_quantize(self.proj(x), self.embed.weight, tau=self.tau if tau is None else tau, mode=mode,
                               kl_weight=self.kl_weight, seed=seed, noise=noise)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The likeliest codes [B, H, W], without noise and without the logits in memory."""
        return encode_indices(x, self.proj.weight, self.proj.bias)

    def decode(self, indices: Tensor) -> Tensor:
        """[B, H, W] -> [B, width, H, W]."""
        return _lookup(self.embed.weight, indices, "nchw")


def _lookup(codebook: Tensor, indices: Tensor, layout: str) -> Tensor:
    low, high = (int(x) for x in indices.aminmax()) if indices.numel() else (0, 0)
    if low < 0 or high >= len(codebook):
        raise ValueError(f"decode: indices reach from {low} to {high}, they must lie between 0 and {len(codebook) - 1}")
    codes = F.embedding(indices, codebook)
    return codes.movedim(-1, 1) if layout == "nchw" else codes
