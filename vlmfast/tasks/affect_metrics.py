"""Metrics of affect: classes of emotion or sentiment, several at once, and intensities."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class ClassificationScores:
    """Scores of one class per example.

    Attributes:
        accuracy: share of right answers; standard_error: of it.
        macro_f1: mean over the classes that occur among targets or predictions.
        weighted_f1: mean weighted by the number of targets.
        f1: [C] float64, 0 for a class that never comes right; support: [C] int64, targets of each class.
    """

    accuracy: float
    standard_error: float
    macro_f1: float
    weighted_f1: float
    f1: Tensor = field(repr=False)
    support: Tensor = field(repr=False)


def classification_scores(predicted: Tensor, target: Tensor, classes: int | None = None) -> ClassificationScores:
    """Accuracy and F1 over classes.

    Args:
        predicted, target: [N] integers, 0 ... C - 1, N >= 1.
        classes: C; None takes one more than the greatest.

    Raises:
        ValueError: shapes do not fit, or a value is out of range.
    """
    predicted, target = _pair("classification_scores", predicted, target, floating=False)
    highest = int(torch.stack([predicted.max(), target.max()]).max())
    count = highest + 1 if classes is None else classes
    if highest >= count or int(torch.stack([predicted.min(), target.min()]).min()) < 0:
        raise ValueError(f"classification_scores: values must be 0 ... {count - 1}, the greatest is {highest}")
    right = torch.bincount(target[predicted == target], minlength=count).double()
    support, given = torch.bincount(target, minlength=count), torch.bincount(predicted, minlength=count)
    f1 = _f1(right, given, support)
    accuracy = right.sum().item() / len(target)
    return ClassificationScores(
        accuracy,
        math.sqrt(accuracy * (1 - accuracy) / len(target)),
        f1[support + given > 0].mean().item(),
        (f1 * support).sum().item() / len(target),
        f1,
        support,
    )


@dataclass(frozen=True)
class MultiLabelScores:
    """Scores of several labels per example.

    Attributes:
        f1: [C] float64 of each label; macro_f1: their mean; weighted_f1: weighted by the number of targets.
        micro_f1: over all decisions; subset_accuracy: share of examples with every label right.
    """

    macro_f1: float
    weighted_f1: float
    micro_f1: float
    subset_accuracy: float
    f1: Tensor = field(repr=False)


def multi_label_scores(predicted: Tensor, target: Tensor) -> MultiLabelScores:
    """F1 of labels that occur together, for example six emotions.

    Args:
        predicted, target: [N, C] booleans, N >= 1, for instance `logits.sigmoid() > 0.5`.

    Raises:
        ValueError: shapes do not fit. TypeError: not booleans.
    """
    if predicted.shape != target.shape or predicted.ndim != 2 or not predicted.numel():
        raise ValueError(f"multi_label_scores: predicted is {list(predicted.shape)}, target is {list(target.shape)}; "
                         "must be equal [N, C]")
    if predicted.dtype != torch.bool or target.dtype != torch.bool:
        raise TypeError(f"multi_label_scores: predicted is {predicted.dtype}, target is {target.dtype}; must be bool")
    right, given, support = (part.sum(0) for part in (predicted & target, predicted, target))
    f1 = _f1(right, given, support)
    total = max(support.sum().item(), 1)
    return MultiLabelScores(
        f1.mean().item(),
        (f1 * support).sum().item() / total,
        _f1(right.sum(), given.sum(), support.sum()).item(),
        (predicted == target).all(1).double().mean().item(),
        f1,
    )


@dataclass(frozen=True)
class IntensityScores:
    """Scores of a signed intensity, in [-3, 3] for MOSI and MOSEI.

    Attributes:
        mae: mean absolute error; mae_standard_error: of it.
        pearson: correlation, nan where either side is constant.
        accuracy_7: both rounded and clipped to -3 ... 3.
        accuracy_2, f1_2: negative against not negative, all examples (F1 weighted by class).
        accuracy_2_nonzero, f1_2_nonzero: negative against positive, targets of 0 left out; nan where none is left.
    """

    mae: float
    mae_standard_error: float
    pearson: float
    accuracy_7: float
    accuracy_2: float
    f1_2: float
    accuracy_2_nonzero: float
    f1_2_nonzero: float


def intensity_scores(predicted: Tensor, target: Tensor) -> IntensityScores:
    """Regression and the customary classifications made of it.

    Args:
        predicted, target: [N] floating point, finite, N >= 1.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.
    """
    predicted, target = _pair("intensity_scores", predicted, target, floating=True)
    error = (predicted - target).abs()
    seven = (predicted.clamp(-3, 3).round() == target.clamp(-3, 3).round()).double().mean().item()
    every = classification_scores((predicted >= 0).long(), (target >= 0).long(), 2)
    signed = target != 0
    accuracy, f1 = math.nan, math.nan
    if signed.any():
        strict = classification_scores((predicted[signed] > 0).long(), (target[signed] > 0).long(), 2)
        accuracy, f1 = strict.accuracy, strict.weighted_f1
    spread = error.std().item() / math.sqrt(len(error)) if len(error) > 1 else math.nan
    return IntensityScores(error.mean().item(), spread, pearson(predicted, target), seven, every.accuracy,
                           every.weighted_f1, accuracy, f1)  # fmt: skip


def pearson(a: Tensor, b: Tensor) -> float:
    """Correlation of [N] and [N]; nan where either is constant."""
    a, b = (part.double() - part.double().mean() for part in (a, b))
    scale = a.norm() * b.norm()
    return (a @ b / scale).item() if scale > 0 else math.nan


def _f1(right: Tensor, given: Tensor, support: Tensor) -> Tensor:
    return 2 * right.double() / (given + support).clamp(min=1)


def _pair(name: str, predicted: Tensor, target: Tensor, *, floating: bool) -> tuple[Tensor, Tensor]:
    if predicted.ndim != 1 or predicted.shape != target.shape or not len(predicted):
        raise ValueError(f"{name}: predicted is {list(predicted.shape)}, target is {list(target.shape)}; "
                         "must be equal [N] with N >= 1")
    for part_name, part in (("predicted", predicted), ("target", target)):
        if not floating and (part.is_floating_point() or part.dtype == torch.bool):
            raise TypeError(f"{name}: {part_name} is {part.dtype}, must be integers")
        if floating and not part.isfinite().all():
            raise ValueError(f"{name}: {part_name} holds NaN or infinity")
    kind = torch.float64 if floating else torch.int64
    return predicted.detach().to("cpu", kind), target.detach().to("cpu", kind)
