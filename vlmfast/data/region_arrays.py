"""Arrays and dicts from untrusted .npy, .npz and pickle bytes. Nothing in a file is ever executed.

Feature files of the ViLBERT, MMF and bottom-up-attention repositories store dicts of arrays as pickles. They are read
by an unpickler that knows a handful of names (numpy arrays, scalars and dtypes, OrderedDict) and stands inert records
in for them; the arrays are built afterwards, from checked sizes. A pickle that names anything else is refused.
"""

import io
import itertools
import math
import pickle
import pickletools
import zipfile
from pathlib import Path

import numpy as np

MAX_BYTES = 1 << 30  # of one image's record; the largest public ones take about 2 MiB
MAX_DEPTH = 16
MAX_NODES = 1_000_000

_MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray", "numpy.core.numeric", "numpy._core.numeric")
_KINDS = "biufSU"  # booleans, integers, floats and texts; objects only as lists


class UnsafePickleError(ValueError):
    """A pickle asks for something other than numpy arrays and plain containers; it was not executed."""


def read_pickle(data: bytes, max_nodes: int = MAX_NODES):
    """The dicts, lists, numbers, texts and numpy arrays of a pickle, `max_nodes` of them at most.

    Raises:
        UnsafePickleError: the pickle names a global outside the allow-list.
        ValueError: damaged, too large, or an array that does not fit its bytes.
    """
    data = bytes(data)
    if len(data) > MAX_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes, must have at most {MAX_BYTES}")
    try:
        # a declared length beyond the stream raises here; a memo index beyond it would only eat memory
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
                raise ValueError(f"memo index {argument} in a stream of {len(data)} bytes")
        unpickler, resolve = _unpickler(data, max_nodes)
        return resolve(unpickler.load(), 0)
    except UnsafePickleError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"damaged pickle ({type(error).__name__}: {error})") from error


def read_npy(data: bytes):
    """The array of an .npy file; an object array of no dimensions becomes what it holds, mostly a dict.

    Raises:
        UnsafePickleError, ValueError: as :func:`read_pickle`; also a header that promises another size than there is.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}, must be 1.0 or 2.0")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except Exception as error:
        raise ValueError(f"not an .npy array ({error})") from error
    body = memoryview(data)[stream.tell() :]
    if dtype.kind == "O":
        value = read_pickle(bytes(body))
        return value[0] if shape == () and isinstance(value, list) and len(value) == 1 else value
    return _array(body, dtype, shape, fortran)


def read_npz(path: Path) -> dict:
    """Name -> array (or dict, see :func:`read_npy`) of an .npz archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
            if total > MAX_BYTES:
                raise ValueError(f"{total} bytes unpacked, must be at most {MAX_BYTES}")
            return {
                name.removesuffix(".npy"): read_npy(archive.read(name))
                for name in archive.namelist()
                if name.endswith(".npy")
            }
    except ValueError:
        raise
    except Exception as error:  # a damaged archive can raise nearly anything
        raise ValueError(f"truncated or damaged .npz archive ({error})") from error


def _array(data, dtype: np.dtype, shape: tuple, fortran: bool) -> np.ndarray:
    if dtype.kind not in _KINDS or dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype}, must hold numbers or texts")
    shape = tuple(shape)
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape}")
    count = math.prod(shape)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"an array {list(shape)} of {dtype} has {len(data)} bytes, must have {count * dtype.itemsize}")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def _unpickler(data: bytes, max_nodes: int):
    # made anew per file, so that no file can alter another's stand-ins
    class Dtype:
        def __init__(self, code, align=False, copy=False):
            self.code, self.order = code, "="

        def __setstate__(self, state):
            if isinstance(state, tuple) and len(state) > 4 and (state[2] is not None or state[3] is not None):
                raise ValueError("an array of records, must hold numbers or texts")
            self.order = state[1]

        def dtype(self) -> np.dtype:
            code = self.code.decode("ascii") if isinstance(self.code, bytes) else self.code
            if not isinstance(code, str) or code[:1] not in _KINDS or not code[1:].isdigit():
                raise ValueError(f"an array of {str(code)[:20]!r}, must hold numbers or texts")
            return np.dtype(("<" if self.order in ("=", "|", "<") else ">") + code)

    class Array:
        def __init__(self, *_):
            self.state = None

        def __setstate__(self, state):
            self.state = state

    class NDArray:
        pass

    def reconstruct(subtype, shape, typecode):
        return Array()

    def from_buffer(buffer, dtype, shape, order):
        if not isinstance(buffer, (bytes, bytearray)) or order not in ("C", "F"):
            raise ValueError("an array without bytes or with an unknown order")
        array = Array()
        array.state = (1, shape, dtype, order == "F", buffer)
        return array

    def scalar(dtype, value=None):
        if not isinstance(value, bytes) or not isinstance(dtype, Dtype):
            raise ValueError("a numpy scalar without bytes")
        return _array(value, dtype.dtype(), (), False)[()].item()

    def encode(text, encoding="latin1"):
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in encoding {encoding!r}")
        return text.encode("latin1")

    def no_bytes() -> bytes:  # how protocol 2 spells b""
        return b""

    known = {"_reconstruct": reconstruct, "_frombuffer": from_buffer, "scalar": scalar, "ndarray": NDArray}

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if module in _MODULES and name in known:
                return known[name]
            if (module, name) == ("numpy", "dtype"):
                return Dtype
            if (module, name) == ("_codecs", "encode"):
                return encode
            if (module, name) == ("collections", "OrderedDict"):
                return dict
            if (module, name) == ("__builtin__", "bytes"):
                return no_bytes
            raise UnsafePickleError(
                f"the pickle refers to {module}.{name}, which is not on the allow-list; only dicts, lists, numbers, "
                f"texts and numpy arrays are read"
            )

        def persistent_load(self, pid):
            raise UnsafePickleError("the pickle refers to an outside object")

    nodes = itertools.count()

    def resolve(value, depth: int):
        if depth > MAX_DEPTH or next(nodes) > max_nodes:  # references to one list can multiply without end
            raise ValueError(f"nested deeper than {MAX_DEPTH} or more than {max_nodes} values")
        if isinstance(value, dict):
            return {resolve(key, depth + 1): resolve(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [resolve(item, depth + 1) for item in value]
        if isinstance(value, Array):
            if not isinstance(value.state, tuple) or len(value.state) != 5:
                raise ValueError("an array without contents")
            _, shape, dtype, fortran, content = value.state
            if isinstance(content, list):
                items = [resolve(item, depth + 1) for item in content]
                return items[0] if shape == () and len(items) == 1 else items
            if isinstance(content, str):  # Python 2 wrote bytes as texts
                content = content.encode("latin1")
            if not isinstance(dtype, Dtype) or not isinstance(content, (bytes, bytearray)):
                raise ValueError("an array without a dtype or bytes")
            return _array(bytes(content), dtype.dtype(), shape, bool(fortran))
        if value is None or isinstance(value, (bool, int, float, str, bytes, bytearray)):
            return value
        raise ValueError(f"holds a {type(value).__name__}")

    return Restricted(io.BytesIO(data), encoding="latin1"), resolve
