"""Registry of architectures: `create("clip-vit-b-32")`, `list_models()`."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from . import clip, dalle, dalle_mini, dvae, lxmert, vilbert, vqgan
from .clip import CLIP, CLIPConfig, CLIPOutput
from .codes import VAEOutput
from .dalle import DALLE, DALLEConfig, DALLEOutput
from .dalle_mini import DALLEMini, DALLEMiniConfig, DALLEMiniOutput
from .dvae import DVAE, DiscreteVAE, DiscreteVAEConfig, DVAEConfig
from .lxmert import LXMERT, LXMERTConfig, LXMERTOutput
from .vilbert import ViLBERT, ViLBERTConfig, ViLBERTOutput
from .vqgan import VQGAN, VQGANConfig

__all__ = [
    "CLIP",
    "CLIPConfig",
    "CLIPOutput",
    "DALLE",
    "DALLEConfig",
    "DALLEMini",
    "DALLEMiniConfig",
    "DALLEMiniOutput",
    "DALLEOutput",
    "DVAE",
    "DVAEConfig",
    "DiscreteVAE",
    "DiscreteVAEConfig",
    "LXMERT",
    "LXMERTConfig",
    "LXMERTOutput",
    "VAEOutput",
    "VQGAN",
    "VQGANConfig",
    "ViLBERT",
    "ViLBERTConfig",
    "ViLBERTOutput",
    "clip",
    "create",
    "dalle",
    "dalle_mini",
    "dvae",
    "list_models",
    "lxmert",
    "register",
    "vilbert",
    "vqgan",
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


for _module in (clip, vilbert, lxmert, dvae, vqgan, dalle, dalle_mini):
    for _name in _module.PRESETS:
        register(_name, partial(_module.build, _name))
