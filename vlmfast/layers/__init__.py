"""The parts models are made of."""

from .bert import BertLayer, MaskedLMHead, MLPClassifier, Pooler, TextEmbeddings
from .co_attention import CoAttentionLayer, CrossModalityLayer
from .quantizer import GumbelQuantizer, VectorQuantizer
from .resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from .streams import Rows, Streams
from .transformer import LayerNorm, QuickGELU, SelfAttention, Transformer, TransformerBlock

__all__ = [
    "AttentionPool2d",
    "BertLayer",
    "Bottleneck",
    "CoAttentionLayer",
    "CrossModalityLayer",
    "GumbelQuantizer",
    "LayerNorm",
    "MLPClassifier",
    "MaskedLMHead",
    "ModifiedResNet",
    "Pooler",
    "QuickGELU",
    "Rows",
    "SelfAttention",
    "Streams",
    "TextEmbeddings",
    "Transformer",
    "TransformerBlock",
    "VectorQuantizer",
]
