"""Region features in tab-separated files: bottom-up-attention, LXMERT, OSCAR and VinVL."""

import base64
import binascii
import json
import os
from pathlib import Path

import numpy as np

from .report import Skip

BOTTOM_UP = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LXMERT = ("img_id", "img_h", "img_w", "objects_id", "objects_conf", "attrs_id", "attrs_conf", "num_boxes", "boxes")
LAYOUTS = {
    "bottom-up-attention": (BOTTOM_UP, (*BOTTOM_UP, "cls_prob")),
    "lxmert": ((*LXMERT, "features"),),
    "oscar": (("image_id", "json"), ("image_id", "num_boxes", "features")),
}
MAX_ROW = 256 << 20

_COLUMNS = {len(columns): (name, columns) for name, layouts in LAYOUTS.items() for columns in layouts}
# name -> (element type, values per box); None leaves the width open
_BASE64 = {
    "boxes": ("float32", 4),
    "features": ("float32", None),
    "cls_prob": ("float32", None),
    "objects_id": ("int64", 1),
    "objects_conf": ("float32", 1),
    "attrs_id": ("int64", 1),
    "attrs_conf": ("float32", 1),
}


class TsvSource:
    """Rows of a tab-separated file, read by offset; only ids and offsets stay in memory.

    OSCAR's `name.lineidx` beside `name.tsv` (one offset a line) spares the first pass over a large file.
    """

    def __init__(self, path: Path, layout: str | None):
        self.path = path
        self.skipped: list[Skip] = []
        self._file, self._process = None, None
        self.rows: dict[str, tuple[int, int]] = {}  # id -> offset, row number from 1
        with open(path, "rb") as file:
            first = file.readline(MAX_ROW)
            if not first.strip():
                raise ValueError(f"RegionFeatures: {path} is empty")
            names = _cells(first)
            if names[0] in ("image_id", "img_id") and "features" in names:
                self.columns, start = tuple(names), len(first)
                missing = {"num_boxes", "boxes", "features"} - set(names)
                if missing or len(set(names)) < len(names):
                    raise ValueError(
                        f"RegionFeatures: {path}:1 heads the columns {names}, must name each once, and "
                        f"{', '.join(sorted(missing)) or 'none twice'}"
                    )
                self.format = "lxmert" if "objects_id" in names else "bottom-up-attention"
            else:
                if len(names) not in _COLUMNS:
                    layouts = "; ".join(", ".join(columns) for _, columns in _COLUMNS.values())
                    raise ValueError(
                        f"RegionFeatures: {path}:1 has {len(names)} columns, must have those of one of: {layouts}"
                    )
                (self.format, self.columns), start = _COLUMNS[len(names)], 0
            if layout not in (None, self.format):
                raise ValueError(f"RegionFeatures: format is {layout!r}, {path} has the columns of {self.format!r}")
            for number, offset in enumerate(self._offsets(file, start), 2 if start else 1):
                self._index(file, number, offset)

    def _index(self, file, number: int, offset: int) -> None:
        file.seek(offset)
        head = file.read(1024)
        image_id, tab, _ = head.partition(b"\t")
        if not head.strip() or head.startswith((b"\n", b"\r\n")):
            return
        name = image_id.decode("utf-8", errors="replace").strip()
        where = f"{self.path}:{number}"
        if not tab or b"\n" in image_id:
            self.skipped.append(Skip("malformed row", where, "has no tab after an image id"))
        elif name in self.rows:
            self.skipped.append(Skip("repeated image id", where, f"{name} is in row {self.rows[name][1]} already"))
        else:
            self.rows[name] = (offset, number)

    def _offsets(self, file, start: int) -> list[int]:
        listed = self._listed_offsets(file, start)
        if listed is not None:
            return listed
        offsets, size = [], os.path.getsize(self.path)
        file.seek(start)
        offset = start
        while offset < size:
            offsets.append(offset)
            line = file.readline(MAX_ROW)
            offset += len(line)
            if not line.endswith(b"\n") and offset < size:
                raise ValueError(f"RegionFeatures: {self.path}: row {len(offsets)} exceeds {MAX_ROW} bytes")
        return offsets

    def _listed_offsets(self, file, start: int) -> list[int] | None:
        """Offsets from a .lineidx file if every one of them is the beginning of a row."""
        index = self.path.with_suffix(".lineidx")
        try:
            offsets = [int(line) for line in index.read_text().split()]
        except (OSError, ValueError):
            return None
        if start:
            offsets = [offset for offset in offsets if offset >= start]
        if not offsets or offsets[0] != start or offsets != sorted(set(offsets)):
            return None
        for offset in offsets[1:]:
            file.seek(offset - 1)
            if file.read(1) != b"\n":
                return None
        file.seek(offsets[-1])
        last = file.readline(MAX_ROW)
        return offsets if offsets[-1] + len(last) == os.path.getsize(self.path) else None

    def ids(self) -> list[str]:
        return list(self.rows)

    def where(self, image_id: str) -> str:
        return f"{self.path}:{self.rows[image_id][1]}"

    def read(self, image_id: str) -> dict:
        if self._process != os.getpid():  # a forked worker must not share the file's position
            self._file, self._process = open(self.path, "rb"), os.getpid()
        self._file.seek(self.rows[image_id][0])
        cells = _cells(self._file.readline(MAX_ROW))
        if len(cells) != len(self.columns):
            raise ValueError(
                f"the row has {len(cells)} columns, must have {len(self.columns)} "
                f"({', '.join(self.columns)}); truncated?"
            )
        record = dict(zip(self.columns, cells, strict=True))
        if "json" in record:
            return _decode_json(record["json"])
        count = integer(record.pop("num_boxes"), "num_boxes")
        out = {"num_boxes": count}
        for name, cell in record.items():
            if name in _BASE64:
                out[name] = decode_base64(cell, name, count)
            elif name not in ("image_id", "img_id"):
                out[name] = _number(cell, name)
        return out

    def close(self) -> None:
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = self._process = None

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_process": None}


