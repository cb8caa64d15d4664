"""Drawing pictures: seeds, guidance, priming, re-ranking, prompts."""

import pytest
import torch

from vlmfast import models
from vlmfast.data import CLIPTokenizer
from vlmfast.ops import sample_tokens
from vlmfast.tasks import encode_prompts, generate, generate_codes, prime_codes, similarity


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.train(["a green apple", "a red apple"] * 3, 520)
    model = models.create("dalle-tiny", dim=32, depth=3, heads=2, dim_head=16, num_text_tokens=tokenizer.vocab_size + 1,
                          text_seq_len=6, num_image_tokens=20, image_grid=(4, 4), token_offset=1,
                          attn_types=("row", "col", "conv"), shift_tokens=True).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.3)
    model.tokenizer = tokenizer
    vae = models.create("dvae-small", num_tokens=20, codebook_dim=8, hidden_dim=8, image_size=16).eval()
    with torch.no_grad():
        for value in vae.parameters():
            value.add_(torch.randn_like(value), alpha=0.3)
    model.attach_vae(vae)
    return model


def test_prompts_leave_0_to_padding(model):
    ids = model.tokenizer.encode("a green apple")
    tokens = encode_prompts(model, ["a green apple", ""])
    assert tokens.tolist() == [[i + 1 for i in ids] + [0] * (6 - len(ids)), [0] * 6]
    with pytest.raises(ValueError, match="the prompt 'green green.* tokens, the text context is 6; shorten it"):
        encode_prompts(model, "green " * 20)
    cut = encode_prompts(model, "green " * 20, truncate=True)
    assert cut.shape == (1, 6) and (cut > 0).all()


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_equals_the_recomputing_loop(model, guidance):
    text = encode_prompts(model, ["a green apple", "a red apple"])
    options = dict(temperature=0.9, top_k=12, top_p=0.95)
    found = generate_codes(model, text, images=2, guidance_scale=guidance, seed=11, **options)
    assert found.shape == (4, 4, 4)
    tokens, codes = text.repeat_interleave(2, 0), torch.zeros(4, 0, dtype=torch.int64)
    for position in range(16):
        with torch.no_grad():
            logits = model(tokens, codes).image_logits[:, -1]
            null = None if guidance == 1 else model(model.null_text(4), codes).image_logits[:, -1]
        drawn = sample_tokens(logits, unconditional=null, guidance_scale=guidance, seed=11, offset=4 * position,
                              **options)
        codes = torch.cat([codes, drawn[:, None]], 1)
    assert torch.equal(found.flatten(1), codes)


def test_seeds(model):
    text = encode_prompts(model, "a green apple")
    first = generate_codes(model, text, images=3, seed=1)
    assert torch.equal(first, generate_codes(model, text, images=3, seed=1))
    assert not torch.equal(first, generate_codes(model, text, images=3, seed=2))
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(4)
    free = generate_codes(model, text)
    torch.manual_seed(4)
    assert torch.equal(free, generate_codes(model, text))


def test_priming_keeps_the_top_of_the_picture(model):
    picture = torch.rand(1, 3, 16, 16)
    codes = model.vae.encode(picture)
    assert len(codes.unique()) > 2
    prime = prime_codes(model, picture)
    assert prime.shape == (1, 7) and torch.equal(prime, codes.flatten(1)[:, :7])  # int(0.4375 16)
    text = encode_prompts(model, ["a green apple", "a red apple"])
    found = generate_codes(model, text, images=2, prime=prime, guidance_scale=2.0, seed=3).flatten(1)
    assert torch.equal(found[:, :7], prime.expand(4, -1))
    again = generate_codes(model, text, images=2, prime=prime[0], guidance_scale=2.0, seed=3).flatten(1)
    assert torch.equal(found, again)
    with pytest.raises(ValueError, match="image is 32 x 32 pixels, must be 16 x 16"):
        prime_codes(model, torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="must be multiples of 4"):
        prime_codes(model, torch.rand(1, 3, 18, 18))
    with pytest.raises(ValueError, match="share is 1"):
        prime_codes(model, picture, 1)


def test_counts_codes_and_batches(model):
    steps = []
    text = encode_prompts(model, "a green apple")
    generate_codes(model, text, images=2, seed=0, on_step=steps.append)
    assert steps == [2] * 16
    found = generate(model, "a green apple", images=5, batch_size=2, progress=False, seed=9)
    assert found.images.shape == (5, 3, 16, 16) and found.codes.shape == (5, 4, 4) and found.scores is None
    assert 0 <= found.images.min() and found.images.max() <= 1
    assert len({tuple(codes.flatten().tolist()) for codes in found.codes}) == 5, "every batch draws anew"


def test_a_clip_puts_the_best_first(model):
    clip = models.create("clip-tiny", vocab_size=model.tokenizer.vocab_size, context_length=16).eval()
    clip.tokenizer = CLIPTokenizer(model.tokenizer.vocabulary, model.tokenizer.merges, 16)
    plain = generate(model, "a red apple", images=6, progress=False, seed=2)
    ranked = generate(model, "a red apple", images=6, progress=False, seed=2, rerank=clip)
    scores = similarity(clip, plain.images, "a red apple")
    order = scores.argsort(descending=True, stable=True)
    assert not torch.equal(order, torch.arange(6))
    assert torch.equal(ranked.codes, plain.codes[order]) and torch.equal(ranked.images, plain.images[order])
    assert torch.equal(ranked.scores, scores[order])


def test_says_what_is_missing(model):
    bare = models.create("dalle-tiny", depth=1).eval()
    with pytest.raises(ValueError, match="no discrete VAE for its codes"):
        generate(bare, "an apple", progress=False)
    with pytest.raises(ValueError, match="has no tokenizer"):
        encode_prompts(bare, "an apple")
    with pytest.raises(ValueError, match="images is 0"):
        generate(model, "an apple", images=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        generate(model, "a red apple", temperature=-1, progress=False)
    with pytest.raises(ValueError, match="text has 9 tokens, the text context is 6"):
        generate_codes(model, torch.ones(1, 9, dtype=torch.int64), guidance_scale=2.0)
    with pytest.raises(ValueError, match="image_codes holds 20"):
        generate_codes(model, torch.ones(1, 6, dtype=torch.int64), prime=torch.full((3,), 20))
