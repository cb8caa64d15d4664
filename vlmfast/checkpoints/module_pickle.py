"""Tensors of pickled `torch.nn` modules and of training checkpoints with foreign objects in them, without running them.

OpenAI published whole modules, which recent PyTorch refuses to load; Lightning's checkpoints hold its callbacks. The
unpickler puts inert stand-ins in place of the classes on a short list and refuses everything else. Both of torch's
containers are read: the zip archive, and the stream of pickles and blobs that torch before 1.6 wrote.
"""

import io
import pickletools
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from .files import is_zip, open_zip
from .torchscript import (
    MAX_PICKLE_BYTES,
    Storage,
    View,
    clear_errors,
    fill_tensors,
    module_tensors,
    open_archive,
    unpickle,
)

LEGACY_MAGIC, LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
# everything in these packages is replaced, nothing of them imported
_MODULE_PACKAGES = "dall_e", "torch.nn.modules", "torch.nn.parameter"
_TRAINING_PACKAGES = (*_MODULE_PACKAGES, "torch.optim", "pytorch_lightning", "lightning", "lightning_fabric",
                      "omegaconf", "taming", "main", "numpy", "argparse", "pathlib", "typing", "_codecs")


def read_module(path: Path) -> dict[str, Tensor]:
    """State dict of a module that was pickled whole.

    Raises:
        UnsafePickleError: the pickle names a global outside the allow-list; nothing was executed.
        ValueError: truncated, damaged, or not a module.
    """
    with clear_errors(path, "a pickled module"), _opened(path, _MODULE_PACKAGES) as (root, module_type, blob_of):
        return module_tensors(root, module_type, blob_of)


def read_training_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors under "state_dict" of a Lightning checkpoint; raises as `read_module` does."""
    with clear_errors(path, "a training checkpoint"), _opened(path, _TRAINING_PACKAGES) as (root, _, blob_of):
        views = root.get("state_dict", root) if isinstance(root, dict) else None
        if not isinstance(views, dict) or not views:
            raise ValueError("holds no state_dict")
        for key, value in views.items():
            if not isinstance(key, str) or not isinstance(value, View):
                raise ValueError(f"entry {key!r} of state_dict is a {type(value).__name__}, must be a tensor")
        return fill_tensors(views, blob_of)


@contextmanager
def _opened(path: Path, packages: tuple[str, ...]) -> Iterator[tuple]:
    """(what the pickle holds, the class that stands in for its classes, a function that reads a storage's blob)."""

    def is_shell(module: str, name: str) -> bool:
        return any(module == package or module.startswith(f"{package}.") for package in packages)

    if is_zip(path):
        with open_zip(path) as archive:
            tree, blob_of = open_archive(archive)
            yield *unpickle(tree, is_shell, _known()), blob_of
        return
    data = path.read_bytes()
    storages: dict[str, Storage] = {}
    parts, at = [], 0
    for _ in range(5):  # magic number, version, sizes of the writer's integers, the object, the storages' keys
        stream = io.BytesIO(data[at : at + MAX_PICKLE_BYTES])
        for _ in pickletools.genops(stream):
            pass
        parts.append(unpickle(stream.getvalue()[: stream.tell()], is_shell, _known(), storages))
        at += stream.tell()
        if parts[0][0] != LEGACY_MAGIC:
            raise ValueError("neither a zip archive nor one of the older files of torch.save")
    _, (version, _), _, (root, module_type), (keys, _) = parts
    if version != LEGACY_VERSION or not isinstance(keys, list):
        raise ValueError(f"version {version!r}, must be {LEGACY_VERSION}")
    places: dict[str, slice] = {}
    for key in keys:
        if key not in storages or at + 8 > len(data):
            raise ValueError(f"storage {key!r} is unknown or cut off")
        (count,) = struct.unpack_from("<q", data, at)
        if count != storages[key].count:
            raise ValueError(f"storage {key!r} has {count} elements, must have {storages[key].count}")
        places[key] = slice(at + 8, at + 8 + count * storages[key].dtype.itemsize)
        at = places[key].stop

    def blob_of(storage: Storage) -> bytes:
        if storage.key not in places:
            raise ValueError(f"storage {storage.key!r} is missing")
        return data[places[storage.key]]

    yield root, module_type, blob_of


def _known() -> dict:
    """Made anew per file, so that no file can alter another's."""

    def parameter(data, requires_grad=True, hooks=None, state=None):
        return data

    def nothing(*args, **keywords):
        return None

    class Dict(dict):
        """Takes the attribute that state dicts carry."""

    def empty_dict(*args):
        return {}

    known = {
        ("collections", "OrderedDict"): Dict,
        ("collections", "defaultdict"): empty_dict,
        ("torch", "Size"): tuple,
        ("torch", "device"): nothing,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): parameter,
    }
    known["__builtin__", "long"] = int
    for kind in (set, dict, list, tuple, int, float, str, bool):
        known["builtins", kind.__name__] = known["__builtin__", kind.__name__] = kind
    return known
