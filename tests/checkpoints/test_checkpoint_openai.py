"""OpenAI's TorchScript archives."""

import pytest
import torch
from checkpoint_helpers import tiny_model

from vlmfast.checkpoints import detect_format, load
from vlmfast.checkpoints.openai import infer_config
from vlmfast.checkpoints.torchscript import read_torchscript
from vlmfast.models import CLIPConfig, create, list_models

DTYPES = {"float16": torch.float16, "float32": torch.float32, "int64": torch.int64}


@pytest.fixture
def archive(golden, shared_dir):
    _, inputs, outputs, metadata = golden("encoders/clip_torchscript__vit")
    return shared_dir / "golden" / "encoders" / metadata["config"]["archive"], inputs, outputs, metadata


def test_archive_gives_exactly_its_tensors(archive):
    path, _, _, metadata = archive
    state = read_torchscript(path)
    assert {key: (value.dtype, list(value.shape)) for key, value in state.items()} == {
        key: (DTYPES[dtype], shape) for key, (dtype, shape) in metadata["config"]["state_dict"].items()
    }


def test_archive_gives_the_reference_features(archive):
    path, inputs, outputs, metadata = archive
    assert detect_format(path) == "openai"
    model = load(path)
    config = metadata["config"]
    assert not model.training and model.dtype == torch.float32 and model.tokenizer is None
    assert model.config == CLIPConfig(
        embed_dim=config["embed_dim"],
        image_size=config["image_resolution"],
        vision_layers=config["vision_layers"],
        vision_width=config["vision_width"],
        vision_patch_size=config["vision_patch_size"],
        context_length=config["context_length"],
        vocab_size=config["vocab_size"],
        text_width=config["transformer_width"],
        text_heads=config["transformer_heads"],
        text_layers=config["transformer_layers"],
        quick_gelu=True,
    )
    assert model.preprocess.image_size == config["image_resolution"]
    with torch.no_grad():
        image, text, scale = model(inputs["image"], inputs["text"])
        found = {
            "image_features": model.encode_image(inputs["image"]),
            "text_features": model.encode_text(inputs["text"]),
            "logits_per_image": scale * image @ text.T,
            "logits_per_text": scale * text @ image.T,
        }
    assert found.keys() == outputs.keys()
    for name, truth in outputs.items():
        torch.testing.assert_close(found[name], truth, rtol=0, atol=float(metadata["atol"]))


@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("clip-")])
def test_sizes_are_read_off_the_shapes(name):
    model = create(name, device="meta")
    inferred = CLIPConfig.from_dict({"quick_gelu": model.config.quick_gelu, **infer_config(model.state_dict(), "x.pt")})
    again = create(name, device="meta", **{key: value for key, value in inferred.to_dict().items()})
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    for field in ("image_size", "vision_heads", "text_heads", "quick_gelu", "context_length", "vocab_size"):
        assert getattr(inferred, field) == getattr(model.config, field)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_resnet_archive_loads(tmp_path):
    model = tiny_model("resnet", text_width=64, text_heads=1)

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children():
                setattr(self, name, child)
            for name, value in model.named_parameters(recurse=False):
                setattr(self, name, value)

        def forward(self, image):
            return self.visual(image)

    torch.jit.save(torch.jit.trace(Features().eval(), torch.zeros(1, 3, 64, 64)), tmp_path / "rn.pt")
    truth = torch.jit.load(tmp_path / "rn.pt").state_dict()
    state = read_torchscript(tmp_path / "rn.pt")
    assert state.keys() == truth.keys() and all(torch.equal(state[key], truth[key]) for key in truth)
    loaded = load(tmp_path / "rn.pt")
    assert loaded.config.vision_layers == (1, 2, 1, 1)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
