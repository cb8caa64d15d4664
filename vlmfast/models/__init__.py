"""Registry of architectures: `create("clip-vit-b-32")`, `list_models()`."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from . import clip, lxmert, vilbert
from .clip import CLIP, CLIPConfig, CLIPOutput
from .lxmert import LXMERT, LXMERTConfig, LXMERTOutput
from .vilbert import ViLBERT, ViLBERTConfig, ViLBERTOutput

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPOutput",
    "LXMERT",
    "LXMERTConfig",
    "LXMERTOutput",
    "ViLBERT",
    "ViLBERTConfig",
    "ViLBERTOutput",
    "clip",
    "create",
    "list_models",
    "lxmert",
    "register",
    "vilbert",
]

_builders: dict[str, Callable[..., nn.Module]] = {}


def register(name: str, builder: Callable[..., nn.Module]) -> None:
    """Make `create(name, **overrides)` call `builder(**overrides)`.

    Raises:
        ValueError: the name is taken.
    """
    if name in _builders:
        raise ValueError(f"register: {name!r} is already a model name")
    _builders[name] = builder


def list_models() -> list[str]:
    """All names `create` knows, sorted."""
    return sorted(_builders)


def create(name: str, **overrides) -> nn.Module:
    """A freshly initialised model, in training mode.

    Args:
        name: one of `list_models()`, upper or lower case.
        overrides: config fields that differ from the preset, for example `image_size=336`; `device` places the
            parameters ("meta" allocates nothing).

    Raises:
        ValueError: unknown name (the message lists close ones) or unknown config field.
    """
    builder = _builders.get(str(name).lower())
    if builder is None:
        close = difflib.get_close_matches(str(name).lower(), _builders, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"must be one of {', '.join(list_models())}"
        raise ValueError(f"create: unknown model {name!r}; {hint}")
    return builder(**overrides)


for _module in (clip, vilbert, lxmert):
    for _name in _module.PRESETS:
        register(_name, partial(_module.build, _name))
