"""GLIDE's checkpoints: the public files, their settings, our folders, damaged and hostile files."""

import json
import os
import re

import pytest
import torch
from checkpoint_helpers import assert_same_model
from glide_golden import (
    BASE,
    CLIP_HEADS,
    HEADS,
    INPAINT,
    NOISED_CLIP,
    UNETS,
    UPSAMPLE,
    clip_files,
    float_weights,
    image_inputs,
    unet_settings,
)

from vlmfast import models
from vlmfast.checkpoints import UnsafePickleError, detect_format, load, save_pretrained
from vlmfast.checkpoints.glide import infer_clip_config, infer_glide_config
from vlmfast.data import CLIPTokenizer
from vlmfast.data.gpt2_tokenizer import GPT2Tokenizer
from vlmfast.models.glide import PRESETS, GLIDEConfig

SIZES = dict(image_size=16, channel_mult=(1, 2), attention_resolutions=(8,), n_vocab=270, text_ctx=6, xf_width=64,
             xf_layers=1, xf_heads=1, num_head_channels=64)


@pytest.fixture
def public(golden, tmp_path):
    """`public(case)` -> (path of the file as published, inputs, outputs, the reference's configuration)."""

    def write(case, name="base.pt", change=lambda state: state):
        weights, given, truth, metadata = golden(case)
        torch.save(change(float_weights(weights)), tmp_path / name)
        return tmp_path / name, given, truth, metadata["config"]

    return write


def small(name="glide-tiny", **changes):
    """A model whose every tensor carries noise."""
    model = models.create(name, **{**SIZES, **changes}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.05)
    return model


def small_clip():
    return models.create("glide-noised-clip", image_size=8, n_timesteps=9, n_vocab=600, max_text_len=7, n_embd=16,
                         n_head_text=1, n_xf_blocks_text=1, n_head_image=2, n_xf_blocks_image=2).eval()


@pytest.mark.parametrize("case", UNETS)
def test_public_files_load_strictly_and_give_the_reference_output(public, golden_close, case):
    path, given, truth, config = public(case)
    assert detect_format(path) == "glide"
    model = load(path, config=HEADS)
    assert model.config == GLIDEConfig(**unet_settings(config)) and not model.training and model.tokenizer is None
    with torch.no_grad():
        output = model(given["forward.x"], given["forward.timesteps"], tokens=given["tokens"], mask=given["mask"],
                       **image_inputs(given))
    golden_close(output, truth["forward.model_output"], 1e-4)


@pytest.mark.parametrize("name", [name for name in PRESETS if "tiny" not in name])
def test_settings_of_the_public_models_are_read_off_names_and_shapes(name):
    model = models.create(name, device="meta")
    found = infer_glide_config(model.state_dict(), "file", {})
    assert GLIDEConfig.from_dict(found) == model.config


@pytest.mark.parametrize("changes", [
    dict(), dict(num_res_blocks=2), dict(channel_mult=(1,), image_size=8), dict(xf_padding=False),
    dict(xf_final_ln=False), dict(channel_mult=(2, 2, 4, 2), image_size=64, attention_resolutions=(32, 8)),
    dict(attention_resolutions=(), xf_width=128, xf_heads=2),
])
def test_settings_of_other_sizes_too(changes):
    model = models.create("glide-tiny", device="meta", **{**SIZES, "num_channels": 64, **changes})
    assert GLIDEConfig.from_dict(infer_glide_config(model.state_dict(), "file", {})) == model.config


def test_settings_of_the_public_noised_clip():
    model = models.create("glide-noised-clip", device="meta")
    assert infer_clip_config(model.state_dict(), "file", {}) == {
        name: value for name, value in model.config.to_dict().items() if name != "logit_scale"}


def test_wrong_heads_would_change_the_output(public, golden_close):
    """So the golden files do check the order within each head."""
    path, given, truth, _ = public(BASE)
    model = load(path, config={"num_head_channels": 32, "xf_heads": 2})
    output = model(given["forward.x"], given["forward.timesteps"], tokens=given["tokens"], mask=given["mask"])
    with pytest.raises(AssertionError, match="relative error"):
        golden_close(output, truth["forward.model_output"], 1e-2)


def test_heads_that_cannot_be_known_must_be_told(public):
    path, *_ = public(BASE)
    with pytest.raises(ValueError, match=re.escape("does not tell xf_heads; pass config={'xf_heads': ...}")):
        load(path)


@pytest.mark.parametrize("name", ["final_ln.bias", "input_blocks.3.1.encoder_kv.weight", "padding_embedding",
                                  "output_blocks.3.0.emb_layers.1.bias"])
def test_every_missing_and_unknown_key_is_named(public, name):
    path, *_ = public(BASE, change=lambda state: {("renamed." if key == name else "") + key: value
                                                  for key, value in state.items()})
    kinds = f"missing keys: {name}.*unknown keys: renamed.{name}"
    if name == "padding_embedding":  # a model without one is a model too
        kinds = "unknown keys: renamed.padding_embedding"
    with pytest.raises(ValueError, match=kinds):
        load(path, config=HEADS)
    with pytest.warns(UserWarning, match=f"renamed.{name}"):
        load(path, config=HEADS, strict=False)


