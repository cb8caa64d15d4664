"""A toy set of region features with captions: pictures of things with colours, features that show them."""

import json
from pathlib import Path

import numpy as np
import torch

from vlmfast.data import Regions, WordPieceTokenizer, write_regions

THINGS, COLORS, WIDTH = ("cat", "dog", "car", "tree", "boat"), ("red", "green", "blue"), 12


def picture(number: int, seed: int = 0) -> Regions:
    """Two to four regions; the feature is one-hot of thing and colour, with a little noise."""
    chance = np.random.default_rng((seed, number))
    count = 2 + number % 3
    things, colors = chance.integers(len(THINGS), size=count), chance.integers(len(COLORS), size=count)
    features = 0.05 * chance.standard_normal((count, WIDTH))
    features[np.arange(count), things] += 1
    features[np.arange(count), len(THINGS) + colors] += 1
    corner = chance.integers(0, 50, (count, 2))
    boxes = np.concatenate([corner, corner + chance.integers(5, 40, (count, 2))], axis=1)
    as_float = dict(dtype=torch.float32)
    return Regions(f"pic{number:03d}", torch.tensor(features, **as_float), torch.tensor(boxes, **as_float), 100, 90,
                   classes=torch.tensor(things), confidences=torch.full((count,), 0.9),
                   attributes=torch.tensor(colors), attribute_confidences=torch.full((count,), 0.8))


def sentence(regions: Regions) -> str:
    return ", ".join(f"a {COLORS[c]} {THINGS[t]}" for t, c in zip(regions.classes, regions.attributes, strict=True))


def write_set(folder: Path, count: int = 40) -> Path:
    """features.tsv with captions.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [picture(i) for i in range(count)]
    write_regions(folder / "features.tsv", pictures)
    rows = [{"image_id": one.image_id, "caption": sentence(one)} for one in pictures]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def tokenizer() -> WordPieceTokenizer:
    words = [f"a {color} {thing}," for color in COLORS for thing in THINGS]
    return WordPieceTokenizer.train(words * 2, 200)
