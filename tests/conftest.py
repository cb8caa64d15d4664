"""Fixtures shared by all tests; reference numbers and image sets live beside the checkout and are optional."""

import json
import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("VLMFAST_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with data sets and reference numbers; skips where it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared data at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared_dir):
    """`golden("encoders/clip__vit_tiny")` -> (weights, inputs, outputs, metadata) of one reference file."""
    from safetensors import safe_open

    def read(name: str):
        path = shared_dir / "golden" / f"{name}.safetensors"
        if not path.is_file():
            pytest.skip(f"no reference file {path}")
        parts: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata())
            for key in file.keys():
                kind, name = key.split("/", 1)
                parts[kind][name] = file.get_tensor(key)
        metadata["config"] = json.loads(metadata["config"])
        return parts["weights"], parts["inputs"], parts["outputs"], metadata

    return read


@pytest.fixture(scope="session")
def golden_close():
    """The rule of the reference numbers: slice by slice, max |a - b| <= tolerance * max(|b_slice|, |b| / 1000)."""

    def check(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
        assert ours.shape == theirs.shape, f"shape {tuple(ours.shape)}, must be {tuple(theirs.shape)}"
        ours, theirs = (x.detach().double().reshape(x.shape[0] if x.ndim else 1, -1) for x in (ours, theirs))
        size = theirs.abs().amax(1).clamp(min=theirs.abs().max() / 1000)
        error = (ours - theirs).abs().amax(1) / size
        assert error.max() <= tolerance, f"relative error {error.max():.3g}, at most {tolerance}"

    return check
