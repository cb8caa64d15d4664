"""`vlmfast train dalle`: a transformer that draws what a caption says, over the codes of a trained discrete VAE."""

import argparse
import shlex
from dataclasses import asdict, dataclass

from . import positive, set_threads
from .train_run import add_optimisation, add_run, line, option, settings_of, stopped, write_settings

HELP = "train DALL-E on pictures with captions, over the codes of a discrete VAE; torchrun for many processes"
# the paper's, app. B.2, where TrainConfig's are CLIP's
DEFAULTS = dict(lr=4.5e-4, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, max_grad_norm=4.0, warmup=0.05)
SAMPLES_NAME = "samples.png"


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.05
    image_column: str | None = None
    caption_column: str | None = None
    dvae: str | None = None
    model: str = "dalle-tiny"
    dim: int | None = None
    depth: int | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    context_length: int | None = None
    image_size: int | None = None
    batch_size: int = 64
    crop: float = 1.0
    flip: float = 0.0
    drop_text: float = 0.1
    workers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, SAMPLES_NAME)

    data = parser.add_argument_group("data")
    option(data, "--dvae", str, "run folder or checkpoint of the discrete VAE")
    option(data, "--data", str, "folder with captions, a caption file, or tar shards")
    option(data, "--val", str, "pairs for validation (default: a twentieth of the data; none for tar shards)")
    option(data, "--val-fraction", float, "share of the data kept for validation (0.05); 0: no validation")
    option(data, "--image-column", str, "of the caption file, where its name is unusual")
    option(data, "--caption-column", str, "of the caption file, where its name is unusual")
    option(data, "--crop", float, "smallest area of random crops (1: none)")
    option(data, "--flip", float, "probability of mirroring (0)")
    option(data, "--drop-text", float, "share of captions left out, which guidance needs (0.1)")
    option(data, "--workers", int, "processes that read pictures (0)")

    model = parser.add_argument_group("model")
    option(model, "--model", str, "dalle-tiny, dalle-base, dalle-small or dalle-12b (dalle-tiny)")
    option(model, "--dim", positive, "width, a multiple of 64, in place of the model's")
    option(model, "--depth", positive, "layers, in place of the model's")
    option(model, "--tokenizer", str, "vocabulary; default: one learned from the captions")
    option(model, "--vocab-size", positive, "of a learned vocabulary (4096)")
    option(model, "--context-length", positive, "tokens of the longest text")
    option(model, "--image-size", positive, "side in pixels (that of the discrete VAE)")

    numbers = {name: value for name, value in DEFAULTS.items() if name not in ("beta1", "eps")}
    add_optimisation(parser, "pairs per process and step (64)",
                     "chunks that a batch is taken in; same gradient, less memory (1)",
                     {**numbers, "min_lr": 0, "ema": 0})


def run(args) -> int:
    set_threads(args.threads)
    from ..training import TrainConfig
    from ..training.distributed import torchrun

    settings, values = settings_of(args, Settings, ("data", "dvae"), defaults=DEFAULTS)
    if not 0 <= settings.drop_text < 1:
        raise ValueError(f"--drop-text is {settings.drop_text}, must be in [0, 1)")
    config = TrainConfig(**values)
    with torchrun(args.device) as process:
        return _run(args, settings, config, process)


def _run(args, settings: Settings, config, process) -> int:
    import torch

    from ..checkpoints import save_pretrained
    from ..checkpoints.dalle import VAE_FOLDER
    from ..training import LossTrainer
    from .clip_data import Data
    from .dalle_data import captions_to_tokens, code_loss, make_model, pixels, save_transformer, validation

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    data = Data.open(settings, config, process)
    say(f"{settings.data}: {data.report()}")
    torch.manual_seed(config.seed)
    model = make_model(settings, data, args.out if args.resume else None)
    model.vae.to(process.device)
    sizes = model.config
    side = sizes.image_grid[0] * model.vae.downsample
    preprocess = pixels(side)
    if settings.crop < 1 or settings.flip:
        preprocess = preprocess.for_training(flip=settings.flip, scale=(settings.crop, 1.0))
    loader = data.loader(preprocess, captions_to_tokens(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {parameters / 1e6:.2f}M parameters, {side} pixels as {sizes.image_grid[0]} x "
        f"{sizes.image_grid[1]} of {sizes.num_image_tokens} codes, {model.tokenizer.vocab_size} tokens; an epoch has "
        f"{len(loader)} steps of {loader.batch_size * process.world} pairs, on {process.world} x {process.device}")
    if process.first:
        write_settings(args.out, {**asdict(settings), **config.to_dict()})
        if not args.resume:
            save_pretrained(model.vae, args.out / VAE_FOLDER)

    progress = not args.no_progress
    validate = None
    if data.val is not None:
        validate = validation(data.val, settings, args.out / SAMPLES_NAME, say=line if progress else print)
    trainer = LossTrainer(model, loader, config, code_loss(settings.drop_text), out=args.out, validate=validate,
                          resume=args.resume, device=process.device, progress=progress, save_model=save_transformer)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    result = trainer.run()
    skipped = data.skipped_while_reading()
    if skipped:
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(stopped(result, args.out, "dalle"))
        return 130
    say(f"{result.step} steps done; model, log.jsonl and loss.png are in {args.out}; draw with\n"
        f"  vlmfast generate {shlex.quote(str(args.out))} 'a text' --out picture.png")
    return 0
