"""Pixel-BERT files: the third-party layout with detectron2's and torchvision's backbone names, strictness, saving."""

import dataclasses
import json

import pytest
import torch
from checkpoint_helpers import assert_same_model
from models.tiny_models import PIXELBERT_SIZES, assert_text_equals_bert, noisy, save_tiny_bert
from models.tiny_models import tiny_pixelbert as tiny
from models.tiny_models import tiny_pixelbert_on_maps as on_maps
from safetensors.torch import save_file

import vlmfast
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.pixelbert import detectron_name, load_backbone, torchvision_name
from vlmfast.layers.plain_resnet import ResNet
from vlmfast.models.pixelbert import PixelBERTConfig

WORDS, BERT = "transformer.cls.predictions.", "transformer.bert."
TABLE, COPY = f"{BERT}embeddings.word_embeddings.weight", f"{WORDS}decoder.weight"
UNUSED = f"{BERT}visual_embeddings.position_embeddings.weight"


def as_public(model, detectron=True) -> dict:
    """The state dict as the third-party code would save it: whole detector, copies, the unused position table."""
    state = {detectron_name(key) if detectron else key: value for key, value in model.state_dict().items()}
    if "pretraining" in model.config.heads:
        state |= {COPY: state[TABLE], f"{WORDS}decoder.bias": state[f"{WORDS}bias"]}
    if model.config.backbone != "none":
        state |= {f"cnn.feature.{name}": torch.randn(3) for name in
                  ("pixel_mean", "pixel_std", "proposal_generator.rpn_head.conv.weight",
                   "roi_heads.box_head.fc1.weight", "roi_heads.box_predictor.attr_score.bias")}
    return {**state, UNUSED: torch.randn(20, model.config.hidden_size)}


def public_sizes(**overrides):
    """64 channels per head as in the public model, so that nothing needs a config file."""
    return noisy(tiny(**{"hidden_size": 64, "num_attention_heads": 1, "pixel_random_sampling_size": 100, **overrides}))


@pytest.mark.parametrize("case, heads", [("pretrain_init", ("pretraining",)), ("pretrain_std03", ("pretraining",)),
                                         ("vqa_std03", ("vqa",))])
def test_reference_weights_load_with_the_reference_configuration(golden, tmp_path, case, heads):
    weights, given, truth, metadata = golden(f"bert_like/pixelbert__{case}")
    file = tmp_path / "pixelbert_image_text_pretrained.pt"
    torch.save(weights, file)
    assert detect_format(file) == "pixelbert"
    model = vlmfast.load(file, config=metadata["config"])
    assert model.config.heads == heads and model.config.backbone == "none"
    placed = set(model.state_dict())
    assert placed <= set(weights)
    assert set(weights) - placed - {UNUSED, COPY, f"{WORDS}decoder.bias"} == set()
    with torch.no_grad():
        output = model(given["input_ids"], image_feat=given["c5_feat"], attention_mask=given["attention_mask"])
    for name, value in {"pooled": output.pooled, "grid": output.grid}.items():
        torch.testing.assert_close(value, truth[name], rtol=0, atol=float(metadata["atol"]))
    head, name = ("vqa", "logits") if heads == ("vqa",) else ("itm", "itm_logits")
    torch.testing.assert_close(output.logits[head], truth[name], rtol=0, atol=float(metadata["atol"]))


