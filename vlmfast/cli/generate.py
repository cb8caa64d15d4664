"""`vlmfast generate`: draw pictures of a text."""

from pathlib import Path

from . import positive, set_threads

HELP = "draw pictures of a text with DALL-E, DALL-E mini or GLIDE, best first where a CLIP ranks them"
# by destination, None where not given
CODE_OPTIONS = "dvae", "temperature", "top_k", "top_p", "prime", "prime_share"
DIFFUSION_OPTIONS = "sampler", "steps", "eta", "upsample_steps", "gif"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("prompt", help="what to draw, for example 'a green apple'")
    parser.add_argument("--images", type=positive, default=16, metavar="N", help="pictures to draw (16)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="contact sheet to write")
    parser.add_argument("--rerank", type=Path, metavar="PATH", help="a CLIP that sorts the pictures")
    parser.add_argument("--guidance-scale", "--guidance", type=float, metavar="S",
                        help="how strongly to follow the text; 1 draws from the model as it is (1, GLIDE 3)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal ones give equal pictures (0)")
    add_common(parser)

    codes = parser.add_argument_group("DALL-E and DALL-E mini")
    codes.add_argument("--dvae", type=Path, metavar="PATH", help="discrete VAE, where the checkpoint has none")
    codes.add_argument("--temperature", type=float, metavar="T", help="0 takes the likeliest code (1)")
    codes.add_argument("--top-k", type=int, metavar="K", help="codes to draw from; 0 (default): all")
    codes.add_argument("--top-p", type=float, metavar="P", help="share of probability to draw from (1)")
    codes.add_argument("--prime", type=Path, metavar="PICTURE", help="start every picture with the top of this one")
    codes.add_argument("--prime-share", type=float, metavar="SHARE", help="how much of it (0.4375)")
    parser.set_defaults(run=run)
    add_diffusion(parser)


def add_common(parser) -> None:
    """Arguments of every command that draws."""
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="vocabulary, where the checkpoint has none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def add_diffusion(parser) -> None:
    """Arguments of GLIDE."""
    group = parser.add_argument_group("GLIDE")
    group.add_argument("--sampler", choices=("ancestral", "ddim", "plms"), help="(ancestral)")
    group.add_argument("--steps", metavar="N", help="of the sampler: a number, 'ddim50', or numbers for equal sections "
                                                    "of the schedule (100)")
    group.add_argument("--eta", type=float, metavar="E", help="noise of ddim, 0 (default) to 1")
    group.add_argument("--upsample-steps", metavar="N", help="of the upsampler (fast27)")
    group.add_argument("--gif", type=Path, metavar="GIF", help="animation of the denoising to write")


def run(args) -> None:
    check_suffix("--out", args.out, ".png")
    check_suffix("--gif", args.gif, ".gif")
    set_threads(args.threads)
    from ..checkpoints import load
    from ..data import contact_sheet
    from ..models import DALLE, GLIDE, DALLEMini
    from ..tasks.image_generation import to_arrays
    from ..training.distributed import check_device

    device = check_device(args.device)
    model = load(args.model, device=device)
    if not isinstance(model, DALLE | DALLEMini | GLIDE):
        raise ValueError(f"{args.model} is a {type(model).__name__}, must be a DALL-E, DALL-E mini or GLIDE")
    refused = CODE_OPTIONS if isinstance(model, GLIDE) else DIFFUSION_OPTIONS
    for name in refused:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} does not go with {args.model}, a {type(model).__name__}")
    judge = None if args.rerank is None else load(args.rerank, device=device)
    if judge is not None and not hasattr(judge, "encode_image"):
        raise ValueError(f"--rerank: {args.rerank} is a {type(judge).__name__}, must be a CLIP")
    found = (_denoised if isinstance(model, GLIDE) else _decoded)(args, model, judge, device)
    scores = None if found.scores is None else [round(score, 4) for score in found.scores.tolist()]
    titles = None if scores is None else [f"{score:+.3f}" for score in scores]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(to_arrays(found.images), titles, columns=min(args.images, 8), heading=args.prompt).save(args.out)
    if args.json:
        import json

        print(json.dumps({"prompt": args.prompt, "images": args.images, "seed": args.seed, "scores": scores,
                          "sheet": str(args.out)}, indent=2))
        return
    print(f"{args.images} pictures of {args.prompt!r} in {args.out}"
          + ("" if scores is None else f", best first by {args.rerank} ({scores[0]:+.3f} to {scores[-1]:+.3f})"))


