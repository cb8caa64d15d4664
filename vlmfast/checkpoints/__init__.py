"""Read public checkpoints of CLIP, the BERT-like models, discrete VAEs, DALL-E and GLIDE into vlmfast models and write
them back."""

from .bert import BertReport, bert_settings, from_bert, load_bert_text
from .files import UnsafePickleError
from .loading import detect_format, load
from .saving import save_pretrained

__all__ = ["BertReport", "UnsafePickleError", "bert_settings", "detect_format", "from_bert", "load", "load_bert_text",
           "save_pretrained"]
