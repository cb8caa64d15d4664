"""Multimodal affect: emotion classes, emotions that occur together, intensity of sentiment."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.affect import AffectConfig, AffectModel
from .fine_tuning import TaskBatch
from .pair_inputs import PairTask, as_picture, evaluating, is_one_picture
from .pair_models import task_head_for

CONFIG_NAME, WEIGHT_NAME = "affect.json", "affect_head.safetensors"


class Affect:
    """What a text with a picture (or either alone) expresses.

    Args:
        model: an `AffectModel` over a BERT-like model, or over a CLIP.
        tokenizer, preprocess, batch_size, options: see `PairTask`; of a CLIP the model's tokenizer and preprocess.

    Raises:
        TypeError: another model. ValueError: see `PairTask`; the model carries no tokenizer or preprocess.
    """

    task = "affect"

    def __init__(self, model: AffectModel, *, tokenizer=None, preprocess=None, batch_size: int = 64, **options):
        if not isinstance(model, AffectModel):
            raise TypeError(f"Affect: model is {type(model).__name__}, must be an AffectModel")
        self.model, self.config, self.batch_size = model, model.config, batch_size
        self.pairs = None
        if not model.dual:
            self.pairs = _AffectPairs(model, tokenizer=tokenizer, preprocess=preprocess, batch_size=batch_size,
                                      **options)  # fmt: skip
        elif options:
            raise ValueError(f"Affect: {', '.join(options)} belong to BERT-like models, must not be given for a CLIP")
        self.tokenizer, self.preprocess = tokenizer or model.tokenizer, preprocess or model.preprocess
        for name, need in (("tokenizer", "text"), ("preprocess", "image")):
            if model.dual and getattr(self, name) is None and self.config.reads in ("pair", need):
                raise ValueError(f"Affect: {name} is None and the model carries none, give one")
        self.task_head = task_head_for(model, self.task, "Affect")

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def __call__(self, texts: str | Sequence[str] | None, pictures=None) -> dict[str, float] | float | list:
        """Probabilities by label, each for itself for "labels"; the number for an intensity.

        Args:
            texts: one or several; None for a CLIP that reads pictures alone.
            pictures: regions or pictures, see `PairTask`; of a CLIP files, Pillow images or preprocessed tensors; None
                for one that reads texts alone.

        Returns:
            Of one example, or a list where `texts` or `pictures` is a list.
        """
        one = (texts is None or isinstance(texts, str)) and (pictures is None or is_one_picture(pictures))
        logits = self.logits(texts, pictures)
        if self.config.kind == "intensity":
            found = logits.tolist()
        else:
            chances = logits.softmax(-1) if self.config.kind == "classes" else logits.sigmoid()
            found = [dict(zip(self.config.labels, row, strict=True)) for row in chances.tolist()]
        return found[0] if one else found

    def logits(self, texts: str | Sequence[str] | None, pictures=None) -> Tensor:
        """[B, C] scores, or [B] intensities, float32 on the CPU."""
        if self.pairs is not None:
            texts, pictures, _ = self.pairs.examples(texts, pictures)
            return self.pairs.logits(texts, pictures)
        texts, pictures = self._lists(texts, pictures)
        many, parts = max(len(part) for part in (texts, pictures) if part is not None), []
        for start in range(0, many, self.batch_size):
            rows = slice(start, start + self.batch_size)
            with evaluating(self.model):
                inputs = self._dual([part and part[rows] for part in (texts, pictures)])
                parts.append(self.model(**inputs).logits["affect"].float().cpu())
        return torch.cat(parts)

    def batch(self, texts: Sequence[str] | None, pictures, target) -> TaskBatch:
        """Examples with what they express, to train on.

        Args:
            texts, pictures: as in a call, lists.
            target: "classes": B label names or numbers; "labels": [B, C] of 0 and 1; "intensity": B numbers.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        if self.pairs is not None:
            texts, pictures, _ = self.pairs.examples(texts, pictures)
            inputs, many = self.pairs.inputs(texts, pictures), max(len(texts), len(pictures))
        else:
            parts = self._lists(texts, pictures)
            inputs, many = self._dual(parts), max(len(part) for part in parts if part is not None)
        target = self._target(target)
        shape = (many, len(self.config.labels)) if self.config.kind == "labels" else (many,)
        if target.shape != shape:
            raise ValueError(f"Affect: target has shape {list(target.shape)}, must be {list(shape)}")
        return TaskBatch(inputs, target.to(self.device))

    def _target(self, target) -> Tensor:
        if self.config.kind != "classes":
            return torch.as_tensor(target, dtype=torch.float32)
        if isinstance(target, Tensor):
            return target.long()
        names = self.config.labels
        if unknown := [label for label in target if label not in names and label not in range(len(names))]:
            raise ValueError(f"Affect: label {unknown[0]!r} must be one of {', '.join(names)}")
        return torch.tensor([names.index(label) if isinstance(label, str) else label for label in target])

    def _lists(self, texts, pictures) -> tuple[list[str] | None, list | None]:
        """What a dual encoder reads, as many of each."""
        reads = self.config.reads
        for name, part, other in (("texts", texts, "image"), ("pictures", pictures, "text")):
            if (part is None) != (reads == other):
                raise ValueError(f"Affect: {name} is {'None' if part is None else 'given'} to a model that reads "
                                 f"{reads!r}, must {'not ' if part is None else ''}be None")
        texts = [texts] if isinstance(texts, str) else texts
        if pictures is not None and is_one_picture(pictures):
            pictures = [pictures]
        if reads == "pair" and len(texts) != len(pictures):
            raise ValueError(f"Affect: {len(texts)} texts and {len(pictures)} pictures, must be as many")
        for i, text in enumerate(texts or ()):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"Affect: text {i} is {text!r}, must be a sentence")
        return None if texts is None else list(texts), None if pictures is None else list(pictures)

    def _dual(self, parts) -> dict[str, Tensor]:
        texts, pictures = parts
        found = {} if texts is None else {"text": self.tokenizer(texts)}
        if pictures is not None:
            pixels = [as_picture(picture, f"pictures[{i}]").pixels for i, picture in enumerate(pictures)]
            found["image"] = torch.stack([x if isinstance(x, Tensor) else self.preprocess(x) for x in pixels])
        return {name: value.to(self.device) for name, value in found.items()}


