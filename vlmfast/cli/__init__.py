"""The `vlmfast` command. Sub-commands live in modules of their own and import what is heavy when they run."""

import argparse
import importlib
import os
import sys

from ..version import __version__

COMMANDS = ("info", "demo", "train", "retrieve", "answer", "caption", "generate", "inpaint", "tasks")


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0, 2 for what the user can mend, 130 after Ctrl-C."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print(f"\n{args.prog}: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output has gone; the interpreter must not try to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug or not _is_users(error):
            raise
        print(f"{args.prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Bad files and arguments, and a diverged training; anything else is our mistake and shows its traceback."""
    if isinstance(error, OSError | ValueError):
        return True
    return type(error).__name__ in ("NonFiniteLoss", "OutOfMemoryError")


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    parser = argparse.ArgumentParser(prog="vlmfast", description="Vision-language models and fused kernels.",
                                     parents=[common])
    parser.add_argument("--version", action="version", version=f"vlmfast {__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for name in COMMANDS:
        module = importlib.import_module(f"{__name__}.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP, parents=[common])
        command.set_defaults(prog=f"vlmfast {name}")
        module.add_arguments(command, common)
    return parser


def positive(text: str) -> int:
    """An argument that counts something."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"is {value}, must be at least 1")
    return value


def set_threads(count: int | None) -> None:
    """Threads of PyTorch and of the native core, which follows it."""
    if count is not None:
        import torch

        torch.set_num_threads(count)
