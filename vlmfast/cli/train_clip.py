"""`vlmfast train clip`: a dual encoder from pictures with captions, in one process or under `torchrun`."""

import argparse
from dataclasses import asdict, dataclass

from . import positive, set_threads
from .train_run import add_optimisation, add_run, line, option, settings_of, stopped, write_settings

HELP = "train CLIP on a folder with captions (csv, jsonl, sidecar .txt) or on tar shards; torchrun for many processes"


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.1
    image_column: str | None = None
    caption_column: str | None = None
    model: str = "clip-tiny"
    tokenizer: str | None = None
    vocab_size: int = 4096
    context_length: int | None = None
    image_size: int | None = None
    batch_size: int = 256
    crop: float = 0.9
    flip: float = 0.0
    workers: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Many processes: torchrun --nproc_per_node 2 --no-python vlmfast train clip --data ... --out ..."

    add_run(parser)

    data = parser.add_argument_group("data")
    option(data, "--data", str, "folder with captions, a caption file, or tar shards such as 'shards-{000..127}.tar'")
    option(data, "--val", str, "pairs for validation (default: a tenth of the data; none for tar shards)")
    option(data, "--val-fraction", float, "share of the data kept for validation (0.1); 0: no validation")
    option(data, "--image-column", str, "of the caption file, where its name is unusual")
    option(data, "--caption-column", str, "of the caption file, where its name is unusual")
    option(data, "--crop", float, "smallest area of random crops (0.9); 1: none")
    option(data, "--flip", float, "probability of mirroring (0)")
    option(data, "--workers", int, "processes that read pictures (0)")

    model = parser.add_argument_group("model")
    option(model, "--model", str, "name (clip-tiny, clip-vit-b-32 ...) or checkpoint to start from (clip-tiny)")
    option(model, "--tokenizer", str, "vocabulary; default: the checkpoint's, else one learned from the captions")
    option(model, "--vocab-size", positive, "of a learned vocabulary (4096)")
    option(model, "--context-length", positive, "tokens of the longest text")
    option(model, "--image-size", positive, "side in pixels")

    steps = add_optimisation(
        parser, "pairs per process and step, all contrasted with each other (256)",
        "encode the batch in so many chunks; same loss, less memory (1)",
        dict(lr=5e-4, min_lr=0, warmup=0.1, weight_decay=0.2, max_grad_norm=1, label_smoothing=0, ema=0),
    )  # fmt: skip
    option(steps, "--objective", str, "clip or siglip (clip)", choices=("clip", "siglip"))


def run(args) -> int:
    set_threads(args.threads)
    from ..training import TrainConfig
    from ..training.distributed import torchrun

    settings, values = settings_of(args, Settings)
    config = TrainConfig(**values)
    with torchrun(args.device) as process:
        return _run(args, settings, config, process)


def _run(args, settings: Settings, config, process) -> int:
    import torch

    from ..training import Trainer
    from .clip_data import Data, make_model

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    data = Data.open(settings, config, process)
    say(f"{settings.data}: {data.report()}")
    torch.manual_seed(config.seed)
    model = make_model(settings, config, data, args.out if args.resume else None)
    preprocess = model.preprocess.for_training(flip=settings.flip, scale=(settings.crop, 1.0))
    loader = data.loader(preprocess, model.tokenizer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {parameters / 1e6:.2f}M parameters, {model.config.image_size} pixels, "
        f"{model.tokenizer.vocab_size} tokens; an epoch has {len(loader)} steps of "
        f"{loader.batch_size * process.world} pairs, on {process.world} x {process.device}")
    if process.first:
        write_settings(args.out, {**asdict(settings), **config.to_dict()})

    progress = not args.no_progress
    validate = data.validation(model, say=line if progress else print) if data.val is not None else None
    trainer = Trainer(model, loader, config, out=args.out, validate=validate, resume=args.resume,
                      device=process.device, progress=progress)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    result = trainer.run()
    skipped = data.skipped_while_reading()
    if skipped:
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(stopped(result, args.out, "clip"))
        return 130
    say(f"{result.step} steps done; model, log.jsonl and loss.png are in {args.out}")
    return 0
