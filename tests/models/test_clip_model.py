"""CLIP against the reference numbers, its published sizes, and its own contract."""

import dataclasses
import math

import pytest
import torch

from vlmfast import models
from vlmfast.models import CLIP, CLIPConfig

# Millions of parameters: (image tower, everything else), from the published model profiles.
PARAMETERS = {
    "clip-rn50": (38.32, 63.69),
    "clip-rn101": (56.26, 63.43),
    "clip-rn50x4": (87.14, 91.16),
    "clip-rn50x16": (167.33, 123.65),
    "clip-rn50x64": (420.38, 202.88),
    "clip-vit-b-32": (87.85, 63.43),
    "clip-vit-b-16": (86.19, 63.43),
    "clip-vit-l-14": (303.97, 123.65),
    "clip-vit-l-14-336": (304.29, 123.65),
    "clip-vit-h-14": (632.08, 354.03),
    "clip-vit-g-14": (1012.65, 354.03),
    "clip-vit-bigg-14": (1844.91, 694.66),
}


def golden_config(config: dict) -> CLIPConfig:
    return CLIPConfig(
        embed_dim=config["embed_dim"],
        image_size=config["image_resolution"],
        vision_layers=config["vision_layers"],
        vision_width=config["vision_width"],
        vision_patch_size=config["vision_patch_size"],
        vision_heads=config.get("vision_heads"),
        context_length=config["context_length"],
        vocab_size=config["vocab_size"],
        text_width=config["transformer_width"],
        text_heads=config["transformer_heads"],
        text_layers=config["transformer_layers"],
    )


@pytest.fixture
def tiny() -> CLIP:
    return models.create("clip-tiny", vision_layers=2, text_layers=1, vocab_size=50, context_length=9).eval()


@pytest.mark.parametrize("case", ["vit_tiny", "resnet_tiny"])
def test_matches_reference_numbers(golden, case):
    weights, inputs, outputs, metadata = golden(f"encoders/clip__{case}")
    model = CLIP(golden_config(metadata["config"])).eval()
    model.load_state_dict(weights, strict=True)
    seen = {}

    def keep(name):
        return lambda module, args, out: seen.__setitem__(name, out)

    model.ln_final.register_forward_hook(keep("text_ln_final"))
    for name in ("ln_pre", "transformer", "layer2", "layer4"):
        if hasattr(model.visual, name):
            getattr(model.visual, name).register_forward_hook(keep(f"visual_{name}"))
    with torch.no_grad():
        seen["image_features"] = model.encode_image(inputs["image"])
        seen["text_features"] = model.encode_text(inputs["text"])
        image, text, scale = model(inputs["image"], inputs["text"])
        seen["logits_per_image"] = scale * image @ text.T
        seen["logits_per_text"] = seen["logits_per_image"].T
        if model.config.resnet:
            seen["visual_stem"] = model.visual.stem(inputs["image"])
    assert set(seen) == set(outputs)
    for name, truth in outputs.items():
        torch.testing.assert_close(seen[name], truth, rtol=0, atol=float(metadata["atol"]), msg=lambda m, n=name: n + m)


def test_every_public_size_is_listed():
    assert set(models.list_models()) >= {*PARAMETERS, "clip-tiny"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    model = models.create(name, device="meta")
    image = sum(p.numel() for p in model.visual.parameters())
    text = sum(p.numel() for p in model.parameters()) - image
    assert all(p.is_meta for p in model.parameters())
    assert (round(image / 1e6, 2), round(text / 1e6, 2)) == PARAMETERS[name]


def test_tiny_has_about_a_million_parameters():
    assert 0.8e6 < sum(p.numel() for p in models.create("clip-tiny").parameters()) < 2e6


def test_forward_gives_unit_features_and_the_scale(tiny):
    out = tiny(torch.randn(3, 3, 32, 32), torch.randint(50, (2, 9)))
    assert out.image_features.shape == (3, 128) and out.text_features.shape == (2, 128)
    torch.testing.assert_close(out.image_features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(out.text_features.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(out.logit_scale, torch.tensor(1 / 0.07))
    assert tiny(text=torch.zeros(1, 9, dtype=torch.long)).image_features is None


def test_text_feature_sits_at_the_first_largest_id_and_ignores_what_follows(tiny):
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0]])
    padded_with_eot = torch.tensor([[48, 3, 4, 49, 49, 49, 49, 49, 49]])
    torch.testing.assert_close(tiny.encode_text(tokens), tiny.encode_text(padded_with_eot), rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny.encode_text(tokens), tiny.encode_text(tokens[:, :4]), rtol=0, atol=1e-6)
    other = torch.tensor([[48, 3, 5, 49, 0, 0, 0, 0, 0]])
    assert not torch.allclose(tiny.encode_text(tokens), tiny.encode_text(other), atol=1e-4)


