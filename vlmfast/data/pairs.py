"""Pictures with captions from folders and caption files, and the chooser over all public layouts."""

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from .captions import Row, is_utf8, read_captions, read_sidecars
from .images import check_image, load_image
from .loader import Batches
from .report import PairsReport, Skip
from .webdataset import WebDatasetPairs, is_shard

CAPTION_FILES = (
    "captions.csv",
    "captions.tsv",
    "captions.jsonl",
    "metadata.csv",
    "metadata.jsonl",
    "captions.txt",
)
TABLE_SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".ndjson")
_CHECKS = ("size", "header", "decode")


class ImageTextPairs(Batches, Dataset):
    """Map-style set of pictures on disk with one or more captions each; open one with :meth:`open`.

    `pairs[i]` is (Pillow image, caption) and raises ValueError or FileNotFoundError, naming the file, where the
    picture cannot be read. Iteration and :meth:`batches` note such pictures in :meth:`report` and go on. Of several
    captions, one is chosen by the seed, the epoch and the position.

    Args:
        entries: (path of a picture, its captions).
        report: what was already left out.
        shuffle: iterate in a new order each epoch (:meth:`batches` has its own switch).
        seed: of captions and order.
    """

    def __init__(
        self,
        entries: Sequence[tuple[str, Sequence[str]]],
        report: PairsReport | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
    ):
        if seed < 0:
            raise ValueError(f"ImageTextPairs: seed is {seed}, must not be negative")
        self.entries = [(str(path), tuple(captions)) for path, captions in entries]
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        self._report = report or PairsReport()
        self._report.used = len(self.entries)
        self._unreadable: set[str] = set()

    @classmethod
    def open(cls, path, **options) -> "ImageTextPairs | WebDatasetPairs":
        """The same as :func:`open_pairs`."""
        return open_pairs(path, **options)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        return load_image(self.entries[i][0]), self.caption(i)

    def __iter__(self) -> Iterator[tuple[Image.Image, str]]:
        order = np.arange(len(self))
        if self.shuffle:
            order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        found = False
        for i in order.tolist():
            try:
                pair = self[i]
            except (ValueError, OSError) as error:
                self.note(Skip("unreadable image", self.where(i), str(error)))
                continue
            found = True
            yield pair
        if len(self) and not found:
            raise ValueError(f"ImageTextPairs: not one picture could be read\n{self._report}")

    def caption(self, i: int) -> str:
        """The caption of picture `i` in this epoch."""
        captions = self.entries[i][1]
        if len(captions) == 1:
            return captions[0]
        return captions[int(np.random.default_rng((self.seed, self.epoch, i % len(self))).integers(len(captions)))]

    def captions(self, i: int) -> tuple[str, ...]:
        """All captions of picture `i`."""
        return self.entries[i][1]

    def set_epoch(self, epoch: int) -> None:
        """Order of iteration and choice of captions of this epoch."""
        self.epoch = epoch

    def where(self, i: int) -> str:
        return self.entries[i][0]

    def note(self, skip: Skip) -> None:
        if skip.where not in self._unreadable:  # an epoch later it is the same loss
            self._unreadable.add(skip.where)
            self._report.add(skip)
            self._report.used -= 1

    def report(self) -> PairsReport:
        """Pairs that can be used, and what was left out so far with reasons and examples."""
        return self._report

    def every_caption(self) -> "ImageTextPairs":
        """A set in which each caption makes a pair of its own."""
        entries = [(path, (caption,)) for path, captions in self.entries for caption in captions]
        return ImageTextPairs(entries, copy.deepcopy(self._report), shuffle=self.shuffle, seed=self.seed)

    def split(self, fraction: float = 0.1, seed: int = 0) -> tuple["ImageTextPairs", "ImageTextPairs"]:
        """(train, test) by picture; others may come or go in the folder they share without a picture changing sides."""
        if not 0 < fraction < 1:
            raise ValueError(f"ImageTextPairs.split: fraction is {fraction}, must be between 0 and 1")
        sides: tuple[list, list] = ([], [])
        common = os.path.commonpath([os.path.dirname(path) for path, _ in self.entries]) if self.entries else ""
        for path, captions in self.entries:
            key = f"{seed}:{os.path.relpath(path, common)}".encode(errors="surrogateescape")
            draw = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64
            sides[draw < fraction].append((path, captions))
        train, test = (ImageTextPairs(side, shuffle=self.shuffle, seed=self.seed) for side in sides)
        return train, test