class _AffectPairs(PairTask):
    """Inputs and batches of an `AffectModel` over a BERT-like model."""

    task = "affect"


def save_affect(model: AffectModel, folder: str | os.PathLike) -> None:
    """The trunk as `save_pretrained` writes it, and the head in affect.json and affect_head.safetensors beside it."""
    import json

    from safetensors.torch import save_file

    from ..checkpoints import save_pretrained

    save_pretrained(model.trunk, folder)
    state = {key: value.detach().cpu().contiguous() for key, value in model.affect.state_dict().items()}
    save_file(state, Path(folder) / WEIGHT_NAME, metadata={"format": "pt"})
    text = json.dumps(model.config.to_dict(), indent=2, ensure_ascii=False)
    (Path(folder) / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def load_affect(path: str | os.PathLike, *, trunk: nn.Module | None = None, device="cpu", **options) -> AffectModel:
    """The model that `save_affect` wrote, in evaluation mode.

    Args:
        path: the folder.
        trunk: its trunk where that is loaded already; else `options` are passed to `checkpoints.load`.

    Raises:
        FileNotFoundError: no head there. ValueError: a damaged file, or a head of another trunk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from ..checkpoints import load
    from ..checkpoints.files import read_json

    folder = Path(path)
    for name in (CONFIG_NAME, WEIGHT_NAME):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_affect: {folder} has no {name}")
    try:
        config = AffectConfig.from_dict(read_json(folder / CONFIG_NAME))
        state = load_file(folder / WEIGHT_NAME)
    except (TypeError, SafetensorError) as error:
        raise ValueError(f"load_affect: {folder} is damaged ({error})") from error
    model = AffectModel(load(folder, device=device, **options) if trunk is None else trunk, config)
    try:
        model.affect.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"load_affect: {folder / WEIGHT_NAME} does not fit: {error}") from error
    return model.eval()
