"""Token shift: part of the channels of each position come from the positions before (DALLE-pytorch)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def shift_tokens(x: Tensor, text_len: int, width: int) -> Tensor:
    """x [B, P + n, C]: half the channels of a text position are those of the one before, a quarter of an image
    position's those of the one above and a quarter those of the one to the left; zero beyond the edge."""
    text, image = x[:, :text_len], x[:, text_len:]
    half, quarter = x.shape[-1] // 2, x.shape[-1] // 4
    text = torch.cat([F.pad(text[..., :half], (0, 0, 1, -1)), text[..., half:]], -1)
    count = image.shape[1]
    if count:
        above = F.pad(image[..., :quarter], (0, 0, width, 0))[:, :count]
        left = F.pad(image[..., quarter:half], (0, 0, 1, 0))[:, :count]
        first = torch.arange(count, device=x.device) % width == 0
        left = left.masked_fill(first[:, None], 0.0)
        image = torch.cat([above, left, image[..., half:]], -1)
    return torch.cat([text, image], 1)


class ShiftCache:
    """The last row of image positions, for `shift_tokens` one position at a time."""

    def __init__(self, text_len: int, grid: tuple[int, int]):
        self.text_len, self.width = text_len, grid[1]

    def fill(self, x: Tensor, copies: int) -> None:
        """Takes x [B, P + n, C] before the shift, `copies` times each."""
        image = x[:, self.text_len :]
        self.row = x.new_zeros(len(x) * copies, self.width, x.shape[-1] // 2)
        kept = torch.arange(max(0, image.shape[1] - self.width), image.shape[1])
        self.row[:, kept % self.width] = image[:, kept, : x.shape[-1] // 2].repeat_interleave(copies, 0)

    def shift(self, x: Tensor, position: int) -> Tensor:
        """x [B, 1, C] of an image position -> the same, shifted."""
        half, quarter, place = x.shape[-1] // 2, x.shape[-1] // 4, position % self.width
        above = self.row[:, place, :quarter].clone()
        left = self.row[:, place - 1, quarter:] if place else torch.zeros_like(above)
        self.row[:, place] = x[:, 0, :half]
        return torch.cat([above, left, x[:, 0, half:]], -1)[:, None]
