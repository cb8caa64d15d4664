"""Image-text pairs streamed from tar shards in the WebDataset layout.

Files of one sample are neighbours and share a key: the path up to the first dot of its last part. Nothing is ever
written to disk, so paths and links inside a tar have no effect.
"""

import bz2
import glob
import gzip
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from .captions import is_utf8, json_caption
from .images import load_image
from .loader import Batches
from .report import PairsReport, Skip

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_MEMBER_BYTES = 256 << 20
MAX_SHARDS = 1_000_000
_BLOCK = 512
_OPENERS = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

Sample = tuple[str, bytes, list[str]]  # where, encoded picture, captions


class WebDatasetPairs(Batches, IterableDataset):
    """Stream of (Pillow image, caption) from tar shards.

    Shards are dealt out to ranks and DataLoader workers; where there are fewer shards than those, every one of them
    reads all shards and keeps its share of the samples. Samples without a picture or caption, unreadable pictures,
    damaged and truncated shards are counted in :meth:`report`; what was read whole before the damage is used.

    Args:
        shards: a tar, a folder of tars, a list of tars, or a pattern: braces `{000..127}`, `{a,b}` or `*`.
        caption_field: key of captions in .json members; None finds the usual ones. A .txt member goes before .json.
        shuffle: shards in a new order each epoch, samples through a buffer.
        seed: of order and of the choice among several captions.
        buffer: samples kept (encoded) for shuffling.
        max_member_bytes: larger members are skipped and counted.

    Raises:
        FileNotFoundError: a shard is missing. ValueError: no shard, a command instead of a path; while iterating: not
            one sample could be used.
    """

    def __init__(
        self,
        shards: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        caption_field: str | None = None,
        shuffle: bool = False,
        seed: int = 0,
        buffer: int = 1000,
        max_member_bytes: int = MAX_MEMBER_BYTES,
    ):
        if seed < 0 or buffer < 1:
            raise ValueError(f"WebDatasetPairs: seed is {seed}, must be at least 0; buffer is {buffer}, at least 1")
        self.shards = expand_shards(shards)
        self.caption_field = caption_field
        self.shuffle = shuffle
        self.seed = seed
        self.buffer = buffer
        self.max_member_bytes = max_member_bytes
        self.epoch = 0
        self._report = PairsReport()

    def set_epoch(self, epoch: int) -> None:
        """Order and choice of captions of this epoch."""
        self.epoch = epoch

    def report(self) -> PairsReport:
        """Counts of the present or last pass; with several ranks, of this one's share."""
        return self._report

    def begin(self) -> None:
        self._report = PairsReport()

    def note(self, skip: Skip) -> None:
        self._report.add(skip)

    def used(self, count: int) -> None:
        self._report.used += count

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        self.begin()
        for item, _, _ in self.stream(0, 1, self.shuffle, self.seed):
            if isinstance(item, Skip):
                self.note(item)
            else:
                self.used(1)
                yield item
        if not self._report.used and get_worker_info() is None:
            raise ValueError(f"WebDatasetPairs: not one sample could be used\n{self._report}")

    def stream(
        self, rank: int, world_size: int, shuffle: bool, seed: int
    ) -> Iterator[tuple[tuple[Image.Image, str] | Skip, str, np.random.Generator | None]]:
        """This process's share of ((image, caption) or skip, place, generator of the sample)."""
        worker = get_worker_info()
        workers, slot = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        slot, slots = rank * workers + slot, world_size * workers
        samples = self._samples(slot, slots, shuffle, seed)
        if shuffle:
            samples = _shuffled(samples, self.buffer, np.random.default_rng((seed, self.epoch, slot)))
        for sample in samples:
            if isinstance(sample, Skip):
                yield sample, sample.where, None
                continue
            where, data, captions = sample
            chance = np.random.default_rng((seed, self.epoch, zlib.crc32(where.encode(errors="surrogateescape"))))
            try:
                image = load_image(data, name=where)
            except ValueError as error:
                yield Skip("unreadable image", where, str(error)), where, None
                continue
            yield (image, captions[int(chance.integers(len(captions)))]), where, chance

    def _samples(self, slot: int, slots: int, shuffle: bool, seed: int) -> Iterator[Sample | Skip]:
        shards = self.shards
        if shuffle:
            order = np.random.default_rng((seed, self.epoch)).permutation(len(shards))
            shards = [shards[i] for i in order]
        by_shard = len(shards) >= slots
        position = -1
        for shard in shards[slot::slots] if by_shard else shards:
            for key, members in self._groups(shard):
                if isinstance(members, Skip):
                    # every reader of a shared shard meets its damage, the first one tells
                    if by_shard or slot == 0:
                        yield members
                    continue
                position += 1
                if by_shard or position % slots == slot:
                    yield self._sample(f"{shard}:{key}", members)

    def _groups(self, shard: str) -> Iterator[tuple[str, dict[str, bytes] | Skip]]:
        key: str | None = None
        members: dict[str, bytes] = {}
        for name, data in read_tar(shard, self.max_member_bytes):
            if isinstance(data, Skip):
                if data.reason == "damaged tar":
                    # the sample at the break may lack members that the tar lost
                    if key is not None and self._complete(members):
                        yield key, members
                    elif key is not None:
                        yield key, Skip("incomplete sample", f"{shard}:{key}", "the tar breaks off inside it")
                    key, members = None, {}
                yield name, data
                continue
            folder, _, base = name.rpartition("/")
            stem, _, extension = base.partition(".")
            this = f"{folder}/{stem}" if folder else stem
            if key is not None and this != key:
                yield key, members
                members = {}
            key = this
            members[extension.lower()] = data
        if key is not None:
            yield key, members

    def _complete(self, members: dict[str, bytes]) -> bool:
        return any(e in members for e in IMAGE_EXTENSIONS) and ("txt" in members or "json" in members)

    def _sample(self, where: str, members: dict[str, bytes]) -> Sample | Skip:
        data = next((members[e] for e in IMAGE_EXTENSIONS if e in members), None)
        if data is None:
            return Skip("no image", where, f"members {sorted(members)}")
        if "txt" in members:
            captions = [members["txt"].decode("utf-8", errors="surrogateescape")]
        elif "json" in members:
            try:
                captions = json_caption(members["json"], self.caption_field)
            except ValueError as error:
                return Skip("malformed JSON", where, str(error))
        else:
            return Skip("no caption", where, f"members {sorted(members)}")
        captions = [text.strip() for text in captions if text.strip()]
        if not captions:
            return Skip("empty caption", where)
        if not all(is_utf8(text) for text in captions):
            return Skip("caption is not UTF-8", where)
        return where, data, captions


