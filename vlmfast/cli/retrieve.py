"""`vlmfast retrieve`: search a folder of pictures with a sentence."""

from pathlib import Path

from . import positive, set_threads

HELP = "rank the pictures of a folder for a sentence"


def add_arguments(parser, common) -> None:
    parser.add_argument("model", type=Path, help="run folder or checkpoint")
    parser.add_argument("query", help="what to look for, for example 'a red car'")
    parser.add_argument("--images", type=Path, required=True, metavar="FOLDER", help="searched with its subfolders")
    parser.add_argument("--top", type=positive, default=10, metavar="N", help="answers to show (10)")
    parser.add_argument("--out", type=Path, metavar="PNG", help="write a contact sheet of the answers")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="keep features of the pictures here")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH", help="vocabulary, where the checkpoint has none")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="pictures encoded at a time (64)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1 ...")
    parser.add_argument("--threads", type=positive, metavar="N")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args) -> None:
    import json
    import sys

    if args.out is not None and args.out.suffix.lower() != ".png":
        raise ValueError(f"--out is {args.out}, must end in .png")
    set_threads(args.threads)
    from ..checkpoints import load
    from ..tasks import Retriever
    from ..tasks.retrieval import list_images
    from ..training.distributed import check_device

    device = check_device(args.device)
    files = list_images(args.images)
    model = load(args.model, device=device)
    tokenizer = None
    if args.tokenizer is not None:
        from ..data import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_file(args.tokenizer, context_length=model.config.context_length)
    elif model.tokenizer is None:
        raise ValueError(f"{args.model} has no vocabulary beside it; give --tokenizer")
    retriever = Retriever(model, tokenizer=tokenizer, batch_size=args.batch_size)
    retriever.add(files, cache=args.cache, progress=not args.no_progress)
    matches = retriever.search(args.query, args.top)
    if args.out is not None:
        _sheet(args.query, matches, args.out)
    if args.json:
        print(json.dumps({
            "query": args.query,
            "images": len(retriever.paths),
            "matches": [{"path": str(match.path), "score": round(match.score, 6)} for match in matches],
            "skipped": [{"path": str(path), "reason": reason} for path, reason in retriever.skipped],
            "sheet": None if args.out is None else str(args.out),
        }, indent=2))
        return
    for rank, match in enumerate(matches, 1):
        print(f"{rank:3d}  {match.score:+.4f}  {match.path}")
    print(f"{len(retriever.paths)} pictures searched" + (f"; contact sheet in {args.out}" if args.out else ""))
    if retriever.skipped:
        path, reason = retriever.skipped[0]
        print(f"{len(retriever.skipped)} files skipped, for example {path}: {reason}", file=sys.stderr)


def _sheet(query: str, matches, path: Path) -> None:
    from ..data import contact_sheet, load_image

    pictures = [load_image(match.path) for match in matches]
    titles = [f"{match.score:+.3f} {match.path.name}" for match in matches]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(pictures, titles, columns=5, heading=query).save(path)
