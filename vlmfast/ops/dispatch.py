"""Which implementation runs an op: the choice, and why a backend is missing."""

import contextlib
import ctypes
import importlib
import importlib.util
import os
import warnings
from functools import cache

import torch

from .. import _native

NAMES = ("auto", "reference", "native", "triton", "cuda")


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}, it must be one of {', '.join(NAMES)}")
    return name


# One choice for the process: autograd runs the backward of CUDA tensors on threads of its own. The variable is read
# once, since a look-up in os.environ costs as much as a small kernel.
_chosen = _checked(os.environ.get("VLMFAST_BACKEND") or "auto", "VLMFAST_BACKEND")


@contextlib.contextmanager
def backend(name: str):
    """Runs every vlmfast op inside the block on one backend, in all threads.

    Args:
        name:  "auto" (the default: native on the CPU, Triton on CUDA), "reference" (plain PyTorch, any device),
            "native" (C++, CPU tensors), "triton" (CUDA tensors; CPU tensors under TRITON_INTERPRET=1), or "cuda".
            Outside any block the variable VLMFAST_BACKEND, read at import, says the same.

    Raises:
        ValueError: unknown name. An op raises ValueError if the backend cannot run on its tensors.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = before


@cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot run on CUDA tensors, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None


def backends() -> dict[str, str]:
    """Each backend's name with "available" and what it is, or with the reason why it is missing."""
    info = _native.build_info()
    missing = triton_missing()
    if missing is None:
        triton = f"available: triton {importlib.import_module('triton').__version__}, {torch.cuda.get_device_name()}"
    else:
        triton = f"available on the CPU by Triton's interpreter: {missing}" if interpreting() else f"missing: {missing}"
    return {
        "reference": f"available: PyTorch {torch.__version__}",
        "native": f"available: {info['isa']} (built: {info['isas_built']}), threads from {info['threads_from']}",
        "triton": triton,
        "cuda": "missing: this build has no CUDA C++ kernels",
    }


_warned = set()


def choose(family: str, tensor: torch.Tensor) -> str:
    """The backend for an op of `family` on `tensor`: "reference", "native" or "triton"."""
    name = _chosen
    device = tensor.device.type
    if name == "auto":
        if device == "cpu":
            return "native"
        if device == "cuda" and triton_missing() is None:
            return "triton"
        if device not in _warned:
            _warned.add(device)
            why = triton_missing() if device == "cuda" else "it has no vlmfast kernels"
            warnings.warn(f"{family}: the reference runs on {device}: {why}", stacklevel=3)
        return "reference"
    if name == "reference":
        return name
    if name == "native" and device == "cpu":
        return name
    if name == "triton" and (device == "cuda" and triton_missing() is None or device == "cpu" and interpreting()):
        return name
    reason = {"native": "it runs on CPU tensors",
              "triton": triton_missing() if device == "cuda" else "CPU tensors need TRITON_INTERPRET=1",
              "cuda": "this build has no CUDA C++ kernels"}[name]
    raise ValueError(f"{family}: backend {name!r} cannot run on a {device} tensor: {reason}")


@cache
def module(family: str, name: str):
    """The Python module with the primitives of `family` on backend "reference" or "triton"."""
    package = "vlmfast.kernels" if name == "triton" else "vlmfast.ops.reference"
    return importlib.import_module(f"{package}.{family}")


def share_threads() -> bool:
    """Lets the native core run on the OpenMP runtime that PyTorch has loaded, so that there is one thread pool."""
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    for library in _loaded_openmp():
        with contextlib.suppress(OSError, AttributeError):
            runtime = ctypes.CDLL(library, mode=getattr(os, "RTLD_NOLOAD", 0) | ctypes.DEFAULT_MODE)
            _native.use_openmp(*(ctypes.cast(getattr(runtime, name), ctypes.c_void_p).value for name in names))
            return True
    return False


def _loaded_openmp() -> list[str]:
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split()[-1] for line in maps if "gomp" in line or "iomp" in line}
    except OSError:
        return []
    return sorted(paths, key=lambda path: "torch" not in path)


share_threads()
