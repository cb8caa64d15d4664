"""`vlmfast demo`: train a small CLIP, DALL-E or GLIDE on the embedded emoji and show what it learned."""

from pathlib import Path

from . import positive, set_threads

HELP = "train a small CLIP (or DALL-E: generate, or GLIDE: diffusion) on the embedded emoji and show what it learned"


def add_arguments(parser, common) -> None:
    parser.add_argument("what", nargs="?", choices=("clip", "generate", "diffusion"), default="clip",
                        help="clip (default): pictures and captions that find each other; generate: a discrete VAE and "
                             "a DALL-E that draws from captions; diffusion: a GLIDE that does")
    parser.add_argument("--out", type=Path, metavar="FOLDER",
                        help="report.md, pictures, curves and the model (demo, demo-generate, demo-diffusion)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and held-out pictures (0)")
    parser.add_argument("--seconds", type=float, metavar="S",
                        help="stop training after about S seconds (default: the full run)")
    parser.add_argument("--threads", type=positive, default=1, metavar="N", help="(1)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(args) -> int:
    if args.seconds is not None and not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds is {args.seconds}, must be positive")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}, must be 0 or more")
    args.out = args.out or Path("demo" if args.what == "clip" else f"demo-{args.what}")
    args.out.mkdir(parents=True, exist_ok=True)
    set_threads(args.threads)
    import torch

    # unused words' second moments fade into subnormal numbers, which the processor handles a hundred times slower
    torch.set_flush_denormal(True)
    try:
        return _demo(args) if args.what == "clip" else _draw(args)
    finally:
        torch.set_flush_denormal(False)


def _demo(args) -> int:
    import time

    from ..checkpoints import save_pretrained
    from ..training.log import draw_curve
    from . import demo_report as report
    from .demo_model import Experiment
    from .info import collect

    facts = collect()
    for name, state in facts["backends"].items():
        print(f"{name:10} {state}")
    experiment = Experiment.prepare(args.seed)
    print(experiment.describe(), flush=True)

    wall, cpu = time.perf_counter(), time.process_time()
    result = experiment.train(args.seconds, progress=not args.no_progress)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if result.interrupted:
        print(f"stopped at step {result.step} of {result.total}")
        return 130
    print(f"trained {result.step} steps in {wall:.0f} s ({cpu:.0f} s of CPU time), "
          f"last loss {result.records[-1]['loss']:.3f}\n", flush=True)

    rows = experiment.recalls()
    print(report.recall_table(rows), flush=True)
    comparison = report.compare_losses(experiment)
    print(report.loss_table(comparison), flush=True)
    experiment.retrieval_sheet().save(args.out / "retrieval.png")
    draw_curve(result.records, args.out / "loss.png")
    save_pretrained(experiment.model, args.out / "model")
    total = time.process_time()
    text = report.document(facts, experiment, result, rows, comparison, wall, cpu, args)
    (args.out / "report.md").write_text(text, encoding="utf-8")
    print(f"wrote {args.out}/report.md, retrieval.png, loss.png and model/ ({total:.0f} s of CPU time in all); try\n"
          f"  vlmfast retrieve {args.out}/model --images FOLDER \"a red car\"")
    return 0


def _draw(args) -> int:
    from . import demo_diffusion, demo_pictures
    from .info import collect

    command = f"vlmfast demo {args.what} --seed {args.seed} --threads {args.threads}" + (
        f" --seconds {args.seconds:g}" if args.seconds is not None else "")
    run, write = (demo_pictures.Drawing, demo_pictures.write) if args.what == "generate" else (
        demo_diffusion.Diffusion, demo_diffusion.write)
    return write(run.prepare(args.seed), args.out, command, collect(), args.seconds, not args.no_progress)
