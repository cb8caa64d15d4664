"""The native core's instruction sets against each other, each in a process of its own."""

import os
import subprocess
import sys

import torch

from vlmfast import _native


def assert_agree(script: str, tolerance: float = 3e-6) -> None:
    """`script` prints the name of its instruction set and then numbers, which all sets of this machine must share."""
    results = {}
    for isa in ("scalar", "avx2", "avx512", "avx512bf16"):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                              env={**os.environ, "VLMFAST_ISA": isa}, check=False)
        if done.returncode and "the widest available here" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        name, *numbers = done.stdout.split()
        assert name == isa
        results[isa] = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    assert "scalar" in results and _native.build_info()["isa"] in results
    for numbers in results.values():
        assert ((numbers / results["scalar"] - 1).abs() < tolerance).all(), results