def _shuffled(samples: Iterator[Sample | Skip], size: int, chance: np.random.Generator) -> Iterator[Sample | Skip]:
    pool: list[Sample] = []
    for sample in samples:
        if isinstance(sample, Skip):
            yield sample
        elif len(pool) < size:
            pool.append(sample)
        else:
            i = int(chance.integers(size))
            pool[i], sample = sample, pool[i]
            yield sample
    yield from (pool[i] for i in chance.permutation(len(pool)))


def read_tar(path: str, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[tuple[str, bytes | Skip]]:
    """(name, content) of the regular files of a tar, read forward; damage ends it with a `Skip` of "damaged tar".

    Names come from the archive as they are and must not be used as paths.
    """
    name = path
    opener = _OPENERS.get(os.path.splitext(path)[1].lower(), open)
    try:
        with opener(path, "rb") as file:
            for name, data in _members(file, path, max_member_bytes):
                yield name, data
    except (EOFError, OSError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError) as error:
        yield name, Skip("damaged tar", path, f"after {name}: {error}" if name != path else str(error))


def _members(file: BinaryIO, path: str, max_member_bytes: int) -> Iterator[tuple[str, bytes | Skip]]:
    override: dict[str, str] = {}
    while True:
        block = file.read(_BLOCK)
        if len(block) < _BLOCK:
            raise EOFError("it ends without an end mark" if not block else "it breaks off inside a header")
        if not block.strip(b"\0"):
            return
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        name = override.get("path", info.name)
        size = int(override.get("size", info.size))
        if size < 0:
            raise ValueError(f"{name} has a negative size")
        padding = -size % _BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            if size > 1 << 20:
                raise ValueError(f"extended header of {size} bytes")
            data = _read_exactly(file, size + padding, name)[:size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                override["path"] = data.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                override |= _pax(data)
            continue
        if info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):  # of no use here, but the long name goes on
            _pass_over(file, size + padding, name)
            continue
        override = {}
        if info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE):
            if size > max_member_bytes:
                _pass_over(file, size + padding, name)
                yield name, Skip("member too large", f"{path}:{name}", f"{size} bytes, at most {max_member_bytes}")
            else:
                yield name, _read_exactly(file, size, name)
                _pass_over(file, padding, name)
        elif info.type not in tarfile.SUPPORTED_TYPES:  # folders, links and devices have no content
            _pass_over(file, size + padding, name)


