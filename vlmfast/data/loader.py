"""Batches of image-text pairs: the same for a seed whatever the number of workers, and full in spite of bad files."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .report import Skip

# substitutes tried for an unreadable picture before its place in the batch is given up
SUBSTITUTES = 32
Item = tuple[object, str]


class Batches:
    """What :class:`PairLoader` asks of a map-style set; mixed into the sets of this package."""

    def batches(
        self,
        batch_size: int,
        *,
        preprocess: Callable | None = None,
        tokenizer: Callable | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> "PairLoader":
        """A :class:`PairLoader` over this set."""
        return PairLoader(
            self,
            batch_size,
            preprocess=preprocess,
            tokenizer=tokenizer,
            shuffle=shuffle,
            drop_last=drop_last,
            workers=workers,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def set_epoch(self, epoch: int) -> None:
        """Sets that choose among captions do so anew each epoch."""

    def where(self, i: int) -> str:
        """What errors and reports call pair `i`."""
        return f"pair {i}"

    def note(self, skip: Skip) -> None:
        """Records a pair that could not be read."""

    def begin(self) -> None:
        """Called as a pass over the set starts."""

    def used(self, count: int) -> None:
        """Called as a batch of `count` pairs comes out."""


class PairLoader:
    """Iterates over (images, texts).

    For map-style sets, batch k of an epoch depends on `seed`, the epoch, `rank` and k alone: not on `workers`, nor on
    what was drawn before, so a run resumes exactly with `set_epoch(epoch, start=k)`. Unreadable pictures are noted in
    the set's report; with `drop_last` (training) another pair, drawn by the same seed, takes the place, so that every
    rank sees equally many full batches; without it (evaluation) the pair is left out.
    Streams (tar shards) fill their batches as pairs come; ranks may then differ in how many they get, so count steps.

    Args:
        pairs: a set of this package.
        batch_size: B.
        preprocess: picture -> tensor, called as `preprocess(image, generator)`; None leaves Pillow images.
        tokenizer: list of texts -> [B, T] tensor; None leaves a list of texts.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch of fewer than B pairs.
        workers: processes that read and decode; 0 does it in this one.
        rank, world_size: this process's share of the pairs.

    Yields:
        images [B, 3, S, S] float32 (or a list of B Pillow images), texts [B, T] int64 (or a list of B strings).

    Raises:
        ValueError: an argument is out of range, or, while iterating, not one pair could be read.
    """

    def __init__(
        self,
        pairs,
        batch_size: int,
        *,
        preprocess: Callable | None = None,
        tokenizer: Callable | None = None,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if batch_size < 1 or workers < 0 or seed < 0:
            raise ValueError(
                f"PairLoader: batch_size is {batch_size}, must be at least 1; workers is {workers} and seed {seed}, "
                "must not be negative"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"PairLoader: rank is {rank}, must be in 0 ... world_size - 1 ({world_size - 1})")
        self.pairs = pairs
        self.batch_size = batch_size
        self.collate = Collate(tokenizer)
        self.preprocess = preprocess
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.workers = workers
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self._stream = isinstance(pairs, IterableDataset)
        if not self._stream and drop_last and len(self) == 0:
            raise ValueError(
                f"PairLoader: {len(pairs)} pairs on {world_size} ranks make no batch of {batch_size}; "
                "take a smaller batch_size or drop_last=False"
            )

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Order and random crops of this epoch; the next pass begins after `start` batches (not for streams)."""
        if epoch < 0 or start < 0 or (start and self._stream):
            raise ValueError(
                f"PairLoader.set_epoch: epoch is {epoch} and start {start}, must not be negative; streams start at 0"
            )
        self.epoch = epoch
        self.start = start
        self.pairs.set_epoch(epoch)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank; streams have no length (TypeError)."""
        count = len(self._order_length())
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def _order_length(self) -> range:
        if self._stream:
            raise TypeError("PairLoader: a stream of tar shards has no length")
        count = len(self.pairs)
        if self.drop_last:
            count -= count % self.world_size  # ranks must agree on the number of batches
        return range(self.rank, count, self.world_size)

    def _order(self) -> np.ndarray:
        count = len(self.pairs)
        order = np.random.default_rng((self.seed, self.epoch)).permutation(count) if self.shuffle else np.arange(count)
        return order[self._order_length()]

    def __iter__(self) -> Iterator[tuple[object, object]]:
        start, self.start = self.start, 0
        self.pairs.begin()
        if self._stream:
            items = _Stream(self)
            batch_size = None
        else:
            items = _Items(self, self._order()[start * self.batch_size :])
            batch_size = self.batch_size
        loader = DataLoader(
            items,
            batch_size=batch_size,
            num_workers=self.workers,
            drop_last=self.drop_last and not self._stream,
            collate_fn=None if self._stream else self.collate,
            # a generator of its own keeps the global one untouched
            generator=torch.Generator().manual_seed(self.seed),
        )
        total = 0
        last: Skip | None = None
        for images, texts, skips in loader:
            for skip in skips:
                self.pairs.note(skip)
                last = skip
            if len(texts):
                total += len(texts)
                self.pairs.used(len(texts))
                yield images, texts
            elif self.drop_last and not self._stream:
                raise ValueError(f"PairLoader: no pair of a batch could be read, the last was {last}")
        if not total and last is not None:
            raise ValueError(f"PairLoader: not one batch came out, the last pair skipped was {last.reason}: {last}")
        if not total and self._stream:
            raise ValueError(f"PairLoader: the shards have too few pairs for a batch of {self.batch_size}")


class Collate:
    """(image, text) items and skips to (images, texts, skips)."""

    def __init__(self, tokenizer: Callable | None):
        self.tokenizer = tokenizer

    def __call__(self, items: list) -> tuple[object, object, list[Skip]]:
        skips = [skip for item in items for skip in item[1]]
        pairs = [item[0] for item in items if item[0] is not None]
        images = [image for image, _ in pairs]
        texts = [text for _, text in pairs]
        if images and isinstance(images[0], torch.Tensor):
            images = torch.stack(images)
        if texts and self.tokenizer is not None:
            texts = self.tokenizer(texts)
        return images, texts, skips


class _Items(Dataset):
    def __init__(self, loader: PairLoader, order: np.ndarray):
        self.pairs = loader.pairs
        self.preprocess = loader.preprocess
        self.order = order
        self.key = (loader.seed, loader.epoch)
        self.substitutes = SUBSTITUTES if loader.drop_last else 0

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[Item | None, list[Skip]]:
        i = int(self.order[position])
        chance = np.random.default_rng((*self.key, i))
        skips: list[Skip] = []
        for _ in range(self.substitutes + 1):
            try:
                image, text = self.pairs[i]
                return (self.preprocess(image, chance) if self.preprocess else image, text), skips
            except (ValueError, OSError) as error:
                skips.append(Skip("unreadable image", self.pairs.where(i), str(error)))
            i = int(chance.integers(len(self.pairs)))
        return None, skips


class _Stream(IterableDataset):
    def __init__(self, loader: PairLoader):
        self.pairs = loader.pairs
        self.preprocess = loader.preprocess
        self.collate = loader.collate
        self.batch_size = loader.batch_size
        self.drop_last = loader.drop_last
        self.options = (loader.rank, loader.world_size, loader.shuffle, loader.seed)

    def __iter__(self) -> Iterator[tuple[object, object, list[Skip]]]:
        batch: list = []
        count = 0
        for item, where, chance in self.pairs.stream(*self.options):
            if isinstance(item, Skip):
                batch.append((None, [item]))
                continue
            image, text = item
            try:
                batch.append(((self.preprocess(image, chance) if self.preprocess else image, text), []))
                count += 1
            except ValueError as error:
                batch.append((None, [Skip("unreadable image", where, str(error))]))
            if count == self.batch_size:
                yield self.collate(batch)
                batch, count = [], 0
        if batch:
            # skips reach the report even where the last pairs are too few for a batch
            keep = batch if not self.drop_last else [(None, skips) for _, skips in batch]
            yield self.collate(keep)
