"""Attention of GLIDE (Nichol et al. 2021, arXiv:2112.10741): its text transformer, and image cells that also read the
text.

Projections are ordered by head: the rows of each head hold its query, key and value one behind the other.
Sizes: B batch, N text tokens, W text width, C channels, T = height width image cells, H heads, D = C / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attention, cross_attention
from .transformer import MLP, LayerNorm

GROUPS, EPS = 32, 1e-5


def wide_group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm computed and returned in float32 (float64 stays float64), whatever the dtype of the input."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.group_norm(x.to(wide), num_groups, weight.to(wide), bias.to(wide), eps)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all parameters 0: a branch that ends in it starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def split_heads(x: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, S, H parts D] ordered by head -> `parts` views [B, S, H, D]."""
    return x.unflatten(-1, (heads, parts, -1)).unbind(-2)


def pointwise(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """A convolution of kernel size 1 over channels that lie last: [B, S, in] -> [B, S, out]."""
    return F.linear(x, conv.weight[:, :, 0], conv.bias)


class AttentionBlock(nn.Module):
    """Image cells read the text and each other in one softmax; the result is added to the input.

    Args:
        channels, heads: C and H. text_width: W.
    """

    def __init__(self, channels: int, heads: int, text_width: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(GROUPS, channels, eps=EPS)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.encoder_kv = nn.Conv1d(text_width, 2 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def text_keys_values(self, xf_out: Tensor) -> tuple[Tensor, Tensor]:
        """What this layer reads of the text [B, N, W]: keys and values [B, N, H, D]."""
        return split_heads(pointwise(xf_out.to(self.encoder_kv.weight.dtype), self.encoder_kv), self.heads, 2)

    def forward(self, x: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:  # [B, C, height, width] -> the same
        norm = self.norm
        cells = wide_group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps).to(x.dtype)
        query, key, value = split_heads(pointwise(cells.flatten(2).transpose(1, 2), self.qkv), self.heads, 3)
        # text first, as in the public code; the softmax does not depend on it
        key, value = torch.cat([text[0], key], 1), torch.cat([text[1], value], 1)  # [B, N + T, H, D]
        out = cross_attention(query, key, value).out.flatten(2)  # [B, T, C]
        return x + pointwise(out, self.proj_out).transpose(1, 2).reshape(x.shape)


class TextAttention(nn.Module):
    """Self-attention between all positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        query, key, value = split_heads(self.c_qkv(x), self.heads, 3)
        return self.c_proj(attention(query, key, value).out.flatten(2))


class TextBlock(nn.Module):
    """x + attn(ln_1 x), then x + mlp(ln_2 x)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = TextAttention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width, 4 * width, quick_gelu=False)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """`layers` blocks; submodules carry the names of the public checkpoints."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:  # [B, N, W] -> [B, N, W]
        for block in self.resblocks:
            x = block(x)
        return x
