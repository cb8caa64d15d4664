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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


class Storage(NamedTuple):
    """A reference to a blob. Immutable records stand for tensors until the pickle is done and cannot alter them."""

    dtype: torch.dtype
    key: str
    count: int


class View(NamedTuple):
    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """State dict of a TorchScript archive: every tensor attribute of every submodule, under its dotted name.

    Raises:
        UnsafePickleError: the pickle names a global outside the allow-list.
        ValueError: not a zip, truncated, or a tensor that does not fit its storage.
    """
    with open_zip(path) as archive, clear_errors(path, "a TorchScript archive"):
        tree, blob_of = open_archive(archive)
        return module_tensors(*unpickle(tree, lambda module, name: module.startswith("__torch__")), blob_of)


@contextmanager
def clear_errors(path: Path, kind: str) -> Iterator[None]:
    """What a damaged file makes Python raise, as one of two errors that name the file."""
    try:
        yield
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: damaged or not {kind} ({name}{error})") from error


def open_archive(archive: zipfile.ZipFile) -> tuple[bytes, Callable[[Storage], bytes]]:
    """The pickle of a zip that torch wrote, and a function that reads a storage's blob."""
    trees = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(trees) != 1:
        raise ValueError(f"{len(trees)} records named data.pkl")
    prefix = trees[0].removesuffix("data.pkl")
    order = f"{prefix}byteorder"
    if order in archive.namelist() and read_record(archive, order).strip() != b"little":
        raise ValueError("big-endian archives are not supported")
    return read_record(archive, trees[0]), lambda storage: read_record(archive, f"{prefix}data/{storage.key}")


def unpickle(tree: bytes, is_shell: Callable[[str, str], bool], extra: dict | None = None,
             storages: dict[str, Storage] | None = None) -> tuple[object, type]:
    """(what the pickle holds, the class that stands in for its classes); nothing in it is executed.

    Args:
        is_shell: `is_shell(module, name)`: a class that is replaced by an inert stand-in.
        extra: further (module, name) -> what is put in its place; must be harmless when called or altered.
        storages: filled with the storages that the pickle refers to, by key.
    """
    _check_pickle(tree)
    unpickler, module_type = _unpickler(tree, is_shell, extra or {}, {} if storages is None else storages)
    return unpickler.load(), module_type


def module_tensors(root, module_type: type, blob_of: Callable[[Storage], bytes]) -> dict[str, Tensor]:
    """State dict of a tree of modules, scripted ones or `torch.nn` ones."""
    if not isinstance(root, module_type):
        raise ValueError(f"data.pkl holds a {type(root).__name__}, must be a module")
    views: dict[str, View] = {}
    seen: set[int] = set()

    def collect(module, name: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"modules nest deeper than {MAX_DEPTH}")
        seen.add(id(module))
        for key, value in _members(module):
            if isinstance(value, View):
                views[f"{name}{key}"] = value
            elif isinstance(value, module_type) and id(value) not in seen:
                collect(value, f"{name}{key}.", depth + 1)

    collect(root, "", 0)
    return fill_tensors(views, blob_of)


def _members(module) -> Iterator[tuple[str, object]]:
    for key, value in vars(module).items():
        if key in ("_parameters", "_buffers", "_modules") and isinstance(value, dict):  # those of torch.nn
            yield from value.items()
        else:
            yield key, value


def fill_tensors(views: dict[str, View], blob_of: Callable[[Storage], bytes]) -> dict[str, Tensor]:
    """The tensors that records stand for; a storage is read once, however many of them refer to it."""
    blobs: dict[Storage, Tensor] = {}
    for view in views.values():
        if view.storage not in blobs:
            blobs[view.storage] = _blob(view.storage, blob_of(view.storage))
    return {name: blobs[view.storage].as_strided(view.size, view.stride, view.offset) for name, view in views.items()}


def _check_pickle(tree: bytes) -> None:
    """Refuse streams that would make the unpickler allocate more than they hold."""
    if len(tree) > MAX_PICKLE_BYTES:
        raise ValueError(f"data.pkl has {len(tree)} bytes, must have at most {MAX_PICKLE_BYTES}")
    for opcode, argument, _ in pickletools.genops(tree):  # raises when a declared length exceeds the stream
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(tree):
            raise ValueError(f"memo index {argument} in a stream of {len(tree)} bytes")


def _unpickler(tree: bytes, is_shell: Callable[[str, str], bool], extra: dict,
               storages: dict[str, Storage]) -> tuple[pickle.Unpickler, type]:
    class Module:
        """Stand-in for a class; made anew per file so that no file can alter another's."""

        def __new__(cls, *args, **keywords):
            return object.__new__(cls)

        def __init__(self, *args, **keywords):
            pass

        def __setstate__(self, state):
            if isinstance(state, dict):
                vars(self).update(state)

    def rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None) -> View:
        if not isinstance(storage, Storage):
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
        return View(storage, offset, size, stride)

    def type_tag(value, name=None):
        return value

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) in extra:
                return extra[module, name]
            if is_shell(module, name):
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

        def persistent_load(self, pid) -> Storage:
            if isinstance(pid, tuple) and len(pid) == 4 and pid[:2] == ("module", Module):
                return Module  # torch before 1.6 stored a class with its source
            pid = pid[:5] if isinstance(pid, tuple) and pid[5:] == (None,) else pid  # and a storage with its view
            if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[2], str):
                raise ValueError(f"unknown storage reference {str(pid)[:100]}")
            _, dtype, key, _, count = pid
            if not isinstance(dtype, torch.dtype) or type(count) is not int or count < 0:
                raise ValueError(f"storage {key} has type {dtype!r} and {count!r} elements")
            storage = Storage(dtype, key, count)
            if storages.setdefault(key, storage) != storage:
                raise ValueError(f"storage {key} has two sizes or types")
            return storage

    return Restricted(io.BytesIO(tree)), Module


def _blob(storage: Storage, blob: bytes) -> Tensor:
    dtype, key, count = storage
    if len(blob) != count * dtype.itemsize:
        raise ValueError(f"storage {key} has {len(blob)} bytes, must have {count} x {dtype.itemsize}")
    return torch.frombuffer(bytearray(blob), dtype=dtype) if blob else torch.empty(0, dtype=dtype)
