"""Tensors of a TorchScript archive, read without running it.

Such an archive is a zip with `<name>/data.pkl`, a pickle of the module tree, and one raw blob `<name>/data/<key>`
per storage. The pickle is interpreted by an unpickler that knows four things: inert stand-ins for the scripted
classes, storage types, `torch._utils._rebuild_tensor_v2` and OrderedDict.
"""

import io
import math
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .files import UnsafePickleError, open_zip, read_record

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
}
TYPE_TAGS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")
MAX_PICKLE_BYTES = 64 << 20  # the tree of the largest public model takes under 1 MiB
MAX_DEPTH = 64


class _Storage(NamedTuple):
    """A reference to a blob. Immutable records stand for tensors until the pickle is done and cannot alter them."""

    dtype: torch.dtype
    key: str
    count: int


class _View(NamedTuple):
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive: every tensor attribute of every submodule, under its dotted name.

    Raises:
        UnsafePickleError: the pickle names a global outside the allow-list.
        ValueError: not a zip, truncated, or a tensor that does not fit its storage.
    """
    with open_zip(path) as archive:
        try:
            return _read_modules(archive)
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{path}: {error}") from error
        except Exception as error:  # a damaged pickle can raise nearly anything
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise ValueError(f"{path}: damaged or not a TorchScript archive ({kind}{error})") from error


def _read_modules(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    trees = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(trees) != 1:
        raise ValueError(f"{len(trees)} records named data.pkl")
    prefix = trees[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and read_record(archive, order).strip() != b"little":
        raise ValueError("big-endian archives are not supported")
    tree = read_record(archive, trees[0])
    _check_pickle(tree)
    unpickler, module_type = _unpickler(tree)
    root = unpickler.load()
    if not isinstance(root, module_type):
        raise ValueError(f"data.pkl holds a {type(root).__name__}, must be a module")
    state: dict[str, Tensor] = {}
    blobs: dict[_Storage, Tensor] = {}
    seen: set[int] = set()

    def collect(module, name: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"modules nest deeper than {MAX_DEPTH}")
        seen.add(id(module))
        for key, value in vars(module).items():
            if isinstance(value, _View):
                storage = value.storage
                if storage not in blobs:  # read once, however many tensors refer to it
                    blobs[storage] = _blob(storage, read_record(archive, f"{prefix}data/{storage.key}"))
                state[f"{name}{key}"] = blobs[storage].as_strided(value.size, value.stride, value.offset)
            elif isinstance(value, module_type) and id(value) not in seen:
                collect(value, f"{name}{key}.", depth + 1)

    collect(root, "", 0)
    return state


def _check_pickle(tree: bytes) -> None:
    """Refuse streams that would make the unpickler allocate more than they hold."""
    if len(tree) > MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {len(tree)} bytes, must have at most {MAX_PICKLE_BYTES}")
    for opcode, argument, _ in pickletools.genops(tree):  # raises when a declared length exceeds the stream
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(tree):
            raise ValueError(f"memo index {argument} in a stream of {len(tree)} bytes")


def _unpickler(tree: bytes) -> tuple[pickle.Unpickler, type]:
    class Module:
        """Stand-in for a scripted class; made anew per file so that no file can alter another's."""

    def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None) -> _View:
        if not isinstance(storage, _Storage):
            raise ValueError(f"a tensor has a {type(storage).__name__} for its storage")
        size, stride = tuple(size), tuple(stride)
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError(f"a tensor has offset {offset!r}, size {size!r}, stride {stride!r}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        count = math.prod(size)
        if offset > storage.count or (count and (last >= storage.count or count > storage.count)):
            raise ValueError(
                f"a tensor of size {size}, stride {stride}, offset {offset} "
                f"exceeds its storage of {storage.count} elements"
            )
        return _View(storage, offset, size, stride)

    def type_tag(value, name=None):
        return value

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if module.startswith("__torch__"):
                return Module
            if module == "torch" and name in STORAGE_TYPES:
                return STORAGE_TYPES[name]
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return rebuild_tensor
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if module == "torch.jit._pickle" and name in TYPE_TAGS:
                return type_tag
            raise UnsafePickleError(f"data.pkl refers to {module}.{name}, which is not on the allow-list")

        def persistent_load(self, pid) -> _Storage:
            if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
                raise ValueError(f"unknown storage reference {str(pid)[:100]}")
            _, dtype, key, _, count = pid
            if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
                raise ValueError(f"storage {key} has type {dtype!r} and {count!r} elements")
            return _Storage(dtype, key, count)

    return Restricted(io.BytesIO(tree)), Module


def _blob(storage: _Storage, blob: bytes) -> Tensor:
    dtype, key, count = storage
    if len(blob) != count * dtype.itemsize:
        raise ValueError(f"storage {key} has {len(blob)} bytes, must have {count} x {dtype.itemsize}")
    return torch.frombuffer(bytearray(blob), dtype=dtype) if blob else torch.empty(0, dtype=dtype)
