"""Losses over words against literal formulas."""

import pytest
import torch
from torch.autograd import gradcheck

from vlmfast.objectives import language

B, T, V = 3, 5, 7


@pytest.fixture
def words():
    labels = torch.tensor([[-100, 3, -100, 6, -1], [-100] * 5, [0, -100, -100, -100, -100]])
    return torch.randn(B, T, V, dtype=torch.float64, requires_grad=True), labels


def picked(logits, labels):
    """(example, -log likelihood) of every label that counts."""
    return [(b, -logits[b, t].log_softmax(0)[labels[b, t]]) for b in range(B) for t in range(T) if labels[b, t] >= 0]


def test_divisors_of_masked_words(words):
    logits, labels = words
    each = picked(logits, labels)
    total = sum(value for _, value in each)
    for name, divisor in (("labels", 3), ("tokens", 3), ("labels_eps", 3 + 1e-5), ("batch", B)):
        torch.testing.assert_close(language.cross_entropy(logits, labels, normalizer=name), total / divisor)
    own = {b: [value for c, value in each if c == b] for b in (0, 2)}
    truth = sum(sum(values) / (len(values) + 1e-4) for values in own.values()) / (2 + 1e-4)
    torch.testing.assert_close(language.cross_entropy(logits, labels, normalizer="samples"), truth)
    for name in ("labels", "labels_eps", "samples"):
        empty = language.cross_entropy(logits, torch.full_like(labels, -100), normalizer=name)
        assert empty == 0 and not torch.autograd.grad(empty, logits)[0].any()


def test_the_worst_examples_are_dropped(words):
    logits, labels = words
    labels[1, 2] = 5
    own = [sum(value for c, value in picked(logits, labels) if c == b) for b in range(B)]
    counts, order = [2, 1, 1], sorted(range(B), key=lambda b: own[b].item())
    for drop, keep in ((0.0, 3), (0.3, 2), (0.5, 1), (0.9, 0)):
        truth = sum(own[b] for b in order[:keep]) / (sum(counts[b] for b in order[:keep]) + 1e-5)
        found = language.masked_words_without_worst(logits, labels, drop_worst=drop)
        torch.testing.assert_close(found, torch.as_tensor(truth, dtype=torch.float64))
    with pytest.raises(ValueError, match="drop_worst is 1, must lie in"):
        language.masked_words_without_worst(logits, labels, drop_worst=1)


def test_prefix_lm_predicts_each_token_from_the_one_before():
    logits = torch.randn(B, T, V, dtype=torch.float64)
    ids, prefix = torch.randint(V, (B, T)), torch.tensor([0, 3, 5])
    lengths = [5, 4, 5]
    keep = torch.arange(T) < torch.tensor(lengths)[:, None]
    each = [-logits[b, t - 1].log_softmax(0)[ids[b, t]] for b in range(B)
            for t in range(max(1, int(prefix[b])), lengths[b])]
    assert len(each) == 4 + 1
    torch.testing.assert_close(language.prefix_lm_loss(logits, ids, prefix, keep), sum(each) / 5)
    torch.testing.assert_close(language.prefix_lm_loss(logits, ids, prefix, keep, normalizer="batch"), sum(each) / B)
    assert (language.prefix_lm_labels(ids, torch.tensor([5, 5, 5])) == -100).all()


def test_prefix_lengths_are_uniform():
    lengths = torch.tensor([4, 1, 0, 9]).repeat(2000)
    found = language.sample_prefix_lengths(lengths).view(2000, 4)
    counts = torch.bincount(found[:, 0], minlength=4)
    assert len(counts) == 4 and (counts / 2000 - 0.25).abs().max() < 0.06
    assert not found[:, 1:3].any() and found[:, 3].max() == 8
    later = language.sample_prefix_lengths(lengths, least=3).view(2000, 4)
    assert (later[:, 0] == 3).all() and later[:, 1:3].tolist() == [[1, 0]] * 2000
    assert set(later[:, 3].tolist()) == set(range(3, 9))


@pytest.mark.parametrize("smooth", ["all", "others"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_seq2seq_is_smoothed_cross_entropy_or_divergence(words, smooth, eps):
    logits, labels = words
    each = []
    for b in range(B):
        for t in range(T):
            if labels[b, t] < 0:
                continue
            target = torch.full((V,), eps / V if smooth == "all" else eps / (V - 1), dtype=torch.float64)
            target[labels[b, t]] = 1 - eps + (eps / V if smooth == "all" else 0)
            log_probs = logits[b, t].log_softmax(0)
            value = -(target * log_probs).sum()
            each.append(value if smooth == "all" or not eps else value + (target * target.log()).sum())
    found = language.seq2seq_loss(logits, labels, label_smoothing=eps, smooth=smooth)
    torch.testing.assert_close(found, sum(each) / 3)
    dropped = language.seq2seq_loss(logits, labels, label_smoothing=eps, smooth=smooth, drop_worst=0.3)
    torch.testing.assert_close(dropped, sum(sorted(each)[:2]) / 2)
    assert gradcheck(lambda x: language.seq2seq_loss(x, labels, label_smoothing=eps, smooth=smooth), (logits,))
    empty = language.seq2seq_loss(logits, torch.full_like(labels, -100), label_smoothing=eps, smooth=smooth,
                                  drop_worst=0.3)
    assert empty == 0


def test_seq2seq_names_bad_input(words):
    with pytest.raises(ValueError, match="smooth is 'some', must be one of all, others"):
        language.seq2seq_loss(*words, smooth="some")
    with pytest.raises(ValueError, match="label_smoothing is 1.0"):
        language.seq2seq_loss(*words, label_smoothing=1.0)
