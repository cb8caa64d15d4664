"""Registry of architectures: `create("clip-vit-b-32")`, `list_models()`."""

import difflib
from collections.abc import Callable
from functools import partial

from torch import nn

from . import (
    clip,
    dalle,
    dalle_mini,
    dvae,
    glide,
    image_seq2seq,
    imagebert,
    lxmert,
    noised_clip,
    pixelbert,
    uniter,
    vdbert,
    vilbert,
    visualbert,
    vlbert,
    vlnbert,
    vqgan,
)
from .affect import AffectConfig, AffectModel
from .clip import CLIP, CLIPConfig, CLIPOutput
from .codes import VAEOutput
from .dalle import DALLE, DALLEConfig, DALLEOutput
from .dalle_mini import DALLEMini, DALLEMiniConfig, DALLEMiniOutput
from .dvae import DVAE, DiscreteVAE, DiscreteVAEConfig, DVAEConfig
from .glide import GLIDE, GLIDEConfig, TextStates
from .image_seq2seq import ImageSeq2Seq, ImageSeq2SeqConfig, ImageSeq2SeqOutput
from .imagebert import ImageBERT, ImageBERTConfig
from .lxmert import LXMERT, LXMERTConfig, LXMERTOutput
from .noised_clip import NoisedCLIP, NoisedCLIPConfig
from .pixelbert import PixelBERT, PixelBERTConfig
from .single_stream import SingleStreamOutput
from .uniter import UNITER, UNITERConfig
from .vdbert import VDBERT, VDBERTConfig
from .vilbert import ViLBERT, ViLBERTConfig, ViLBERTOutput
from .visualbert import VisualBERT, VisualBERTConfig
from .vlbert import VLBERT, VLBERTConfig
from .vlnbert import VLNBERT, VLNBERTConfig
from .vqgan import VQGAN, VQGANConfig

__all__ = [
    "AffectConfig",
    "AffectModel",
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
    "GLIDE",
    "GLIDEConfig",
    "ImageBERT",
    "ImageBERTConfig",
    "ImageSeq2Seq",
    "ImageSeq2SeqConfig",
    "ImageSeq2SeqOutput",
    "LXMERT",
    "LXMERTConfig",
    "LXMERTOutput",
    "NoisedCLIP",
    "NoisedCLIPConfig",
    "PixelBERT",
    "PixelBERTConfig",
    "SingleStreamOutput",
    "TextStates",
    "UNITER",
    "UNITERConfig",
    "VAEOutput",
    "VDBERT",
    "VDBERTConfig",
    "VLBERT",
    "VLBERTConfig",
    "VLNBERT",
    "VLNBERTConfig",
    "VQGAN",
    "VQGANConfig",
    "ViLBERT",
    "ViLBERTConfig",
    "ViLBERTOutput",
    "VisualBERT",
    "VisualBERTConfig",
    "clip",
    "create",
    "dalle",
    "dalle_mini",
    "dvae",
    "glide",
    "image_seq2seq",
    "imagebert",
    "list_models",
    "lxmert",
    "noised_clip",
    "pixelbert",
    "register",
    "uniter",
    "vdbert",
    "vilbert",
    "visualbert",
    "vlbert",
    "vlnbert",
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


for _module in (clip, vilbert, lxmert, visualbert, uniter, vlbert, vdbert, pixelbert, imagebert, image_seq2seq, vlnbert,
                dvae, vqgan, dalle, dalle_mini, glide, noised_clip):
    for _name in _module.PRESETS:
        register(_name, partial(_module.build, _name))
