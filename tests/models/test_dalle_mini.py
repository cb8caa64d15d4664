"""DALL-E mini: reference numbers, cached decoding, super-conditioning."""

import pytest
import torch
import torch.nn.functional as F
from dalle_golden import MINI_CASE, assert_golden, min_dalle_folder

import vlmfast
from vlmfast import models
from vlmfast.models.dalle_mini import DALLEMiniConfig
from vlmfast.ops import sample_tokens
from vlmfast.tasks import generate_codes


def small(**changes):
    sizes = dict(d_model=32, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=40, decoder_layers=2,
                 decoder_attention_heads=4, decoder_ffn_dim=24, encoder_vocab_size=30, max_text_length=8,
                 image_vocab_size=25, num_image_codes=20, decoder_start_token_id=20, image_grid=3)
    model = models.create("dalle-mini-tiny", **{**sizes, **changes}).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
    return model


def some_text():
    return torch.tensor([[0, 5, 7, 2, 1, 1], [0, 9, 3, 4, 8, 2], [0, 2, 1, 1, 1, 1]])


@pytest.fixture
def reference(golden, tmp_path):
    weights, given, truth, metadata = golden(MINI_CASE)
    model = vlmfast.load(min_dalle_folder(tmp_path / "mini", weights),
                         config={"encoder_attention_heads": 2, "decoder_attention_heads": 2})
    return model, given, truth, metadata["config"]


def test_encoder_and_decoder_match_min_dalle(reference):
    model, given, truth, config = reference
    count = config["image_count"]
    assert_golden(model.encode_text(given["text_tokens"])[0], truth["encoder_state"])
    text = given["text_tokens"].repeat_interleave(count, 0)
    codes = given["prev_tokens"].repeat(2, 1)
    assert (codes[:, 0] == model.config.decoder_start_token_id).all()
    assert_golden(model(text, codes[:, 1:]).logits, truth["logits"])
    logits, state = model.prefill(given["text_tokens"], copies=count)
    found = [logits]
    for step in range(1, codes.shape[1]):
        found.append(model.step(codes[:, step], state))
    kept = model.config.num_image_codes
    assert_golden(torch.stack(found, 1), truth["incremental_logits"][..., :kept])


def test_superconditioned_sampling_draws_the_reference_codes(reference):
    model, given, truth, config = reference
    model = models.DALLEMini(DALLEMiniConfig.from_dict(model.config.to_dict())).eval()
    model.load_state_dict(reference[0].state_dict())
    # the reference scores the start token too
    logits = truth["logits"][:, -1]
    count = config["image_count"]
    guided = logits[:count] + config["supercondition_factor"] * (logits[count:] - logits[:count])
    assert_golden(guided, truth["superconditioned_logits"])
    found = sample_tokens(logits[count:], unconditional=logits[:count], temperature=0,
                          guidance_scale=config["supercondition_factor"])
    assert torch.equal(found, truth["most_likely_token"])

    def all_logits(x):
        return F.linear(model.decoder.final_ln(x[:, 0]), model.decoder.lm_head.weight)

    model._logits = all_logits
    logits, state = model.prefill(given["text_tokens"], copies=count)
    drawn = []
    for step in range(config["sampled_steps"]):
        drawn.append(sample_tokens(
            logits[count:], unconditional=logits[:count], guidance_scale=config["supercondition_factor"],
            temperature=config["temperature"], top_k=config["top_k"], noise=given["sampling.gumbel"][step]))
        logits = model.step(drawn[-1].repeat(2), state)
    assert torch.equal(torch.stack(drawn, 1), truth["sampled_tokens"])


def test_cached_decoding_equals_the_full_pass():
    model, text = small(), some_text()
    codes = torch.randint(20, (3, 9))
    with torch.no_grad():
        truth = model(text, codes).logits[..., :20]
        for known in (0, 1, 5, 8):
            logits, state = model.prefill(text, codes[:, :known])
            found = [logits]
            for position in range(known, 8):
                found.append(model.step(codes[:, position], state))
            error = (torch.stack(found, 1) - truth[:, known:]).abs().max()
            assert error <= 1e-5 * truth.abs().max(), known


def test_padding_reaches_nothing():
    model, text = small(), some_text()
    longer = F.pad(text, (0, 2), value=1)
    codes = torch.randint(20, (3, 4))
    torch.testing.assert_close(model(text, codes).logits, model(longer, codes).logits, rtol=1e-5, atol=1e-5)
    alone = model(text[:1, :4], codes[:1]).logits
    torch.testing.assert_close(model(text, codes).logits[:1], alone, rtol=1e-5, atol=1e-5)


def test_copies_agree_with_repeated_prompts():
    model, text = small(), some_text()
    with torch.no_grad():
        few, state = model.prefill(text, copies=2)
        many, other = model.prefill(text.repeat_interleave(2, 0))
        assert torch.allclose(few, many, atol=1e-5)
        codes = torch.arange(6)
        assert torch.allclose(model.step(codes, state), model.step(codes, other), atol=1e-5)


def test_loss_is_that_of_all_codes():
    model, text = small(), some_text()
    codes = torch.randint(20, (3, 3, 3))
    logits = model(text, codes).logits
    loss = model(text, codes, return_loss=True).loss
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), codes.flatten()))
    loss.backward()
    assert all(value.grad is not None for value in model.parameters())


def test_generates_only_codes_of_the_vqgan():
    model = small()
    with torch.no_grad():  # the entries above the codes score highest
        model.decoder.lm_head.weight[20:] = 50 * model.decoder.final_ln.bias.detach()
    codes = generate_codes(model, some_text(), images=2, guidance_scale=3.0, seed=1)
    assert codes.shape == (6, 3, 3) and codes.max() < 20


def test_public_sizes():
    counts = []
    for name in ("dalle-mini", "dalle-mega"):
        model = models.create(name, device="meta")
        counts += [sum(value.numel() for value in side.parameters()) for side in (model.encoder, model.decoder)]
    assert [round(count / 1e6, 1) for count in counts[:2]] == [202.6, 235.3]
    assert model.config.image_vocab_size == 16415 and model.config.num_image_codes == 16384


def test_bad_input_names_the_argument():
    model, text = small(), some_text()
    with pytest.raises(ValueError, match="the prompt is longer than the text context"):
        model(torch.ones(1, 9, dtype=torch.int64))
    with pytest.raises(TypeError, match="text is torch.float32"):
        model(text.float())
    with pytest.raises(ValueError, match="text holds 30, must be in 0 ... 29"):
        model(text + 21)
    with pytest.raises(ValueError, match="image_codes holds 25, must be in 0 ... 24"):
        model(text, torch.full((3, 2), 25))
    with pytest.raises(ValueError, match=r"image_codes has shape \[2, 2\], must be \[3, 0..9\]"):
        model(text, torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be fewer than the image's 9"):
        model.prefill(text, torch.zeros(3, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match="decoder_start_token_id is 26, must be at most"):
        DALLEMiniConfig.from_dict({**model.config.to_dict(), "decoder_start_token_id": 26})
