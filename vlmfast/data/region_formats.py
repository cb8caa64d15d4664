"""The public layouts of region features: each a source of records (name -> array) by image id.

A record's arrays carry the names of their file; `vlmfast.data.regions` knows them all.
"""

import importlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np

from .region_arrays import MAX_BYTES, read_npy, read_npz, read_pickle
from .region_tsv import LAYOUTS, TsvSource, decode_base64, integer
from .report import Skip

FORMATS = (*LAYOUTS, "numpy", "lmdb", "hdf5")

# LMDB refuses to open a path twice in one process; read-only and without locks, a forked worker may share it
_ENVIRONMENTS: WeakValueDictionary = WeakValueDictionary()


class NumpySource:
    """A folder of .npz or .npy files, one an image; `name_info.npy` beside a bare array holds its boxes (MMF)."""

    format = "numpy"

    def __init__(self, path: Path, layout: str | None = None):
        self.path, self.skipped = path, []
        files = [path] if path.is_file() else sorted(_walk(path))
        names = {file.with_suffix("").as_posix() for file in files}
        self.files: dict[str, Path] = {}
        root = path.parent if path.is_file() else path
        for file in files:
            stem = file.with_suffix("").as_posix()
            if stem.endswith("_info") and stem.removesuffix("_info") in names:
                continue
            image_id = file.relative_to(root).with_suffix("").as_posix()
            if image_id in self.files:
                self.skipped.append(Skip("repeated image id", str(file), f"{self.files[image_id].name} is there too"))
            else:
                self.files[image_id] = file

    def ids(self) -> list[str]:
        return list(self.files)

    def where(self, image_id: str) -> str:
        return str(self.files[image_id])

    def read(self, image_id: str) -> dict:
        file = self.files[image_id]
        if file.suffix == ".npz":
            record = read_npz(file)
        else:
            record = _read_npy_file(file)
            if isinstance(record, np.ndarray):
                record = {"features": record}
        info_file = file.with_name(f"{file.stem}_info.npy")
        if info_file.is_file():
            info = _read_npy_file(info_file)
            record = {**(info if isinstance(info, dict) else {}), **record}
        if isinstance(record, dict) and isinstance(record.get("info"), dict):
            record = {**record["info"], **record}
        if not isinstance(record, dict):
            raise ValueError(f"holds a {type(record).__name__}, must be a dict of arrays or an array of features")
        return record

    def close(self) -> None:
        pass


class LmdbSource:
    """An LMDB environment (folder or file) of pickled dicts, as ViLBERT and MMF store features; needs `lmdb`."""

    format = "lmdb"

    def __init__(self, path: Path, layout: str | None = None):
        self.path, self.skipped = path, []
        self._environment = None
        with self._open().begin() as transaction:
            # the record "keys" pickles the same list; the cursor needs no unpickling
            keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
        self.keys = {key.decode("utf-8", errors="replace"): key for key in keys if key != b"keys"}

    def _open(self):
        if self._environment is None:
            lmdb, place = _import("lmdb"), os.path.realpath(self.path)
            self._environment = _ENVIRONMENTS.get(place)
            try:
                if self._environment is None:
                    options = {"readonly": True, "lock": False, "readahead": False, "create": False}
                    self._environment = lmdb.open(place, subdir=self.path.is_dir(), **options)
                    _ENVIRONMENTS[place] = self._environment
            except lmdb.Error as error:
                raise ValueError(f"RegionFeatures: {self.path} is not a readable LMDB environment ({error})") from error
        return self._environment

    def ids(self) -> list[str]:
        return list(self.keys)

    def where(self, image_id: str) -> str:
        return f"{self.path}[{image_id}]"

    def read(self, image_id: str) -> dict:
        with self._open().begin(buffers=True) as transaction:
            record = read_pickle(transaction.get(self.keys[image_id]))
        if not isinstance(record, dict):
            raise ValueError(f"holds a {type(record).__name__}, must be a dict")
        count = record.get("num_boxes")
        for name in ("features", "boxes", "cls_prob"):
            if isinstance(record.get(name), (bytes, str)):  # the published files keep the TSV's base64
                record[name] = decode_base64(record[name], name, integer(count, "num_boxes"))
        return record

    def close(self) -> None:
        self._environment = None

    def __getstate__(self):
        return {**self.__dict__, "_environment": None}


