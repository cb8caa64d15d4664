"""Picture packs, shared by the example data sets: a zip with `meta.json` and `img/N.webp`, and splits without leakage.

`meta.json` is a list of {"i": N, "en": text, "cat": category, ...}. Pictures that share a text, or that look the same,
belong to one group, and a group is never divided among the splits.
"""

import hashlib
import json
import zipfile
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from vlmfast.data import load_image

THUMBNAIL = 16
SAME_PICTURE = 0.05  # difference of two thumbnails, as a share of what is drawn on both
GROUND = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Entry:
    """One picture of a pack: its number, its record in `meta.json`, and the picture on white."""

    number: int
    record: dict
    image: Image.Image


def read_pack(path: str | Path, languages: Sequence[str] = ("en",)) -> tuple[list[Entry], Counter]:
    """The pictures that have a text in each language, in order of their numbers, and counts of those left out.

    Raises:
        ValueError: not such a zip, or nothing in it can be used.
    """
    entries, left_out = [], Counter()
    try:
        with zipfile.ZipFile(path) as archive:
            records = json.loads(archive.read("meta.json"))
            for record in sorted(records, key=lambda record: record["i"]):
                if not all(record.get(language, "").strip() for language in languages):
                    left_out["without a text"] += 1
                    continue
                name = f"img/{record['i']}.webp"
                image = load_image(archive.read(name), name=name).convert("RGBA")
                if image.getchannel("A").getextrema()[1] < 16:
                    left_out["invisible"] += 1
                    continue
                white = Image.new("RGBA", image.size, (*GROUND, 255))
                entries.append(Entry(record["i"], record, Image.alpha_composite(white, image).convert("RGB")))
    except (zipfile.BadZipFile, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"read_pack: {path} must be a zip with meta.json and img/N.webp: {error}") from error
    if not entries:
        raise ValueError(f"read_pack: {path} has no picture with a text in {', '.join(languages)}")
    return entries, left_out


def group_by_keys(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Number of the group of each item: items that share a key, directly or through others, share it."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(keys))]


def group_entries(entries: Sequence[Entry], keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """Number of the group of each entry: entries that share a key, or whose pictures look the same, share it."""
    drawn = np.stack([255.0 - _thumbnail(entry.image) for entry in entries])
    ink = drawn.sum(axis=1)
    every: list[list[Hashable]] = [list(own) for own in keys]
    for i in range(len(entries) - 1):
        difference = np.abs(drawn[i + 1 :] - drawn[i]).sum(axis=1)
        for j in np.flatnonzero(difference < SAME_PICTURE * (ink[i + 1 :] + ink[i])):
            every[i].append(("looks", i))
            every[i + 1 + int(j)].append(("looks", i))
    return group_by_keys(every)


def split_groups(groups: Sequence[int], fractions: dict[str, float], seed: int = 0) -> list[str]:
    """Name of the split of each entry; whole groups in an order drawn by the seed fill the splits to their fractions.

    The first split takes what is left over.
    """
    rest, *held_out = fractions
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    # a hash, not a generator: the split then does not depend on numpy's version
    order = sorted(members, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    splits = [rest] * len(groups)
    for name in held_out:
        room = round(fractions[name] * len(groups))
        for group in list(order):
            if len(members[group]) <= room:
                room -= len(members[group])
                order.remove(group)
                for i in members[group]:
                    splits[i] = name
            if not room:
                break
    return splits


def leaks(groups: Sequence[int], splits: Sequence[str]) -> int:
    """Groups with members in several splits; 0 where the split is sound."""
    sides = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        sides[group].add(split)
    return sum(len(side) > 1 for side in sides.values())


def plain_text(text: str) -> str:
    """Case, outer white space and closing marks removed, to tell equal texts."""
    return " ".join(text.lower().split()).rstrip(".!?。！ ")


def _thumbnail(image: Image.Image) -> np.ndarray:
    side = max(image.size)
    square = Image.new("RGB", (side, side), GROUND)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    small = square.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).reshape(-1)