def _cells(line: bytes) -> list[str]:
    return [cell.strip() for cell in line.decode("utf-8", errors="replace").rstrip("\r\n").split("\t")]


def integer(cell, name: str) -> int:
    value = _number(cell, name)
    if value != int(value):
        raise ValueError(f"{name} is {cell!r}, must be an integer")
    return int(value)


def _number(cell, name: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError):
        value = float("nan")
    if not abs(value) < 1e12:
        raise ValueError(f"{name} is {str(cell)[:40]!r}, must be a number")
    return value


def decode_base64(cell: str | bytes, name: str, count: int) -> np.ndarray:
    """[count] or [count, D] of the column's type from base64; the length must fit exactly."""
    text = cell.decode("ascii", errors="replace") if isinstance(cell, bytes) else cell
    if not isinstance(text, str):
        raise ValueError(f"{name} is a {type(text).__name__}, must be base64 text")
    if text.startswith("b'") and text.endswith("'"):  # Python 3 writers forgot to decode
        text = text[2:-1]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} is not valid base64 ({error}); truncated?") from error
    dtype, width = _BASE64[name]
    size = np.dtype(dtype).itemsize
    if count < 1:
        raise ValueError(f"num_boxes is {count}, must be at least 1")
    if width is None:
        if not data or len(data) % (count * size):
            raise ValueError(f"{name} has {len(data)} bytes, must be a multiple of {count} boxes x {size} ({dtype})")
        return np.frombuffer(data, dtype=dtype).reshape(count, -1)
    if len(data) != count * width * size:
        hint = "; stored as another type?" if len(data) in (count * width * size // 2, count * width * size * 2) else ""
        raise ValueError(
            f"{name} has {len(data)} bytes, must have {count} boxes x {width} x {size} = {count * width * size} "
            f"({dtype}){hint}"
        )
    array = np.frombuffer(data, dtype=dtype)
    return array.reshape(count, width) if width > 1 else array


def _decode_json(text: str) -> dict:
    """A row of OSCAR or VinVL: features of all boxes in one base64 string, or an object a box."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the second column is not valid JSON ({error}); truncated?") from error
    if not isinstance(row, dict):
        raise ValueError(f"the second column is a JSON {type(row).__name__}, must be an object")
    record = {name: row[name] for name in ("image_h", "image_w") if name in row}
    if isinstance(row.get("objects"), list):
        objects = row["objects"]
        if not objects or not all(isinstance(entry, dict) for entry in objects):
            raise ValueError(f"objects has {len(objects)} entries, must be at least one object with rect and feature")
        missing = [name for name in ("rect", "feature") if any(name not in entry for entry in objects)]
        if missing:
            raise ValueError(f"an entry of objects has no {' and no '.join(missing)}")
        record["num_boxes"] = len(objects)
        record["boxes"] = _json_floats([entry["rect"] for entry in objects], "rect")
        record["features"] = np.concatenate(
            [decode_base64(entry["feature"], "features", 1) for entry in objects], axis=0
        )
        if all("conf" in entry for entry in objects):
            record["conf"] = _json_floats([entry["conf"] for entry in objects], "conf")
        if all(isinstance(entry.get("class"), str) for entry in objects):
            record["names"] = tuple(entry["class"] for entry in objects)
        return record
    count = integer(row.get("num_boxes"), "num_boxes")
    if not isinstance(row.get("features"), str):
        raise ValueError("the JSON has no features")
    record["num_boxes"] = count
    record["features"] = decode_base64(row["features"], "features", count)
    if isinstance(row.get("boxes"), str):
        record["boxes"] = decode_base64(row["boxes"], "boxes", count)
    return record


def _json_floats(values: list, name: str) -> np.ndarray:
    try:
        return np.array(values, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} of an object holds no numbers or too few ({error})") from error
