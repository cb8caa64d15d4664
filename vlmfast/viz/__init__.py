"""Pictures of what a model does."""

from .attention import attention, attention_maps

__all__ = ["attention", "attention_maps"]
