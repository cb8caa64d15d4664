"""The built package: what the native module needs, what the wheel holds, and that both work away from the source."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import vlmfast._native

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = ("libstdc++", "libgcc_s", "libc.so", "libm.so", "libdl", "libpthread", "librt", "ld-linux")

WITHOUT_TORCH = """
import importlib.util, sys
import numpy as np
assert importlib.util.find_spec("torch") is None, "torch must not be installed here"
import vlmfast._native as native
rng = np.random.default_rng(0)
image, text = rng.standard_normal((50, 12), np.float32), rng.standard_normal((50, 12), np.float32)
scale, loss = np.float32([0.5]), np.zeros(1, np.float32)
rows, columns = np.zeros((2, 50)), np.zeros((2, 50))
at = lambda array: array.ctypes.data
pairs = native.pairs(at(image), at(text), 0, 50, 50, 12, 12, 12, at(scale), 0, 0, 0, 0, 0, 0, 0, 2)
assert native.info_nce_fwd(pairs, False, at(rows), at(columns), 0, at(loss), True, True, 0.0) == 0
logits = 0.5 * image.astype(float) @ text.T
lse = lambda x, axis: np.log(np.exp(x).sum(axis))
truth = (lse(logits, 1).mean() + lse(logits, 0).mean()) / 2 - np.diag(logits).mean()
assert abs(loss[0] - truth) < 1e-5, (loss, truth)
assert "torch" not in sys.modules
print("native", native.build_info()["isa"])
"""

WITH_TORCH = """
import torch, vlmfast
from vlmfast.ops import info_nce
import vlmfast.kernels, vlmfast.data
image, text = torch.randn(9, 4, requires_grad=True), torch.randn(9, 4)
info_nce(image, text, 1.0).backward()
assert image.grad.abs().sum() > 0
pairs = vlmfast.data.load_emoji()
assert len(pairs.images) == len(pairs.captions) > 3000
print("smoke", vlmfast.__version__)
"""


def python(executable, script, *flags, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run([str(executable), *flags, "-c", script], capture_output=True, text=True, check=False,
                          env=environment, **kwargs)


def run(*command, **kwargs):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **kwargs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built with the tools of this environment."""
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, ROOT)
    (path,) = out.glob("*.whl")
    return path


def test_the_native_module_needs_no_torch_library():
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    lines = run("readelf", "-d", vlmfast._native.__file__).splitlines()
    needed = [line.split("[")[1].rstrip("]") for line in lines if "(NEEDED)" in line]
    assert needed and all(name.startswith(ALLOWED) for name in needed), needed
    assert not any("RUNPATH" in line or "RPATH" in line for line in lines)


def test_an_unbuilt_source_tree_says_so(tmp_path):
    shutil.copytree(ROOT / "vlmfast", tmp_path / "vlmfast", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "csrc").mkdir()
    # without site-packages, where an editable installation would still find the module
    done = python(sys.executable, "import sys; sys.path.insert(0, '.'); import vlmfast", "-S", cwd=tmp_path)
    assert done.returncode != 0 and "imported from its source tree, which is not built" in done.stderr


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"vlmfast", f"vlmfast-{vlmfast.__version__}.dist-info"}
    for part in ("kernels/info_nce.py", "ops/reference/info_nce.py", "data/emoji/NOTICE", "data/emoji/emoji32.bin.xz",
                 "models/clip.py", "cli/__init__.py"):
        assert f"vlmfast/{part}" in names
    modules = [name for name in names if name.endswith(".so")]
    assert len(modules) == 1 and modules[0].startswith("vlmfast/_native.")
    assert wheel.stat().st_size < 6 << 20


@pytest.mark.slow
def test_the_native_module_works_without_torch(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env")
    executable = tmp_path / "env" / "bin" / "python"
    run(executable, "-m", "pip", "install", "-q", "numpy")
    run(executable, "-m", "pip", "install", "-q", "--no-deps", wheel)
    done = python(executable, WITHOUT_TORCH, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("native"), done.stderr


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment(wheel, tmp_path):
    run(sys.executable, "-m", "venv", tmp_path / "env")
    executable = tmp_path / "env" / "bin" / "python"
    run(executable, "-m", "pip", "install", "-q", f"torch=={torch.__version__.split('+')[0]}", wheel)
    done = python(executable, WITH_TORCH, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("smoke"), done.stderr
    assert "available" in run(tmp_path / "env" / "bin" / "vlmfast", "info", cwd=tmp_path)


@pytest.mark.slow
def test_a_build_in_isolation_succeeds(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path, ROOT)
    assert len(list(tmp_path.glob("*.whl"))) == 1
