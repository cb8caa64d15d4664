"""Where a figure was measured, and whether the family's tests pass there."""

from __future__ import annotations

import datetime
import importlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("vlmfast", "torch", "numpy", "triton", "open_clip_torch", "diffusers")


def commit(root: Path = ROOT) -> str:
    """Short hash, with `+dirty` where the tree differs from it; "unknown" outside a repository."""

    def git(*args: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        head = git("rev-parse", "--short=12", "HEAD")
        return head + ("+dirty" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1) if match else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def isa() -> str:
    """The instruction set vlmfast's native core picked, or "none" where there is no native core."""
    try:
        return importlib.import_module("vlmfast._native").build_info()["isa"]
    except ImportError:
        return "none"


def describe(device: str = "cpu") -> dict:
    """Everything about machine and software that the rows do not carry themselves, and what they do."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "isa": isa(),
        "backend": os.environ.get("VLMFAST_BACKEND") or "auto",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "platform": platform.platform(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "versions": versions(),
    }


@dataclass(frozen=True)
class Gate:
    """Outcome of a family's tests: `status` is "green", "red", "missing" (no such file) or "not run"."""

    status: str
    text: str

    @property
    def may_report(self) -> bool:
        return self.status != "red"


def run_tests(path: str, root: Path = ROOT, command: Sequence[str] = ("-m", "pytest", "-q")) -> Gate:
    """Runs a family's tests, one file or several parted by blanks, in a new process.

    Green needs at least one test that passed, none that failed.
    """
    if missing := [part for part in path.split() if not (root / part).is_file()]:
        return Gate("missing", f"WARNING: {missing[0]} is not there; the figures below come from untested code")
    done = subprocess.run([sys.executable, *command, *path.split()], cwd=root, capture_output=True, text=True)
    output = (done.stdout + done.stderr).strip()
    last = output.splitlines()[-1].strip("= ") if output else "no output"
    if done.returncode == 0 and re.search(r"\b[1-9]\d* passed", done.stdout):
        return Gate("green", f"{path}: {last}")
    return Gate("red", "\n".join(output.splitlines()[-30:]) + f"\n{path} is red: no speed is reported")
