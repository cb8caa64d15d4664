"""`vlmfast train dvae`: pictures to codes and back, the first half of DALL-E."""

import argparse
from dataclasses import asdict, dataclass, fields

from . import positive, set_threads
from .train_run import add_optimisation, add_run, line, option, settings_of, stopped, write_settings

HELP = "train a discrete VAE on a folder of pictures; torchrun for many processes"
# the paper's, app. A.2, where TrainConfig's are CLIP's; the learning rate is that of small models and short runs
DEFAULTS = dict(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-4, ema=0.999, warmup=0.05)


@dataclass(frozen=True)
class Settings:
    """A run's settings beside `TrainConfig`; saved in the run folder, so that --resume needs no other argument."""

    data: str | None = None
    val: str | None = None
    val_fraction: float = 0.1
    image_column: str | None = None
    caption_column: str | None = None
    model: str = "dvae-small"
    vocab_size: int | None = None
    image_size: int | None = None
    batch_size: int = 32
    crop: float = 1.0
    flip: float = 0.0
    workers: int = 0
    reconstruction: str | None = None
    kl_weight: float | None = None
    kl_anneal: float | None = None
    tau: float | None = None
    tau_end: float | None = None
    tau_anneal: float | None = None
    shape: str | None = None
    sheet_every: int = 500


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Then: vlmfast train dalle --dvae RUN --data PAIRS --out FOLDER"

    add_run(parser, "reconstruction.png")

    data = parser.add_argument_group("data")
    option(data, "--data", str, "folder of pictures, with captions or without; a caption file; tar shards; "
                                "or 'emoji', the embedded set")
    option(data, "--val", str, "pictures for validation (default: a tenth of the data; none for tar shards)")
    option(data, "--val-fraction", float, "share of the data kept for validation (0.1); 0: no validation")
    option(data, "--image-column", str, "of a caption file, where its name is unusual")
    option(data, "--caption-column", str, "of a caption file, where its name is unusual")
    option(data, "--crop", float, "smallest area of random crops (1: none)")
    option(data, "--flip", float, "probability of mirroring (0)")
    option(data, "--workers", int, "processes that read pictures (0)")

    model = parser.add_argument_group("model")
    option(model, "--model", str, "dvae-small, dvae-tiny, openai-dvae, vqgan-tiny ..., or a checkpoint (dvae-small)")
    option(model, "--vocab-size", positive, "codes, in place of the model's")
    option(model, "--image-size", positive, "side in pixels, in place of the model's")

    loss = parser.add_argument_group("objective")
    option(loss, "--reconstruction", str, "mse, l1, smooth_l1; logit_laplace, and nothing else, for OpenAI's dVAE",
           choices=("mse", "l1", "smooth_l1", "logit_laplace"))
    option(loss, "--kl-weight", float, "of the divergence from even use of the codes, as DALL-E counts (0; 6.6 for "
                                       "OpenAI's dVAE)")
    option(loss, "--kl-anneal", float, "share of the steps in which it grows from 0 (0.1)")
    option(loss, "--tau", float, "temperature at the start (1)")
    option(loss, "--tau-end", float, "temperature at the end (0.0625)")
    option(loss, "--tau-anneal", float, "share of the steps until it is reached (0.75)")
    option(loss, "--shape", str, "of both changes (half_cosine)",
           choices=("linear", "half_cosine", "quarter_cosine", "exponential"))
    option(loss, "--sheet-every", positive, "steps between sheets of reconstructions (500)")

    numbers = ("lr", "warmup", "weight_decay", "beta1", "beta2", "ema")
    add_optimisation(parser, "pictures per process and step (32)",
                     "chunks that a batch is taken in; same gradient, less memory (1)",
                     {**{name: DEFAULTS[name] for name in numbers}, "min_lr": 0, "max_grad_norm": 1})


def run(args) -> int:
    set_threads(args.threads)
    from ..training import TrainConfig
    from ..training.distributed import torchrun

    settings, values = settings_of(args, Settings, defaults=DEFAULTS)
    config = TrainConfig(**values)
    with torchrun(args.device) as process:
        return _run(args, settings, config, process)


def _run(args, settings: Settings, config, process) -> int:
    import torch

    from ..training import DVAETrainer
    from .dvae_data import make_model, make_preprocess, no_text, open_images, validation

    def say(text: str) -> None:
        if process.first:
            print(text, flush=True)

    torch.manual_seed(config.seed)
    model = make_model(settings)
    objective = make_objective(settings, model)
    train_images, plain = make_preprocess(model, settings)
    side = plain.image_size
    if side % model.downsample:
        raise ValueError(f"--image-size is {side}, must be a multiple of {model.downsample} for {settings.model}")
    data = open_images(settings, config, process)
    say(f"{settings.data}: {data.report()}")
    loader = data.loader(train_images, no_text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(f"{settings.model}: {parameters / 1e6:.2f}M parameters, {side} pixels, {(side // model.downsample) ** 2} codes "
        f"out of {model.vocab_size}; an epoch has {len(loader)} steps of {loader.batch_size * process.world} pictures, "
        f"on {process.world} x {process.device}")
    if process.first:
        write_settings(args.out, {**asdict(settings), **config.to_dict()})

    progress = not args.no_progress
    validate, sheet = None, None
    if data.val is not None:
        validate, sheet = validation(data, plain, say=line if progress else print)
    trainer = DVAETrainer(model, loader, config, objective, sheet=sheet, sheet_every=settings.sheet_every, out=args.out,
                          validate=validate, resume=args.resume, device=process.device, progress=progress)
    if trainer.step:
        say(f"resumed at step {trainer.step} of {trainer.total}")
    result = trainer.run()
    skipped = data.skipped_while_reading() if hasattr(data.train, "report") else ""
    if skipped:
        say(f"left out while reading: {skipped}")
    if result.interrupted:
        say(stopped(result, args.out, "dvae"))
        return 130
    say(f"{result.step} steps done; model, log.jsonl, loss.png and reconstruction.png are in {args.out}")
    return 0


def make_objective(settings: Settings, model):
    """The settings' objective; what they leave open is OpenAI's for its architecture, squared error for the others."""
    from ..models import DVAE
    from ..training import DVAEObjective

    values = dict(reconstruction="logit_laplace", kl_weight=6.6) if isinstance(model, DVAE) else {}
    given = {field.name: getattr(settings, field.name, None) for field in fields(DVAEObjective)}
    return DVAEObjective(**{**values, **{name: value for name, value in given.items() if value is not None}})
