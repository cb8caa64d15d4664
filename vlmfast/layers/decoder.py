"""A decoder layer whose self-attention keeps what it has read, and a small convolutional stem.

Layers are post-LN, as in Attention Is All You Need (Vaswani et al. 2017, arXiv:1706.03762), Fig. 1.

Sizes: B batch, T target tokens, S rows of the memory, C width, H heads, D channels per head.
"""

import torch
from torch import Tensor, nn

from ..ops.attention import cross_attention
from .bert import Intermediate, ResidualOutput

KeysValues = tuple[Tensor, Tensor]  # [B, S, H, D] each


class DecoderAttention(nn.Module):
    """x <- LN(x + W_o attention(W_q x, keys, values)).

    Args:
        width, heads: C and H.
        dropout, attention_dropout: after the output projection; on the attention weights.

    Raises:
        ValueError: width is not a multiple of heads.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.1, attention_dropout: float = 0.1):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"DecoderAttention: width {width} is not a multiple of heads {heads}")
        self.heads, self.dropout = heads, attention_dropout
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = ResidualOutput(width, width, dropout)

    def read(self, x: Tensor) -> KeysValues:
        """Keys and values of [B, S, C]."""
        return self.key(x).unflatten(-1, (self.heads, -1)), self.value(x).unflatten(-1, (self.heads, -1))

    def forward(self, x: Tensor, known: KeysValues, keep: Tensor | None = None, causal: bool = False) -> Tensor:
        """[B, T, C] over S rows, of which `keep` [B, S] may be read; causal: the last of T sees all S."""
        query = self.query(x).unflatten(-1, (self.heads, -1))
        dropout = self.dropout if self.training else 0.0
        context = cross_attention(query, *known, mask=keep, causal=causal, dropout=dropout).out
        return self.output(context.flatten(-2), x)


class DecoderLayer(nn.Module):
    """Causal self-attention, attention over the memory, feed-forward network.

    Args:
        width, heads, inner: C, H and the feed-forward width.
        dropout, attention_dropout, activation: as in `BertLayer`.
    """

    def __init__(self, width: int, heads: int, inner: int, dropout: float = 0.1, attention_dropout: float = 0.1,
                 activation: str = "gelu"):
        super().__init__()
        self.attention = DecoderAttention(width, heads, dropout, attention_dropout)
        self.cross_attention = DecoderAttention(width, heads, dropout, attention_dropout)
        self.intermediate = Intermediate(width, inner, activation)
        self.output = ResidualOutput(inner, width, dropout)

    def forward(self, x: Tensor, memory: KeysValues, keep: Tensor | None = None,
                past: KeysValues | None = None) -> tuple[Tensor, KeysValues]:
        """States of T tokens that follow those of `past`.

        Args:
            x: [B, T, C].
            memory: keys and values of the encoder's rows, `cross_attention.read` of them.
            keep: [B, S] bool, rows of the memory that exist; None: all.
            past: keys and values of the tokens before, or None.

        Returns:
            ([B, T, C], keys and values of all tokens so far).
        """
        known = self.attention.read(x)
        if past is not None:
            known = tuple(torch.cat(parts, dim=1) for parts in zip(past, known, strict=True))
        x = self.attention(x, known, causal=True)
        x = self.cross_attention(x, memory, keep)
        return self.output(self.intermediate(x), x), known


class ConvStem(nn.Module):
    """Pixels to a grid of visual tokens: for each width a 3 x 3 convolution of stride 2 and a residual one.

    Args:
        widths: channels of the stages; each halves the side of the grid.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        sides = zip((3, *widths), widths, strict=False)
        self.stages = nn.ModuleList(
            nn.ModuleList([_convolution(before, width, 2), _convolution(width, width, 1)]) for before, width in sides
        )

    def forward(self, image: Tensor) -> Tensor:  # [B, 3, P, P] -> [B, G * G, widths[-1]], rows of the grid in order
        x = image
        for shrink, refine in self.stages:
            x = nn.functional.gelu(shrink(x))
            x = nn.functional.gelu(x + refine(x))
        return x.flatten(2).transpose(1, 2)


def _convolution(before: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width))
