"""Pretraining objectives: `Pretraining` runs any of the BERT-like models' on any model, `variational` holds those of
discrete VAEs, `diffusion` that of text-conditional diffusion; beneath them the losses, masks and negatives."""

from vlmfast.objectives import (
    bert_like,
    diffusion,
    language,
    masking,
    matching,
    multitask,
    regions,
    tasks,
    unsupervised,
    variational,
)
from vlmfast.objectives.batch import PretrainingBatch
from vlmfast.objectives.bert_like import lxmert_pretraining_loss, vilbert_pretraining_loss
from vlmfast.objectives.common import PretrainingLoss
from vlmfast.objectives.contrastive import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels
from vlmfast.objectives.diffusion import text_diffusion_loss
from vlmfast.objectives.models import HEADS, OBJECTIVES, Heads
from vlmfast.objectives.multitask import MultiTask, StopAndGo, Task, TaskSampler
from vlmfast.objectives.presets import PRESETS, Conventions
from vlmfast.objectives.pretraining import Pretraining
from vlmfast.objectives.unsupervised import TagPieces, UnpairedPretraining
from vlmfast.objectives.variational import Annealing, VariationalLoss, dalle_loss, discrete_vae_loss, logit_laplace_loss

__all__ = ["HEADS", "OBJECTIVES", "PRESETS", "AlignLoss", "Annealing", "ClipLoss", "Conventions", "Heads", "InfoNCE",
           "MultiTask", "Pretraining", "PretrainingBatch", "PretrainingLoss", "SigLipLoss", "StopAndGo", "TagPieces",
           "Task", "TaskSampler", "UniCLLoss", "UnpairedPretraining", "VariationalLoss", "bert_like", "dalle_loss",
           "diffusion", "discrete_vae_loss", "fill_web_labels", "language", "logit_laplace_loss",
           "lxmert_pretraining_loss", "masking", "matching", "multitask", "regions", "tasks", "text_diffusion_loss",
           "unsupervised", "variational", "vilbert_pretraining_loss"]
