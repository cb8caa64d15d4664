"""Noised CLIP: reference numbers, the gradient that guides, sizes of the public model, errors."""

import pytest
import torch
import torch.nn.functional as F
from glide_golden import NOISED_CLIP
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmfast import models
from vlmfast.models import noised_clip
from vlmfast.models.noised_clip import AttentionResblock, NoisedCLIP, NoisedCLIPConfig

SIZES = dict(image_size=8, patch_size=4, n_timesteps=20, n_vocab=30, max_text_len=7, n_embd=16, n_head_text=2,
             n_head_state_text=12, n_xf_blocks_text=2, n_head_image=2, n_head_state_image=16, n_xf_blocks_image=2)


def small(**changes) -> NoisedCLIP:
    return models.create("glide-noised-clip", **{**SIZES, **changes}).eval()


@pytest.fixture
def reference(golden):
    weights, given, truth, metadata = golden(NOISED_CLIP)
    config = metadata["config"]
    fields = {name: config[name] for name in NoisedCLIPConfig().to_dict()}
    model = NoisedCLIP(NoisedCLIPConfig(**fields)).eval()
    model.load_state_dict(weights)  # strict: every key, and no other
    return model, given, truth, config


def test_features_match_the_public_code(reference, golden_close):
    model, given, truth, _ = reference
    for kind, encode, inputs in (("image", model.encode_image, (given["images"], given["timesteps"])),
                                 ("text", model.encode_text, (given["text"], given["text_len"]))):
        golden_close(encode(*inputs), truth[f"{kind}_features"])
        golden_close(encode(*inputs, normalize=True), truth[f"{kind}_embeddings"])
        golden_close(encode(*inputs, return_probe_features=True), truth[f"{kind}_probe_features"])


def test_guiding_gradient_matches_the_public_code(reference, golden_close):
    model, given, truth, config = reference
    guide = model.cond_fn(given["text"], given["text_len"], config["grad_scale"])
    with torch.no_grad():
        found = guide(given["images"], given["timesteps"])
    golden_close(found, truth["cond_fn"])
    golden_close(guide(given["images"], given["timesteps"], grad_scale=2 * config["grad_scale"]), 2 * truth["cond_fn"])
    assert not found.requires_grad and all(value.grad is None for value in model.parameters())


def test_one_text_guides_every_image(reference):
    model, given, _, _ = reference
    rows = [model.cond_fn(given["text"][:1], given["text_len"][:1])(given["images"][i : i + 1],
                                                                   given["timesteps"][i : i + 1]) for i in range(3)]
    found = model.cond_fn(given["text"][:1], given["text_len"][:1])(given["images"], given["timesteps"])
    torch.testing.assert_close(found, torch.cat(rows), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="x has 3 rows, must have 2"):
        model.cond_fn(given["text"][:2], given["text_len"][:2])(given["images"], given["timesteps"])


def test_parameter_counts_of_the_public_model():
    model = models.create("glide-noised-clip", device="meta")
    assert sum(value.numel() for value in model.image_encoder.parameters()) == 86_443_776
    assert sum(value.numel() for value in model.text_encoder.parameters()) == 71_679_488


def test_guidance_of_the_public_size_reads_no_value(monkeypatch):
    """Tensors without values: what would wait for a device raises. Only on the CPU are ids looked at."""
    monkeypatch.setattr(noised_clip, "check_ids", lambda *given: None)
    with FakeTensorMode():
        model = models.create("glide-noised-clip").eval()
        guide = model.cond_fn(torch.zeros(1, 77, dtype=torch.int64))
        assert guide(torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_to_blocks_of_32_changes_nothing(causal):
    """The public code's attention: padded queries and keys, finite masks, full rows of -1e10 for the padding."""
    block, x = AttentionResblock(24, 2, 4, causal), torch.randn(2, 9, 24)
    with torch.no_grad():
        for value in block.parameters():
            value.add_(torch.randn_like(value), alpha=0.3)
    h = F.layer_norm(x, (24,), block.ln.g, block.ln.b, 1e-5)
    query, key, value = (F.pad(f(h), (0, 0, 0, 23)).unflatten(-1, (2, 12)).transpose(1, 2)
                         for f in (block.f_q, block.f_k, block.f_v))
    seen = torch.ones(32, 32).tril() if causal else torch.ones(32, 32)
    seen[9:], seen[:, 9:] = 0, 0
    probs = (query @ key.mT / 12**0.5 - 1e10 * (1 - seen)).softmax(-1)
    truth = x + block.f_c((probs @ value).transpose(1, 2).flatten(2)[:, :9])
    torch.testing.assert_close(block(x), truth, rtol=1e-5, atol=1e-5)


def test_the_end_of_a_text_is_found_and_nothing_behind_it_matters():
    model = small()
    tokens = torch.tensor([[28, 3, 29, 0, 0, 0, 0], [28, 5, 6, 7, 8, 9, 29]])
    truth = model.encode_text(tokens, torch.tensor([3, 7]))
    assert torch.equal(model.encode_text(tokens), truth)
    tokens[0, 3:] = 5
    torch.testing.assert_close(model.encode_text(tokens, torch.tensor([3, 7])), truth)


def test_features_know_the_time_and_every_parameter_learns():
    model = small()
    image, tokens = torch.rand(2, 3, 8, 8), torch.randint(30, (2, 7))
    output = model(image, torch.tensor([0, 19]), tokens)
    assert output.logit_scale == 100
    torch.testing.assert_close(output.image_features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(output.text_features.norm(dim=1), torch.ones(2))
    assert not torch.allclose(output.image_features, model(image, torch.tensor([5, 6]), tokens).image_features)
    (output.image_features * output.text_features).square().sum().backward()
    assert [key for key, value in model.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("call, error, message", [
    (lambda m: m.encode_image(torch.zeros(1, 3, 8, 9), torch.zeros(1).long()), ValueError, r"must be \[B, 3, 8, 8\]"),
    (lambda m: m.encode_image(torch.zeros(1, 1, 8, 8), torch.zeros(1).long()), ValueError, "image has shape"),
    (lambda m: m.encode_image(torch.zeros(2, 3, 8, 8), torch.zeros(1).long()), ValueError, "timesteps has shape"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 8, 8), torch.zeros(1)), TypeError, "timesteps are torch.float32"),
    (lambda m: m.encode_image(torch.zeros(1, 3, 8, 8), torch.tensor([20])), ValueError, "timesteps holds 20"),
    (lambda m: m.encode_text(torch.zeros(1, 8).long()), ValueError, r"tokens has shape \[1, 8\], must be \[1, 7\]"),
    (lambda m: m.encode_text(torch.full((1, 7), 30)), ValueError, "tokens holds 30"),
    (lambda m: m.encode_text(torch.zeros(1, 7).long(), torch.tensor([8])), ValueError, "text_len - 1 holds 7"),
    (lambda m: m.encode_text(torch.zeros(1, 7).long(), torch.tensor([0])), ValueError, "text_len - 1 holds -1"),
])
def test_wrong_inputs_are_named(call, error, message):
    with pytest.raises(error, match=f"NoisedCLIP: .*{message}"):
        call(small())


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="image_size is 9, must be a multiple of patch_size, 4"):
        small(image_size=9)
    with pytest.raises(ValueError, match="n_head_text is 0, must be an integer of at least 1"):
        small(n_head_text=0)
