"""open_clip's model code without its optional dependencies."""

import importlib
import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def open_clip():
    """open_clip's `model` module; stand-ins replace torchvision, timm and transformers while it is imported."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        pytest.skip("open_clip is not installed")
    package = types.ModuleType("open_clip")
    package.__path__ = list(spec.submodule_search_locations)
    misc = types.ModuleType("torchvision.ops.misc")
    misc.FrozenBatchNorm2d = torch.nn.BatchNorm2d
    stand_ins = {"open_clip": package, "torchvision": types.ModuleType("torchvision"), "timm": None,
                 "torchvision.ops": types.ModuleType("torchvision.ops"), "torchvision.ops.misc": misc,
                 "transformers": None}
    before = dict(sys.modules)
    sys.modules.update(stand_ins)
    try:
        module = importlib.import_module("open_clip.model")
    finally:
        for name in [name for name in sys.modules if name.startswith("open_clip") or name in stand_ins]:
            del sys.modules[name]
        sys.modules.update({name: old for name, old in before.items() if name not in sys.modules})
    module.public_config = lambda name: json.loads(
        (Path(spec.submodule_search_locations[0]) / "model_configs" / f"{name}.json").read_text()
    )
    return module
