"""Read public CLIP, ViLBERT, LXMERT and discrete VAE checkpoints into vlmfast models and write them back."""

from .files import UnsafePickleError
from .loading import detect_format, load
from .saving import save_pretrained

__all__ = ["UnsafePickleError", "detect_format", "load", "save_pretrained"]
