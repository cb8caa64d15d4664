"""`vlmfast info`: what is installed and what will run."""

HELP = "version, build, instruction set in use, and which backends are there or why not"


def add_arguments(parser, common) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def collect() -> dict:
    """Everything `vlmfast info` shows, in plain values."""
    import platform

    import torch

    from .. import __version__, _native, ops

    build = getattr(_native, "build_info", dict)()
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "vlmfast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda_devices": [torch.cuda.get_device_name(i) for i in devices],
        "build": {str(key): value if isinstance(value, int | float | bool) else str(value)
                  for key, value in dict(build).items()},
        "backends": dict(ops.backends()),
    }


def run(args) -> None:
    facts = collect()
    if args.json:
        import json

        print(json.dumps(facts, indent=2))
        return
    print(f"vlmfast {facts['vlmfast']}   Python {facts['python']}   PyTorch {facts['torch']}   {facts['platform']}")
    print(f"threads  {facts['threads']}")
    print(f"GPUs     {', '.join(facts['cuda_devices']) or 'none'}")
    for title in ("build", "backends"):
        print(title)
        width = max((len(key) for key in facts[title]), default=0)
        for key, value in facts[title].items():
            print(f"  {key:{width}}  {value}")
