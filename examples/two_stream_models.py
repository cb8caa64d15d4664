"""Small ViLBERT and LXMERT, their losses on composed scenes, and the training loop; used by train_two_stream.py."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from two_stream_data import Pictures, Scenes, Targets, Texts, make_batch

from vlmfast.models import create
from vlmfast.objectives.bert_like import (
    IGNORE,
    PretrainingLoss,
    cross_entropy,
    lxmert_pretraining_loss,
    vilbert_pretraining_loss,
)
from vlmfast.training import Trainer

WIDTH, HEADS, INNER, POSITIONS = 128, 4, 256, 32
DROPOUT = 0.0
INIT = 0.08  # about 1 / sqrt(WIDTH); the papers' 0.02 is for widths of 768


def make_vilbert(scenes: Scenes, vocab_size: int) -> nn.Module:
    """Two text and two region blocks, joined by two co-attention layers."""
    return create(
        "vilbert-base", vocab_size=vocab_size, max_position_embeddings=POSITIONS, heads=("pretraining", "vqa"),
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, intermediate_size=INNER,
        v_feature_size=scenes.feature_dim, v_target_size=len(scenes.kinds), v_hidden_size=WIDTH, v_num_hidden_layers=2,
        v_num_attention_heads=HEADS, v_intermediate_size=INNER, bi_hidden_size=WIDTH, bi_num_attention_heads=HEADS,
        t_biattention_id=(0, 1), v_biattention_id=(0, 1), vqa_labels=len(scenes.answers), initializer_range=INIT,
        hidden_dropout_prob=DROPOUT, attention_probs_dropout_prob=DROPOUT, v_hidden_dropout_prob=DROPOUT,
        v_attention_probs_dropout_prob=DROPOUT,
    )


def make_lxmert(scenes: Scenes, vocab_size: int) -> nn.Module:
    """One language layer, one object layer, two cross-modality layers."""
    return create(
        "lxmert-base", vocab_size=vocab_size, max_position_embeddings=POSITIONS, hidden_size=WIDTH,
        num_attention_heads=HEADS, intermediate_size=INNER, l_layers=1, r_layers=1, x_layers=2,
        visual_feat_dim=scenes.feature_dim, num_qa_labels=len(scenes.answers), num_object_labels=len(scenes.kinds),
        num_attr_labels=len(scenes.colors), initializer_range=INIT, hidden_dropout_prob=DROPOUT,
        attention_probs_dropout_prob=DROPOUT,
    )


def vilbert_pretraining(logits: dict[str, Tensor], targets: Targets) -> PretrainingLoss:
    """Masked words, kinds of masked regions in the place of a detector's class distribution, alignment."""
    kinds = F.one_hot(targets.kinds[:, 1:].clamp(min=0), logits["image"].shape[-1])
    return vilbert_pretraining_loss(logits, targets.words, targets.masked[:, 1:].long(), kinds, 1 - targets.truths)


def lxmert_pretraining(logits: dict[str, Tensor], targets: Targets) -> PretrainingLoss:
    """Masked words, matching, kinds and colours of all regions and features of masked ones."""
    sure = torch.ones(targets.kinds.shape)
    return lxmert_pretraining_loss(
        logits, targets.words, targets.truths, obj=(targets.kinds, sure), attr=(targets.colors, sure),
        feat=(targets.features, targets.masked.float()), factor=1.0,
    )


@dataclass(frozen=True)
class Recipe:
    """How one model is built, fed, trained and scored.

    boxes: box inputs of `vlmfast.data.collate_regions`. pretraining: the loss of the paper. heads: the scores it takes.
    truth_head, true_class: what judges whether text and scene match. steps: in all. lr: of pretraining, fine-tuning.
    """

    make: Callable[[Scenes, int], nn.Module]
    boxes: str
    pretraining: Callable[[dict[str, Tensor], Targets], PretrainingLoss]
    heads: tuple[str, ...]
    truth_head: str
    true_class: int
    steps: int
    lr: tuple[float, float]

    @property
    def task_heads(self) -> tuple[str, ...]:
        return "vqa", self.truth_head

    def task_loss(self, logits: dict[str, Tensor], targets: Targets) -> PretrainingLoss:
        """Cross entropy of answers (each question has one; the papers take soft scores) and of truth."""
        right = targets.truths if self.true_class else torch.where(targets.truths == IGNORE, IGNORE, 1 - targets.truths)
        parts = {"vqa": cross_entropy(logits["vqa"], targets.answers),
                 "truth": cross_entropy(logits[self.truth_head], right)}
        return PretrainingLoss(sum(parts.values()), parts)


RECIPES = {
    "vilbert": Recipe(make_vilbert, "vilbert", vilbert_pretraining, ("mlm", "image", "nsp"), "nsp", 0,
                      steps=3200, lr=(2e-3, 1e-3)),
    "lxmert": Recipe(make_lxmert, "lxmert", lxmert_pretraining, ("mlm", "matched", "obj", "attr", "feat"), "matched", 1,
                     steps=2800, lr=(2e-3, 1e-3)),
}


class TwoStreamTrainer(Trainer):
    """The package's loop (schedule, checkpoints, resume, Ctrl-C) with the loss of a two-stream model.

    Args:
        loader: a `BatchLoader`.
        loss: of (logits, targets). heads: the scores it takes.
        options: see `vlmfast.training.Trainer`.
    """

    def __init__(self, model: nn.Module, loader, config, loss: Callable, heads: tuple[str, ...], **options):
        super().__init__(model, loader, config, **options)
        self.loss, self.heads = loss, heads

    def add_gradient(self, batch: tuple[dict[str, Tensor], Targets], factor: Tensor) -> tuple[Tensor, dict]:
        inputs, targets = batch
        loss = self.loss(self.model(**inputs, heads=self.heads).logits, targets)
        (loss.total * factor).backward()
        return loss.total.detach(), {name: part.item() for name, part in loss.parts.items()}

    def after_step(self) -> dict:
        return {}

    def examples(self, batch: tuple[dict[str, Tensor], Targets]) -> int:
        return len(batch[1].answers)


@torch.no_grad()
def correct(model: nn.Module, recipe: Recipe, texts: Texts, pictures: Pictures, batch_size: int = 256) -> Tensor:
    """[N] bool: the best answer is the right one, the judgement of the statement is right."""
    model.eval()
    hits = []
    for index in torch.arange(len(texts)).split(batch_size):
        inputs, targets = make_batch(texts, pictures, index)
        logits = model(**inputs, heads=("vqa", recipe.truth_head)).logits
        asked = targets.truths == IGNORE
        true = (logits[recipe.truth_head].argmax(1) == recipe.true_class).long()
        hits.append(torch.where(asked, logits["vqa"].argmax(1) == targets.answers, true == targets.truths))
    return torch.cat(hits)
