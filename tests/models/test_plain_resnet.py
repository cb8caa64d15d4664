"""The plain residual network against transformers' and against published sizes."""

import pytest
import torch
from models.tiny_models import noisy

from vlmfast.layers.plain_resnet import RESNETS, FrozenBatchNorm2d, ResidualBottleneck, ResNet


# torchvision's published counts; its classifier of 1000 classes is not built here
@pytest.mark.parametrize("name, published", [("resnet50", 25557032), ("resnet101", 44549160), ("resnet152", 60192808),
                                             ("resnext50", 25028904), ("resnext101", 88791336)])
def test_published_sizes(name, published):
    with torch.device("meta"):
        model = ResNet(*RESNETS[name])
    assert sum(value.numel() for value in model.parameters()) == published - 1000 * 2049
    assert model.channels == 2048


def test_names_are_those_of_torchvision():
    with torch.device("meta"):
        keys = list(ResNet(*RESNETS["resnet50"]).state_dict())
    assert keys[:6] == ["conv1.weight", "bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var",
                        "bn1.num_batches_tracked"]
    assert {"layer1.0.downsample.0.weight", "layer1.0.downsample.1.running_var", "layer4.2.conv3.weight",
            "layer3.5.bn2.bias"} <= set(keys)
    assert "layer1.1.downsample.0.weight" not in keys and len(keys) == 318


@pytest.mark.oracle
@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_matches_transformers(stride_in_1x1, frozen):
    transformers = pytest.importorskip("transformers")
    theirs = noisy(transformers.ResNetModel(transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 2, 1], layer_type="bottleneck",
        downsample_in_bottleneck=stride_in_1x1,
    )))
    ours = ResNet((1, 2, 2, 1), width=8, stride_in_1x1=stride_in_1x1, frozen_norm=frozen).eval()
    state = {}
    for key, value in theirs.state_dict().items():
        for old, new in (("embedder.embedder.convolution", "conv1"), ("embedder.embedder.normalization", "bn1"),
                         ("shortcut.convolution", "downsample.0"), ("shortcut.normalization", "downsample.1")):
            key = key.replace(old, new)
        for i in range(4):
            key = key.replace(f"encoder.stages.{i}.layers.", f"layer{i + 1}.")
        for i in range(3):
            key = key.replace(f"layer.{i}.convolution", f"conv{i + 1}")
            key = key.replace(f"layer.{i}.normalization", f"bn{i + 1}")
        if not (frozen and key.endswith("num_batches_tracked")):
            state[key] = value
    ours.load_state_dict(state)
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        found, truth = ours(image), theirs(image).last_hidden_state
    assert found.shape == (2, 256, 3, 2)
    assert (found - truth).abs().max() <= 2e-6 * truth.abs().max()


def test_groups_and_dilation_of_a_block():
    block = noisy(ResidualBottleneck(16, 8, 16, groups=4, dilation=2))
    x = torch.randn(2, 16, 9, 7)
    inner = torch.relu(block.bn1(block.conv1(x)))
    parts = []
    for i in range(4):  # each group of 2 channels by itself, every second pixel
        weight = block.conv2.weight[2 * i : 2 * i + 2]
        parts.append(torch.nn.functional.conv2d(inner[:, 2 * i : 2 * i + 2], weight, padding=2, dilation=2))
    inner = torch.relu(block.bn2(torch.cat(parts, dim=1)))
    torch.testing.assert_close(block(x), torch.relu(x + block.bn3(block.conv3(inner))))


def test_last_dilation_keeps_the_size_and_the_keys():
    plain, dilated = (noisy(ResNet((1, 1, 1, 2), width=8, last_dilation=n)) for n in (1, 2))
    assert list(plain.state_dict()) == list(dilated.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert plain(image).shape == (1, 256, 2, 2) and dilated(image).shape == (1, 256, 4, 4)


def test_frozen_norm_never_changes():
    norm = noisy(FrozenBatchNorm2d(5)).train()
    plain = torch.nn.BatchNorm2d(5).eval()
    plain.load_state_dict(norm.state_dict(), strict=False)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    x = torch.randn(3, 5, 4, 4) + 2
    torch.testing.assert_close(norm(x), plain(x))
    assert not list(norm.parameters())
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
