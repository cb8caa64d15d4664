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