def open_pairs(
    path: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    root: str | os.PathLike | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    delimiter: str | None = None,
    allow_outside: bool = False,
    check: str = "header",
    shuffle: bool = False,
    seed: int = 0,
) -> ImageTextPairs | WebDatasetPairs:
    """Opens image-text pairs in any of the common layouts.

    Args:
        path: a folder with captions.csv, .tsv or .jsonl (also metadata.csv or .jsonl), or with name.txt beside
            name.jpg, or with tar shards; one such table (.csv, .tsv, .txt, .jsonl); one tar shard, a list of them, or
            a pattern such as `shards-{000..127}.tar` or `shards/*.tar`.
        root: folder that picture names are relative to; None takes the caption file's.
        image_column, caption_column: names in the header or keys of the JSON; None finds the usual ones.
        delimiter: of the table; None finds comma, tab or semicolon.
        allow_outside: also take pictures that a caption file names outside `root`, by an absolute path or `..`. Without
            it they are skipped and counted: a caption file from elsewhere shall not read the machine's other files.
            Symbolic links inside `root` are followed, they are its owner's.
        check: what is tested of every picture now: "size" (it exists and is not empty), "header" (it begins like a
            picture of acceptable size) or "decode" (all of it can be read).
        shuffle, seed: of iteration and of the choice among captions.

    Returns:
        :class:`ImageTextPairs`, or :class:`WebDatasetPairs` for tar shards. Both have `report()`.

    Raises:
        FileNotFoundError: nothing at `path`. ValueError: an unknown layout, no caption column, or every pair skipped.
    """
    if check not in _CHECKS:
        raise ValueError(f"open_pairs: check is {check!r}, must be one of {_CHECKS}")
    if not isinstance(path, (str, os.PathLike)):
        return WebDatasetPairs(path, caption_field=caption_column, shuffle=shuffle, seed=seed)
    place = Path(path)
    if is_shard(path):
        return WebDatasetPairs(path, caption_field=caption_column, shuffle=shuffle, seed=seed)
    if not place.exists():
        raise FileNotFoundError(f"open_pairs: {place} does not exist")
    rows: Iterable[Row | Skip]
    if place.is_dir():
        table = next((place / name for name in CAPTION_FILES if (place / name).is_file()), None)
        if table is not None:
            rows, base = read_captions(table, image_column, caption_column, delimiter), table.parent
        elif any(is_shard(name) for name in os.listdir(place)):
            return WebDatasetPairs(place, caption_field=caption_column, shuffle=shuffle, seed=seed)
        else:
            rows, base, root = read_sidecars(place), place, place
    elif place.suffix.lower() in TABLE_SUFFIXES:
        rows, base = read_captions(place, image_column, caption_column, delimiter), place.parent
    else:
        raise ValueError(f"open_pairs: {place} must be a folder, a tar shard or one of {', '.join(TABLE_SUFFIXES)}")
    report = PairsReport()
    entries = _collect(rows, Path(root) if root is not None else base, allow_outside, check, report)
    if not entries:
        raise ValueError(f"open_pairs: {place} has no usable pair\n{report}")
    return ImageTextPairs(entries, report, shuffle=shuffle, seed=seed)


def _collect(
    rows: Iterable[Row | Skip], root: Path, allow_outside: bool, check: str, report: PairsReport
) -> list[tuple[str, list[str]]]:
    top = os.path.abspath(root)
    entries: dict[str, list[str]] = {}
    bad: dict[str, tuple[str, str]] = {}  # reason and detail, so that no picture is tested twice
    for row in rows:
        if isinstance(row, Skip):
            report.add(row)
            continue
        where, name, texts = row
        image = os.path.abspath(os.path.join(top, name.strip())) if "\0" not in name else ""
        if not name.strip() or not image:
            report.add(Skip("missing image", where, f"picture name is {name!r}"))
            continue
        if not allow_outside and os.path.commonpath([top, image]) != top:
            report.add(Skip("outside the root", where, f"{name} lies outside {top}"))
            continue
        if image not in entries and image not in bad:
            reason = _check(image, check)
            if reason is not None:
                bad[image] = reason
        if image in bad:
            reason, detail = bad[image]
            report.add(Skip(reason, where, detail))
            continue
        captions = _clean(where, texts, entries.get(image, []), report)
        if captions:
            entries.setdefault(image, []).extend(captions)
    return list(entries.items())


def _clean(where: str, texts: Sequence[str], known: Sequence[str], report: PairsReport) -> list[str]:
    captions: list[str] = []
    stripped = [text.strip() for text in texts]
    filled = [text for text in stripped if text]
    if not filled:
        report.add(Skip("empty caption", where))
    for text in filled:
        if not is_utf8(text):
            report.add(Skip("caption is not UTF-8", where, ascii(text[:60])))
        elif text in known or text in captions:
            report.add(Skip("repeated pair", where, text[:60]))
        else:
            captions.append(text)
    return captions


def _check(image: str, check: str) -> tuple[str, str] | None:
    try:
        if check == "decode":
            load_image(image)
        elif check == "header":
            check_image(image)
        elif not os.path.isfile(image):
            return "missing image", f"{image} does not exist"
        elif os.path.getsize(image) == 0:
            return "unreadable image", f"{image} is empty (0 bytes)"
    except FileNotFoundError as error:
        return "missing image", str(error)
    except (ValueError, OSError) as error:
        return "unreadable image", str(error)
    return None
