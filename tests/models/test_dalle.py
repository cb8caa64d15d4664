"""DALL-E's transformer: reference numbers, masks, cached decoding."""

import pytest
import torch
import torch.nn.functional as F
from dalle_golden import PYTORCH_CASES, assert_golden, pytorch_checkpoint

import vlmfast
from vlmfast import models
from vlmfast.layers.axial import AXIAL_KINDS, AxialCache, decode_plan, image_mask
from vlmfast.layers.cross_entropy import linear_cross_entropy
from vlmfast.models.dalle import DALLEConfig


def small(**changes):
    """A model whose every tensor carries noise."""
    sizes = dict(dim=32, depth=2, heads=2, dim_head=16, num_text_tokens=20, text_seq_len=5, num_image_tokens=30,
                 image_grid=(5, 4), conv_kernel=3)
    model = models.create("dalle-tiny", **{**sizes, **changes}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
    return model


def some_inputs(config: DALLEConfig, batch: int = 2):
    text = torch.randint(1, config.num_text_tokens, (batch, config.text_seq_len))
    text[-1, 3:] = 0
    return text, torch.randint(config.num_image_tokens, (batch, config.image_seq_len))


def decode(model, text, codes, known: int = 0):
    """Logits of every position from `known` on, with the cache."""
    logits, state = model.prefill(text, codes[:, :known])
    found = [logits]
    for position in range(known, codes.shape[1] - 1):
        found.append(model.step(codes[:, position], state))
    return torch.stack(found, 1)


@pytest.fixture
def reference(golden, tmp_path):
    def read(case):
        weights, given, truth, metadata = golden(f"generative/dallepytorch__{case}")
        model = vlmfast.load(pytorch_checkpoint(tmp_path / "dalle.pt", weights, metadata["config"]))
        return model, given, truth, metadata["config"]

    return read


@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_logits_and_losses_match_dalle_pytorch(reference, case):
    model, given, truth, config = reference(case)
    entries, prefix = model.config.text_entries, model.config.prefix_len
    out = model(given["text"], given["image_tokens"])
    assert_golden(out.text_logits, truth["logits"][:, : prefix - 1, :entries])
    assert_golden(out.image_logits, truth["logits"][:, prefix - 1 :, entries:])
    assert_golden(out.image_logits, truth["step_logits"][:, :, entries:])
    assert_golden(model(given["text"], given["image_tokens"], return_loss=True).loss, truth["loss"])
    codes = model.vae.encode(given["images"])
    assert torch.equal(codes.flatten(1), truth["vae_codebook_indices"])
    assert_golden(model(given["text"], codes, return_loss=True).loss, truth["loss_raw_images"])


@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_gradients_match_dalle_pytorch(reference, case):
    model, given, truth, _ = reference(case)
    model(given["text"], given["image_tokens"], return_loss=True).loss.backward()
    names = {"text_emb.weight": model.text_emb.weight, "image_emb.weight": model.image_emb.weight}
    for key in truth:
        if key.endswith("to_qkv.weight"):
            names[key.removeprefix("grad.")] = model.layers[0].attn.fn.to_qkv.weight
        elif key.endswith(".scale"):
            names[key.removeprefix("grad.")] = model.layers[0].attn.scale
    assert len(names) == 4
    for name, parameter in names.items():
        # a scale per channel is one vector, its leading dimensions of size 1
        expected = truth[f"grad.{name}"].reshape(parameter.shape)
        assert_golden(parameter.grad[None] if parameter.ndim == 1 else parameter.grad,
                      expected[None] if parameter.ndim == 1 else expected, 5e-5, name)


@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_guided_logits_match_dalle_pytorch(reference, case):
    model, given, truth, config = reference(case)
    entries = model.config.text_entries
    codes = given["image_tokens"][:, : config["prefix"]]
    null = model(model.null_text(2), codes).image_logits[:, -1]
    full = model(given["text"], codes).image_logits[:, -1]
    assert_golden(null, truth["null_logits_last"][:, entries:])
    assert_golden(null + config["cond_scale"] * (full - null), truth["cfg_logits_last"][:, entries:])


@pytest.mark.parametrize("case", PYTORCH_CASES)
def test_cached_sampling_draws_the_reference_codes(reference, case):
    """Their filter counts text and image tokens together: it keeps (1 - thres) of all, so here every image token."""
    from vlmfast.ops import sample_tokens

    model, given, truth, config = reference(case)
    entries, total = model.config.text_entries, model.to_logits.out_features
    noise = -(-given["sampling.uniform"].log()).log()
    kept = max(int((1 - config["filter_thres"]) * total), 1)
    logits, state = model.prefill(given["text"])
    drawn = []
    for step in range(model.config.image_seq_len):
        drawn.append(sample_tokens(logits, temperature=config["temperature"], top_k=kept,
                                   noise=noise[step, :, entries:]))
        if step + 1 < model.config.image_seq_len:
            logits = model.step(drawn[-1], state)
    drawn = torch.stack(drawn, 1)
    assert torch.equal(drawn, truth["sampled_ids"])
    assert_golden(model.vae.decode(drawn), (truth["sampled_images"] * 0.5 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("kind", AXIAL_KINDS)
@pytest.mark.parametrize("variant", [{}, {"shift_tokens": True, "rotary": True, "start_token": True}],
                         ids=["plain", "rotary-shift"])
def test_cached_decoding_equals_the_full_pass(kind, variant):
    model = small(attn_types=(kind,), **variant)
    text, codes = some_inputs(model.config)
    with torch.no_grad():
        truth = model(text, codes).image_logits
        for known in (0, 1, 4, 9, 18):
            found = decode(model, text, codes, known)
            error = (found - truth[:, known:]).abs().amax((0, 2))
            assert error.max() <= 1e-5 * truth.abs().max(), f"{kind} from {known}: {error}"


@pytest.mark.parametrize("changes", [dict(sandwich_norm=True, layer_scale=True, feed_forward="geglu"),
                                     dict(divide_max=True, shared_embeddings=True, qkv_bias=False),
                                     dict(attn_types="paper", depth=6), dict(attn_types="dalle-pytorch", depth=4)])
def test_cached_decoding_equals_the_full_pass_of_every_variant(changes):
    model = small(**changes)
    text, codes = some_inputs(model.config)
    with torch.no_grad():
        truth = model(text, codes).image_logits
        assert (decode(model, text, codes) - truth).abs().max() <= 1e-5 * truth.abs().max()


def test_copies_of_a_prompt_are_read_once_and_agree():
    model = small(attn_types=("col", "row"), shift_tokens=True)
    text, codes = some_inputs(model.config)
    with torch.no_grad():
        logits, state = model.prefill(text, codes[:, :6], copies=3)
        logits = model.step(codes[:, 6].repeat_interleave(3), state)
        truth = model(text, codes[:, :7]).image_logits[:, -1]
    assert (logits - truth.repeat_interleave(3, 0)).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("kind", AXIAL_KINDS)
def test_no_logit_depends_on_a_later_code(kind):
    model = small(attn_types=(kind,), shift_tokens=True)
    text, codes = some_inputs(model.config)
    with torch.no_grad():
        truth = model(text, codes).image_logits
        other = codes.clone()
        other[:, 7:] = (other[:, 7:] + 1) % 30
        changed = model(text, other).image_logits
    assert torch.equal(truth[:, :8], changed[:, :8])
    assert (truth[:, 8] - changed[:, 8]).abs().max() > 1e-4


@pytest.mark.parametrize("text, side, kernel", [(8, 4, 3), (12, 8, 5)])
def test_masks_match_ru_dalle(golden, text, side, kernel):
    _, _, truth, _ = golden("generative/rudalle__masks")
    for name, kind in (("row", "row"), ("col", "col"), (f"conv_k{kernel}_v3", "conv"),
                       (f"conv_k{kernel}_v2", "conv_wrap")):
        seen = truth[f"t{text}_n{side}.{name}"][text:, text:]
        assert torch.equal(image_mask((side, side), kind, kernel), seen), name


def test_layers_of_the_12_billion_model_are_the_papers():
    model = models.create("dalle-12b", device="meta")
    kinds = model.config.layer_kinds
    assert len(kinds) == 64 and kinds[-1] == "conv"
    assert [i for i, kind in enumerate(kinds, 1) if kind == "col"] == [i for i in range(1, 64) if (i - 2) % 4 == 0]
    assert kinds.count("row") == 47 and model.config.prefix_len + model.config.image_seq_len == 1280
    assert 12.0e9 < sum(value.numel() for value in model.parameters()) < 12.5e9


def test_caches_are_as_small_as_the_windows():
    plans = {kind: decode_plan(kind, (32, 32), kernel) for kind, kernel in
             (("row", 11), ("row_only", 11), ("conv", 11), ("col", 11), ("full", 11), ("corner", 5))}
    assert {kind: plan.ring for kind, plan in plans.items()} == {
        "row": 33, "row_only": 32, "conv": 166, "col": 993, "full": 1024, "corner": 133}
    assert plans["conv"].width == 61 and plans["col"].width == 32
    cache = AxialCache("row", 11, 256, (32, 32))
    cache.fill(torch.zeros(1, 256, 1, 1), torch.zeros(1, 256, 1, 1), 1)
    assert cache.nbytes == 2 * 4 * (256 + 33)


def test_paddings_are_tokens_of_their_positions():
    model = small(start_token=True)
    padded = model.pad_text(torch.tensor([[3, 0, 7, 0]]))
    assert padded.tolist() == [[0, 3, 21, 7, 23, 24]]
    assert model.pad_text(torch.zeros(1, 0, dtype=torch.int64)).tolist() == [[0, 20, 21, 22, 23, 24]]


def test_loss_weighs_text_and_image_1_to_7():
    model = small()
    text, codes = some_inputs(model.config)
    out, logits = model(text, codes, return_loss=True), model(text, codes)
    text_loss = F.cross_entropy(logits.text_logits.flatten(0, 1), model.pad_text(text)[:, 1:].flatten())
    image_loss = F.cross_entropy(logits.image_logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(out.text_loss, text_loss)
    torch.testing.assert_close(out.image_loss, image_loss)
    torch.testing.assert_close(out.loss, text_loss / 8 + image_loss * 7 / 8)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["fused", "plain"])
def test_linear_cross_entropy_equals_the_formula(monkeypatch, limit):
    monkeypatch.setattr("vlmfast.layers.cross_entropy.SMALL", limit)
    states, weight, bias = (torch.randn(size, requires_grad=True) for size in ((70, 16), (50, 16), (50,)))
    labels = torch.randint(50, (70,))
    loss = linear_cross_entropy(states, weight, bias, labels)
    truth = F.cross_entropy(F.linear(states, weight, bias), labels)
    torch.testing.assert_close(loss, truth)
    found = torch.autograd.grad(loss, (states, weight, bias))
    for ours, theirs in zip(found, torch.autograd.grad(truth, (states, weight, bias)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_bad_input_names_the_argument():
    model = small()
    text, codes = some_inputs(model.config)
    with pytest.raises(ValueError, match="the prompt is longer than the text context"):
        model(torch.ones(2, 6, dtype=torch.int64))
    with pytest.raises(TypeError, match="text is torch.float32"):
        model(text.float())
    with pytest.raises(ValueError, match="text holds 20, must be in 0 ... 19"):
        model(text.fill_(20))
    text.fill_(1)
    with pytest.raises(ValueError, match="image_codes holds 30, must be in 0 ... 29"):
        model(text, torch.full_like(codes, 30))
    with pytest.raises(ValueError, match="image_codes holds -1"):
        model(text, torch.full_like(codes, -1))
    with pytest.raises(ValueError, match=r"image_codes is a grid \[4, 5\], must be \[5, 4\]"):
        model(text, codes.view(2, 4, 5))
    with pytest.raises(ValueError, match="the loss needs all 20"):
        model(text, codes[:, :3], return_loss=True)
    with pytest.raises(ValueError, match="must be fewer than the image's 20"):
        model.prefill(text, codes)
    logits, state = model.prefill(text, codes[:, :19])
    with pytest.raises(ValueError, match="already has 20 of 20 codes"):
        model.step(codes[:, 19], state)


@pytest.mark.parametrize("field, value", [("attn_types", "rows"), ("attn_types", ("row", "diagonal")),
                                          ("image_grid", (4,)), ("conv_kernel", 4), ("feed_forward", "relu"),
                                          ("depth", 0), ("image_loss_weight", 0)])
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=f"DALLEConfig: {field} is "):
        DALLEConfig(**{field: value})


def test_config_round_trip():
    config = small(attn_types=("row", "conv")).config
    assert DALLEConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown fields width"):
        DALLEConfig.from_dict({**config.to_dict(), "width": 3})