def _pax(data: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(data):
            raise ValueError("malformed extended header")
        record, data = data[len(length) + 1 : int(length) - 1], data[int(length) :]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size"):
            found[key.decode()] = value.decode("utf-8", "surrogateescape")
    return found


def _read_exactly(file: BinaryIO, size: int, name: str) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise EOFError(f"it breaks off inside {name}")
    return data


def _pass_over(file: BinaryIO, size: int, name: str) -> None:
    while size:
        chunk = file.read(min(size, 1 << 20))
        if not chunk:
            raise EOFError(f"it breaks off inside {name}")
        size -= len(chunk)


def is_shard(path: str | os.PathLike) -> bool:
    """True for names of tars, patterns of them included."""
    return str(path).lower().endswith(SHARD_SUFFIXES)


def expand_shards(shards: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """Existing tar files of a path, folder, list or pattern, in order; raises as :class:`WebDatasetPairs` does."""
    if isinstance(shards, (str, os.PathLike)):
        if Path(shards).is_dir():
            found = sorted(str(Path(shards) / name) for name in os.listdir(shards) if is_shard(name))
            if not found:
                raise FileNotFoundError(f"WebDatasetPairs: {shards} has no tar files")
            return found
        shards = [shards]
    names: list[str] = []
    for shard in shards:
        text = str(shard)
        if text.startswith("pipe:") or "://" in text:
            raise ValueError(f"WebDatasetPairs: shard is {text!r}, must be a local path (commands are never run)")
        for name in [text] if os.path.exists(text) else expand_braces(text):
            matches = sorted(glob.glob(name)) if re.search(r"[*?\[]", name) and not os.path.exists(name) else [name]
            if not matches:
                raise FileNotFoundError(f"WebDatasetPairs: no file matches {name}")
            names += matches
    missing = [name for name in names if not os.path.isfile(name)]
    if missing:
        raise FileNotFoundError(f"WebDatasetPairs: {len(missing)} of {len(names)} shards are missing: {missing[:3]}")
    if not names:
        raise ValueError("WebDatasetPairs: shards is empty, must name at least one tar")
    return names


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}{x,y}` -> a08x, a08y, a09x ... ; ValueError over a million names."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, body, tail = pattern[: match.start()], match[1], pattern[match.end() :]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        low, high = int(numbers[1]), int(numbers[2])
        if not low <= high < low + MAX_SHARDS:
            raise ValueError(f"WebDatasetPairs: {{{body}}} must count up, to at most {MAX_SHARDS} shards")
        parts = [str(n).zfill(len(numbers[1])) for n in range(low, high + 1)]
    elif "," in body:
        parts = body.split(",")
    else:
        raise ValueError(f"WebDatasetPairs: {{{body}}} must be a range {{000..127}} or a list {{a,b}}")
    tails = expand_braces(tail)
    if len(parts) * len(tails) > MAX_SHARDS:
        raise ValueError(f"WebDatasetPairs: {pattern} names more than {MAX_SHARDS} shards")
    return [f"{head}{part}{rest}" for part in parts for rest in tails]