def test_third_party_base_model_json_is_read(golden, tmp_path):
    weights, _, _, metadata = golden("bert_like/pixelbert__pretrain_std03")
    torch.save(weights, tmp_path / "model.pt")
    content = {**metadata["config"], "model_type": "bert"}
    (tmp_path / "base_model.json").write_text(json.dumps(content))
    truth = load(tmp_path / "model.pt", config=metadata["config"])
    assert_same_model(load(tmp_path / "model.pt", config=tmp_path / "base_model.json"), truth)
    assert_same_model(load(tmp_path / "model.pt", config=content), truth)
    (tmp_path / "pytorch_model.bin").write_bytes((tmp_path / "model.pt").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same_model(load(tmp_path, "pixelbert"), truth)


@pytest.mark.parametrize("fields", [
    {}, {"heads": ("pretraining",)}, {"heads": ("vqa",), "num_labels": 1, "cls_hidden_scale": 3}, {"heads": ()},
    {"backbone_layers": (1, 2, 1, 1)}, {"frozen_norm": False}, {"backbone": "none"},
    {"max_grid_row_position_embeddings": 0, "max_grid_col_position_embeddings": 0},
    {"backbone": "resnext50", "backbone_width": 16, "backbone_channel_in_size": 512, "stride_in_1x1": False},
    {"backbone": "resnext101", "backbone_width": 8, "backbone_channel_in_size": 256, "stride_in_1x1": False},
], ids=str)
def test_sizes_are_read_off_the_tensors(tmp_path, fields):
    if fields.get("backbone") == "none":
        fields = {**fields, "backbone_layers": (), "backbone_width": 64}
    model = public_sizes(**fields)
    torch.save(as_public(model), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    untold = {"vqa": ("num_labels", "cls_hidden_scale"), "classifier": ("classifier_labels", "classifier_images")}
    names = [name for head, names in untold.items() if head not in model.config.heads for name in names]
    model.config = dataclasses.replace(model.config, **{name: getattr(loaded.config, name) for name in names})
    if model.config.backbone == "none":
        model.config = dataclasses.replace(model.config, stride_in_1x1=loaded.config.stride_in_1x1)
    assert_same_model(loaded, model)


@pytest.mark.parametrize("layers, name", [((3, 4, 6, 3), "resnet50"), ((3, 4, 23, 3), "resnet101"),
                                          ((3, 8, 36, 3), "resnet152")])
def test_public_backbones_are_recognised(tmp_path, layers, name):
    model = public_sizes(backbone_layers=layers, heads=())
    torch.save(as_public(model), tmp_path / "model.pt")
    config = load(tmp_path / "model.pt").config
    assert config.backbone == name and config.backbone_layers == ()


def test_torchvision_names_stride_in_the_3x3_convolution(tmp_path):
    model = public_sizes(stride_in_1x1=False)
    torch.save(as_public(model, detectron=False), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert_same_model(loaded, model)
    image, ids = torch.randn(1, 3, 64, 64), torch.ones(1, 3, dtype=torch.long)
    assert torch.equal(loaded(ids, image).grid, model(ids, image).grid)


def test_backbone_names_of_both_kinds():
    pairs = {"stem.conv1.weight": "conv1.weight", "stem.conv1.norm.running_var": "bn1.running_var",
             "res2.0.shortcut.weight": "layer1.0.downsample.0.weight",
             "res2.0.shortcut.norm.bias": "layer1.0.downsample.1.bias", "res5.2.conv3.weight": "layer4.2.conv3.weight",
             "res4.5.conv2.norm.running_mean": "layer3.5.bn2.running_mean"}
    for theirs, ours in pairs.items():
        assert torchvision_name(f"cnn.feature.backbone.{theirs}") == f"cnn.feature.{ours}"
        assert torchvision_name(f"cnn.feature.{theirs}") == f"cnn.feature.{ours}"
        assert detectron_name(f"cnn.feature.{ours}") == f"cnn.feature.backbone.{theirs}"
        assert torchvision_name(f"cnn.feature.{ours}") == f"cnn.feature.{ours}"
    assert torchvision_name(f"{BERT}encoder.layer.0.x") == f"{BERT}encoder.layer.0.x"


def test_the_used_bias_is_the_decoders(tmp_path):
    model = public_sizes()
    state = as_public(model)
    state[f"{WORDS}decoder.bias"] = state[f"{WORDS}bias"] + 1
    torch.save(state, tmp_path / "model.pt")
    assert torch.equal(load(tmp_path / "model.pt").transformer.cls.predictions.bias, state[f"{WORDS}decoder.bias"])


@pytest.mark.parametrize("fields", [{}, {"frozen_norm": False, "img_input_format": "RGB"}, {"heads": ("vqa",)},
                                    {"heads": ("classifier",), "classifier_images": 2},
                                    {"backbone": "none", "pixel_random_sampling_size": 0},
                                    {"max_grid_row_position_embeddings": 0, "max_grid_col_position_embeddings": 0}],
                         ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_save_and_load_is_exact(tmp_path, fields, dtype):
    model = noisy(tiny(**fields)).to(dtype)
    assert save_pretrained(model, tmp_path) == "pixelbert"
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "pytorch_model.bin"}
    for loaded in (load(tmp_path), load(tmp_path, "vlmfast"), load(tmp_path / "pytorch_model.bin")):
        assert_same_model(loaded, model)


def test_saved_names_are_the_public_ones(golden, tmp_path):
    weights, _, _, metadata = golden("bert_like/pixelbert__pretrain_std03")
    torch.save(weights, tmp_path / "model.pt")
    save_pretrained(load(tmp_path / "model.pt", config=metadata["config"]), tmp_path / "ours")
    saved = torch.load(tmp_path / "ours" / "pytorch_model.bin", weights_only=True)
    assert saved.keys() == weights.keys() - {UNUSED}
    assert all(torch.equal(saved[key], weights[key]) for key in saved)
    save_pretrained(tiny(), tmp_path / "whole")
    saved = torch.load(tmp_path / "whole" / "pytorch_model.bin", weights_only=True)
    assert "cnn.feature.backbone.res5.0.shortcut.norm.running_var" in saved


def test_missing_and_unknown_keys_are_named(tmp_path):
    state = as_public(public_sizes())
    del state["cnn.feature.backbone.res3.0.conv2.norm.bias"]
    state["cnn.feature.backbone.res4.0.conv2_offset.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(ValueError) as error:
        load(tmp_path / "model.pt")
    assert ("missing keys: cnn.feature.layer2.0.bn2.bias; unknown keys: cnn.feature.layer3.0.conv2_offset.weight"
            in str(error.value))
    with pytest.warns(UserWarning, match="unknown keys"):
        load(tmp_path / "model.pt", strict=False)


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("kind", ["torchvision", "safetensors", "detectron2"])
def test_backbone_of_its_own_file_loads(tmp_path, kind, frozen):
    network = noisy(ResNet((1, 1, 1, 1), width=4))
    state = {key: value.contiguous() for key, value in network.state_dict().items()}
    file = tmp_path / ("resnet.safetensors" if kind == "safetensors" else "resnet.pth")
    if kind == "detectron2":
        state = {detectron_name(f"cnn.feature.{key}").removeprefix("cnn.feature."): value
                 for key, value in state.items() if "num_batches" not in key}
        torch.save({"model": {**state, "roi_heads.box_head.fc1.weight": torch.zeros(2)}}, file)
    elif kind == "torchvision":
        torch.save({**state, "fc.weight": torch.zeros(5, 128), "fc.bias": torch.zeros(5)}, file)
    else:
        save_file(state, file)
    model = tiny(stride_in_1x1=False, frozen_norm=frozen)
    load_backbone(model, file)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.cnn.feature.eval()(image), network(image))
    if kind != "detectron2":
        with pytest.raises(ValueError, match="has torchvision's names, the model must be built with stride_in_1x1=Fal"):
            load_backbone(tiny(), file)
    with pytest.raises(ValueError, match="load_backbone: model has no backbone"):
        load_backbone(on_maps(), file)
    with pytest.raises(ValueError, match="missing keys: layer1.1.conv1.weight"):
        load_backbone(tiny(backbone_layers=(2, 1, 1, 1), stride_in_1x1=False), file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_backbone(model, tmp_path / "absent.pth")


def test_wrong_files_are_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"cnn.grid_encoder.0.weight": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UnsafePickleError):
        load(tmp_path / "bomb.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=f"not a Pixel-BERT checkpoint: {TABLE} is missing"):
        load(tmp_path / "other.pt", "pixelbert")
    state = as_public(public_sizes())
    torch.save({**state, COPY: state[COPY] + 1}, tmp_path / "untied.pt")
    with pytest.raises(ValueError, match=f"{COPY} differs from {TABLE}"):
        load(tmp_path / "untied.pt")
    block = "cnn.feature.backbone.res2.0.conv2.weight"
    torch.save({**state, block: torch.zeros(4, 2, 3, 3)}, tmp_path / "groups.pt")
    with pytest.raises(ValueError, match="layer1.0.conv2.weight has 2 groups of 2 channels, must be of one of"):
        load(tmp_path / "groups.pt")
    torch.save(as_public(tiny()), tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match="does not tell num_attention_heads; pass config="):
        load(tmp_path / "narrow.pt")
    assert load(tmp_path / "narrow.pt", config=PixelBERTConfig(**PIXELBERT_SIZES)).config.num_attention_heads == 4
    for wrong, message in (({"layers": 3}, "unknown fields layers"), ({"model_type": "bert"}, None),
                           ({"model_type": "uniter"}, "model_type is 'uniter'"), ({"num_hidden_layers": 10**9}, "bl"),
                           ({"backbone_layers": (1, 1, 2, 1)}, "missing keys"), ({"hidden_act": 3}, "hidden_act is 3")):
        if message is None:
            load(tmp_path / "narrow.pt", config={**PIXELBERT_SIZES, **wrong})
            continue
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "narrow.pt", config={**PIXELBERT_SIZES, **wrong})


@pytest.mark.oracle
def test_text_stream_starts_from_bert(tmp_path):
    bert = save_tiny_bert(tmp_path, max_position_embeddings=20)
    assert_text_equals_bert(on_maps(heads=("pretraining",)), bert, tmp_path, "itm")
