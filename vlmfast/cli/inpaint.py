"""`vlmfast inpaint`: paint a part of a picture anew, after a text."""

from pathlib import Path

from . import positive, set_threads
from .generate import add_common, add_diffusion, check_suffix, glide_pipeline, save_animation

HELP = "paint a part of a picture anew, after a text, with GLIDE"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint; best one trained to inpaint")
    parser.add_argument("picture", type=Path, help="its centre square is used")
    parser.add_argument("prompt", help="what the picture shall show, for example 'a vase of flowers'")
    parser.add_argument("--mask", type=Path, required=True, metavar="PICTURE",
                        help="as large as the picture: white is painted anew, black stays")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG",
                        help="picture to write; with --images a contact sheet, the given picture first")
    parser.add_argument("--images", type=positive, metavar="N", help="how many to draw (1)")
    parser.add_argument("--guidance-scale", "--guidance", type=float, metavar="S",
                        help="how strongly to follow the text; 1 draws from the model as it is (5)")
    parser.add_argument("--batch-size", type=positive, default=16, metavar="N", help="pictures at a time (16)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal ones give equal pictures (0)")
    add_common(parser)
    add_diffusion(parser)
    parser.set_defaults(run=run)


def run(args) -> None:
    check_suffix("--out", args.out, ".png")
    check_suffix("--gif", args.gif, ".gif")
    set_threads(args.threads)
    from PIL import Image

    from ..checkpoints import load
    from ..data import contact_sheet, load_image
    from ..diffusion import Recorder
    from ..models import GLIDE
    from ..tasks.diffusion_generation import PRESETS, schedule_of
    from ..tasks.image_generation import to_arrays
    from ..training.distributed import check_device

    model = load(args.model, device=check_device(args.device))
    if not isinstance(model, GLIDE):
        raise ValueError(f"{args.model} is a {type(model).__name__}, must be a GLIDE")
    pipe = glide_pipeline(args, model)
    recorder = None
    if args.gif is not None:
        recorder = Recorder(len(schedule_of(model).respace(args.steps or PRESETS["inpaint"][0].steps)))
    picture = load_image(args.picture)
    images = pipe.generate(args.prompt, images=args.images or 1, seed=args.seed, steps=args.steps, sampler=args.sampler,
                           eta=args.eta, guidance_scale=args.guidance_scale, upsample_steps=args.upsample_steps,
                           image=picture, mask=load_image(args.mask), batch_size=args.batch_size,
                           progress=not args.no_progress, callback=recorder)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if args.images is None:
        Image.fromarray(to_arrays(images)[0]).save(args.out)
    else:
        shown = [_square(picture, images.shape[-1]), *to_arrays(images)]
        contact_sheet(shown, columns=min(len(shown), 8), heading=args.prompt).save(args.out)
    if recorder is not None:
        save_animation(recorder, args.gif, args.prompt)
    if args.json:
        import json

        print(json.dumps({"prompt": args.prompt, "picture": str(args.picture), "images": len(images),
                          "seed": args.seed, "out": str(args.out)}, indent=2))
        return
    print(f"{args.picture} with {args.prompt!r} in {args.out}")


def _square(picture, side: int):
    from ..data import ImagePreprocess

    return ImagePreprocess(side, (0.0,) * 3, (1.0,) * 3).square(picture)
