"""Runs the interpreted kernel tests in a process where Triton interprets, so that plain `pytest` covers them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="they are collected by this very run")
@pytest.mark.parametrize("name", sorted(path.name for path in FOLDER.glob("test_*_interpreter.py")))
def test_kernels_pass_in_the_interpreter(name):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name], cwd=FOLDER,
                         env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout, run.stdout


def test_importing_the_package_leaves_triton_alone():
    assert importlib.util.find_spec("vlmfast.kernels") is not None
    code = "import sys, vlmfast.kernels; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER).returncode == 0
