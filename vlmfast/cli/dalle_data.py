"""Model, loss and validation of `vlmfast train dalle`."""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import CLIPTokenizer, ImagePreprocess, PairLoader
from ..models import DALLE
from ..tasks import encode_prompts, generate_codes
from ..tasks.image_generation import to_arrays
from .clip_data import Data

MAX_VALIDATION = 512  # pairs
SAMPLES = 12


def pixels(side: int) -> ImagePreprocess:
    """Pictures as discrete VAEs take them: square, in 0 ... 1."""
    return ImagePreprocess(side, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def make_model(settings, data: Data, resumed: Path | None) -> DALLE:
    """A new model with tokenizer and discrete VAE; weights of a resumed run are read later, by the trainer.

    Raises:
        ValueError: a size that does not fit the discrete VAE. FileNotFoundError: no such checkpoint or vocabulary.
    """
    from ..checkpoints import load
    from ..checkpoints.dalle import VAE_FOLDER
    from ..models import create

    source = Path(settings.dvae) if resumed is None else resumed / VAE_FOLDER
    vae = load(source).eval().requires_grad_(False)
    if not hasattr(vae, "downsample"):
        raise ValueError(f"--dvae: {source} is a {type(vae).__name__}, must be a discrete VAE")
    side = settings.image_size or getattr(vae.config, "image_size", None) or vae.config.resolution
    if side % vae.downsample:
        raise ValueError(f"--image-size is {side}, must be a multiple of {vae.downsample}, the pixels along a side of "
                         "one code")
    tokenizer = _vocabulary(settings, data, resumed)
    overrides = dict(num_text_tokens=tokenizer.vocab_size + 1, token_offset=1, text_seq_len=tokenizer.context_length,
                     num_image_tokens=vae.vocab_size, image_grid=(side // vae.downsample,) * 2)
    if settings.depth:
        overrides["depth"] = settings.depth
    if settings.dim:
        overrides |= dict(dim=settings.dim, heads=max(1, settings.dim // 64))
    model = create(settings.model, **overrides)
    if not isinstance(model, DALLE):
        raise ValueError(f"--model is {settings.model}, must be one of the DALL-E models, for example dalle-tiny")
    model.tokenizer = tokenizer
    model.attach_vae(vae)
    return model


def _vocabulary(settings, data: Data, resumed: Path | None) -> CLIPTokenizer:
    if resumed is not None and (resumed / "vocab.json").exists():
        return CLIPTokenizer.from_file(resumed)
    if settings.tokenizer:
        return CLIPTokenizer.from_file(settings.tokenizer, context_length=settings.context_length or 64)
    tokenizer = CLIPTokenizer.train(data.captions, max(settings.vocab_size, 514))
    longest = max(len(tokenizer.encode(caption)) for caption in data.captions)
    tokenizer.context_length = settings.context_length or max(2, min(64, 4 * math.ceil(longest / 4)))
    return tokenizer


def captions_to_tokens(model: DALLE) -> Callable[[list[str]], Tensor]:
    """Captions -> [B, T]; what is longer than the text context is cut."""
    return lambda captions: encode_prompts(model, captions, truncate=True)


def code_loss(drop_text: float) -> Callable:
    """The loss of pictures with tokens: codes without noise, and no text for a share of them."""

    def loss(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[Tensor, dict]:
        codes = _plain(model).vae.encode(images)
        if drop_text:
            dropped = torch.rand(len(tokens), 1, device=tokens.device) < drop_text
            tokens = tokens.masked_fill(dropped, 0)
        out = model(tokens, codes, return_loss=True)
        return out.loss, {"text_loss": out.text_loss.detach(), "image_loss": out.image_loss.detach()}

    return loss


def validation(pairs, settings, sheet: Path, say: Callable[[str], None]) -> Callable[[DALLE], dict[str, float]]:
    """A function that measures the losses on (at most MAX_VALIDATION) pairs and draws some of their captions."""

    def validate(model: DALLE) -> dict[str, float]:
        device = next(model.parameters()).device
        side = model.config.image_grid[0] * model.vae.downsample
        loader = PairLoader(pairs, min(settings.batch_size, 64), preprocess=pixels(side), shuffle=False,
                            drop_last=False, workers=settings.workers)
        score, sums, captions = code_loss(0.0), {}, []
        count = 0
        for images, texts in loader:
            tokens = encode_prompts(model, texts, truncate=True).to(device)
            loss, figures = score(model, images.to(device), tokens)
            for name, value in {"loss": loss, **figures}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(texts)
            captions += texts[: SAMPLES - len(captions)]
            count += len(texts)
            if count >= MAX_VALIDATION:
                break
        report = {name: value / count for name, value in sums.items()}
        say("validation: " + ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in report.items())
            + f" ({count} pairs); a code by chance {math.log(model.config.num_image_tokens):.3f}")
        draw_samples(model, captions, sheet)
        return report

    return validate


def draw_samples(model: DALLE, captions: list[str], path: Path) -> None:
    """A contact sheet with a picture for each caption."""
    from ..data import contact_sheet

    tokens = encode_prompts(model, captions, truncate=True).to(next(model.parameters()).device)
    images = model.vae.decode(generate_codes(model, tokens, seed=0))
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(to_arrays(images), captions, columns=6, heading="drawn from captions kept for validation").save(path)


def save_transformer(model: DALLE, folder: Path) -> None:
    """The transformer and its vocabulary; the discrete VAE was written once, when the run began."""
    from ..checkpoints import dalle
    from ..checkpoints.files import atomic_folder

    with atomic_folder(folder) as stage:
        dalle.save(model, stage)
        model.tokenizer.save(stage)


def _plain(model: nn.Module) -> DALLE:
    return model.module if hasattr(model, "no_sync") else model
