"""Pretraining losses: contrastive ones as modules, those of the BERT-like models and discrete VAEs as functions."""

from vlmfast.objectives import bert_like, variational
from vlmfast.objectives.bert_like import PretrainingLoss, lxmert_pretraining_loss, vilbert_pretraining_loss
from vlmfast.objectives.contrastive import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels
from vlmfast.objectives.variational import Annealing, VariationalLoss, dalle_loss, discrete_vae_loss, logit_laplace_loss

__all__ = ["AlignLoss", "Annealing", "ClipLoss", "InfoNCE", "PretrainingLoss", "SigLipLoss", "UniCLLoss",
           "VariationalLoss", "bert_like", "dalle_loss", "discrete_vae_loss", "fill_web_labels", "logit_laplace_loss",
           "lxmert_pretraining_loss", "variational", "vilbert_pretraining_loss"]
