"""Pairs, vocabulary and model of `vlmfast train clip`."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import IterableDataset

from ..data import CLIPTokenizer, ImagePreprocess, ImageTextPairs, PairLoader
from ..tasks import recall_at_k, same_caption_ids
from ..training import StreamLoader, TrainConfig
from ..training.distributed import Process

MAX_CAPTIONS = 200_000  # a learned vocabulary does not get better from more
MAX_VALIDATION = 5000


@dataclass
class Data:
    """Training pairs and, perhaps, validation pairs.

    Attributes:
        train, val: sets of `vlmfast.data`; val may be None.
        captions: of the training part, at most MAX_CAPTIONS, for a vocabulary.
        count: training pairs; of a stream those of one pass.
    """

    settings: object
    config: TrainConfig
    process: Process
    train: object
    val: object | None
    captions: list[str]
    count: int
    opened: object  # report at opening

    @classmethod
    def open(cls, settings, config: TrainConfig, process: Process) -> "Data":
        """Opens and splits; a stream is read once to count it.

        Raises:
            FileNotFoundError, ValueError: nothing usable there.
        """
        options = dict(image_column=settings.image_column, caption_column=settings.caption_column, seed=config.seed)
        pairs = ImageTextPairs.open(settings.data, **options)
        val = ImageTextPairs.open(settings.val, **options) if settings.val else None
        if isinstance(pairs, IterableDataset):
            captions, count = [], 0
            for _, caption in pairs:
                count += 1
                if len(captions) < MAX_CAPTIONS:
                    captions.append(caption)
            return cls(settings, config, process, pairs, val, captions, count, pairs.report())
        report = pairs.report()
        if val is None and settings.val_fraction and len(pairs) >= 20:
            pairs, val = pairs.split(settings.val_fraction, seed=config.seed)
            if len(val) < 2:
                val = None
        captions = [text for i in range(min(len(pairs), MAX_CAPTIONS)) for text in pairs.captions(i)]
        return cls(settings, config, process, pairs, val, captions[:MAX_CAPTIONS], len(pairs), report)

    def report(self) -> str:
        """What was opened and left out, and the split."""
        val = "no validation" if self.val is None else \
            "validation on tar shards" if isinstance(self.val, IterableDataset) else f"{len(self.val)} for validation"
        return f"{self.opened}\n{self.count} pairs for training, {val}"

    def skipped_while_reading(self) -> str:
        """Pictures that turned out unreadable during training; empty if there were none."""
        if isinstance(self.train, IterableDataset):
            report = self.train.report()
            return str(report) if report.total_skipped else ""
        reports = [pairs.report() for pairs in (self.train, self.val) if pairs is not None]
        return "; ".join(str(report) for report in reports if report.total_skipped)

    def loader(self, preprocess: ImagePreprocess, tokenizer: Callable):
        """Batches of this process; the batch size shrinks to what there is.

        Args:
            tokenizer: a CLIPTokenizer, or any function from texts to [B, T].

        Raises:
            ValueError: fewer than two pairs for each process.
        """
        share = self.count // self.process.world
        if share < 2:
            raise ValueError(f"--data: {self.count} pairs for {self.process.world} processes, must be two for each")
        batch_size = min(self.settings.batch_size, share)
        if isinstance(tokenizer, CLIPTokenizer):
            tokenizer = _trimmed(tokenizer)
        loader = PairLoader(self.train, batch_size, preprocess=preprocess, tokenizer=tokenizer, shuffle=True,
                            drop_last=True, workers=self.settings.workers, seed=self.config.seed,
                            rank=self.process.rank, world_size=self.process.world)
        if isinstance(self.train, IterableDataset):
            return StreamLoader(loader, share // batch_size)
        return loader

    def validation(self, model: nn.Module, say: Callable[[str], None]) -> Callable[[nn.Module], dict[str, float]]:
        """A function that measures recall on (at most MAX_VALIDATION) validation pairs."""

        def validate(model: nn.Module) -> dict[str, float]:
            device = next(model.parameters()).device
            loader = PairLoader(self.val, min(self.settings.batch_size, 256), preprocess=model.preprocess,
                                shuffle=False, drop_last=False, workers=self.settings.workers)
            images, texts, captions = [], [], []
            for batch, strings in loader:
                images.append(model.encode_image(batch.to(device)))
                texts.append(model.encode_text(model.tokenizer(strings).to(device)))
                captions += strings
                if len(captions) >= MAX_VALIDATION:
                    break
            ids = same_caption_ids(captions).to(device)
            report = recall_at_k(torch.cat(images), torch.cat(texts), image_ids=ids, text_ids=ids)
            say("validation: " + ", ".join(
                f"{name} R@1/5/10 {'/'.join(f'{100 * value:.1f}' for value in recalls.values())} %"
                for name, recalls in (("image to text", report.image_to_text), ("text to image", report.text_to_image))
            ) + f" (chance {100 * report.chance_image_to_text[1]:.1f} % at 1, {len(captions)} pairs)")
            return report.to_dict()

        return validate


class _trimmed:
    """A tokenizer whose batches are as wide as their longest text: padding costs time and no text feature sees it."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts)
        return tokens[:, : int((tokens == self.tokenizer.eot).int().argmax(1).amax()) + 1] if len(tokens) else tokens


