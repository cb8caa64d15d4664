"""Pictures and model of `vlmfast train dvae`."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from ..checkpoints.dvae import picture_preprocess
from ..data import ImagePreprocess, ImageTextPairs, PairLoader, PairsReport, check_image, load_emoji
from ..data.captions import IMAGE_SUFFIXES
from ..data.report import Skip
from ..tasks.reconstruction import measure_reconstruction
from ..training import TrainConfig
from ..training.distributed import Process
from .clip_data import MAX_VALIDATION, Data

EMOJI = "emoji"  # --data of the embedded set
SHEET = 16  # pictures on it
# how each model's config calls the size of its vocabulary
_VOCABULARY = ("vocab_size", "num_tokens", "n_embed")


def open_images(settings, config: TrainConfig, process: Process) -> Data:
    """Training and validation pictures: a folder of them, what `vlmfast train clip` takes, or the embedded emoji.

    Raises:
        FileNotFoundError, ValueError: nothing usable there.
    """
    emoji = settings.data == EMOJI and not Path(settings.data).exists()
    pairs = load_emoji() if emoji else _open(settings.data, settings, config)
    if isinstance(pairs, IterableDataset):
        return Data.open(settings, config, process)
    report = "the embedded emoji" if emoji else pairs.report()
    val = _open(settings.val, settings, config) if settings.val else None
    if val is None and settings.val_fraction and len(pairs) >= 20:
        if emoji:  # whole glyphs: no skin tone of a validation picture is learned
            pairs, val = pairs.split_concepts(max(2, round(settings.val_fraction * len(pairs))), config.seed)
        else:
            pairs, val = pairs.split(settings.val_fraction, seed=config.seed)
            val = val if len(val) >= 2 else None
    return Data(settings, config, process, pairs, val, [], len(pairs), report)


def _open(path: str, settings, config: TrainConfig):
    """A folder with pictures, whatever else is in it; else what `vlmfast train clip` takes."""
    found = _folder(Path(path))
    return found if found is not None else ImageTextPairs.open(
        path, image_column=settings.image_column, caption_column=settings.caption_column, seed=config.seed)


def _folder(path: Path) -> ImageTextPairs | None:
    """Every picture below a folder, captions or not; None where there is none, perhaps tar shards instead."""
    entries, report = [], PairsReport()
    for where, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names):
            if not name.lower().endswith(IMAGE_SUFFIXES):
                continue
            file = os.path.join(where, name)
            try:
                check_image(file)
            except (ValueError, OSError) as error:
                report.add(Skip("unreadable image", file, str(error)))
                continue
            entries.append((file, ("",)))
    if not entries and report.total_skipped:
        raise ValueError(f"--data: {path} holds no picture that can be read\n{report}")
    return ImageTextPairs(entries, report) if entries else None


def no_text(texts: list[str]) -> Tensor:
    """Stands for a tokenizer: one empty token each."""
    return torch.zeros(len(texts), 1, dtype=torch.int64)


def make_preprocess(model: nn.Module, settings) -> tuple[ImagePreprocess, ImagePreprocess]:
    """(for training, for validation): pictures in 0 ... 1, square, as the dVAE papers resize them."""
    plain = picture_preprocess(getattr(model.config, "image_size", None) or model.config.resolution)
    if settings.crop == 1 and not settings.flip:
        return plain, plain
    return replace(plain.for_training(flip=settings.flip, scale=(settings.crop, 1.0)), ratio=(1.0, 1.0)), plain


def make_model(settings) -> nn.Module:
    """A new model by name, or one from a checkpoint.

    Raises:
        FileNotFoundError: a path that does not exist. ValueError: an unknown name, no discrete VAE, no decoder.
    """
    from ..checkpoints import load
    from ..models import DVAE, VQGAN, DiscreteVAE, create, list_models

    start = Path(settings.model)
    if settings.model.lower() in list_models():
        probe = create(settings.model, device="meta")
        known = probe.config.to_dict()
        size = {"resolution" if "resolution" in known else "image_size": settings.image_size}
        size |= {name: settings.vocab_size for name in _VOCABULARY if name in known}
        model = create(settings.model, **{name: value for name, value in size.items() if value})
    elif start.exists():
        if settings.image_size or settings.vocab_size:
            raise ValueError(f"--image-size and --vocab-size belong to a new model, --model is the checkpoint {start}")
        model = load(start, dtype=torch.float32)
    elif len(start.parts) > 1 or start.suffix:
        raise FileNotFoundError(f"--model: {start} does not exist")
    else:
        model = create(settings.model)  # raises, and says what is like it
    if not isinstance(model, (DVAE, DiscreteVAE, VQGAN)):
        raise ValueError(f"--model: {settings.model} is a {type(model).__name__}, must be a discrete VAE")
    if model.encoder is None or model.decoder is None:
        raise ValueError(f"--model: {settings.model} has no {'encoder' if model.encoder is None else 'decoder'}")
    return model.train()


def validation(data: Data, preprocess: ImagePreprocess,
               say: Callable[[str], None]) -> tuple[Callable[[nn.Module], dict[str, float]], Tensor]:
    """A function that measures (at most MAX_VALIDATION) validation pictures, and some of them for the sheet."""

    def batches():
        loader = PairLoader(data.val, min(data.settings.batch_size, 256), preprocess=preprocess, shuffle=False,
                            drop_last=False, workers=data.settings.workers)
        seen = 0
        for images, _ in loader:
            yield images
            seen += len(images)
            if seen >= MAX_VALIDATION:
                return

    def validate(model: nn.Module) -> dict[str, float]:
        device = next(model.parameters()).device
        report = measure_reconstruction(model, (images.to(device) for images in batches()))
        say(f"validation: {report}")
        return report.to_dict()

    return validate, _spread(data.val, preprocess)


def _spread(pairs, preprocess: ImagePreprocess) -> Tensor:
    """SHEET pictures from all over a set, or the first ones of a stream."""
    chosen = []
    if isinstance(pairs, IterableDataset):
        for image, _ in pairs:
            chosen.append(preprocess(image))
            if len(chosen) == SHEET:
                break
        return torch.stack(chosen)
    for i in range(len(pairs)):
        if len(chosen) == SHEET or len(chosen) * len(pairs) > i * SHEET:
            continue
        try:
            chosen.append(preprocess(pairs[i][0]))
        except (ValueError, OSError):
            continue
    return torch.stack(chosen) if chosen else torch.empty(0)
