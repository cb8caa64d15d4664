"""`vlmfast tasks`: which model does which task."""

HELP = "list the tasks and the models that do them"


def add_arguments(parser, common) -> None:
    parser.add_argument("--task", metavar="NAME", help="one task, with heads, losses and metrics")
    parser.add_argument("--model", metavar="NAME", help="one model, likewise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args) -> None:
    import json
    from dataclasses import asdict

    from ..tasks.catalogue import table

    rows = table(args.task, args.model)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    elif args.task or args.model:
        names = ("task", "model", "heads", "reads", "loss", "vlmfast.tasks.", "metric")
        _print([names] + [(row.task, row.model, ", ".join(row.heads) or "-", row.reads, row.loss or "-", row.interface,
                           ", ".join(row.metric)) for row in rows])
    else:
        models = list(dict.fromkeys(row.model for row in rows))
        lines = [("", *models)]
        for task in dict.fromkeys(row.task for row in rows):
            does = {row.model for row in rows if row.task == task}
            lines.append((task, *("x" if model in does else "." for model in models)))
        _print(lines)
        print("\nheads, losses and metrics: vlmfast tasks --task NAME, vlmfast tasks --model NAME")


def _print(lines) -> None:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
