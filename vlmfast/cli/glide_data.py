"""Model and validation of `vlmfast train glide`."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from ..data import ImagePreprocess, PairLoader
from ..data.gpt2_tokenizer import GPT2Tokenizer, has_gpt2_vocabulary
from ..models.glide import GLIDE, PRESETS
from ..objectives.diffusion import text_diffusion_loss
from ..tasks.diffusion_generation import schedule_of
from ..training.diffusion import glide_tokens
from .clip_data import Data

MAX_VALIDATION = 512  # pairs
SAMPLES = 12
LONGEST_TEXT = 128


def pixels(side: int) -> ImagePreprocess:
    """Pictures as diffusion takes them: square, in [-1, 1]."""
    return ImagePreprocess(side, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def make_model(settings, data: Data, resumed: Path | None) -> GLIDE:
    """A new model by name, or one from a checkpoint, with its tokenizer; a resumed run's weights are read later.

    Raises:
        ValueError: a name or a size that does not fit. FileNotFoundError: no such checkpoint or vocabulary.
    """
    from ..checkpoints import load
    from ..models import create, list_models

    start = Path(settings.model)
    if settings.model.lower() not in list_models() and (start.exists() or len(start.parts) > 1):
        model = load(start, dtype=torch.float32)
        if isinstance(model, GLIDE) and (settings.tokenizer or model.tokenizer is None):
            model.tokenizer = _vocabulary(settings, data, resumed)
    elif settings.model.lower() in list_models() and settings.model.lower() not in PRESETS:
        raise ValueError(f"--model is {settings.model}, must be a GLIDE, for example glide-tiny")
    else:
        tokenizer = _vocabulary(settings, data, resumed)
        longest = max(len(tokenizer.encode(caption)) for caption in data.captions)
        # one more, so that the last position, which also speaks for the whole text, is padding
        context = settings.context_length or min(LONGEST_TEXT, 8 * math.ceil((longest + 1) / 8))
        sizes = dict(n_vocab=tokenizer.vocab_size, text_ctx=context)
        for name in ("image_size", "num_channels", "num_res_blocks", "dropout"):
            if getattr(settings, name) is not None:
                sizes[name] = getattr(settings, name)
        model = create(settings.model, **sizes)
        model.tokenizer = tokenizer
    if not isinstance(model, GLIDE):
        raise ValueError(f"--model is {settings.model}, must be a GLIDE, for example glide-tiny")
    if model.tokenizer.vocab_size > model.config.n_vocab:
        raise ValueError(f"--tokenizer has {model.tokenizer.vocab_size} tokens, the model {model.config.n_vocab}")
    if model.config.super_res and (settings.scale < 2 or model.config.image_size % settings.scale):
        raise ValueError(f"--scale is {settings.scale}, must be at least 2 and divide {model.config.image_size} pixels")
    return model.train()


def _vocabulary(settings, data: Data, resumed: Path | None) -> GPT2Tokenizer:
    if resumed is not None and has_gpt2_vocabulary(resumed):
        return GPT2Tokenizer.from_file(resumed)
    if settings.tokenizer:
        return GPT2Tokenizer.from_file(settings.tokenizer)
    return GPT2Tokenizer.train(data.captions, max(settings.vocab_size, 257))


def validation(pairs, settings, say: Callable[[str], None]) -> Callable[[GLIDE], dict[str, float]]:
    """A function that measures the loss on (at most MAX_VALIDATION) pairs, with the same noise every time: with each
    picture's own text, and without any, which tells how much the texts say."""

    def validate(model: GLIDE) -> dict[str, float]:
        device, schedule = next(model.parameters()).device, schedule_of(model)
        scale = settings.scale if model.config.super_res else None
        loader = PairLoader(pairs, min(settings.batch_size, 64), preprocess=pixels(model.config.image_size),
                            shuffle=False, drop_last=False, workers=settings.workers)
        sums, count = {"loss": 0.0, "mse": 0.0, "mse without text": 0.0}, 0
        for images, texts in loader:
            images, tokens = images.to(device), glide_tokens(model, texts).to(device)
            for name in ("own", "none"):
                if name == "none":
                    tokens = torch.full_like(tokens, -1)
                generator = torch.Generator(device).manual_seed(count)
                found = text_diffusion_loss(model, schedule, images, tokens, scale=scale,
                                            prediction=model.config.prediction, padding=model.config.n_vocab - 1,
                                            inpaint=model.config.inpaint, generator=generator)
                if name == "own":
                    sums["loss"] += float(found.loss.sum())
                sums["mse" if name == "own" else "mse without text"] += float(found.mse.sum())
            count += len(texts)
            if count >= MAX_VALIDATION:
                break
        report = {name: value / count for name, value in sums.items()}
        say("validation: " + ", ".join(f"{name} {value:.4f}" for name, value in report.items()) + f" ({count} pairs)")
        return {name.replace(" ", "_"): value for name, value in report.items()}

    return validate


def sheet_of(pairs, settings, model: GLIDE) -> tuple[list[str], torch.Tensor | None]:
    """Captions kept for validation that the sheets of samples show, and for an upsampler their small pictures."""
    from ..objectives.diffusion import small_images

    loader = PairLoader(pairs, SAMPLES, preprocess=pixels(model.config.image_size), shuffle=False, drop_last=False)
    images, captions = next(iter(loader))
    return list(captions), small_images(images, settings.scale) if model.config.super_res else None
