"""Multi30k: pictures with a sentence and its translation, in parallel text files."""

import gzip
import os
import zlib
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from .records import Annotations, ImageName, Images, Skip, decode, read_text

MAX_BYTES = 1 << 28  # of one text unpacked; the largest public file takes 2 MiB


@dataclass(frozen=True)
class TranslationPair:
    """A picture, a sentence and its translation.

    Attributes:
        image_id: name of the picture's features.
        source, target: the sentences.
        line: number of their line, from 1.
    """

    image_id: str
    source: str
    target: str
    line: int


def read_multi30k(
    source: str | os.PathLike,
    target: str | os.PathLike,
    image_list: str | os.PathLike,
    *,
    images: Container | None = None,
    image_name: ImageName = "{}",
) -> Annotations[TranslationPair]:
    """Parallel sentences (`train.en` and `train.de`, plain or `.gz`) with their pictures (`train.txt`).

    Args:
        source, target, image_list: files of equally many lines; a line of the last is a picture's file name.
        images, image_name: pictures with features, and how their names are made of the file name without suffix.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: the numbers of lines differ, or a file is damaged or not UTF-8.

    Paper: Multi30K (Elliott et al. 2016, arXiv:1605.00459).
    """
    files = [Path(path) for path in (source, target, image_list)]
    lines = [_lines(path) for path in files]
    if len({len(part) for part in lines}) != 1:
        counts = ", ".join(f"{path} has {len(part)}" for path, part in zip(files, lines, strict=True))
        raise ValueError(f"read_multi30k: {counts} lines, must be equal")
    return Annotations(_pairs(files, lines, Images(images, image_name)))


def _pairs(files: list[Path], lines: list[list[str]], images: Images) -> Iterator[TranslationPair | Skip]:
    for number, row in enumerate(zip(*lines, strict=True), 1):
        source, target, picture = (cell.strip() for cell in row)
        if not picture:
            raise ValueError(f"{files[2]}: line {number} is empty, must name a picture")
        name = images.name(Path(picture.split("#")[0]).stem)
        if not source or not target:
            yield Skip("empty sentence", f"{files[1] if source else files[0]}: line {number}")
            continue
        skip = images.missing(f"{files[2]}: line {number}", name)
        yield TranslationPair(name, source, target, number) if skip is None else skip


def _lines(path: Path) -> list[str]:
    text = _unpacked(path) if path.suffix == ".gz" else read_text(path)
    lines = text.split("\n")  # other separators may stand inside a sentence
    return lines[:-1] if not lines[-1].strip() else lines


def _unpacked(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"annotations: {path} does not exist")
    try:
        with gzip.open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_BYTES} bytes")
    return decode(data, path)
