"""Pretraining objectives: `Pretraining` runs any of them on any model; beneath it the losses, masks and negatives."""

from vlmfast.objectives import bert_like, language, masking, matching, multitask, regions, tasks, unsupervised
from vlmfast.objectives.batch import PretrainingBatch
from vlmfast.objectives.bert_like import lxmert_pretraining_loss, vilbert_pretraining_loss
from vlmfast.objectives.common import PretrainingLoss
from vlmfast.objectives.contrastive import AlignLoss, ClipLoss, InfoNCE, SigLipLoss, UniCLLoss, fill_web_labels
from vlmfast.objectives.models import HEADS, OBJECTIVES, Heads
from vlmfast.objectives.multitask import MultiTask, StopAndGo, Task, TaskSampler
from vlmfast.objectives.presets import PRESETS, Conventions
from vlmfast.objectives.pretraining import Pretraining
from vlmfast.objectives.unsupervised import TagPieces, UnpairedPretraining

__all__ = ["HEADS", "OBJECTIVES", "PRESETS", "AlignLoss", "ClipLoss", "Conventions", "Heads", "InfoNCE", "MultiTask",
           "Pretraining", "PretrainingBatch", "PretrainingLoss", "SigLipLoss", "StopAndGo", "TagPieces", "Task",
           "TaskSampler", "UniCLLoss", "UnpairedPretraining", "bert_like", "fill_web_labels", "language",
           "lxmert_pretraining_loss", "masking", "matching", "multitask", "regions", "tasks", "unsupervised",
           "vilbert_pretraining_loss"]
