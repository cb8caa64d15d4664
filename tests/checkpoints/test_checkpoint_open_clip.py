"""open_clip files: all their variants load, and loaded models compute what open_clip computes."""

import json

import pytest
import torch
from checkpoint_helpers import assert_same_model, inputs, tiny_model
from safetensors.torch import save_file

from vlmfast import models
from vlmfast.checkpoints import detect_format, load
from vlmfast.checkpoints import open_clip as layout
from vlmfast.models import CLIP, CLIPConfig

PUBLIC = {
    "clip-rn50": "RN50",
    "clip-rn101": "RN101",
    "clip-rn50x4": "RN50x4",
    "clip-rn50x16": "RN50x16",
    "clip-rn50x64": "RN50x64",
    "clip-vit-b-32": "ViT-B-32",
    "clip-vit-b-16": "ViT-B-16",
    "clip-vit-l-14": "ViT-L-14",
    "clip-vit-l-14-336": "ViT-L-14-336",
    "clip-vit-h-14": "ViT-H-14",
    "clip-vit-g-14": "ViT-g-14",
    "clip-vit-bigg-14": "ViT-bigG-14",
}


def write_folder(folder, model, **preprocess):
    """open_clip's hub layout with the weights as a pickle."""
    content = {"model_cfg": layout.config_json(model.config), "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return content


@pytest.mark.oracle
@pytest.mark.parametrize("name", PUBLIC)
def test_public_config_gives_our_preset_and_its_keys(open_clip, name):
    config = open_clip.public_config(PUBLIC[name])
    quick = name not in ("clip-vit-h-14", "clip-vit-g-14", "clip-vit-bigg-14")
    ours = models.create(name, device="meta")
    fields = layout.config_fields({"model_cfg": {**config, "quick_gelu": quick}}, "open_clip_config.json")
    assert CLIPConfig.from_dict(fields) == ours.config
    with torch.device("meta"):
        theirs = open_clip.CLIP(**config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.oracle
@pytest.mark.parametrize("custom_text", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("quick_gelu", [False, True], ids=["gelu", "quick_gelu"])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_loads_what_open_clip_wrote(open_clip, tmp_path, tower, quick_gelu, custom_text):
    model_cfg = layout.config_json(tiny_model(tower, quick_gelu=quick_gelu).config)
    theirs = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_cfg).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if not name.startswith("logit"):
                value.add_(torch.randn_like(value), alpha=0.1)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    ours = load(tmp_path)
    assert ours.config.quick_gelu is quick_gelu and not ours.training
    image, text = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), rtol=0, atol=2e-5)
        torch.testing.assert_close(ours.encode_text(text), theirs.encode_text(text), rtol=0, atol=2e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_open_clip_reads_our_weights(open_clip, tower):
    ours = tiny_model(tower, init_logit_bias=-10.0)
    theirs = open_clip.CLIP(**layout.config_json(ours.config)).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    image, text = inputs(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours.encode_image(image), theirs.encode_image(image), rtol=0, atol=2e-5)
        torch.testing.assert_close(ours.encode_text(text), theirs.encode_text(text), rtol=0, atol=2e-5)


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize("name", ["clip-vit-b-32", "clip-rn50"])
def test_full_size_model_equals_open_clip(open_clip, name):
    theirs = open_clip.CLIP(**open_clip.public_config(PUBLIC[name]), quick_gelu=True).eval()
    with torch.no_grad():
        for key, value in theirs.named_parameters():
            if "bn3.weight" in key:  # zero at initialisation, which would hide the residual branch
                value.fill_(0.5)
    ours = CLIP(models.create(name, device="meta").config, device="meta").eval()
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    image, text = torch.randn(1, 3, 224, 224), torch.randint(49406, (2, 77))
    text[:, 9] = 49407
    with torch.no_grad():
        for got, truth in (
            (ours.encode_image(image), theirs.encode_image(image)),
            (ours.encode_text(text), theirs.encode_text(text)),
        ):
            assert (got - truth).norm() / truth.norm() <= 1e-6


@pytest.mark.oracle
@pytest.mark.parametrize("size", [16, 56])
def test_position_grid_is_resized_as_in_open_clip(open_clip, tmp_path, size):
    model = tiny_model()
    write_folder(tmp_path, model)
    resized = load(tmp_path, image_size=size)
    theirs = open_clip.CLIP(**layout.config_json(resized.config))
    state = model.state_dict()
    open_clip.resize_pos_embed(state, theirs)
    assert torch.equal(resized.visual.positional_embedding, state["visual.positional_embedding"])
    assert resized.encode_image(torch.zeros(1, 3, size, size)).shape == (1, 24)
    assert resized.preprocess.image_size == size


def test_resnet_position_grid_is_resized(tmp_path):
    model = tiny_model("resnet")
    write_folder(tmp_path, model)
    resized = load(tmp_path, image_size=96)
    assert resized.visual.attnpool.positional_embedding.shape == (10, 128)
    assert torch.equal(resized.visual.attnpool.positional_embedding[0], model.visual.attnpool.positional_embedding[0])


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("suffix", ["bin", "safetensors"])
def test_folder_loads_bit_for_bit(tmp_path, tower, suffix):
    model = tiny_model(tower)
    write_folder(tmp_path, model)
    if suffix == "safetensors":
        (tmp_path / "open_clip_pytorch_model.bin").unlink()
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    assert detect_format(tmp_path) == "open_clip"
    assert_same_model(load(tmp_path), model)
    file = next(file for file in tmp_path.iterdir() if file.suffix == f".{suffix}")
    assert_same_model(load(file), model)  # the config beside a file counts too


def test_activation_is_gelu_where_the_config_does_not_say(tmp_path):
    model = tiny_model(quick_gelu=False)
    content = write_folder(tmp_path, model)
    del content["model_cfg"]["quick_gelu"]
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    assert_same_model(load(tmp_path), model)


def wrap(state):
    return {"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"state": {}, "param_groups": []}}


def custom_text(state):
    own = ("visual.", "logit_")
    return {key if key.startswith(own) else f"text.{key}": value for key, value in state.items()}


VARIANTS = {
    "wrapped": wrap,
    "data_parallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "custom_text": custom_text,
    "all_at_once": lambda state: wrap({f"module.{key}": value for key, value in custom_text(state).items()}),
    "logit_scale_1d": lambda state: {**state, "logit_scale": state["logit_scale"].reshape(1)},
    "size_buffers": lambda state: {**state, "context_length": torch.tensor(12), "attn_mask": torch.zeros(12, 12)},
    "no_batch_counters": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("tower", ["vit", "resnet"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_state_dict_variants(tmp_path, tower, variant):
    model = tiny_model(tower)
    write_folder(tmp_path, model)
    torch.save(VARIANTS[variant](model.state_dict()), tmp_path / "open_clip_pytorch_model.bin")
    assert_same_model(load(tmp_path), model)


def test_logit_bias_loads(tmp_path):
    model = tiny_model(init_logit_bias=-10.0)
    write_folder(tmp_path, model)
    assert load(tmp_path).logit_bias.item() == -10.0


def test_bare_state_dict_gives_sizes_and_warns_about_the_activation(tmp_path):
    model = tiny_model(text_width=64, text_heads=1, vision_width=128, vision_heads=2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert detect_format(tmp_path / "weights.pt") == "open_clip"
    with pytest.warns(UserWarning, match="assuming QuickGELU"):
        assert_same_model(load(tmp_path / "weights.pt"), model)
    assert load(tmp_path / "weights.pt", quick_gelu=False).config.quick_gelu is False


@pytest.mark.parametrize("name", ["clip-vit-h-14", "clip-vit-g-14", "clip-vit-bigg-14"])
def test_bare_state_dict_of_a_large_public_size_gets_its_heads(name):
    from vlmfast.checkpoints.openai import infer_config

    model = models.create(name, device="meta")
    config = CLIPConfig.from_dict(infer_config(model.state_dict(), "weights.pt"))
    assert (config.vision_heads, config.text_heads) == (16, model.config.text_heads)
    assert config.quick_gelu is False and config.mlp_width("vision") == model.config.mlp_width("vision")


def test_bare_state_dict_with_unknown_heads_is_refused(tmp_path):
    torch.save(tiny_model().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"head counts are not stored and widths \[48, 32\]"):
        load(tmp_path / "weights.pt")


def test_preprocessing_comes_from_the_config(tmp_path):
    write_folder(tmp_path, tiny_model(), mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], resize_mode="squash")
    model = load(tmp_path)
    assert model.preprocess.resize_mode == "squash" and model.preprocess.image_size == 32
    assert model.config.image_mean == (0.5, 0.5, 0.5) and model.preprocess.std == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("vision_cfg.timm_model_name", "vit_base", "vision_cfg.timm_model_name = 'vit_base' is not supported"),
        ("vision_cfg.ls_init_value", 0.1, "vision_cfg.ls_init_value = 0.1 is not supported"),
        ("vision_cfg.surprise", 1, "vision_cfg.surprise = 1 is not supported"),
        ("text_cfg.hf_model_name", "roberta", "text_cfg.hf_model_name = 'roberta' is not supported"),
        ("text_cfg.pool_type", "last", "pool_type is 'last', must be argmax or eos"),
        ("multimodal_cfg", {"width": 3}, "model_cfg.multimodal_cfg is not supported"),
        ("vision_cfg.layers", 10**9, "1000000002 blocks"),
        ("vision_cfg.width", "wide", "wrong"),
        ("text_cfg.norm_kwargs", {"eps": 1e-6}, "eps differs between the towers"),
    ],
)
def test_unsupported_settings_are_named(tmp_path, path, value, message):
    content = write_folder(tmp_path, tiny_model())
    place = content["model_cfg"]
    *parents, leaf = path.split(".")
    for parent in parents:
        place = place[parent]
    place[leaf] = value
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_eos_pooling_and_norm_eps_are_kept(tmp_path):
    model = tiny_model(eos_token_id=5, layer_norm_eps=1e-6)
    write_folder(tmp_path, model)
    assert_same_model(load(tmp_path), model)


def test_missing_and_unknown_keys_are_all_named(tmp_path):
    model = tiny_model()
    write_folder(tmp_path, model)
    state = model.state_dict()
    state["visual.extra"] = state.pop("visual.proj")
    state["other.weight"] = torch.zeros(2)
    del state["ln_final.bias"]
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    missing = str(error.value).partition("missing keys: ")[2].partition(";")[0]
    assert set(missing.split(", ")) == {"visual.proj", "ln_final.bias"}
    assert "unknown keys: other.weight, visual.extra" in str(error.value)
    with pytest.warns(UserWarning, match="unknown keys: other.weight, visual.extra"):
        lax = load(tmp_path, strict=False)
    assert torch.equal(lax.visual.conv1.weight, model.visual.conv1.weight)
    assert not any(p.is_meta for p in lax.parameters())


def test_wrong_shapes_are_named(tmp_path):
    model = tiny_model()
    write_folder(tmp_path, model)
    torch.save({**model.state_dict(), "text_projection": torch.zeros(3, 3)}, tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"text_projection is torch.float32 \[3, 3\], must be .* \[32, 24\]"):
        load(tmp_path)


def test_dtype_is_kept_unless_mixed_or_asked_for(tmp_path):
    model = tiny_model()
    write_folder(tmp_path, model.to(torch.bfloat16))
    assert_same_model(load(tmp_path), model)
    assert load(tmp_path, dtype=torch.float64).dtype == torch.float64
    state = {**model.state_dict(), "ln_final.bias": model.ln_final.bias.float()}
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    assert {p.dtype for p in load(tmp_path).parameters()} == {torch.float32}
