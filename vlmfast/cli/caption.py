"""`vlmfast caption`: a sentence about a picture, or its translation of a text."""

from pathlib import Path

from . import positive, set_threads

HELP = "write a caption of a picture, or translate a text with its picture"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint of an ImageSeq2Seq, VD-BERT or UNITER")
    parser.add_argument("images", type=Path, nargs="*", metavar="PHOTO",
                        help="pictures, before the options; a line each")
    parser.add_argument("--regions", type=Path, metavar="FILE", help="region features, for models that read those: "
                        ".tsv, .npz, .npy, LMDB, HDF5, or a folder of .npz/.npy")
    parser.add_argument("--image-id", metavar="ID", action="append", help="picture in FILE, again for more (all)")
    parser.add_argument("--translate", metavar="TEXT", help="translate this text, with the picture if there is one")
    parser.add_argument("--beams", type=positive, metavar="N", help="hypotheses of beam search (5)")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw words from the nucleus of this probability")
    parser.add_argument("--temperature", type=float, metavar="T", help="of drawing; below 1 is less adventurous (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawing (0)")
    parser.add_argument("--max-tokens", type=positive, default=30, metavar="N", help="longest text (30)")
    parser.add_argument("--length-penalty", type=float, metavar="A", help="above 0 favours longer texts (1)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="vocab.txt, where the checkpoint has none")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.set_defaults(run=run)


def run(args) -> None:
    import json

    import torch

    generation = _generation(args)
    if args.image_id and args.regions is None:
        raise ValueError("--image-id names a picture in --regions, which is missing")
    if args.regions is not None and args.images:
        raise ValueError("--regions: give either pictures or region features, not both")
    set_threads(args.threads)
    from ..checkpoints import load
    from ..data import WordPieceTokenizer
    from ..tasks import Captioner, Translator
    from ..training.distributed import check_device

    device = check_device(args.device)
    names, pictures = _regions(args) if args.regions is not None else _pictures(args.images)
    model = load(args.model, device=device)
    tokenizer = None if args.tokenizer is None else WordPieceTokenizer.from_file(args.tokenizer)
    kind = Captioner if args.translate is None else Translator
    if not isinstance(model, kind.models):
        must = " or ".join(one.__name__ for one in kind.models)
        raise ValueError(f"{args.model} is a {type(model).__name__}, must be {must}")
    if tokenizer is None and model.tokenizer is None:
        raise ValueError(f"{args.model} has no vocabulary beside it; give --tokenizer")
    task = kind(model, generation, tokenizer=tokenizer)
    _check_kind(args, model, pictures)
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.translate is None:
        found = task.hypotheses(pictures, generator=generator)
    else:
        names = names or [""]
        found = task.hypotheses([args.translate] * len(names), pictures or None, generator=generator)
    texts = [task.text(hypothesis) for hypothesis in found]
    if args.json:
        print(json.dumps([{"image": name or None, "text": text, "log_probability": round(one.log_probability, 6),
                           "finished": one.finished} for name, text, one in zip(names, texts, found, strict=True)],
                         ensure_ascii=False, indent=2))
        return
    for name, text in zip(names, texts, strict=True):
        print(text if len(texts) == 1 else f"{name}  {text}")


def _generation(args):
    from ..tasks.generation import Generation

    if args.top_p is not None:
        for name in ("beams", "length_penalty"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} belongs to beam search, --top-p draws; give one of them")
    elif args.temperature is not None:
        raise ValueError("--temperature belongs to drawing; give --top-p")
    names = ("beams", "top_p", "temperature", "length_penalty", "max_tokens")
    return Generation(**{name: value for name in names if (value := getattr(args, name)) is not None})


def _pictures(paths: list[Path]) -> tuple[list[str], list]:
    from ..data import load_image

    return [str(path) for path in paths], [load_image(path) for path in paths]


def _regions(args) -> tuple[list[str], list]:
    from ..data import RegionFeatures

    try:
        features = RegionFeatures.open(args.regions)
    except ImportError as error:
        raise ValueError(f"--regions {args.regions}: {error}") from error
    names = args.image_id or list(features.ids)
    for name in names:
        if name not in features:
            some = ", ".join(features.ids[:5]) + (" ..." if len(features) > 5 else "")
            raise ValueError(f"--image-id is {name}, the region file holds {some}")
    return names, [features[name] for name in names]


def _check_kind(args, model, pictures: list) -> None:
    """Pictures for models of pixels, regions for models of regions."""
    visual = getattr(model.config, "visual", "regions")
    if not pictures and args.translate is None:
        raise ValueError(f"there is no picture; give {'PHOTO' if visual == 'grid' else '--regions'}")
    wrong = args.regions is not None if visual == "grid" else bool(args.images)
    if pictures and (wrong or visual == "none"):
        reads = {"grid": "pictures; give PHOTO", "regions": "region features; give --regions", "none": "texts alone"}
        raise ValueError(f"{args.model} is a {type(model).__name__} that reads {reads[visual]}")
