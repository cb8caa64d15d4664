"""Loaders beside `vlmfast.data.PairLoader`, with the same three parts the training loop asks for.

`len(loader)` is the number of batches in an epoch on this process, `set_epoch(epoch, start)` says what the next pass
yields, and a pass yields (images [B, 3, S, S], tokens [B, T]). Batch k of an epoch depends on seed, epoch, rank and k
only, so a run can be picked up anywhere.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class TensorLoader:
    """Batches of a set held in memory, with random shifts.

    Args:
        images: [N, 3, H, W] uint8, or floating point in 0 ... 1.
        tokens: [N, T] int64, zero-padded on the right; batches are cut to their longest text.
        batch_size: B; what does not fill a batch waits for a later epoch.
        mean, std: per channel, in units of 0 ... 1.
        shift: pixels of a random shift in x and y, each in [-shift, shift].
        fill: value of what a shift uncovers, in units of 0 ... 1.
        channels_last: memory format of the batches, faster for convolutions on the CPU.
        rank, world_size: this process's share.

    Raises:
        ValueError: shapes do not fit, or the pairs make no batch.
    """

    def __init__(self, images: Tensor, tokens: Tensor, batch_size: int, mean: Sequence[float], std: Sequence[float], *,
                 shift: int = 0, fill: float = 1.0, channels_last: bool = False, seed: int = 0, rank: int = 0,
                 world_size: int = 1):
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"TensorLoader: images is {list(images.shape)}, must be [N, 3, H, W]")
        if len(images) != len(tokens):
            raise ValueError(f"TensorLoader: tokens has {len(tokens)} rows, images has {len(images)}")
        if not 1 <= batch_size <= len(images) // world_size:
            raise ValueError(f"TensorLoader: batch_size is {batch_size}, must be between 1 and "
                             f"{len(images) // world_size} ({len(images)} pairs on {world_size} processes)")
        self.images, self.tokens, self.batch_size = images, tokens, batch_size
        self.unit = 255.0 if images.dtype == torch.uint8 else 1.0
        self.mean, self.std = (torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1) for values in (mean, std))
        self.shift, self.fill = shift, fill
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.lengths = (tokens != 0).long().mul(torch.arange(1, tokens.shape[1] + 1)).amax(1)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return len(self.images) // self.world_size // self.batch_size

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch of the next pass, `start` batches of which are taken as done."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, 0
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self.images))
        order = order[self.rank :: self.world_size]
        for number in range(start, len(self)):
            index = torch.from_numpy(order[number * self.batch_size : (number + 1) * self.batch_size].copy())
            chance = np.random.default_rng((self.seed, self.epoch, self.rank, number)) if self.shift else None
            yield self.prepare(index, chance), self.tokens[index, : max(1, int(self.lengths[index].max()))]

    def prepare(self, index: Tensor, chance: np.random.Generator | None = None) -> Tensor:
        """[B, 3, H, W] float32 normalised images; shifted where there is a source of chance."""
        images = self.images[index].float() / self.unit
        if chance is not None:
            images = _random_shift(images, self.shift, self.fill, chance)
        return ((images - self.mean) / self.std).contiguous(memory_format=self.memory_format)


def _random_shift(images: Tensor, shift: int, fill: float, chance: np.random.Generator) -> Tensor:
    count, _, height, width = images.shape
    padded = F.pad(images, (shift,) * 4, value=fill)
    dx, dy = torch.from_numpy(chance.integers(0, 2 * shift + 1, (2, count, 1)))
    rows = (dy + torch.arange(height))[:, None, :, None]
    columns = (dx + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


class StreamLoader:
    """Gives a stream, whose length nobody knows and which differs between processes, epochs of a fixed length.

    A pass that ends early goes on with another one. Picking up within an epoch reads and drops the batches before it.

    Args:
        loader: a `PairLoader` over tar shards.
        batches: in an epoch, the same number on every process.
    """

    def __init__(self, loader, batches: int):
        if batches < 1:
            raise ValueError(f"StreamLoader: batches is {batches}, must be at least 1")
        self.loader, self.count = loader, batches
        self.batch_size, self.seed = loader.batch_size, loader.seed
        self.epoch = self.start = 0

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The epoch of the next pass, `start` batches of which are taken as done."""
        self.epoch, self.start = epoch, start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        start, self.start = self.start, 0
        number = passes = 0
        while number < self.count:
            before = number
            self.loader.set_epoch(self.epoch + 1_000_003 * passes)
            for batch in self.loader:
                if number >= start:
                    yield batch
                number += 1
                if number >= self.count:
                    return
            if number == before:
                raise ValueError(f"StreamLoader: the stream makes no batch of {self.batch_size} on this process")
            passes += 1
