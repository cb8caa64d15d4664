"""The embedded picture-text set: 3786 Noto emoji of 32 x 32 pixels with names in 14 languages.

Licences of pictures and names: `emoji/NOTICE` beside this module.
"""

import hashlib
import json
import lzma
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .loader import Batches

FOLDER = Path(__file__).parent / "emoji"
LANGUAGES = ("en", "de", "fr", "es", "ja", "zh", "pt", "it", "ko", "ru", "tr", "id", "fa", "ar")
IMAGE_SIZE = 32
_PALETTE_BYTES = 256 * 3
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_EMOJI_STYLE = "FE0F"  # a variation selector that skin tones replace
# two-person glyphs whose variants are spelled as sequences of persons
_SEQUENCE_OF = {
    "1F469-200D-1F91D-200D-1F468": "1F46B",
    "1F468-200D-1F91D-200D-1F468": "1F46C",
    "1F469-200D-1F91D-200D-1F469": "1F46D",
    "1F9D1-200D-2764-200D-1F48B-200D-1F9D1": "1F48F",
    "1F9D1-200D-2764-200D-1F9D1": "1F491",
    "1FAF1-200D-1FAF2": "1F91D",
}


def base_glyph(code_points: str) -> str:
    """Code points ("1F44B-1F3FD") without skin tones: what all variants of one glyph share."""
    parts = [p for p in code_points.split("-") if p not in _SKIN_TONES and p != _EMOJI_STYLE]
    base = "-".join(parts) or code_points  # a skin tone by itself is a glyph too
    return _SEQUENCE_OF.get(base, base)


