"""Pretraining losses as modules."""

from vlmfast.objectives.contrastive import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels

__all__ = ["AlignLoss", "ClipLoss", "InfoNCE", "SigLipLoss", "UniCLLoss", "fill_web_labels"]
