"""`vlmfast generate`: draw pictures of a text."""

from pathlib import Path

from . import positive, set_threads

HELP = "draw pictures of a text with DALL-E or DALL-E mini, best first where a CLIP ranks them"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("prompt", help="what to draw, for example 'a green apple'")
    parser.add_argument("--images", type=positive, default=16, metavar="N", help="pictures to draw (16)")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG", help="contact sheet to write")
    parser.add_argument("--rerank", type=Path, metavar="PATH", help="a CLIP that sorts the pictures")
    parser.add_argument("--dvae", type=Path, metavar="PATH", help="discrete VAE, where the checkpoint has none")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="vocabulary, where the checkpoint has none")
    parser.add_argument("--guidance", type=float, default=1.0, metavar="S",
                        help="how strongly to follow the text; 1 (default) draws from the model as it is")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 takes the likeliest code (1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="codes to draw from; 0 (default): all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="share of probability to draw from (1)")
    parser.add_argument("--prime", type=Path, metavar="PICTURE", help="start every picture with the top of this one")
    parser.add_argument("--prime-share", type=float, default=0.4375, metavar="SHARE", help="how much of it (0.4375)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal ones give equal pictures (0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args) -> None:
    import json

    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {args.out}, must end in .png")
    set_threads(args.threads)
    from ..checkpoints import load
    from ..data import contact_sheet, load_image
    from ..tasks import generate, prime_codes
    from ..tasks.image_generation import to_arrays
    from ..training.distributed import check_device
    from .dalle_data import pixels

    device = check_device(args.device)
    model = _model(args, device)
    judge = None if args.rerank is None else load(args.rerank, device=device)
    if judge is not None and not hasattr(judge, "encode_image"):
        raise ValueError(f"--rerank: {args.rerank} is a {type(judge).__name__}, must be a CLIP")
    prime = None
    if args.prime is not None:
        side = model.image_shape[0] * model.vae.downsample
        prime = prime_codes(model, pixels(side)(load_image(args.prime))[None].to(device), args.prime_share)
    found = generate(model, args.prompt, images=args.images, batch_size=args.batch_size, rerank=judge,
                     progress=not args.no_progress, seed=args.seed, guidance_scale=args.guidance,
                     temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, prime=prime)
    scores = None if found.scores is None else [round(score, 4) for score in found.scores.tolist()]
    titles = None if scores is None else [f"{score:+.3f}" for score in scores]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(to_arrays(found.images), titles, columns=min(args.images, 8), heading=args.prompt).save(args.out)
    if args.json:
        print(json.dumps({"prompt": args.prompt, "images": args.images, "seed": args.seed, "scores": scores,
                          "sheet": str(args.out)}, indent=2))
        return
    print(f"{args.images} pictures of {args.prompt!r} in {args.out}"
          + ("" if scores is None else f", best first by {args.rerank} ({scores[0]:+.3f} to {scores[-1]:+.3f})"))


def _model(args, device):
    """The model with everything that drawing needs."""
    from ..checkpoints import load
    from ..models import DALLE, DALLEMini

    model = load(args.model, device=device)
    if not isinstance(model, DALLE | DALLEMini):
        raise ValueError(f"{args.model} is a {type(model).__name__}, must be a DALL-E or DALL-E mini")
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
    return model