class Hdf5Source:
    """HDF5 with a group an image (`ID/features`, LXMERT's mirrors) or columns (`features` [N, R, D]); needs `h5py`.

    Columns are `image_id`, `features`, `boxes`, `image_w`, `image_h` and mostly `num_boxes` (MMF, ViLBERT).
    """

    format = "hdf5"

    def __init__(self, path: Path, layout: str | None = None):
        self.path, self.skipped = path, []
        self._file, self._process = None, None
        with self._readable():
            self._index(self._open())

    def _index(self, file) -> None:
        self.by_column = "image_id" in file and "features" in file
        if not self.by_column:
            self.rows = dict.fromkeys(_groups(file), 0)
            if not self.rows:
                raise ValueError(
                    f"holds {sorted(file)[:8]}, must hold image_id and features, or a group with features an image"
                )
            return
        listed = self._read(file, "image_id", ()).tolist()
        texts = [value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in listed]
        self.rows, self.count = {}, len(texts)
        for row, text in enumerate(texts):
            if text in self.rows:
                self.skipped.append(Skip("repeated image id", f"{self.path}[{row}]", text))
            else:
                self.rows[text] = row

    @contextmanager
    def _readable(self):
        try:
            yield
        except ImportError:
            raise
        except ValueError as error:
            raise ValueError(f"{self.path.name}: {error}") from error
        except Exception as error:  # h5py raises many types on damaged files
            raise ValueError(f"{self.path.name} is damaged or no HDF5 file ({error})") from error

    def _open(self):
        if self._process != os.getpid():
            self._file, self._process = _import("h5py").File(self.path, "r"), os.getpid()
        return self._file

    @staticmethod
    def _read(node, name: str, row):
        h5py = _import("h5py")
        data = node.get(name) if isinstance(node.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.external or data.is_virtual:
            raise ValueError(f"{name} is no plain dataset of this file; links to other files are not followed")
        size = math.prod(data.shape if row == () else data.shape[1:]) * data.dtype.itemsize
        if size > MAX_BYTES:  # an empty dataset may declare any shape
            raise ValueError(f"{name} has {size} bytes, must have at most {MAX_BYTES}")
        return data[row]

    def ids(self) -> list[str]:
        return list(self.rows)

    def where(self, image_id: str) -> str:
        return f"{self.path}[{image_id}]"

    def read(self, image_id: str) -> dict:
        with self._readable():
            file = self._open()
            if self.by_column:
                columns = [name for name in file if getattr(file[name], "shape", ())[:1] == (self.count,)]
                return {name: self._read(file, name, self.rows[image_id]) for name in columns if name != "image_id"}
            group = file[image_id]
            return {name: self._read(group, name, ()) for name in group if not hasattr(group.get(name), "keys")}

    def close(self) -> None:
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = self._process = None

    def __getstate__(self):
        return {**self.__dict__, "_file": None, "_process": None}


def open_source(path: Path, layout: str | None):
    """The source for a path; `layout` is one of FORMATS or None to tell by suffix and content."""
    if layout is not None and layout not in FORMATS:
        raise ValueError(f"RegionFeatures: format is {layout!r}, must be one of {', '.join(FORMATS)}")
    if not path.exists():
        raise FileNotFoundError(f"RegionFeatures: {path} does not exist")
    if layout is None:
        layout = _detect(path)
    if layout in LAYOUTS or layout == "tsv":
        if path.is_dir():
            raise ValueError(f"RegionFeatures: {path} is a folder, format {layout!r} needs a file")
        return TsvSource(path, None if layout == "tsv" else layout)
    return {"numpy": NumpySource, "lmdb": LmdbSource, "hdf5": Hdf5Source}[layout](path, layout)


def _detect(path: Path) -> str:
    if path.is_dir():
        if (path / "data.mdb").is_file():
            return "lmdb"
        if next(_walk(path), None) is not None:
            return "numpy"
        raise ValueError(f"RegionFeatures: {path} holds no data.mdb (LMDB) and no .npy or .npz files")
    with open(path, "rb") as file:
        head = file.read(32)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if path.suffix in (".npy", ".npz"):
        return "numpy"
    if path.suffix in (".lmdb", ".mdb") or head[16:20] == b"\xde\xc0\xef\xbe":
        return "lmdb"
    if path.suffix in (".h5", ".hdf5"):
        raise ValueError(f"RegionFeatures: {path} does not begin like an HDF5 file")
    return "tsv"


def _walk(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith((".npy", ".npz")):
                yield Path(where) / name


def _groups(node, prefix: str = "", depth: int = 0) -> Iterator[str]:
    h5py = _import("h5py")
    for name in node:
        child = node.get(name) if isinstance(node.get(name, getlink=True), h5py.HardLink) else None
        if isinstance(child, h5py.Group) and depth < 4:
            if "features" in child:
                yield prefix + name
            else:
                yield from _groups(child, f"{prefix}{name}/", depth + 1)


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"RegionFeatures: this format needs {name}: pip install {name}") from error


def _read_npy_file(file: Path):
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, must have at most {MAX_BYTES}")
    return read_npy(file.read_bytes())
