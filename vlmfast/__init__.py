"""Fused kernels and a thin model layer for the vision-language canon.

    import vlmfast
    from vlmfast.ops import info_nce
    model = vlmfast.create("clip-vit-b-32")
    model = vlmfast.load("path/to/checkpoint")
"""

import importlib

from .version import __version__

try:
    from . import _native  # noqa: F401
except ImportError as error:
    from pathlib import Path

    if (Path(__file__).resolve().parents[1] / "csrc").is_dir():
        raise ImportError("vlmfast is imported from its source tree, which is not built: run `pip install -e .` there, "
                          f"or start Python elsewhere to use an installed one ({error})") from error
    raise

_SUBMODULES = ("ops", "diffusion", "layers", "models", "objectives", "tasks", "checkpoints", "data", "training", "viz")
_FUNCTIONS = {"create": "models", "list_models": "models", "load": "tasks.diffusion_generation",
              "save_pretrained": "checkpoints", "backend": "ops", "backends": "ops"}

__all__ = ["__version__", *_SUBMODULES, *_FUNCTIONS]


def __getattr__(name):
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(f"{__name__}.{_FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'vlmfast' has no attribute '{name}'")
