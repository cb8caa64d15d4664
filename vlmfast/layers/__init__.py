"""The parts models are made of."""

from .resnet import AttentionPool2d, Bottleneck, ModifiedResNet
from .transformer import LayerNorm, QuickGELU, SelfAttention, Transformer, TransformerBlock

__all__ = [
    "AttentionPool2d",
    "Bottleneck",
    "LayerNorm",
    "ModifiedResNet",
    "QuickGELU",
    "SelfAttention",
    "Transformer",
    "TransformerBlock",
]