def test_eos_token_id_pools_at_its_first_occurrence(tiny):
    model = CLIP(dataclasses.replace(tiny.config, eos_token_id=7))
    model.load_state_dict(tiny.state_dict())
    tokens = torch.tensor([[48, 3, 7, 49, 7, 0, 0, 0, 0]])
    expected = tiny.encode_text(torch.tensor([[48, 3, 7]]))  # there the largest id is 48, at position 0
    assert not torch.allclose(model.encode_text(tokens), expected, atol=1e-4)
    hidden = model.ln_final(model.transformer(model.token_embedding(tokens) + model.positional_embedding))
    torch.testing.assert_close(model.encode_text(tokens), hidden[:, 2] @ model.text_projection)


def test_clamp_keeps_the_scale_between_1_and_100(tiny):
    for value, expected in ((9.0, 100.0), (-3.0, 1.0), (2.0, math.exp(2.0))):
        with torch.no_grad():
            tiny.logit_scale.fill_(value)
        tiny.clamp_logit_scale()
        assert tiny.logit_scale.exp().item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_every_parameter(tiny):
    out = tiny(torch.randn(4, 3, 32, 32), torch.randint(50, (4, 9)))
    logits = out.logit_scale * out.image_features @ out.text_features.T
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    dead = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", ["clip-tiny", "clip-rn50"])
def test_initialisation_has_the_published_spreads(name):
    size = {} if name == "clip-tiny" else dict(image_size=64, vision_layers=[1, 1, 1, 1], vision_width=32)
    model = models.create(name, text_width=256, text_layers=2, vocab_size=900, context_length=64, **size)
    block = model.transformer.resblocks[1]
    width, layers = 256, 2
    spreads = {
        model.token_embedding.weight: 0.02,
        model.positional_embedding: 0.01,
        model.text_projection: width**-0.5,
        block.attn.in_proj_weight: width**-0.5,
        block.attn.out_proj.weight: (width * 2 * layers) ** -0.5,
        block.mlp.c_fc.weight: (2 * width) ** -0.5,
        block.mlp.c_proj.weight: (width * 2 * layers) ** -0.5,
    }
    if model.config.resnet:
        spreads[model.visual.attnpool.q_proj.weight] = (32 * 32) ** -0.5
        assert all(not stage[0].bn3.weight.any() for stage in (model.visual.layer1, model.visual.layer4))
    else:
        spreads[model.visual.positional_embedding] = spreads[model.visual.proj] = 128**-0.5
        spreads[model.visual.transformer.resblocks[0].mlp.c_proj.weight] = (128 * 2 * 4) ** -0.5
    for tensor, spread in spreads.items():
        assert tensor.std().item() == pytest.approx(spread, rel=0.05)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_half_precision_keeps_norms_wide(tiny):
    image, text = torch.randn(2, 3, 32, 32), torch.randint(50, (2, 9))
    expected = tiny(image, text)
    low = tiny.to(torch.bfloat16)(image, text)
    assert low.image_features.dtype == torch.bfloat16
    torch.testing.assert_close(low.image_features.float(), expected.image_features, rtol=0, atol=0.02)
    norm = tiny.ln_final.float()
    x = torch.randn(4, 128, dtype=torch.bfloat16) * 300
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), norm(x.float()).to(torch.bfloat16), rtol=0, atol=0)


def test_config_round_trips_and_rejects_unknown_fields():
    config = models.create("clip-rn50", device="meta").config
    assert CLIPConfig.from_dict(config.to_dict()) == config
    assert CLIPConfig.from_dict({**config.to_dict(), "vision_layers": [3, 4, 6, 3]}) == config
    with pytest.raises(ValueError, match="unknown fields patch"):
        CLIPConfig.from_dict({**config.to_dict(), "patch": 3})


def test_mlp_width_survives_its_ratio():
    config = models.create("clip-tiny", device="meta").config
    for hidden in range(1408, 7040):
        assert dataclasses.replace(
            config, vision_width=1408, vision_heads=16, vision_mlp_ratio=hidden / 1408
        ).mlp_width("vision") == hidden


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"vision_layers": (2, 2)}, "four block counts"),
        ({"vision_width": 0}, "vision_width is 0"),
        ({"vision_heads": 7}, "vision_heads is 7, must divide"),
        ({"text_width": "wide"}, "text_width is 'wide'"),
        ({"image_size": 3}, "image_size is 3"),
        ({"vision_mlp_ratio": -1.0}, "vision_mlp_ratio is -1.0"),
        ({"eos_token_id": [1, 2]}, "eos_token_id is"),
    ],
)
def test_config_rejects(fields, message):
    with pytest.raises(ValueError, match=message):
        models.create("clip-tiny", **fields)


def test_wrong_inputs_are_named(tiny):
    with pytest.raises(ValueError, match=r"image has shape \[2, 3, 16, 32\], must be \[B, 3, 32, 32\]"):
        tiny.encode_image(torch.zeros(2, 3, 16, 32))
    with pytest.raises(ValueError, match=r"tokens have shape \[1, 10\], must be \[B, 1..9\]"):
        tiny.encode_text(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(TypeError, match="tokens are torch.float32"):
        tiny.encode_text(torch.zeros(1, 9))


def test_unknown_name_lists_close_ones():
    with pytest.raises(ValueError, match="did you mean clip-vit-b-32"):
        models.create("clip-vit-b32")
    with pytest.raises(ValueError, match="already a model name"):
        models.register("clip-tiny", CLIP)