def make_model(settings, config: TrainConfig, data: Data, resumed: Path | None) -> nn.Module:
    """A new model by name, or one from a checkpoint, with tokenizer and preprocess attached.

    Args:
        resumed: run folder whose vocabulary goes on being used; None for a new run.

    Raises:
        ValueError: unknown name, a checkpoint that does not fit. FileNotFoundError: no such vocabulary.
    """
    from ..checkpoints import load
    from ..models import create, list_models

    start = Path(settings.model)
    # a name goes before a folder of the same name in the working directory
    from_checkpoint = settings.model.lower() not in list_models() and start.exists()
    if not from_checkpoint and start.suffix in (".pt", ".bin", ".safetensors") or len(start.parts) > 1 \
            and not start.exists():
        raise FileNotFoundError(f"--model: {start} does not exist")
    if from_checkpoint:
        model = load(start, image_size=settings.image_size, dtype=torch.float32)
        tokenizer = _vocabulary(settings, data, resumed) if settings.tokenizer or model.tokenizer is None \
            else model.tokenizer
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"--tokenizer has {tokenizer.vocab_size} tokens, {start} has {model.config.vocab_size}")
        tokenizer.context_length = model.config.context_length
        if config.objective == "siglip" and model.logit_bias is None:
            raise ValueError(f"--objective siglip: {start} has no logit_bias")
        model.train()
    else:
        tokenizer = _vocabulary(settings, data, resumed)
        overrides = dict(vocab_size=tokenizer.vocab_size, context_length=tokenizer.context_length)
        if settings.image_size:
            overrides["image_size"] = settings.image_size
        if config.objective == "siglip":  # the paper's start, arXiv:2303.15343, sec. 3.2
            overrides |= dict(init_logit_scale=math.log(10.0), init_logit_bias=-10.0)
        model = create(settings.model, **overrides)
        model.preprocess = ImagePreprocess(model.config.image_size, model.config.image_mean, model.config.image_std)
    model.tokenizer = tokenizer
    return model


def _vocabulary(settings, data: Data, resumed: Path | None) -> CLIPTokenizer:
    if resumed is not None and (resumed / "vocab.json").exists():
        return CLIPTokenizer.from_file(resumed)
    if settings.tokenizer:
        return CLIPTokenizer.from_file(settings.tokenizer, context_length=settings.context_length or 77)
    tokenizer = CLIPTokenizer.train(data.captions, max(settings.vocab_size, 514))
    longest = max(len(tokenizer.encode(caption)) for caption in data.captions) + 2
    tokenizer.context_length = settings.context_length or min(77, 8 * math.ceil(longest / 8))
    return tokenizer
