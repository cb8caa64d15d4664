"""Pretraining losses: contrastive ones as modules, those of the BERT-like models as functions."""

from vlmfast.objectives import bert_like
from vlmfast.objectives.bert_like import PretrainingLoss, lxmert_pretraining_loss, vilbert_pretraining_loss
from vlmfast.objectives.contrastive import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels

__all__ = ["AlignLoss", "ClipLoss", "InfoNCE", "PretrainingLoss", "SigLipLoss", "UniCLLoss", "bert_like",
           "fill_web_labels", "lxmert_pretraining_loss", "vilbert_pretraining_loss"]