@pytest.mark.parametrize("key, shape, message", [
    ("input_blocks.0.0.weight", (32, 4, 3, 3), "takes 4 channels, must be one of"),
    ("input_blocks.0.0.weight", (33, 3, 3, 3), "no U-Net of GLIDE's"),
    ("input_blocks.0.0.weight", (32, 3, 3), "must have 4 dimensions"),
    ("time_embed.0.weight", (128, 0), "no U-Net of GLIDE's"),
    ("input_blocks.1.0.in_layers.2.weight", (40, 32, 3, 3), "must be multiples of 32"),
    ("input_blocks.1.0.in_layers.2.weight", (64, 32, 3, 3), "missing keys: .*skip_connection.weight"),
    ("middle_block.0.in_layers.2.weight", (64, 32, 3, 3), r"must be torch.float32 \[32, 32, 3, 3\]"),
    ("token_embedding.weight", (48, 0), "xf_heads|xf_width"),
    ("positional_embedding", (0, 32), "text_ctx is 0"),
    ("output_blocks.1.0.in_layers.2.weight", None, "missing keys: output_blocks.1.0.in_layers.2.weight"),
    ("time_embed.0.weight", None, "not a GLIDE checkpoint: time_embed.0.weight is missing"),
    ("token_embedding.weight", None, "not a GLIDE checkpoint: token_embedding.weight is missing"),
])
def test_files_whose_shapes_make_no_sense_are_refused(public, key, shape, message):
    def change(state):
        if shape is None:
            del state[key]
        else:
            state[key] = torch.zeros(shape)
        return state

    path, *_ = public(BASE, change=change)
    with pytest.raises(ValueError, match=message):
        load(path, config=HEADS)


def test_half_precision_files_keep_float32_norms(public):
    def halved(state):
        return {key: value.half() if key.endswith("weight") and value.ndim > 2 else value
                for key, value in state.items()}

    path, given, *_ = public(BASE, change=halved)
    model = load(path, config=HEADS)
    assert model.dtype == torch.float16 and model.final_ln.weight.dtype == torch.float32
    assert model.time_embed[0].weight.dtype == torch.float32
    assert load(path, config=HEADS, dtype=torch.float32).dtype == torch.float32
    assert load(path, config=HEADS, dtype=torch.bfloat16).dtype == torch.bfloat16
    text = given["tokens"], given["mask"]
    assert model(given["forward.x"], given["forward.timesteps"], model.encode_text(*text)).isfinite().all()


def test_a_model_its_upsampler_and_vocabulary_in_a_public_folder(public, golden, tmp_path):
    base, *_ = public(BASE)
    upsample, *_ = public(UPSAMPLE, "upsample.pt")
    assert detect_format(tmp_path) == "glide"
    for model in (load(tmp_path, config=HEADS), load(base, upsample, format="glide", config=HEADS),
                  load(base, upsample, config=HEADS)):
        assert not model.config.super_res and model.upsampler.config.super_res
    assert load(base, config=HEADS).upsampler is None
    with pytest.raises(ValueError, match="must be a GLIDE with super_res, attached to one without"):
        load(upsample, base, config=HEADS)
    with pytest.raises(ValueError, match="3 files, must be a GLIDE and its upsampler"):
        load(base, upsample, upsample, config=HEADS)
    base.unlink()
    inpaint, *_ = public(INPAINT, "base_inpaint.pt")
    assert load(tmp_path, config=HEADS).config.inpaint
    with pytest.raises(ValueError, match="upsampler has inpaint False, must be True"):
        load(inpaint, upsample, config=HEADS)
    GPT2Tokenizer.train([], 257).save(tmp_path)
    with pytest.raises(ValueError, match="the vocabulary has 257 tokens, the model only 48"):
        load(inpaint, config=HEADS)


@pytest.mark.parametrize("changes", [{}, dict(inpaint=True, xf_padding=False, noise_schedule="linear"),
                                     dict(dropout=0.0, use_checkpoint=True)])
def test_our_folder_is_read_back_exactly(tmp_path, changes):
    model = small(**changes)
    model.tokenizer = GPT2Tokenizer.train(["a red circle"] * 3, 270)
    model.attach_upsampler(small("glide-tiny-upsample", inpaint=model.config.inpaint))
    assert save_pretrained(model, tmp_path) == "glide" and detect_format(tmp_path) == "glide"
    found = load(tmp_path)
    assert_same_model(found, model)
    assert_same_model(found.upsampler, model.upsampler)
    assert found.tokenizer == found.upsampler.tokenizer == model.tokenizer
    assert load(tmp_path, config={"dropout": 0.5}).config.dropout == 0.5
    assert_same_model(load(tmp_path / "upsample"), model.upsampler)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folder_is_read_back_exactly(tmp_path, dtype):
    model = small().to_half(dtype)
    save_pretrained(model, tmp_path)
    assert_same_model(load(tmp_path), model)


