"""Discrete VAEs: sizes, codes, gradients, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

import vlmfast
from vlmfast.layers.pixels import map_pixels, unmap_pixels
from vlmfast.models import DVAE, DiscreteVAE, DiscreteVAEConfig, DVAEConfig

TINY = dict(image_size=32, vocab_size=40, n_hid=8, n_init=16, n_blk_per_group=1)
SMALL = dict(image_size=16, num_tokens=24, codebook_dim=12, num_layers=2, num_resnet_blocks=1, hidden_dim=10)


@pytest.fixture(params=["DVAE", "DiscreteVAE"])
def model(request):
    model = DVAE(DVAEConfig(**TINY)) if request.param == "DVAE" else DiscreteVAE(DiscreteVAEConfig(**SMALL))
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
    return model


def test_sizes_of_the_public_model():
    model = vlmfast.create("openai-dvae", device="meta")
    assert sum(value.numel() for value in model.encoder.parameters()) == 53_786_240
    assert sum(value.numel() for value in model.decoder.parameters()) == 43_829_766
    assert len(model.encoder.state_dict()) == 74
    assert model.config == DVAEConfig() and model.vocab_size == 8192 and model.downsample == 8


def test_sizes_of_dalle_pytorch():
    state = vlmfast.create("dalle-pytorch-dvae", device="meta").state_dict()
    assert state["codebook.weight"].shape == (8192, 512) and state["encoder.5.weight"].shape == (8192, 256, 1, 1)
    assert state["decoder.0.weight"].shape == (256, 512, 1, 1) and state["decoder.6.weight"].shape == (3, 256, 1, 1)


def test_codes_are_the_argmax_of_the_logits(model):
    image = torch.rand(3, 3, 32, 16)
    logits = model.logits(image)
    side = 32 // model.downsample
    assert logits.shape == (3, model.vocab_size, side, side // 2)
    codes = model.encode(image)
    assert codes.dtype == torch.int64 and torch.equal(codes, logits.argmax(1)) and len(codes.unique()) > 1
    assert model(image, mode="argmax").codes.equal(codes)


def test_decoding_equals_the_one_hot_product(model):
    codes = torch.randint(model.vocab_size, (2, 3, 4))
    one_hot = F.one_hot(codes, model.vocab_size).permute(0, 3, 1, 2).float()
    if isinstance(model, DVAE):
        blocks = model.decoder.blocks
        raw = blocks[1:](F.conv2d(one_hot, blocks.input.weight, blocks.input.bias))
        expected = unmap_pixels(raw[:, :3].sigmoid())
    else:
        raw = model.decoder(torch.einsum("bvhw,vd->bdhw", one_hot, model.codebook.weight))
        expected = (raw * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), expected, rtol=1e-5, atol=1e-5)
    square = torch.randint(model.vocab_size, (2, 9))
    torch.testing.assert_close(model.decode(square), model.decode(square.view(2, 3, 3)))


def test_forward_is_the_gumbel_softmax(model):
    image, tau = torch.rand(2, 3, 32, 16), 0.7
    logits = model.logits(image)
    noise = -torch.log(-torch.log(torch.rand_like(logits)))
    out = model(image, tau, noise=noise)
    y = ((logits + noise) / tau).softmax(1)
    codebook = model.decoder.codebook if isinstance(model, DVAE) else model.codebook.weight
    torch.testing.assert_close(out.raw, model.decoder(torch.einsum("bvhw,vd->bdhw", y, codebook)), rtol=1e-4, atol=1e-5)
    q = logits.softmax(1)
    torch.testing.assert_close(out.kl, (q * (q * model.vocab_size).log()).sum(1).mean())
    assert torch.equal(out.codes, y.argmax(1))
    assert out.reconstruction.shape == image.shape and 0 <= out.reconstruction.min() <= out.reconstruction.max() <= 1


def test_every_parameter_gets_a_gradient(model):
    out = model(torch.rand(2, 3, 32, 16), 1.0, seed=3)
    (out.raw.square().mean() + out.kl).backward()
    for name, value in model.named_parameters():
        assert value.grad is not None and value.grad.abs().max() > 0, name


def test_the_seed_decides(model):
    image = torch.rand(1, 3, 32, 16)
    first, again, other = (model(image, 1.0, seed) for seed in (5, 5, 6))
    assert torch.equal(first.raw, again.raw) and not torch.equal(first.raw, other.raw)


def test_target_and_reconstruction_are_inverse(model):
    image = torch.rand(1, 3, 8, 8)
    target = model.target(image)
    if isinstance(model, DVAE):
        assert torch.equal(target, map_pixels(image))
        statistics = torch.cat([target.logit(), torch.zeros_like(target)], 1)
        torch.testing.assert_close(model._picture(statistics), image, rtol=0, atol=1e-6)
    else:
        torch.testing.assert_close(target, image * 2 - 1)
        torch.testing.assert_close(model._picture(target), image)


@pytest.mark.parametrize("straight_through, reinmax, mode", [(False, False, "soft"), (True, False, "straight_through"),
                                                             (True, True, "reinmax")])
def test_modes_of_dalle_pytorch(straight_through, reinmax, mode):
    config = DiscreteVAEConfig(**SMALL, straight_through=straight_through, reinmax=reinmax)
    assert config.mode == mode
    model = DiscreteVAE(config)
    out = model(torch.rand(2, 3, 16, 16), seed=1)
    if mode == "soft":
        assert not torch.allclose(out.raw, model.decoder(model.codebook(out.codes).permute(0, 3, 1, 2)), atol=1e-6)
    else:
        torch.testing.assert_close(out.raw, model.decoder(model.codebook(out.codes).permute(0, 3, 1, 2)))


def test_bf16_and_autocast(model):
    image = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.logits(image).dtype == torch.float32  # the softmax over the codes needs it
        out = model(image, 1.0, seed=2)
        out.raw.float().sum().backward()
        assert model.encode(image).shape == model.encode(image).shape
    half = model.to(torch.bfloat16)
    assert half.decode(half.encode(image)).dtype == torch.float32


def test_bad_input_is_refused(model):
    name, factor = type(model).__name__, model.downsample
    image = torch.rand(1, 3, 16, 16)
    for call in (model.encode, model.logits, model):
        message = f"{name}: image is 16 x 18 pixels, both sides must be multiples of {factor}"
        with pytest.raises(ValueError, match=message):
            call(torch.rand(1, 3, 16, 18))
        with pytest.raises(ValueError, match=rf"{name}: image has shape \[1, 4, 16, 16\], must be \[B, 3, H, W\]"):
            call(torch.rand(1, 4, 16, 16))
        with pytest.raises(TypeError, match="image is torch.uint8"):
            call(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    for codes, kind, message in (
            (torch.full((1, 2, 2), model.vocab_size), ValueError, f"must lie in 0 ... {model.vocab_size - 1}"),
            (torch.full((1, 2, 2), -1), ValueError, "codes lie in -1"),
            (torch.zeros(1, 2, 2), TypeError, "codes is torch.float32"),
            (torch.zeros(1, 5, dtype=torch.int64), ValueError, r"codes has shape \[1, 5\]"),
            (torch.zeros(4, dtype=torch.int64), ValueError, r"codes has shape \[4\]")):
        with pytest.raises(kind, match=message):
            model.decode(codes)
    for tau in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="tau is"):
            model(image, tau)


def test_an_empty_batch_passes(model):
    empty = torch.rand(0, 3, 16, 16)
    assert model.encode(empty).shape[0] == 0 and model.decode(model.encode(empty)).shape[0] == 0


@pytest.mark.parametrize("config, changes, message", [
    (DVAEConfig, dict(n_hid=6), "n_hid is 6, must be a multiple of 4"),
    (DVAEConfig, dict(vocab_size=0), "vocab_size is 0"),
    (DVAEConfig, dict(temperature=0.0), "temperature is 0.0, must be above 0"),
    (DiscreteVAEConfig, dict(image_size=20), "image_size is 20, must be a multiple of"),
    (DiscreteVAEConfig, dict(reinmax=True), "reinmax is True, must be False without straight_through"),
    (DiscreteVAEConfig, dict(normalization=((0.5,), (0.5,))), "3 means and 3 positive deviations"),
    (DiscreteVAEConfig, dict(normalization=((0.5,) * 3, (0.0,) * 3)), "3 means and 3 positive deviations")])
def test_bad_settings_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_configs_survive_json():
    import json

    for config in (DVAEConfig(**TINY), DiscreteVAEConfig(**SMALL), DiscreteVAEConfig(normalization=None)):
        assert type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
