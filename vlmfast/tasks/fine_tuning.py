"""The losses that models are fine-tuned with: `task_loss("vqa", model, batch)`.

Each task makes its batches: `VQA(model, answers).batch(questions, regions, targets)`. A head's loss and its divisor are
those of the model's public code, see `pair_models.TASK_HEADS` and `objectives.tasks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..objectives import tasks as losses
from ..objectives.models import inner
from .pair_inputs import PairTask
from .pair_models import TaskHead, task_head_for


@dataclass(frozen=True)
class TaskBatch:
    """Examples with their answers.

    Attributes:
        inputs: arguments of `model.forward`.
        target: vqa, gqa: [B, C] soft scores or [B] classes; nlvr2, entailment: [B] classes of the head; vcr, retrieval:
            [B] which of the K choices is right, whose B K rows follow one another in `inputs`; grounding: [B, R] IoU of
            the model's regions with the true box; affect: [B] classes, [B, C] labels or [B] intensities.
    """

    inputs: Mapping[str, Tensor]
    target: Tensor

    def __len__(self) -> int:
        return len(self.target)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TaskBatch":
        inputs = {name: value.to(device, non_blocking=non_blocking) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, target=self.target.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class Loss:
    """One way to train a head.

    Attributes:
        function: of (logits, batch, task_head, normalizer=, **options) -> [].
        normalizer: its divisor where a call does not say.
    """

    function: Callable[..., Tensor]
    normalizer: str


def _soft(logits: Tensor, batch: TaskBatch) -> Tensor:
    """Targets [B, C]; classes [B] become one-hot."""
    target = batch.target
    return target if target.ndim == 2 else F.one_hot(target.long(), logits.shape[-1]).to(logits.dtype)


def _choices(logits: Tensor, batch: TaskBatch) -> Tensor:
    """[B K, ...] -> [B, K, ...]"""
    count = len(batch.target)
    if not count or len(logits) % count:
        raise ValueError(f"task_loss: target has {count} entries, must divide the {len(logits)} rows of the model")
    return logits.unflatten(0, (count, len(logits) // count))


def _of_answers(function):
    return lambda logits, batch, task_head, **options: function(logits, _soft(logits, batch), **options)


def _of_target(function):
    return lambda logits, batch, task_head, **options: function(logits, batch.target, **options)


def _of_choices(function):
    return lambda logits, batch, task_head, **options: function(_choices(logits[:, 0], batch), batch.target.long(),
                                                                **options)


def _of_regions(function):
    # [B, R, 1] of ViLBERT, [B, 1, R] of VisualBERT
    return lambda logits, batch, task_head, **options: function(logits.reshape(batch.target.shape), batch.target,
                                                                **options)


def _classes(logits: Tensor, batch: TaskBatch, task_head: TaskHead, normalizer: str) -> Tensor:
    if batch.target.ndim == 2:  # soft scores of answers: the same with a distribution as target
        return losses.answer_kl(logits, batch.target)
    return losses.cross_entropy(logits, batch.target.long(), normalizer=normalizer)


def _two_class(logits: Tensor, batch: TaskBatch, task_head: TaskHead, **options) -> Tensor:
    return losses.choice_two_class(_choices(logits, batch), batch.target.long(), match_index=task_head.match, **options)


def _mean_regions(logits: Tensor, batch: TaskBatch, task_head: TaskHead, **options) -> Tensor:
    keep = torch.arange(logits.shape[1], device=logits.device) < batch.inputs["num_regions"][:, None]
    return losses.region_bce(logits, batch.target, keep, hard=True, **options)


LOSSES: dict[str, Loss] = {
    "answer_bce": Loss(_of_answers(losses.soft_target_bce), "batch_sum_classes"),
    "answer_kl": Loss(_of_answers(losses.answer_kl), "batch"),
    "classes": Loss(_classes, "labels"),
    "classes_bce": Loss(_of_target(losses.one_hot_bce), "elements"),
    "classes_bce_sum": Loss(_of_target(losses.one_hot_bce), "batch_sum_classes"),
    "choices": Loss(_of_choices(losses.choice_cross_entropy), "batch"),
    "choices_bce": Loss(_of_choices(losses.choice_bce), "choices"),
    "choices_margin": Loss(_of_choices(losses.choice_margin), "pairs"),
    "choices_two_class": Loss(_two_class, "choices"),
    "regions_bce": Loss(_of_regions(losses.region_bce), "batch_sum_classes"),
    "regions_mean_bce": Loss(_mean_regions, "regions"),
    "regions_cross_entropy": Loss(_of_regions(losses.region_cross_entropy), "sum"),
    "regions_kl": Loss(_of_regions(losses.region_kl), "batch"),
    "affect_labels": Loss(_of_target(losses.label_bce), "elements"),
    "affect_intensity": Loss(_of_target(losses.intensity_l1), "batch"),
}


def task_loss(task: str | PairTask, model: nn.Module, batch: TaskBatch, *, normalizer: str | None = None,
              **options) -> Tensor:
    """The loss of one batch.

    Args:
        task: a key of `TASK_HEADS`, or the task that made the batch.
        model: as it is trained, inside DistributedDataParallel or torch.compile too.
        batch: on the model's device.
        normalizer: another divisor than the public code's, where the loss has it.
        options: further arguments of the loss: `margin`, `positive_weight`, `least`.

    Returns:
        [] float32 or wider, to differentiate.

    Raises:
        ValueError: the model has no head for the task, or target and scores do not fit.
    """
    task_head = task_head_for(inner(model), task, "task_loss") if isinstance(task, str) else task.task_head
    loss = LOSSES[task_head.loss]
    logits = model(**batch.inputs, heads=(task_head.head,)).logits[task_head.head]
    return loss.function(logits, batch, task_head, normalizer=normalizer or loss.normalizer, **options)
