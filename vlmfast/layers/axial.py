"""Sparse causal self-attention over text and then an image grid (DALL-E), and its keys and values while decoding.

Sizes: B batch, P text positions, N = height width image positions, H heads, D channels a head.
"""

from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.attention_grid import AXIAL_MODES
from ..ops.reference.attention import axial_mask
from .linear import Linear

AXIAL_KINDS = (*AXIAL_MODES, "conv_wrap")


def image_mask(grid: tuple[int, int], kind: str, kernel: int) -> Tensor:
    """[N, N] bool, True where an image position (row) reads another (column); all of them also read all text.

    Kinds are the modes of `ops.axial_attention`, and "conv_wrap": the square of "conv" continued over the edges of the
    grid on the other side, as ru-dalle's conv mask "v2" has it.
    """
    height, width = grid
    if kind != "conv_wrap":
        return axial_mask(0, grid, kind, kernel)
    at = torch.arange(height * width)
    near = torch.ones(len(at), len(at), dtype=torch.bool).tril()
    for place, size in ((at // width, height), (at % width, width)):
        apart = (place[:, None] - place) % size
        near &= (apart <= kernel // 2) | (size - apart <= kernel // 2)
    return near


class Plan(NamedTuple):
    """What a layer keeps of the image and what each position reads of that.

    Attributes:
        ring: positions kept; position t lies in place t % ring.
        width: the most that one position reads.
        counts: for each position how many it reads.
        places: for each position the places that it reads; None where those are the first `counts`.
    """

    ring: int
    width: int
    counts: tuple[int, ...]
    places: tuple[Tensor, ...] | None


@cache
def decode_plan(kind: str, grid: tuple[int, int], kernel: int) -> Plan:
    """The smallest ring that holds all which `image_mask` lets any position read."""
    seen = image_mask(grid, kind, kernel)
    at = torch.arange(len(seen))
    counts = seen.sum(1)
    ring = int((at - seen.int().argmax(1)).max()) + 1
    places = tuple((row.nonzero().flatten() % ring).sort().values for row in seen)
    if all(torch.equal(place, torch.arange(len(place))) for place in places):
        places = None
    return Plan(ring, int(counts.max()), tuple(counts.tolist()), places)


class AxialCache:
    """Keys and values of one layer while an image is decoded: all text, and the image as far back as the layer reads.

    Everything is allocated at `fill`. What a position reads lies side by side, so attention needs no mask: the ring
    itself where the layer reads all that it keeps ("full", "row", "row_only"), else a copy of the few places read.
    """

    def __init__(self, kind: str, kernel: int, text_len: int, grid: tuple[int, int]):
        self.plan, self.text_len = decode_plan(kind, tuple(grid), kernel), text_len

    def fill(self, key: Tensor, value: Tensor, copies: int) -> None:
        """Takes key and value [B, P + n, H, D] of the prompt and the first n image positions, `copies` times each."""
        plan, text = self.plan, self.text_len
        count = key.shape[1] - text
        kept = torch.arange(max(0, count - plan.ring), count)
        self.read, self.stored = [], []
        for x in (key, value):
            shape = len(x) * copies, text + plan.width, *x.shape[2:]
            x = x.repeat_interleave(copies, 0)
            read = x.new_zeros(shape)
            read[:, :text] = x[:, :text]
            stored = read[:, text:] if plan.places is None else x.new_zeros(shape[0], plan.ring, *shape[2:])
            stored[:, kept % plan.ring] = x[:, text + kept]
            self.read.append(read)
            self.stored.append(stored)

    def append(self, key: Tensor, value: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Adds key and value [B, 1, H, D] of an image position; returns those which it reads, [B, P + count, H, D]."""
        plan, text = self.plan, self.text_len
        end = text + plan.counts[position]
        for x, read, stored in zip((key, value), self.read, self.stored, strict=True):
            stored[:, position % plan.ring] = x[:, 0]
            if plan.places is not None:
                read[:, text:end] = stored[:, plan.places[position].to(x.device)]
        return self.read[0][:, :end], self.read[1][:, :end]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        tensors = self.read if self.plan.places is None else [*self.read, *self.stored]
        return sum(x.numel() * x.element_size() for x in tensors)


class AxialAttention(nn.Module):
    """Multi-head self-attention of one kind.

    Args:
        dim, heads, dim_head: widths; the heads together may be wider or narrower than `dim`.
        kind, kernel: see `image_mask`.
        bias: of the projection to queries, keys and values.
        dropout: of the output while training.
    """

    def __init__(self, dim: int, heads: int, dim_head: int, kind: str, kernel: int, bias: bool, dropout: float = 0.0):
        super().__init__()
        self.heads, self.kind, self.kernel, self.dropout = heads, kind, kernel, dropout
        self.to_qkv = Linear(dim, 3 * heads * dim_head, bias=bias)
        self.to_out = Linear(heads * dim_head, dim)

    def forward(self, x: Tensor, text_len: int, grid: tuple[int, int], rotary: Tensor | None = None,
                store: AxialCache | None = None, copies: int = 1) -> Tensor:
        """x [B, P + n, dim] -> the same, n any number of positions of the grid from its start.

        `store` takes keys and values for decoding on, `copies` times each.
        """
        query, key, value = self._project(x, rotary)
        if store is not None:
            store.fill(key, value, copies)
        image, width = x.shape[1] - text_len, grid[1]
        rows = -(-image // width)
        missing = rows * width - image
        if missing:  # rows are whole; nothing reads what comes after it
            query, key, value = (F.pad(part, (0, 0, 0, 0, 0, missing)) for part in (query, key, value))
        if self.kind == "conv_wrap":
            mask = torch.ones(query.shape[1], query.shape[1], dtype=torch.bool, device=x.device).tril()
            seen = image_mask(grid, self.kind, self.kernel)[: rows * width, : rows * width]
            mask[text_len:, text_len:] = seen.to(x.device)
            out = ops.attention(query, key, value, mask=mask[None]).out
        else:
            out = ops.axial_attention(query, key, value, text_len=text_len, grid=(rows, width), mode=self.kind,
                                      kernel=self.kernel)
        out = self.to_out(out[:, : x.shape[1]].flatten(2))
        return F.dropout(out, self.dropout, self.training)

    def step(self, x: Tensor, position: int, cache: AxialCache, rotary: Tensor | None = None) -> Tensor:
        """x [B, 1, dim] of image position `position` -> the same, reading what came before from `cache`."""
        query, key, value = self._project(x, rotary)
        key, value = cache.append(key, value, position)
        out = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value)))
        return self.to_out(out.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, rotary: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        parts = self.to_qkv(x).unflatten(-1, (3, self.heads, -1))  # [B, S, 3, H, D]
        if rotary is not None:  # values too: the public models were trained so
            parts = rotate(parts, rotary)
        return parts.unbind(2)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns neighbouring channels (2i, 2i + 1) of x [B, S, .., D] by angles [S, R], each twice; the last D - R stay.

    Source: RoFormer (Su et al. 2021, arXiv:2104.09864), eq. 15.
    """
    width = angles.shape[-1]
    shape = 1, len(angles), *(1,) * (x.ndim - 3), width
    angles = angles.to(x.dtype).view(shape)
    part, rest = x[..., :width], x[..., width:]
    even, odd = part.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return torch.cat([part * angles.cos() + turned * angles.sin(), rest], -1)


def rotary_angles(text_len: int, grid: tuple[int, int], dim_head: int) -> Tensor:
    """[P + N, 3 R] angles of text positions, image rows and image columns, a third of the channels each.

    Text counts 0, 1 ..; rows and columns run over -1 ... 1 in "pixel" frequencies up to 5 pi. What is no text stands at
    text position 8192, what is no image at -10, far from everything. The layout of DALLE-pytorch.
    """
    count = dim_head // 3 // 2
    height, width = grid
    text_scale = 10000.0 ** (-torch.arange(0, 2 * count, 2) / (dim_head // 3))
    image_scale = torch.linspace(1.0, 5.0, count) * torch.pi
    number = torch.cat([torch.arange(text_len), torch.full((height * width,), 8192)])
    outside = torch.full((text_len,), -10.0)
    rows = torch.cat([outside, torch.linspace(-1, 1, height).repeat_interleave(width)])
    columns = torch.cat([outside, torch.linspace(-1, 1, width).repeat(height)])
    parts = number[:, None] * text_scale, rows[:, None] * image_scale, columns[:, None] * image_scale
    return torch.cat([part.repeat_interleave(2, 1) for part in parts], 1)
