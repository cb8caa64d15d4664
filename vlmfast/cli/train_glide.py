"""`vlmfast train glide`: diffusion from captions, its upsampler, or a model that fills holes."""

import argparse
import shlex
from dataclasses import asdict, dataclass

from . import positive, set_threads
from .train_run import add_optimisation, add_run, line, option, settings_of, stopped, write_settings

HELP = "train GLIDE on pictures with captions; torchrun for many processes"
# those of guided-diffusion, with a learning rate for small models
DEFAULTS = dict(lr=1e-3, beta2=0.999, eps=1e-8, weight_decay=0.0, max_grad_norm=1.0, warmup=0.05, ema=0.999)
SAMPLES_NAME = "samples.png"


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.05
    image_column: str | None = None
    caption_column: str | None = None
    model: str = "glide-tiny"
    image_size: int | None = None
    num_channels: int | None = None
    num_res_blocks: int | None = None
    dropout: float | None = None
    tokenizer: str | None = None
    vocab_size: int = 4096
    context_length: int | None = None
    batch_size: int = 64
    crop: float = 1.0
    flip: float = 0.0
    drop_text: float = 0.2
    scale: int = 4
    sheet_every: int = 500
    sheet_steps: int = 50
    guidance_scale: float = 3.0
    workers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser, SAMPLES_NAME, "samples/")

    data = parser.add_argument_group("data")
    option(data, "--data", str, "folder with captions, a caption file, or tar shards")
    option(data, "--val", str, "pairs for validation (default: a twentieth of the data; none for tar shards)")
    option(data, "--val-fraction", float, "share of the data kept for validation (0.05); 0: no validation")
    option(data, "--image-column", str, "of the caption file, where its name is unusual")
    option(data, "--caption-column", str, "of the caption file, where its name is unusual")
    option(data, "--crop", float, "smallest area of random crops (1: none)")
    option(data, "--flip", float, "probability of mirroring (0)")
    option(data, "--drop-text", float, "share of captions left out, which guidance needs (0.2)")
    option(data, "--scale", positive, "of an upsampler: how many times smaller what it enlarges is (4)")
    option(data, "--workers", int, "processes that read pictures (0)")

    model = parser.add_argument_group("model")
    option(model, "--model", str, "glide-tiny, glide-base, glide-upsample, glide-base-inpaint, ..., or a checkpoint to "
                                  "go on from (glide-tiny)")
    option(model, "--image-size", positive, "side in pixels (that of the model)")
    option(model, "--num-channels", positive, "of the first level, a multiple of 32, in place of the model's")
    option(model, "--num-res-blocks", positive, "of a level, in place of the model's")
    option(model, "--dropout", float, "in place of the model's")
    option(model, "--tokenizer", str, "folder with vocab.json and merges.txt; default: one learned from the captions")
    option(model, "--vocab-size", positive, "of a learned vocabulary (4096)")
    option(model, "--context-length", positive, "tokens of the longest text")

    sheets = parser.add_argument_group("samples of captions kept for validation")
    option(sheets, "--sheet-every", positive, "steps between sheets (500)")
    option(sheets, "--sheet-steps", positive, "steps of DDIM in a sheet's pictures (50)")
    option(sheets, "--guidance-scale", float, "(3)")

    numbers = {name: value for name, value in DEFAULTS.items() if name != "eps"}
    add_optimisation(parser, "pairs per process and step (64)",
                     "chunks that a batch is taken in; same gradient, less memory (1)", {**numbers, "min_lr": 0})


def run(args) -> int:
    set_threads(args.threads)
    from ..training import TrainConfig
    from ..training.distributed import torchrun

    settings, values = settings_of(args, Settings, ("data",), defaults=DEFAULTS)
    if not 0 <= settings.drop_text < 1:
        raise ValueError(f"--drop-text is {settings.drop_text}, must be in [0, 1)")
    config = TrainConfig(**values)
    with torchrun(args.device) as process:
        return _run(args, settings, config, process)


def _run(args, settings: Settings, config, process) -> int:
    import torch

    from ..training.diffusion import DiffusionTrainer, glide_tokens
    from .clip_data import Data
    from .glide_data import make_model, pixels, sheet_of, validation

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    data = Data.open(settings, config, process)
    say(f"{settings.data}: {data.report()}")
    torch.manual_seed(config.seed)
    model = make_model(settings, data, args.out if args.resume else None)
    sizes = model.config
    preprocess = pixels(sizes.image_size)
    if settings.crop < 1 or settings.flip:
        preprocess = preprocess.for_training(flip=settings.flip, scale=(settings.crop, 1.0))
    loader = data.loader(preprocess, lambda captions: glide_tokens(model, captions))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {parameters / 1e6:.2f}M parameters, {sizes.image_size} pixels, {sizes.text_ctx} text "
        f"positions, {model.tokenizer.vocab_size} tokens; an epoch has {len(loader)} steps of "
        f"{loader.batch_size * process.world} pairs, on {process.world} x {process.device}")
    if process.first:
        write_settings(args.out, {**asdict(settings), **config.to_dict()})

    progress = not args.no_progress
    validate, captions, low_res = None, (), None
    if data.val is not None:
        validate = validation(data.val, settings, say=line if progress else print)
        captions, low_res = sheet_of(data.val, settings, model)
    trainer = DiffusionTrainer(
        model, loader, config, drop_text=settings.drop_text, scale=settings.scale if sizes.super_res else None,
        captions=captions, sheet_every=settings.sheet_every, sheet_steps=settings.sheet_steps,
        guidance_scale=settings.guidance_scale, low_res=low_res, out=args.out, validate=validate, resume=args.resume,
        device=process.device, progress=progress)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    result = trainer.run()
    skipped = data.skipped_while_reading()
    if skipped:
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(stopped(result, args.out, "glide"))
        return 130
    say(f"{result.step} steps done; model, log.jsonl, loss.png and samples.png are in {args.out}; draw with\n"
        f"  vlmfast generate {shlex.quote(str(args.out))} 'a text' --out picture.png")
    return 0
