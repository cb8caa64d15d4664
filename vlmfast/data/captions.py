"""Caption files: tables (comma, tab or semicolon), JSON lines, and texts beside pictures."""

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

from .report import Skip

IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "file", "img")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "description", "sentence", "sentences")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_TEXT_BYTES = 1 << 20

Row = tuple[str, str, list[str]]  # where, picture name, captions


def read_captions(
    path: Path, image_column: str | None, caption_column: str | None, delimiter: str | None
) -> Iterator[Row | Skip]:
    """Rows of a .csv/.tsv/.txt table or a .jsonl file.

    Raises:
        ValueError: the header has no column of pictures or captions.
    """
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _read_json_lines(path, image_column, caption_column)
    return _read_table(path, image_column, caption_column, delimiter)


def read_sidecars(folder: Path) -> Iterator[Row | Skip]:
    """Every picture below `folder` with the lines of the .txt file of the same name, in sorted order."""
    for where, folders, names in os.walk(folder):
        folders.sort()
        present = set(names)
        stems = {Path(name).stem for name in names if name.lower().endswith(IMAGE_SUFFIXES)}
        for name in sorted(names):
            place = os.path.join(where, name)
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in IMAGE_SUFFIXES:
                if f"{stem}.txt" not in present:
                    yield Skip("no caption file", place, f"{stem}.txt is missing")
                    continue
                try:
                    with open(os.path.join(where, f"{stem}.txt"), "rb") as file:
                        text = _decode(file.read(MAX_TEXT_BYTES))
                except OSError as error:
                    yield Skip("unreadable caption file", place, str(error))
                    continue
                yield place, place, text.splitlines()
            elif suffix.lower() == ".txt" and stem not in stems:
                yield Skip("no image", place, "no picture of that name")


def _decode(data: bytes) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return data.decode("utf-16", errors="replace")
    # undecodable bytes stay as surrogates: file names keep working, captions with them are told apart
    return data.decode("utf-8", errors="surrogateescape").removeprefix("\ufeff")


def is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _read_table(
    path: Path, image_column: str | None, caption_column: str | None, delimiter: str | None
) -> Iterator[Row | Skip]:
    lines = io.StringIO(_decode(path.read_bytes()), newline="").readlines()
    first = next((n for n, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise ValueError(f"open_pairs: {path} is empty, must start with a header")
    if delimiter is None:
        delimiter = max("\t,;", key=lines[first].count)
    elif len(delimiter) != 1:
        raise ValueError(f"open_pairs: delimiter is {delimiter!r}, must be one character")
    try:
        header = [cell.strip() for cell in next(csv.reader([lines[first]], delimiter=delimiter))]
    except csv.Error as error:
        raise ValueError(f"open_pairs: the header of {path} is no table row: {error}") from error
    image = _column(path, header, image_column, IMAGE_COLUMNS, "image_column")
    caption = _column(path, header, caption_column, CAPTION_COLUMNS, "caption_column")
    for number, cells, error in _cells(lines, first + 1, delimiter, len(header)):
        where = f"{path}:{number}"
        if cells is None:
            yield Skip("malformed row", where, error)
        elif len(cells) <= max(image, caption) or any(cells[len(header) :]):
            # too many cells are mostly an unquoted comma in the caption, which would be cut there
            yield Skip("malformed row", where, f"{len(cells)} cells, the header has {len(header)}")
        else:
            yield where, cells[image], [cells[caption]]


def _cells(lines: list[str], at: int, delimiter: str, width: int) -> Iterator[tuple[int, list[str] | None, str]]:
    while at < len(lines):
        reader = csv.reader((lines[n] for n in range(at, len(lines))), delimiter=delimiter, strict=True)
        offset = at
        while True:
            number = at + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                # a stray quote would swallow the lines after it: take this line without quoting and go on behind it
                cells = lines[at].rstrip("\r\n").split(delimiter)
                yield (number, cells, "") if len(cells) == width else (number, None, str(error))
                at += 1
                break
            at = offset + reader.line_num
            if cells:
                yield number, cells, ""


def _column(path: Path, header: list[str], wanted: str | None, known: tuple[str, ...], argument: str) -> int:
    if wanted is not None:
        if wanted in header:
            return header.index(wanted)
        raise ValueError(f"open_pairs: {argument} is {wanted!r}, {path} has the columns {header}")
    lower = [name.lower() for name in header]
    for name in known:
        if name in lower:
            return lower.index(name)
    raise ValueError(f"open_pairs: {path} has the columns {header}, none of {known}; pass {argument}")


def _read_json_lines(path: Path, image_key: str | None, caption_key: str | None) -> Iterator[Row | Skip]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(_decode(line))
            except (ValueError, RecursionError) as error:
                yield Skip("malformed JSON", where, str(error))
                continue
            if not isinstance(record, dict):
                yield Skip("malformed JSON", where, f"{type(record).__name__}, must be an object")
                continue
            image = _field(record, image_key, IMAGE_COLUMNS)
            captions = caption_list(_field(record, caption_key, CAPTION_COLUMNS))
            if not isinstance(image, str) or captions is None:
                missing = "image" if not isinstance(image, str) else "caption"
                yield Skip("missing field", where, f"no {missing} among {sorted(map(str, record))[:8]}")
            else:
                yield where, image, captions


def _field(record: dict, wanted: str | None, known: tuple[str, ...]):
    if wanted is not None:
        return record.get(wanted)
    return next((record[name] for name in known if name in record), None)


def caption_list(value) -> list[str] | None:
    """A string or a list of strings as a list; None for anything else."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return value
    return None


def json_caption(data: bytes, field: str | None) -> list[str]:
    """Captions of one JSON object; ValueError where it is malformed or has none."""
    try:
        record = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    captions = caption_list(_field(record, field, CAPTION_COLUMNS)) if isinstance(record, dict) else None
    if captions is None:
        raise ValueError("no caption field")
    return captions
