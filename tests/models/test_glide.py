"""GLIDE's U-Nets and text transformer: reference numbers, sizes of the public models, errors."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from glide_golden import BASE, INPAINT, UNETS, UPSAMPLE, float_weights, image_inputs, unet_settings
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmfast import models
from vlmfast.layers import unet
from vlmfast.layers.unet import ResBlock, timestep_embedding
from vlmfast.layers.unet_attention import AttentionBlock
from vlmfast.models import glide
from vlmfast.models.glide import GLIDE, GLIDEConfig

TOLERANCE = {"forward.model_output": {BASE: 5e-5, UPSAMPLE: 5e-5, INPAINT: 1e-4}, "forward.guided_output": 1e-4}
SIZES = dict(image_size=16, num_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(8,),
             num_head_channels=16, n_vocab=40, text_ctx=6, xf_width=32, xf_layers=2, xf_heads=2)


def small(name="glide-tiny", **changes) -> GLIDE:
    """A model whose every tensor carries noise."""
    model = models.create(name, **{**SIZES, **changes}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.05)
    return model


def some_text(model, batch=2):
    tokens = torch.randint(model.config.n_vocab, (batch, model.config.text_ctx))
    lengths = torch.arange(batch) % model.config.text_ctx
    return tokens, torch.arange(model.config.text_ctx) < model.config.text_ctx - lengths[:, None]


def some_images(model, batch=2, side=16):
    return torch.randn(batch, 3, side, side), torch.randint(1000, (batch,))


@pytest.fixture
def reference(golden):
    def read(case):
        weights, given, truth, metadata = golden(case)
        model = GLIDE(GLIDEConfig(**unet_settings(metadata["config"]))).eval()
        model.load_state_dict(float_weights(weights))  # strict: every key, and no other
        return model, given, truth, metadata["config"]

    return read


@pytest.mark.parametrize("case", UNETS)
def test_text_and_output_match_the_public_code(reference, golden_close, case):
    model, given, truth, _ = reference(case)
    with torch.no_grad():
        states = model.encode_text(given["tokens"], given["mask"])
        golden_close(states.xf_out.mT, truth["xf_out"])
        golden_close(states.xf_proj, truth["xf_proj"])
        output = model(given["forward.x"], given["forward.timesteps"], states, **image_inputs(given))
        golden_close(output, truth["forward.model_output"], TOLERANCE["forward.model_output"][case])


@pytest.mark.parametrize("case", [BASE, INPAINT])
def test_guided_output_matches_the_public_code(reference, golden_close, case):
    """[conditional; unconditional] see the same image; the variance is not guided."""
    model, given, truth, config = reference(case)
    half = given["forward.x"].chunk(2)[0]
    with torch.no_grad():
        output = model(torch.cat([half, half]), given["forward.timesteps"], tokens=given["tokens"],
                       mask=given["mask"], **image_inputs(given))
    noise, variance = output.split(3, 1)
    conditional, unconditional = noise.chunk(2)
    guided = unconditional + config["guidance_scale"] * (conditional - unconditional)
    golden_close(torch.cat([torch.cat([guided, guided]), variance], 1), truth["forward.guided_output"],
                 TOLERANCE["forward.guided_output"])


def test_null_text_is_what_guidance_reads(reference, golden_close):
    model, given, truth, _ = reference(BASE)
    with torch.no_grad():
        golden_close(model.encode_text(*model.null_text(1)).xf_out.mT, truth["xf_out"][1:])


@pytest.mark.parametrize("name, total, keys", [
    ("glide-base", 385_030_726, 783), ("glide-base-inpaint", 385_037_638, 783),
    ("glide-upsample", 398_361_286, 797), ("glide-upsample-inpaint", 398_361_286 + 4 * 9 * 192, 797),
])
def test_parameter_counts_of_the_public_models(name, total, keys):
    model = models.create(name, device="meta")
    assert sum(value.numel() for value in model.parameters()) == total
    text = ("transformer", "final_ln", "token_embedding", "positional_embedding", "padding_embedding")
    assert sum(value.numel() for key, value in model.named_parameters() if key.startswith(text)) == 76_695_808
    assert len(model.state_dict()) == keys


@pytest.mark.parametrize("name, side, attention_layers", [("glide-base", 64, 22), ("glide-upsample-inpaint", 256, 16)])
def test_public_sizes_run_without_reading_a_value(monkeypatch, name, side, attention_layers):
    """Tensors without values: what would wait for a device raises. Only on the CPU are ids looked at."""
    monkeypatch.setattr(glide, "check_ids", lambda *given: None)
    with FakeTensorMode(), torch.no_grad():
        model = models.create(name).eval()
        tokens, mask = model.null_text(2)
        states = model.encode_text(tokens, mask)
        assert states.xf_proj.shape == (2, 768) and states.xf_out.shape == (2, 128, 512)
        assert len(states.encoder_kv) == attention_layers
        assert all(part.shape[1] == 128 and part.shape[3] == 64 for pair in states.encoder_kv for part in pair)
        x, conditions = torch.zeros(2, 3, side, side), {}
        if model.config.super_res:
            conditions = dict(inpaint_image=x, inpaint_mask=x[:, :1], low_res=torch.zeros(2, 3, 64, 64))
        assert model(x, torch.zeros(2), states, **conditions).shape == (2, 6, side, side)


def test_compiles_into_one_graph():
    model = small("glide-tiny-upsample")
    x, t = some_images(model)
    tokens, mask = some_text(model)
    low_res = torch.rand(2, 3, 4, 4)
    found = torch.compile(model, backend="eager", fullgraph=True)(x, t, tokens=tokens, mask=mask, low_res=low_res)
    torch.testing.assert_close(found, model(x, t, tokens=tokens, mask=mask, low_res=low_res))
    found.sum().backward()
    assert model.input_blocks[0][0].weight.grad.abs().sum() > 0


def test_tiny_models_are_tiny():
    for name in ("glide-tiny", "glide-tiny-upsample"):
        model = models.create(name, device="meta", n_vocab=500, text_ctx=16)
        assert 1.5e6 < sum(value.numel() for value in model.parameters()) < 4e6
        assert model.config.image_size == 32


def test_every_branch_starts_at_zero_and_every_parameter_learns():
    model = models.create("glide-tiny", **SIZES)
    last = [value for key, value in model.named_parameters() if re.search(r"proj_out|out_layers\.3|^out\.2", key)]
    blocks = sum(isinstance(module, ResBlock | AttentionBlock) for module in model.modules())
    assert len(last) == 2 * (blocks + 1) and not any(value.any() for value in last)
    x, t = some_images(model)
    tokens, mask = some_text(model, 2)
    assert model(x, t, tokens=tokens, mask=mask).abs().max() == 0
    model = small().train()
    model(x, t, tokens=tokens, mask=mask).square().sum().backward()
    without = [key for key, value in model.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert without == []


def test_prepared_text_gives_what_tokens_give():
    model = small("glide-tiny-upsample")
    x, t = some_images(model)
    tokens, mask = some_text(model)
    low_res = torch.rand(2, 3, 4, 4)
    states = model.encode_text(tokens, mask)
    truth = model(x, t, tokens=tokens, mask=mask, low_res=low_res)
    assert torch.equal(model(x, t, states, low_res=low_res), truth)
    assert not torch.allclose(model(x, t, model.encode_text(*model.null_text(2)), low_res=low_res), truth, atol=1e-3)


def test_padding_is_read_through_its_own_embeddings():
    model = small()
    tokens, mask = some_text(model, 3)
    other = torch.where(mask, tokens, (tokens + 1) % model.config.n_vocab)
    for a, b in zip(model.encode_text(tokens, mask)[:2], model.encode_text(other, mask)[:2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(model.encode_text(tokens).xf_out, model.encode_text(tokens, torch.ones_like(mask)).xf_out)
    plain = small(xf_padding=False)
    assert "padding_embedding" not in plain.state_dict()
    assert not torch.allclose(plain.encode_text(tokens, mask).xf_out, plain.encode_text(other, mask).xf_out)


def test_checkpointing_changes_memory_and_nothing_else(monkeypatch):
    """Equal outputs and gradients, dropout included; without it no stage runs twice."""
    model = small(dropout=0.3).train()
    x, t = some_images(model)
    text, runs = some_text(model), []
    stage_forward = unet.Stage.forward
    monkeypatch.setattr(unet.Stage, "forward", lambda self, *given: runs.append(1) or stage_forward(self, *given))
    results, counts = [], []
    for flag in (False, True):
        model.use_checkpoint = flag
        torch.manual_seed(3)
        runs.clear()
        output = model(x, t, tokens=text[0], mask=text[1])
        gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        results.append((output, *gradients))
        counts.append(len(runs))
    assert counts[1] == 2 * counts[0]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_dropout_is_drawn_in_training_only():
    model = small(dropout=0.5)
    x, t = some_images(model)
    states = model.encode_text(*some_text(model))
    assert torch.equal(model(x, t, states), model(x, t, states))
    model.train()
    assert not torch.allclose(model(x, t, states), model(x, t, states), atol=1e-3)


def test_inpainting_without_an_image_knows_nothing():
    model = small(inpaint=True)
    x, t = some_images(model)
    states = model.encode_text(*some_text(model))
    truth = model(x, t, states)
    image, mask = torch.rand(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)
    torch.testing.assert_close(model(x, t, states, inpaint_image=image, inpaint_mask=mask), truth)
    known = model(x, t, states, inpaint_image=image, inpaint_mask=mask + 1)
    assert not torch.allclose(known, truth, atol=1e-3)
    half = torch.cat([mask[..., :8] + 1, mask[..., 8:]], -1)  # what the mask hides does not matter
    hidden = torch.where(half.bool(), image, image + 5)
    torch.testing.assert_close(model(x, t, states, inpaint_image=image, inpaint_mask=half),
                               model(x, t, states, inpaint_image=hidden, inpaint_mask=half))


def test_inpainting_upsampler_takes_image_mask_and_small_image_in_this_order(monkeypatch):
    model = small("glide-tiny-upsample", inpaint=True)
    assert model.config.in_channels == 10
    x, t = some_images(model)
    states, seen = model.encode_text(*some_text(model)), []
    monkeypatch.setattr(model, "run", lambda x, *rest: seen.append(x))
    image, mask, low = torch.rand(2, 3, 16, 16), torch.rand(2, 1, 16, 16).round(), torch.rand(2, 3, 4, 4)
    model(x, t, states, inpaint_image=image, inpaint_mask=mask, low_res=low)
    enlarged = F.interpolate(low, (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(seen[0], torch.cat([x, image * mask, mask, enlarged], 1))


def test_other_sizes_that_can_be_halved_work():
    model = small()
    states = model.encode_text(*some_text(model))
    assert model(torch.randn(2, 3, 10, 4), torch.tensor([5, 7]), states).shape == (2, 6, 10, 4)
    assert model(torch.randn(2, 3, 16, 16), torch.tensor([5.5, 7]), states).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_norms_and_times_in_float32(dtype):
    model = small()
    x, t = some_images(model)
    text = some_text(model)
    truth = model(x, t, tokens=text[0], mask=text[1])
    assert model.to_half(dtype) is model and model.dtype == dtype
    wide = ("time_embed", "emb_layers", "norm", "out.", "ln_", "final_ln", "positional_embedding", "padding_embedding",
            "in_layers.0", "out_layers.0")
    for key, value in model.state_dict().items():
        expected = torch.float32 if key.startswith("out.") or any(part in key for part in wide if part != "out.") \
            else dtype
        assert value.dtype == expected, key
    output = model(x, t, tokens=text[0], mask=text[1])
    assert output.dtype == torch.float32
    assert (output - truth).norm() < 16 * torch.finfo(dtype).eps * truth.norm()
    assert not torch.equal(output, truth)
    model.to_half(torch.float32)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_cast_of_the_whole_model_works(dtype):
    model = small()
    x, t = some_images(model)
    text = some_text(model)
    truth = model(x, t, tokens=text[0], mask=text[1])
    output = model.to(dtype)(x.to(dtype), t, tokens=text[0], mask=text[1])
    assert output.dtype == dtype
    assert (output - truth).norm() < (1e-5 if dtype == torch.float64 else 0.1) * truth.norm()


def test_attention_equals_the_formula_of_the_paper():
    """Per head [query, key, value]; text keys before those of the image; scale D^-1/2."""
    block = AttentionBlock(64, 4, 24)
    torch.nn.init.normal_(block.proj_out.weight)
    x, text = torch.randn(2, 64, 3, 5), torch.randn(2, 7, 24)
    qkv = F.conv1d(F.group_norm(x, 32, eps=1e-5).flatten(2), block.qkv.weight, block.qkv.bias)
    kv = F.conv1d(text.mT, block.encoder_kv.weight, block.encoder_kv.bias)
    rows = []
    for head in range(4):
        query, key, value = qkv[:, 48 * head : 48 * (head + 1)].split(16, 1)
        text_key, text_value = kv[:, 32 * head : 32 * (head + 1)].split(16, 1)
        key, value = torch.cat([text_key, key], 2), torch.cat([text_value, value], 2)
        rows.append(value @ (query.mT @ key / 16**0.5).softmax(-1).mT)
    truth = x + F.conv1d(torch.cat(rows, 1), block.proj_out.weight, block.proj_out.bias).unflatten(2, (3, 5))
    torch.testing.assert_close(block(x, block.text_keys_values(text)), truth, rtol=1e-5, atol=1e-5)


def test_timesteps_are_cosines_then_sines():
    t = torch.tensor([0.0, 3.0, 999.5])
    found = timestep_embedding(t, 9)
    assert found.shape == (3, 9) and (found[:, -1] == 0).all()
    for i in range(4):
        angle = t.double() * 10000.0 ** (-i / 4)
        torch.testing.assert_close(found[:, i], angle.cos().float(), rtol=0, atol=1e-4)
        torch.testing.assert_close(found[:, 4 + i], angle.sin().float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(2, 4, 16, 16)), r"x has shape \[2, 4, 16, 16\], must be \[B, 3, height, width\]"),
    (dict(x=torch.zeros(2, 3, 16, 15)), r"sides divisible by 2"),
    (dict(x=torch.zeros(2, 3, 0, 16)), r"sides divisible by 2"),
    (dict(x=torch.zeros(3, 16, 16)), r"x has shape"),
    (dict(x=torch.zeros(3, 3, 16, 16), timesteps=torch.zeros(3)), "the text has 2 rows, x has 3"),
    (dict(timesteps=torch.zeros(3)), r"timesteps has shape \[3\], must be \[2\]"),
    (dict(low_res=torch.zeros(2, 3, 4, 4)), "low_res must be None: this model has super_res False"),
    (dict(inpaint_image=torch.zeros(2, 3, 16, 16)), "inpaint_mask is None"),
    (dict(inpaint_mask=torch.zeros(2, 1, 16, 16)), "inpaint_image is None"),
    (dict(inpaint_image=torch.zeros(2, 3, 16, 16), inpaint_mask=torch.zeros(2, 1, 8, 8)),
     r"inpaint_mask has shape \[2, 1, 8, 8\], must be \[2, 1, 16, 16\]"),
    (dict(inpaint_image=torch.zeros(2, 1, 16, 16), inpaint_mask=torch.zeros(2, 1, 16, 16)), "inpaint_image has shape"),
    (dict(tokens=torch.zeros(2, 6, dtype=torch.int64)), "and not both"),
    (dict(text_states=None), "text_states or tokens must be given"),
    (dict(text_states=None, tokens=torch.zeros(2, 7, dtype=torch.int64)),
     r"tokens has shape \[2, 7\], must be \[B, 6\]"),
    (dict(text_states=None, tokens=torch.full((2, 6), 40)), r"tokens holds 40, must be in 0 \.\.\. 39"),
    (dict(text_states=None, tokens=torch.zeros(2, 6, dtype=torch.int64), mask=torch.ones(2, 5, dtype=torch.bool)),
     r"mask has shape \[2, 5\], must be \[2, 6\]"),
])
def test_wrong_inputs_are_named(change, message):
    model = small(inpaint="low_res" not in change)
    states = model.encode_text(*some_text(model))
    given = dict(x=torch.zeros(2, 3, 16, 16), timesteps=torch.zeros(2), text_states=states)
    with pytest.raises(ValueError, match=f"GLIDE: .*{message}"):
        model(**{**given, **change})


def test_upsampler_needs_its_small_image():
    model = small("glide-tiny-upsample")
    x, t = some_images(model)
    states = model.encode_text(*some_text(model))
    with pytest.raises(ValueError, match="low_res is None, must be the small image"):
        model(x, t, states)
    with pytest.raises(ValueError, match=r"low_res has shape \[1, 3, 4, 4\], must be \[2, 3, 4, 4\]"):
        model(x, t, states, low_res=torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"low_res has shape \[2, 4, 4\]"):
        model(x, t, states, low_res=torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="inpaint_mask must be None: this model has inpaint False"):
        model(x, t, states, low_res=torch.zeros(2, 3, 4, 4), inpaint_mask=torch.zeros(2, 1, 16, 16))


def test_wrong_dtypes_of_text_are_named():
    model = small()
    with pytest.raises(TypeError, match="tokens are torch.float32"):
        model.encode_text(torch.zeros(2, 6))
    with pytest.raises(TypeError, match="mask is torch.int64"):
        model.encode_text(torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.int64))


def test_upsamplers_are_attached_to_their_kind():
    base, upsampler = small(), small("glide-tiny-upsample")
    base.attach_upsampler(upsampler)
    assert base.upsampler is upsampler and not any("upsampler" in key for key in base.state_dict())
    for wrong in (base, torch.nn.Identity()):
        with pytest.raises(ValueError, match="upsampler must be a GLIDE with super_res"):
            base.attach_upsampler(wrong)
    with pytest.raises(ValueError, match="upsampler has inpaint True, must be False"):
        base.attach_upsampler(small("glide-tiny-upsample", inpaint=True))


@pytest.mark.parametrize("change, message", [
    (dict(image_size=17), "image_size is 17, must be a multiple of 2"),
    (dict(num_channels=48), "num_channels is 48, must be a multiple of 32"),
    (dict(num_head_channels=24), "num_head_channels is 24, must be a divisor of 64"),
    (dict(channel_mult=()), "channel_mult"),
    (dict(channel_mult=(1, -1)), "channel_mult is .*, must be positive integers"),
    (dict(channel_mult="1,2"), "channel_mult is '1,2', must be positive integers"),
    (dict(xf_heads=5), "xf_heads is 5, must be a divisor of xf_width"),
    (dict(noise_schedule="quadratic"), "noise_schedule is 'quadratic', must be one of"),
    (dict(dropout=1.0), "dropout is 1.0, must be less than 1"),
    (dict(super_res=1), "super_res is 1, must be True or False"),
    (dict(width=3), "unknown fields width"),
])
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=f"GLIDEConfig: {message}"):
        models.create("glide-tiny", device="meta", **{**SIZES, **change})


def test_settings_survive_a_round_trip():
    config = replace(GLIDEConfig(), inpaint=True, channel_mult=(1, 2))
    assert GLIDEConfig.from_dict({**config.to_dict(), "channel_mult": [1, 2]}) == config


def test_a_few_steps_fit_one_batch_with_text_dropped():
    model = models.create("glide-tiny", **{**SIZES, "dropout": 0.0}).train()
    x, t = some_images(model)
    tokens, mask = some_text(model)
    null = model.null_text(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(25):
        text = (tokens, mask) if step % 5 else null
        loss = F.mse_loss(model(x, t, tokens=text[0], mask=text[1])[:, :3], x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
