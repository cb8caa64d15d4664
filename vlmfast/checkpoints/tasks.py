"""`load(path, task=...)`: the model with a head for a task, a new one where the checkpoint has none."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from ..models.affect import AffectConfig, AffectModel
from ..models.clip import CLIP


def for_task(model: nn.Module, path: Path, task: str, labels: int | Sequence[str] | AffectConfig | None) -> nn.Module:
    """The model, or a copy with a new head (a UserWarning says so); arguments as in `load`."""
    from ..tasks.answers import find_answers, read_answers
    from ..tasks.pair_models import TASK_HEADS, plain_task, task_head_for, with_head

    task = plain_task(task)
    if task == "affect":
        return _with_affect(model, path, labels)
    if isinstance(model, CLIP):
        raise ValueError(f"load: task is {task!r}, must be 'affect' or None for a CLIP")
    if task not in TASK_HEADS:
        raise ValueError(f"load: task is {task!r}, must be one of {', '.join(TASK_HEADS)}")
    if isinstance(labels, AffectConfig):
        raise TypeError(f"load: labels is an AffectConfig, must be a number or names for {task!r}")
    count = len(labels) if isinstance(labels, Sequence) else labels
    found = with_head(model, task, count)
    if found is model:
        return model
    if count is None and task in ("vqa", "gqa") and (file := find_answers(path)) is not None:
        found = with_head(model, task, len(read_answers(file)))
    head = task_head_for(found, task, "load")
    size = f" of {getattr(found.config, head.labels)} labels" if head.labels else ""
    _warn(path, task, f"its {head.head!r} head{size}")
    return found


def _with_affect(model: nn.Module, path: Path, labels) -> AffectModel:
    from ..tasks.affect import CONFIG_NAME, load_affect

    folder = path if path.is_dir() else path.parent
    if (folder / CONFIG_NAME).is_file() and labels is None:
        return load_affect(folder, trunk=model)
    if isinstance(labels, int):
        raise TypeError(f"load: labels is {labels}, must be names or an AffectConfig for 'affect'")
    config = labels if isinstance(labels, AffectConfig) else AffectConfig()
    if labels is not None and config is not labels:
        config = replace(config, labels=tuple(labels))
    if getattr(model.config, "with_pooler", True) is False:
        model = model.adapted(with_pooler=True)
    found = AffectModel(model, config).train(model.training)
    _warn(path, "affect", f"its head of {config.outputs} outputs")
    return found


def _warn(path: Path, task: str, what: str) -> None:
    warnings.warn(f"{path}: has no head for {task!r}; {what} is new and must be trained", stacklevel=4)
