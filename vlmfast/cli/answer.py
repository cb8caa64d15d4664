"""`vlmfast answer`: a question about a picture, by its region features or, with Pixel-BERT, its pixels."""

from pathlib import Path

from . import positive, set_threads

HELP = "answer a question about a picture"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint of a BERT-like model with an answer head")
    parser.add_argument("question", help="for example 'what is on the table?'")
    parser.add_argument("--regions", type=Path, metavar="FILE",
                        help="region features: .tsv, .npz, .npy, LMDB, HDF5, or a folder of .npz/.npy; Pixel-BERT "
                        "needs none")
    parser.add_argument("--image-id", metavar="ID", help="picture in FILE, where it holds several")
    parser.add_argument("--image", type=Path, metavar="PHOTO", help="the picture itself, for Pixel-BERT and --show")
    parser.add_argument("--image-size", type=positive, metavar="N", help="pixels of the longer side (Pixel-BERT: 768)")
    parser.add_argument("--show", type=Path, nargs="?", const=Path(), metavar="PNG",
                        help="draw what words and regions attend to (by default into attention.png)")
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="cross-modal layer of --show (the last)")
    parser.add_argument("--top", type=positive, default=5, metavar="N", help="answers to show (5)")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="list of answers, where the checkpoint has none")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="vocab.txt, where the checkpoint has none")
    parser.add_argument("--task", choices=("vqa", "gqa"), help="answer head (vqa; gqa where the model has only that)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.set_defaults(run=run)


def run(args) -> None:
    import json

    if args.show == Path():
        args.show = Path("attention.png")
    _check_pictures(args.show, args.image)
    set_threads(args.threads)
    from ..data import load_image
    from ..training.distributed import check_device

    device = check_device(args.device)
    image = None if args.image is None else load_image(args.image)
    regions = None if args.regions is None else _regions(args)
    task = _task(args, device)
    if task.pixels:
        if image is None:
            raise ValueError(f"{args.model} is a {task.kind}, which reads pixels; give --image")
        name, picture, what = args.image.name, image, "read by its pixels"
    else:
        if regions is None:
            raise ValueError(f"{args.model} is a {task.kind}, which reads region features; give --regions")
        name, picture, what = regions.image_id, regions, f"{len(regions)} regions"
    answer = task(args.question, picture, top=args.top, attention=args.show is not None)
    if args.show is not None:
        args.show.parent.mkdir(parents=True, exist_ok=True)
        title = f"{args.question.strip()}  {answer} ({100 * answer.probability:.0f} %)"
        answer.attention.draw(image, title=title, layer=args.layer).save(args.show)
    if args.json:
        print(json.dumps({
            "question": args.question,
            "image_id": name,
            "regions": None if task.pixels else len(regions),
            "answers": [{"answer": text, "probability": round(value, 6)} for text, value in answer.top],
            "picture": None if args.show is None else str(args.show),
        }, ensure_ascii=False, indent=2))
        return
    width = max(len(text) for text, _ in answer.top)
    for rank, (text, value) in enumerate(answer.top, 1):
        print(f"{rank:3d}  {text:{width}}  {value:.4f}")
    shown = "" if args.show is None else f"; attention in {args.show}"
    print(f"picture {name}, {what}{shown}")


def _regions(args):
    """Those of the picture that the arguments mean."""
    from ..data import RegionFeatures

    try:
        features = RegionFeatures.open(args.regions)
    except ImportError as error:
        raise ValueError(f"--regions {args.regions}: {error}") from error
    return features[_image_id(features, args.image_id, args.image)]


def _check_pictures(show: Path | None, image: Path | None) -> None:
    if show is None:
        return
    if show.suffix.lower() != ".png":
        raise ValueError(f"--show is {show}, must end in .png")
    if image is None:
        raise ValueError("--show draws over the picture; give --image")


def _image_id(features, wanted: str | None, image: Path | None) -> str:
    """The id given, the only one of the file, or the one that the picture's name says."""
    some = ", ".join(features.ids[:5]) + (" ..." if len(features) > 5 else "")
    if wanted is not None:
        if wanted not in features:
            raise ValueError(f"--image-id is {wanted}, the region file holds {some}")
        return wanted
    if len(features) == 1:
        return features.ids[0]
    if image is not None:
        for name in (image.stem, image.name):
            if name in features:
                return name
    raise ValueError(f"--image-id: the region file holds {len(features)} pictures, name one of {some}")


def _task(args, device):
    """The question answering task of the model with its tokenizer and answers."""
    from ..checkpoints import load
    from ..data import WordPieceTokenizer
    from ..tasks import GQA, MODELS, VQA, read_answers
    from ..tasks.answers import find_answers

    model = load(args.model, device=device)
    if not hasattr(model, "available"):
        raise ValueError(f"{args.model} is a {type(model).__name__}, must be one of {', '.join(MODELS)}")
    tokenizer = None if args.tokenizer is None else WordPieceTokenizer.from_file(args.tokenizer)
    if tokenizer is None and model.tokenizer is None:
        raise ValueError(f"{args.model} has no vocabulary beside it; give --tokenizer")
    answers = args.answers or find_answers(args.model)
    if answers is None:
        raise ValueError(f"{args.model} has no list of answers beside it; give --answers")
    heads = model.available()
    name = args.task or ("gqa" if "gqa" in heads and "vqa" not in heads else "vqa")
    return {"vqa": VQA, "gqa": GQA}[name](model, read_answers(answers), tokenizer=tokenizer,
                                          preprocess=_preprocess(model, args.image_size))


def _preprocess(model, size: int | None):
    """How Pixel-BERT's pictures are prepared, where their size is given."""
    from dataclasses import replace

    from ..tasks.pair_pictures import pixel_preprocess

    if size is None:
        return None
    if not hasattr(model.config, "img_pixel_mean"):
        raise ValueError(f"--image-size belongs to Pixel-BERT, the model is a {type(model).__name__}")
    return replace(pixel_preprocess(model.config), image_size=size)
