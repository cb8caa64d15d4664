"""A pre-LN layer of DALL-E: sparse causal attention, then a feed-forward network, with the open variants' extras.

`config` is a `vlmfast.models.DALLEConfig`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .axial import AxialAttention, AxialCache
from .linear import Linear
from .token_shift import ShiftCache, shift_tokens
from .transformer import LayerNorm


class BlockCache(NamedTuple):
    """What a layer keeps while an image is decoded."""

    attention: AxialCache
    shifts: tuple[ShiftCache, ShiftCache]


class FeedForward(nn.Module):
    """Linear, GELU (or GELU-gated, arXiv:2002.05202), Linear."""

    def __init__(self, config):
        super().__init__()
        self.gated, self.dropout = config.feed_forward == "geglu", config.ff_dropout
        hidden = config.dim * config.ff_mult
        self.fc = Linear(config.dim, hidden * (2 if self.gated else 1))
        self.proj = Linear(hidden, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.gated:
            x, gate = x.chunk(2, -1)
            x = x * F.gelu(gate)
        else:
            x = F.gelu(x)
        return self.proj(F.dropout(x, self.dropout, self.training))


class Branch(nn.Module):
    """What a layer adds to the stream: layer norm, `fn`, perhaps a second norm (sandwich) and a scale per channel."""

    def __init__(self, config, fn: nn.Module, layer: int):
        super().__init__()
        self.norm = LayerNorm(config.dim)
        self.fn = fn
        self.norm_out = LayerNorm(config.dim) if config.sandwich_norm else None
        self.scale = None
        if config.layer_scale:  # CaiT (arXiv:2103.17239), tab. 1
            start = 0.1 if layer < 18 else 1e-5 if layer < 24 else 1e-6
            self.scale = nn.Parameter(torch.full((config.dim,), start))

    def finish(self, x: Tensor) -> Tensor:
        x = x if self.norm_out is None else self.norm_out(x)
        return x if self.scale is None else x * self.scale


class AxialBlock(nn.Module):
    """x + attention, then x + feed-forward."""

    def __init__(self, config, kind: str, layer: int):
        super().__init__()
        self.shift = config.shift_tokens
        attention = AxialAttention(config.dim, config.heads, config.dim_head, kind, config.conv_kernel,
                                   config.qkv_bias, config.attn_dropout)
        self.attn = Branch(config, attention, layer)
        self.ff = Branch(config, FeedForward(config), layer)

    def forward(self, x: Tensor, text_len: int, grid: tuple[int, int], rotary: Tensor | None,
                cache: BlockCache | None = None, copies: int = 1) -> Tensor:
        store = None if cache is None else cache.attention
        for i, branch in enumerate((self.attn, self.ff)):
            y = branch.norm(x)
            if self.shift:
                if cache is not None:
                    cache.shifts[i].fill(y, copies)
                y = shift_tokens(y, text_len, grid[1])
            y = branch.fn(y, text_len, grid, rotary, store, copies) if i == 0 else branch.fn(y)
            x = x + branch.finish(y)
        return x

    def step(self, x: Tensor, position: int, cache: BlockCache, rotary: Tensor | None) -> Tensor:
        """x [B, 1, C] of one image position."""
        for i, branch in enumerate((self.attn, self.ff)):
            y = branch.norm(x)
            if self.shift:
                y = cache.shifts[i].shift(y, position)
            y = branch.fn.step(y, position, cache.attention, rotary) if i == 0 else branch.fn(y)
            x = x + branch.finish(y)
        return x