def test_our_tensors_are_a_public_file(tmp_path):
    """Whoever has the public code can load what was trained here."""
    model = small(num_channels=64)
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    assert_same_model(load(tmp_path / "trained.pt"), model)


@pytest.mark.parametrize("given", ["folder", "image", "text", "both", "swapped", "format"])
def test_noised_clip_is_read_from_the_two_public_files(golden, golden_close, tmp_path, given):
    weights, inputs, truth, _ = golden(NOISED_CLIP)
    image, text = clip_files(tmp_path, weights)
    paths = {"folder": [tmp_path], "image": [image], "text": [text], "both": [image, text], "swapped": [text, image],
             "format": [image, text, "glide-noised-clip"]}[given]
    assert detect_format(paths[0]) == "glide-noised-clip"
    model = load(*paths, config=CLIP_HEADS)
    assert model.config.logit_scale == 100 and model.config.n_head_state_text == 12 and not model.training
    golden_close(model.encode_image(inputs["images"], inputs["timesteps"]), truth["image_features"])
    golden_close(model.encode_text(inputs["text"], inputs["text_len"]), truth["text_features"])


def test_half_a_noised_clip_is_refused(golden, tmp_path):
    weights, *_ = golden(NOISED_CLIP)
    image, text = clip_files(tmp_path, weights, only="image")
    with pytest.raises(FileNotFoundError, match="clip_text_enc.pt: no such file; a noised CLIP is loaded from"):
        load(image, config=CLIP_HEADS)
    with pytest.raises(ValueError, match="holds the same tower"):
        load(image, image, config=CLIP_HEADS)
    image.rename(tmp_path / "other.pt")
    with pytest.raises(ValueError, match="not a noised CLIP checkpoint: text_encoder.blocks.input.w_voc is missing"):
        load(tmp_path / "other.pt", config=CLIP_HEADS)
    with pytest.raises(ValueError, match="does not tell n_head_image; pass config="):
        load(*clip_files(tmp_path, weights))
    del weights["text_encoder.blocks.block_0.f_attn.f_k.w"]
    with pytest.raises(ValueError, match="missing keys: text_encoder.blocks.block_0.f_attn.f_k.w"):
        load(*clip_files(tmp_path, weights), config=CLIP_HEADS)


def test_noised_clip_folder_is_read_back_exactly(tmp_path):
    model = small_clip()
    model.tokenizer = CLIPTokenizer.train(["a red circle"], 514, context_length=7)
    assert save_pretrained(model, tmp_path) == "glide-noised-clip"
    assert detect_format(tmp_path) == "glide-noised-clip"
    found = load(tmp_path)
    assert_same_model(found, model)
    assert found.tokenizer == model.tokenizer
    found.encode_text(found.tokenizer(["red", "blue"]))


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, keep):
    model = small()
    torch.save(model.state_dict(), tmp_path / "base.pt")
    save_pretrained(model, tmp_path / "folder")
    for path in (tmp_path / "base.pt", tmp_path / "folder" / "model.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
        for format in (None, "glide", "glide-noised-clip"):
            with pytest.raises(ValueError):
                load(path, format=format)
    with pytest.raises(ValueError):
        load(tmp_path / "folder")


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("key", ["transformer_proj.weight", "blocks.input.w_t"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, key):
    target = tmp_path / "ran"
    torch.save({key: torch.zeros(2), "bomb": Attack(target)}, tmp_path / "clip_image_enc.pt")
    (tmp_path / "clip_text_enc.pt").write_bytes((tmp_path / "clip_image_enc.pt").read_bytes())
    with pytest.raises(UnsafePickleError, match="system"):
        load(tmp_path / "clip_image_enc.pt")
    assert not target.exists()


@pytest.mark.parametrize("change, message", [
    ({"model_type": "dalle"}, "has no model_type 'glide'|DALL"),
    ({"num_channels": "32"}, "num_channels|wrong type"),
    ({"xf_layers": 10**12}, "blocks, the file only"),
    ({"num_res_blocks": 10**12}, "blocks, the file only"),
    ({"channel_mult": [1] * 40}, "channel_mult is .* must be 1 to 16 integers"),
    ({"channel_mult": [1, 10**15]}, "absurd|is torch.float32|overflow|wrong type"),
    ({"n_vocab": 10**15}, "absurd|token_embedding.weight is"),
    ({"width": 3}, "unknown fields width"),
    ({"inpaint": True}, r"input_blocks.0.0.weight is torch.float32 \[32, 3, 3, 3\], must be torch.float32 \[32, 7"),
])
def test_wrong_configs_are_refused(tmp_path, change, message):
    save_pretrained(small(), tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_absent_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "base.pt")
    with pytest.raises(FileNotFoundError, match="must hold config.json and model.safetensors, or one of base.pt"):
        load(tmp_path, format="glide")
    save_pretrained(small(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no model.safetensors beside config.json"):
        load(tmp_path, format="glide")
    with pytest.raises(ValueError, match="image_size and quick_gelu belong to CLIP"):
        load(tmp_path, format="glide", image_size=64)
