"""Untrusted weight and JSON files to plain tensors and dicts. Nothing in a file is ever executed."""

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

_TENSOR_RECORD = re.compile(r"[^/]+/(data\.pkl|byteorder|data/.*)")  # scripted code and debug records are compressed


class UnsafePickleError(ValueError):
    """A pickle asks for something other than tensors and plain containers; it was not executed."""


def find_weights(folder: Path, names: tuple[str, ...]) -> Path:
    """The first of `names` that lies in the folder."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder}: no weights, must hold one of {', '.join(names)}")


def read_json(path: Path) -> dict:
    """The object in a JSON file; ValueError names the file when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a JSON {type(value).__name__}, must be an object")
    return value


def is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def key_bytes(path: Path, most: int = 8 << 20) -> bytes:
    """The part of a weight file that spells its tensor names, unread: to guess by, not to trust."""
    with open(path, "rb") as file:
        start = file.read(8)
        if not start.startswith(b"PK\x03\x04"):  # plain pickles and safetensors begin with the names
            return start + file.read(most)
    with open_zip(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return read_record(archive, names[0])[:most] if names else b""


def open_zip(path: Path) -> zipfile.ZipFile:
    """An archive whose tensor records are stored uncompressed and so cannot exceed the file; ValueError otherwise."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path}: truncated or damaged zip archive ({error})") from error
    records = [record for record in archive.infolist() if _TENSOR_RECORD.fullmatch(record.filename)]
    total = sum(record.file_size for record in records)
    if any(record.compress_type != zipfile.ZIP_STORED for record in records) or total > path.stat().st_size:
        archive.close()
        raise ValueError(f"{path}: tensor records are compressed or overlap; checkpoints store them plainly")
    return archive


def read_record(archive: zipfile.ZipFile, name: str) -> bytes:
    """One record, its checksum verified."""
    try:
        return archive.read(name)
    except (KeyError, zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"record {name} is missing or damaged ({error})") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """State dict of a .safetensors file or of a torch.save file (.bin, .pt), read with weights_only=True.

    A dict under "state_dict", "model_state_dict" or "model" (training checkpoints) is unwrapped.

    Raises:
        UnsafePickleError: the pickle names a global outside torch's allow-list.
        ValueError: damaged file, or not a dict of tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a valid safetensors file ({error})") from error
    state = read_content(path)
    for wrapper in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    return check_tensors(state, path)


def check_tensors(state, path: Path) -> dict[str, Tensor]:
    """ValueError unless it is a dict of tensors by name."""
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{path}: holds a {type(state).__name__}, must be a dict of tensors")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{path}: entry {key!r} is a {type(value).__name__}, must be a tensor")
    return dict(state)


def read_content(path: Path):
    """What a torch.save file holds, read with weights_only=True; raises as `read_tensors` does."""
    if is_zip(path):
        open_zip(path).close()
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafePickleError(f"{path}: refused to unpickle: {_reason(error)}") from error
    except Exception as error:  # torch raises many types on damaged files
        raise ValueError(f"{path}: not a readable torch.save file ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """The part of torch's message that says what is wrong, without its advice to load the file unsafely."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if re.search(r"GLOBAL|Unsupported|not allowed", line)]
    advice = lines[0].startswith("Weights only load failed")
    return telling[0] if telling else "more than tensors and containers" if advice else lines[0]


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to write to; when the block ends well its files are renamed into `folder`, config files last."""
    folder.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield stage
        for file in sorted(stage.iterdir(), key=lambda file: (file.suffix == ".json", file.name)):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
