"""`sample_tokens`: the draw, the filters, guidance, seeds."""

import pytest
import torch

from vlmfast.ops import gumbel_noise, sample_tokens
from vlmfast.ops.reference.sampling import filtered


def share(x):
    return x.softmax(-1)


def test_draws_follow_the_softmax():
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]])
    count = 20000
    drawn = sample_tokens(logits.expand(count, -1), temperature=0.7, seed=3)
    found = torch.bincount(drawn, minlength=4) / count
    truth = share(logits[0] / 0.7)
    assert ((found - truth).abs() < 4 * (truth * (1 - truth) / count).sqrt()).all()


def test_equals_the_formula_with_the_kernels_noise():
    logits, unconditional = torch.randn(2, 5, 40)
    drawn = sample_tokens(logits, unconditional=unconditional, guidance_scale=3.0, temperature=0.8, top_k=7, seed=5,
                          offset=10)
    x = (unconditional + 3 * (logits - unconditional)) / 0.8
    x[x < x.topk(7).values[:, -1:]] = -torch.inf
    assert torch.equal(drawn, (x + gumbel_noise(x.shape, 5, 10)).argmax(-1))


@pytest.mark.parametrize("k", [1, 3, 39, 40, 100])
def test_top_k_keeps_the_largest(k):
    logits = torch.randn(6, 40)
    kept = filtered(logits, None, 1.0, 1.0, k, 1.0) > -torch.inf
    assert (kept.sum(1) == min(k, 40)).all()
    assert (logits.masked_fill(~kept, torch.inf).amin(1) >= logits.masked_fill(kept, -torch.inf).amax(1)).all()


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]).log()
    for p, kept in ((0.45, [[1, 0, 0, 0], [0, 0, 1, 1]]), (0.69, [[1, 1, 0, 0], [0, 0, 1, 1]]),
                    (0.94, [[1, 1, 1, 0], [1, 1, 1, 1]]), (1e-9, [[1, 0, 0, 0], [0, 0, 0, 1]])):
        found = filtered(logits, None, 1.0, 1.0, 0, p) > -torch.inf
        assert found.int().tolist() == kept, p


def test_top_p_counts_what_top_k_left():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    found = filtered(logits, None, 1.0, 1.0, 2, 0.6) > -torch.inf  # 4/7 alone is less than 0.6
    assert found.int().tolist() == [[1, 1, 0, 0]]


def test_guidance():
    conditional, unconditional = torch.randn(2, 3, 9)
    for scale in (0.0, 1.0, 4.5):
        x = filtered(conditional, unconditional, scale, 1.0, 0, 1.0)
        torch.testing.assert_close(x, unconditional + scale * (conditional - unconditional))


def test_zero_temperature_takes_the_largest_without_drawing():
    logits = torch.randn(4, 30)
    before = torch.get_rng_state()
    assert torch.equal(sample_tokens(logits, temperature=0), logits.argmax(-1))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_and_offsets():
    logits = torch.zeros(4, 1000)
    drawn = sample_tokens(logits, seed=7)
    assert torch.equal(drawn, sample_tokens(logits, seed=7))
    assert torch.equal(drawn[2:], sample_tokens(logits[2:], seed=7, offset=2))
    assert not torch.equal(drawn, sample_tokens(logits, seed=8))
    assert not torch.equal(drawn, sample_tokens(logits, seed=7, offset=4))
    torch.manual_seed(1)
    first = sample_tokens(logits)
    assert not torch.equal(first, sample_tokens(logits))
    torch.manual_seed(1)
    assert torch.equal(first, sample_tokens(logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype):
    logits = torch.randn(3, 20).to(dtype)
    assert torch.equal(sample_tokens(logits, seed=2, top_k=5), sample_tokens(logits.double(), seed=2, top_k=5))


def test_rejects():
    logits = torch.randn(2, 5)
    for match, error, options in (
        ("temperature is -1", ValueError, dict(temperature=-1)),
        ("temperature is nan", ValueError, dict(temperature=float("nan"))),
        ("top_k is -2", ValueError, dict(top_k=-2)),
        ("top_k is 2.0", ValueError, dict(top_k=2.0)),
        ("top_p is 0", ValueError, dict(top_p=0)),
        ("top_p is 1.5", ValueError, dict(top_p=1.5)),
        ("guidance_scale is 3.0 without unconditional", ValueError, dict(guidance_scale=3.0)),
        ("guidance_scale is inf", ValueError, dict(guidance_scale=float("inf"), unconditional=logits)),
        (r"unconditional has shape \(5,\)", ValueError, dict(unconditional=logits[0], guidance_scale=2.0)),
        (r"noise has shape \(1, 5\)", ValueError, dict(noise=logits[:1])),
    ):
        with pytest.raises(error, match=match):
            sample_tokens(logits, **options)
    with pytest.raises(TypeError, match="logits is torch.int64"):
        sample_tokens(logits.long())
    with pytest.raises(ValueError, match=r"logits has shape \(5,\)"):
        sample_tokens(logits[0])