def check_suffix(option: str, path: Path | None, suffix: str) -> None:
    if path is not None and path.suffix.lower() != suffix:
        raise ValueError(f"{option} is {path}, must end in {suffix}")


def glide_pipeline(args, model):
    """The pipeline of a GLIDE with its vocabulary."""
    from ..data.gpt2_tokenizer import GPT2Tokenizer
    from ..tasks import GlidePipeline

    if args.tokenizer is not None:
        model.tokenizer = GPT2Tokenizer.from_file(args.tokenizer)
    if model.config.super_res:
        raise ValueError(f"{args.model} is an upsampler, must be a GLIDE that draws")
    if model.tokenizer is None:
        raise ValueError(f"{args.model} has no vocabulary beside it; give --tokenizer")
    return GlidePipeline(model)


def save_animation(recorder, path: Path, heading: str) -> None:
    """Contact sheets of the estimates that a `Recorder` kept, as a GIF."""
    from ..data import contact_sheet
    from ..data.animation import save_gif
    from ..tasks.image_generation import to_arrays

    path.parent.mkdir(parents=True, exist_ok=True)
    save_gif([contact_sheet(to_arrays(frame), columns=min(len(frame), 8), heading=heading)
              for frame in recorder.frames], path)


def _denoised(args, model, judge, device):
    from ..diffusion import Recorder
    from ..tasks.diffusion_generation import PRESETS, schedule_of
    from ..tasks.image_generation import Generated, similarity

    pipe = glide_pipeline(args, model)
    recorder = None
    if args.gif is not None:
        recorder = Recorder(len(schedule_of(model).respace(args.steps or PRESETS["text2im"][0].steps)))
    images = pipe.generate(args.prompt, images=args.images, seed=args.seed, steps=args.steps, sampler=args.sampler,
                           eta=args.eta, guidance_scale=args.guidance_scale, upsample_steps=args.upsample_steps,
                           batch_size=args.batch_size, progress=not args.no_progress, callback=recorder)
    if recorder is not None:
        save_animation(recorder, args.gif, args.prompt)
    if judge is None:
        return Generated(images, None, None)
    scores = similarity(judge, images, args.prompt)
    order = scores.argsort(descending=True, stable=True)
    return Generated(images[order], None, scores[order])


def _decoded(args, model, judge, device):
    from ..data import load_image
    from ..tasks import generate, prime_codes
    from ..tasks.image_generation import PRIME_SHARE
    from .dalle_data import pixels

    _complete(args, model, device)
    prime = None
    if args.prime is not None:
        side = model.image_shape[0] * model.vae.downsample
        share = PRIME_SHARE if args.prime_share is None else args.prime_share
        prime = prime_codes(model, pixels(side)(load_image(args.prime))[None].to(device), share)
    defaults = {"guidance_scale": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    values = {name: default if getattr(args, name) is None else getattr(args, name)
              for name, default in defaults.items()}
    return generate(model, args.prompt, images=args.images, batch_size=args.batch_size, rerank=judge,
                    progress=not args.no_progress, seed=args.seed, prime=prime, **values)


def _complete(args, model, device) -> None:
    """Gives the model everything that drawing needs."""
    from ..checkpoints import load
    from ..models import DALLE

    if args.dvae is not None:
        model.attach_vae(load(args.dvae, device=device))
    if model.vae is None:
        raise ValueError(f"{args.model} has no discrete VAE; give --dvae")
    if args.tokenizer is not None:
        from ..data import BartTokenizer, CLIPTokenizer

        kind = CLIPTokenizer if isinstance(model, DALLE) else BartTokenizer
        model.tokenizer = kind.from_file(args.tokenizer)
    if model.tokenizer is None:
        raise ValueError(f"{args.model} has no vocabulary beside it; give --tokenizer")
