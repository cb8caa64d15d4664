"""Hugging Face folders: parity with transformers both ways, sharding, old files, saving."""

import json
import os

import pytest
import torch
from checkpoint_helpers import assert_same_model, inputs, tiny_model
from safetensors.torch import load_file, save_file

from vlmfast.checkpoints import detect_format, load, save_pretrained

VISION = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=32,
              patch_size=8)
TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, vocab_size=99,
            max_position_embeddings=12)


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def hf_model(transformers, activation="quick_gelu", eos=98, perturb=0.0):
    config = transformers.CLIPConfig(
        text_config={**TEXT, "hidden_act": activation, "eos_token_id": eos, "bos_token_id": 97},
        vision_config={**VISION, "hidden_act": activation},
        projection_dim=24,
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if perturb and name != "logit_scale":
                value.add_(torch.randn_like(value), alpha=perturb)
    return model


def assert_same_features(ours, theirs, atol):
    image, text = inputs(ours)
    with torch.no_grad():
        found = ours(image, text)
        truth = theirs(input_ids=text, pixel_values=image)
        vision = theirs.visual_projection(theirs.vision_model(pixel_values=image).pooler_output)
        words = theirs.text_projection(theirs.text_model(input_ids=text).pooler_output)
        torch.testing.assert_close(found.image_features, truth.image_embeds, rtol=0, atol=atol)
        torch.testing.assert_close(found.text_features, truth.text_embeds, rtol=0, atol=atol)
        torch.testing.assert_close(ours.encode_image(image), vision, rtol=0, atol=atol)
        torch.testing.assert_close(ours.encode_text(text), words, rtol=0, atol=atol)


@pytest.mark.oracle
@pytest.mark.parametrize("perturb, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("eos", [2, 98], ids=["legacy_eos", "eos"])
def test_loads_what_transformers_wrote(transformers, tmp_path, activation, eos, perturb, atol):
    theirs = hf_model(transformers, activation, eos, perturb)
    theirs.save_pretrained(tmp_path)
    assert detect_format(tmp_path) == "huggingface"
    ours = load(tmp_path)
    assert ours.config.quick_gelu is (activation == "quick_gelu")
    assert ours.config.eos_token_id == (None if eos == 2 else eos)
    assert_same_features(ours, theirs, atol)
    logits = theirs(input_ids=inputs(ours)[1], pixel_values=inputs(ours)[0])
    assert ours.logit_scale.exp() == theirs.logit_scale.exp() and logits is not None


@pytest.mark.oracle
@pytest.mark.parametrize("perturb, atol", [(0.0, 4e-6), (0.3, 2e-5)], ids=["init", "perturbed"])
@pytest.mark.parametrize("quick_gelu", [True, False], ids=["quick_gelu", "gelu"])
def test_transformers_reads_what_we_wrote(transformers, tmp_path, quick_gelu, perturb, atol):
    from vlmfast import models

    ours = models.create("clip-tiny", **tiny_model(quick_gelu=quick_gelu).config.to_dict()).eval()
    with torch.no_grad():
        for name, value in ours.named_parameters():
            if name != "logit_scale":
                value.add_(torch.randn_like(value), alpha=perturb)
    assert save_pretrained(ours, tmp_path) == "huggingface"
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert_same_features(ours, theirs.eval(), atol)
    assert theirs.config.text_config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")


@pytest.mark.oracle
def test_transformers_round_trip_keeps_every_bit(transformers, tmp_path):
    theirs = hf_model(transformers, perturb=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    save_pretrained(load(tmp_path / "theirs"), tmp_path / "ours")
    a, b = load_file(tmp_path / "theirs" / "model.safetensors"), load_file(tmp_path / "ours" / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.oracle
def test_image_processor_reads_our_preprocessing(transformers, tmp_path):
    image_module = pytest.importorskip("transformers.models.clip.image_processing_clip")
    save_pretrained(tiny_model(image_mean=(0.1, 0.2, 0.3)), tmp_path)
    processor = next(
        cls for name, cls in vars(image_module).items() if name.startswith("CLIPImageProcessor")
    ).from_pretrained(tmp_path)
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.crop_size["height"] == 32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("fields", [{}, {"quick_gelu": False}, {"eos_token_id": 98}, {"layer_norm_eps": 1e-6},
                                    {"init_logit_scale": 1.5}, {"image_std": (0.1, 0.2, 0.3)}], ids=str)
def test_save_and_load_is_exact(tmp_path, dtype, fields):
    model = tiny_model(**fields).to(dtype)
    assert save_pretrained(model, tmp_path) == "huggingface"
    assert_same_model(load(tmp_path), model)
    assert_same_model(load(tmp_path, "vlmfast"), model)
    assert_same_model(load(tmp_path / "model.safetensors"), model)


@pytest.mark.parametrize("fields", [{"tower": "resnet"}, {"init_logit_bias": -10.0}], ids=str)
def test_what_hugging_face_cannot_hold_is_saved_for_open_clip(tmp_path, fields):
    model = tiny_model(**fields)
    assert save_pretrained(model, tmp_path) == "open_clip"
    assert {file.name for file in tmp_path.iterdir()} == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert_same_model(load(tmp_path), model)
    assert_same_model(load(tmp_path, "vlmfast"), model)
    with pytest.raises(FileExistsError, match="holds open_clip_config.json"):
        save_pretrained(tiny_model(), tmp_path)


def test_preprocessing_and_tokenizer_travel_with_the_model(tmp_path):
    from vlmfast.data.images import ImagePreprocess
    from vlmfast.data.tokenizer import CLIPTokenizer

    model = tiny_model(vocab_size=600)
    model.tokenizer = CLIPTokenizer.train(["a red apple", "a green apple"] * 3, 530, context_length=12)
    model.preprocess = ImagePreprocess(32, resize_mode="squash", interpolation="bilinear").for_training(flip=0.5)
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    assert loaded.tokenizer == model.tokenizer
    assert loaded.preprocess == model.preprocess.for_evaluation()
    assert torch.equal(loaded.tokenizer("a red apple"), model.tokenizer("a red apple"))
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["bos_token_id"] == model.tokenizer.sot
    model.preprocess = ImagePreprocess(32, resize_mode="longest")
    assert save_pretrained(model, tmp_path / "padded") == "open_clip"
    loaded = load(tmp_path / "padded")
    assert loaded.preprocess == model.preprocess and loaded.tokenizer == model.tokenizer


def test_vocabulary_larger_than_the_model_is_refused(tmp_path):
    from vlmfast.data.tokenizer import CLIPTokenizer

    save_pretrained(tiny_model(), tmp_path)
    CLIPTokenizer.train(["a"], 514).save(tmp_path)
    with pytest.raises(ValueError, match="has 514 tokens, the model only 99"):
        load(tmp_path)


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    class Broken:
        sot = 0

        def save(self, folder):
            raise OSError("disk full")

    other = tiny_model()
    other.tokenizer = Broken()
    with pytest.raises(OSError, match="disk full"):
        save_pretrained(other, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_replaces_files_instead_of_writing_into_them(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    os.link(tmp_path / "model.safetensors", tmp_path / "kept")
    loaded = load(tmp_path)
    save_pretrained(tiny_model(), tmp_path)
    assert (tmp_path / "kept").read_bytes() != (tmp_path / "model.safetensors").read_bytes()
    assert_same_model(loaded, model)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".saving")]


def test_config_appears_after_the_weights_it_describes(tmp_path, monkeypatch):
    order, replace = [], os.replace

    def record(source, target):
        order.append(os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    save_pretrained(tiny_model(), tmp_path)
    assert order == ["model.safetensors", "config.json", "preprocessor_config.json"]


def test_loaded_model_does_not_depend_on_its_file(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    loaded = load(tmp_path)
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as handle:  # safetensors maps the file, so this would reach uncopied tensors
        handle.write(bytes(file.stat().st_size))
    assert_same_model(loaded, model)


def shard(folder, suffix):
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    weight_map = {}
    for part, keys in enumerate((names[::2], names[1::2])):
        name = f"shard-{part}.{suffix}"
        tensors = {key: state[key] for key in keys}
        save_file(tensors, folder / name) if suffix == "safetensors" else torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder / f"{stem}.index.json", weight_map


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_sharded_and_pickled_weights_load(tmp_path, suffix):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    shard(tmp_path, suffix)
    assert_same_model(load(tmp_path), model)


def test_wrong_shards_are_named(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    index, weight_map = shard(tmp_path, "safetensors")
    key = sorted(weight_map)[0]

    def with_map(changes):
        index.write_text(json.dumps({"weight_map": {**weight_map, **changes}}))

    with_map({key: "../shard-0.safetensors"})
    with pytest.raises(ValueError, match="must be a file in the same folder"):
        load(tmp_path)
    with_map({key: "shard-1.safetensors"})
    with pytest.raises(ValueError, match="which the index puts elsewhere"):
        load(tmp_path)
    with_map({"ghost": "shard-1.safetensors"})
    with pytest.raises(ValueError, match="the shards lack ghost"):
        load(tmp_path)
    with_map({})
    (tmp_path / "shard-1.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="shard shard-1.safetensors is missing"):
        load(tmp_path)


def test_old_pickled_folder_with_position_ids_loads(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for tower in ("text", "vision"):
        state[f"{tower}_model.embeddings.position_ids"] = torch.arange(12)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    content = json.loads((tmp_path / "config.json").read_text())
    for tower in ("text", "vision"):  # once the real settings were under *_config_dict
        content[f"{tower}_config_dict"] = content[f"{tower}_config"]
        content[f"{tower}_config"] = None
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_same_model(load(tmp_path), model)
    assert_same_model(load(tmp_path / "pytorch_model.bin"), model)


def test_missing_and_unknown_keys_carry_hugging_face_names(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["text_model.encoder.layers.0.self_attn.k_proj.weight"]
    state["vision_model.surprise"] = torch.zeros(1)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert "missing keys: text_model.encoder.layers.0.self_attn.k_proj.weight; " in str(error.value)
    assert "unknown keys: vision_model.surprise" in str(error.value)


def test_packed_attention_rows_are_query_key_value(tmp_path):
    model = tiny_model()
    save_pretrained(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for part, name in enumerate("qkv"):
        saved = state[f"vision_model.encoder.layers.1.self_attn.{name}_proj.weight"]
        packed = model.visual.transformer.resblocks[1].attn.in_proj_weight
        assert torch.equal(saved, packed[48 * part : 48 * part + 48])


def test_settings_that_differ_between_towers_are_refused(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hidden_act differs between the towers"):
        load(tmp_path)
    content["vision_config"]["hidden_act"] = content["text_config"]["hidden_act"] = "gelu_new"
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="hidden_act is 'gelu_new', must be one of quick_gelu, gelu"):
        load(tmp_path)


def test_weights_without_a_config_are_refused(tmp_path):
    save_pretrained(tiny_model(), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has Hugging Face keys; load the folder"):
        load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no config.json beside the weights"):
        load(tmp_path, "huggingface")


def test_only_clip_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match="model is a Linear, must be a CLIP"):
        save_pretrained(torch.nn.Linear(2, 2), tmp_path)
