"""VQGAN: sizes, both quantizers, and what it refuses."""

import pytest
import torch

import vlmfast
from vlmfast.models import VQGAN, VQGANConfig

TINY = dict(resolution=16, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), z_channels=8, n_embed=20,
            embed_dim=8)


@pytest.fixture(params=["vq", "gumbel"])
def model(request):
    model = VQGAN(VQGANConfig(**TINY, quantizer=request.param))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model


def test_sizes_of_the_public_models():
    detokenizer = vlmfast.create("dalle-mini-vqgan", encoder=False, device="meta")
    assert sum(value.numel() for value in detokenizer.parameters()) == 46_709_891
    gumbel = vlmfast.create("vqgan-gumbel-f8", device="meta")
    state = gumbel.state_dict()
    assert gumbel.downsample == 8 and state["quantize.proj.weight"].shape == (8192, 256, 1, 1)
    assert state["quantize.embed.weight"].shape == (8192, 256)
    f16 = vlmfast.create("vqgan-f16-16384", device="meta")
    assert f16.downsample == 16 and f16.vocab_size == 16384
    names = {name.rsplit(".", 2)[0] for name in f16.state_dict() if ".attn." in name}
    assert {name.split(".attn")[0] for name in names} == {"encoder.down.4", "decoder.up.4"}


def test_codes_are_nearest_or_likeliest(model):
    image = torch.rand(2, 3, 16, 24)
    features = model.features(image)
    codes = model.encode(image)
    assert codes.shape == (2, 8, 12) and len(codes.unique()) > 1
    if model.config.quantizer == "vq":
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        expected = torch.cdist(rows, model.quantize.embedding.weight).argmin(1)
    else:
        expected = model.quantize.proj(features).argmax(1)
    assert torch.equal(codes.flatten(), expected.flatten())
    picture = model.decode(codes)
    assert picture.shape == image.shape and 0 <= picture.min() and picture.max() <= 1
    torch.testing.assert_close(model.decode(codes[:, :, :8].flatten(1)), model.decode(codes[:, :, :8]))


def test_every_parameter_gets_a_gradient(model):
    out = model(torch.rand(2, 3, 16, 16), 0.9, seed=1)
    (out.raw.square().mean() + out.kl + out.codebook_loss).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None, name
    assert (out.codebook_loss.item() > 0) == (model.config.quantizer == "vq")
    assert (out.kl.item() > 0) == (model.config.quantizer == "gumbel")


def test_the_gumbel_seed_decides():
    model, image = VQGAN(VQGANConfig(**TINY, quantizer="gumbel")), torch.rand(1, 3, 16, 16)
    first, again, other = (model(image, 1.0, seed).raw for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_pixels_lie_in_the_units_that_the_config_names():
    image = torch.rand(1, 3, 16, 16)
    for unit, expected in (("signed", image * 2 - 1), ("unit", image)):
        model = VQGAN(VQGANConfig(**TINY, pixel_range=unit))
        torch.testing.assert_close(model.target(image), expected)
        torch.testing.assert_close(model._picture(expected), image)


def test_bad_input_is_refused(model):
    with pytest.raises(ValueError, match="image is 16 x 17 pixels, both sides must be multiples of 2"):
        model.encode(torch.rand(1, 3, 16, 17))
    with pytest.raises(ValueError, match="codes lie in 20 ... 20, must lie in 0 ... 19"):
        model.decode(torch.full((1, 2, 2), 20))
    decoder = VQGAN(VQGANConfig(**TINY, encoder=False))
    with pytest.raises(ValueError, match="has no encoder"):
        decoder(torch.rand(1, 3, 16, 16))
    if model.config.quantizer == "gumbel":
        with pytest.raises(ValueError, match="tau is 0"):
            model(torch.rand(1, 3, 16, 16), 0)


@pytest.mark.parametrize("changes, message", [
    (dict(ch=48), "ch is 48, must be a multiple of 32"), (dict(ch_mult=()), "ch_mult is"),
    (dict(resolution=18, ch_mult=(1, 1, 1)), "ch_mult is"), (dict(quantizer="fsq"), "quantizer is 'fsq'"),
    (dict(pixel_range="byte"), "pixel_range is 'byte'"), (dict(attn_resolutions=(0,)), "attn_resolutions is"),
    (dict(dropout=1.0), "dropout is 1.0")])
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VQGANConfig(**{**TINY, **changes})


def test_config_survives_json():
    import json

    config = VQGANConfig(**TINY)
    assert VQGANConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