@dataclass(frozen=True, eq=False)
class EmojiPairs(Batches):
    """N pictures with captions; `pairs[i]` is (Pillow image, caption).

    Attributes:
        images: [N, 32, 32, 3] uint8, RGB, read-only.
        captions: N names in one language.
        records: N dicts: `u` code points, `cat`, `sub`, `skin` ("" for a base glyph), `base`, and a name per language.
    """

    images: np.ndarray
    captions: list[str]
    records: list[dict]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        return Image.fromarray(np.ascontiguousarray(self.images[i])), self.captions[i]

    def select(self, indices: Iterable[int]) -> "EmojiPairs":
        """The pairs at these positions, in this order."""
        indices = [int(i) for i in indices]
        images = self.images[indices]
        images.setflags(write=False)
        return EmojiPairs(images, [self.captions[i] for i in indices], [self.records[i] for i in indices])

    def split_random(self, fraction: float = 0.1, seed: int = 0) -> tuple["EmojiPairs", "EmojiPairs"]:
        """(train, test) with `fraction` of the pictures, drawn singly, in test.

        Mostly compositional: another skin tone of a test figure is likely in train. See :func:`strata`.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"split_random: fraction is {fraction}, must be between 0 and 1")
        order = sorted(range(len(self)), key=lambda i: _draw(seed, self.records[i]["u"]))
        return self._split(order[: round(fraction * len(self))])

    def split_concepts(self, count: int = 192, seed: int = 0) -> tuple["EmojiPairs", "EmojiPairs"]:
        """(train, test) with whole base glyphs, all their skin tones and pixel-equal pictures in test.

        Args:
            count: pictures in test, reached exactly unless the glyphs' sizes do not add up to it.

        Raises:
            ValueError: `count` is not between 1 and N - 1.
        """
        if not 0 < count < len(self):
            raise ValueError(f"split_concepts: count is {count}, must be between 1 and {len(self) - 1}")
        concepts = self._concepts()
        test: list[int] = []
        for key in sorted(concepts, key=lambda key: _draw(seed, key)):
            if len(test) + len(concepts[key]) <= count:
                test += concepts[key]
        return self._split(test)

    def _split(self, test: Sequence[int]) -> tuple["EmojiPairs", "EmojiPairs"]:
        chosen = set(test)
        return self.select(i for i in range(len(self)) if i not in chosen), self.select(sorted(chosen))

    def _concepts(self) -> dict[str, list[int]]:
        parent: dict[str, str] = {}

        def root(key: str) -> str:
            while parent.setdefault(key, key) != key:
                key = parent[key]
            return key

        # some flags and families are the same picture under several names: they stay on one side
        first_with: dict[bytes, str] = {}
        for image, record in zip(self.images, self.records, strict=True):
            twin = first_with.setdefault(image.tobytes(), record["base"])
            parent[root(record["base"])] = root(twin)
        concepts: dict[str, list[int]] = defaultdict(list)
        for i, record in enumerate(self.records):
            concepts[root(record["base"])].append(i)
        return concepts


def _draw(seed: int, key: str) -> bytes:
    # a hash, not a generator: the split then depends on neither the order of the set nor the numpy version
    return hashlib.sha256(f"{seed}:{key}".encode()).digest()


@lru_cache(maxsize=1)
def _pack() -> tuple[np.ndarray, list[dict]]:
    data = lzma.decompress((FOLDER / "emoji32.bin.xz").read_bytes())
    records = json.loads(lzma.decompress((FOLDER / "emoji32.json.xz").read_bytes()))
    palette = np.frombuffer(data, np.uint8, _PALETTE_BYTES).reshape(256, 3)
    indices = np.frombuffer(data, np.uint8, offset=_PALETTE_BYTES).reshape(-1, IMAGE_SIZE, IMAGE_SIZE)
    if len(indices) != len(records):
        raise ValueError(f"load_emoji: {FOLDER} has {len(indices)} pictures and {len(records)} names, must be equal")
    images = palette[indices]  # [N, 32, 32, 3]
    images.setflags(write=False)
    return images, [record | {"base": base_glyph(record["u"])} for record in records]


def load_emoji(language: str = "en") -> EmojiPairs:
    """All 3786 pairs with the names of one language (see `LANGUAGES`).

    Raises:
        ValueError: the language is not in the set.
    """
    if language not in LANGUAGES:
        raise ValueError(f"load_emoji: language is {language!r}, must be one of {', '.join(LANGUAGES)}")
    images, records = _pack()
    return EmojiPairs(images, [record[language] for record in records], list(records))


def emoji_pairs(
    language: str = "en", split: str | None = None, seed: int = 0
) -> EmojiPairs | tuple[EmojiPairs, EmojiPairs]:
    """The embedded set, whole (`split=None`) or as (train, test): "random" holds out a tenth, "concepts" 192 pictures.

    Raises:
        ValueError: the language or the split is unknown.
    """
    pairs = load_emoji(language)
    if split is None:
        return pairs
    if split == "random":
        return pairs.split_random(seed=seed)
    if split == "concepts":
        return pairs.split_concepts(seed=seed)
    raise ValueError(f"emoji_pairs: split is {split!r}, must be None, 'random' or 'concepts'")


def strata(train: EmojiPairs, test: EmojiPairs) -> dict[str, np.ndarray]:
    """Masks over the test pairs, for metrics that tell composition from novelty.

    Returns:
        [len(test)] bool each: `seen_words` (every word of the caption occurs in a training caption) and its complement
        `unseen_words`; `base` (no skin tone) and its complement `skin_tone`; `seen_base` (another variant of the glyph
        is in training).
    """
    words = Counter(word for caption in train.captions for word in _words(caption))
    bases = {record["base"] for record in train.records}
    seen = np.array([all(word in words for word in _words(caption)) for caption in test.captions], dtype=bool)
    base = np.array([record["skin"] == "" for record in test.records], dtype=bool)
    seen_base = np.array([record["base"] in bases for record in test.records], dtype=bool)
    return {"seen_words": seen, "unseen_words": ~seen, "base": base, "skin_tone": ~base, "seen_base": seen_base}


def _words(caption: str) -> list[str]:
    return re.findall(r"\w+", caption.lower())
