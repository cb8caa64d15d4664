"""Negatives and the losses of pairs, against literal loops."""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.objectives import matching


def test_mismatches_have_the_rate_and_are_uniform_over_the_others():
    found = torch.stack([matching.sample_mismatches(5) for _ in range(2000)])
    own = torch.arange(5)
    assert abs((found != own).float().mean() - 0.5) < 0.025
    for i in range(5):
        moved = found[:, i][found[:, i] != i]
        counts = torch.bincount(moved, minlength=5)
        assert counts[i] == 0 and (counts[own != i] / len(moved) - 0.25).abs().max() < 0.07
    assert torch.equal(matching.sample_mismatches(4, rate=0.0), torch.arange(4))
    assert (matching.sample_mismatches(4, rate=1.0) != torch.arange(4)).all()


def test_exactly_half_of_the_batch_may_be_mismatched():
    found = torch.stack([matching.sample_mismatches(7, exact=True) != torch.arange(7) for _ in range(300)])
    assert (found.sum(1) == 3).all() and found.float().mean(0).min() > 0.3


def test_examples_of_one_group_are_no_negatives():
    groups = torch.tensor([4, 4, 9, 4, 9])
    for _ in range(50):
        found = matching.sample_mismatches(5, rate=1.0, groups=groups)
        assert (groups[found] != groups).all()
    assert torch.equal(matching.sample_mismatches(3, rate=1.0, groups=torch.zeros(3)), torch.arange(3))


def test_hard_negatives_follow_the_softmax_of_the_similarity():
    similarity = torch.tensor([[9.0, 1.0, 0.0], [0.0, 9.0, 2.0], [1.0, -1.0, 9.0]])
    draws = [matching.hard_negatives(similarity, scale=1.0) for _ in range(3000)]
    for found, rows in ((torch.stack([d.texts for d in draws]), similarity),
                        (torch.stack([d.images for d in draws]), similarity.T)):
        for i in range(3):
            others = [j for j in range(3) if j != i]
            share = torch.tensor([(found[:, i] == j).float().mean() for j in others])
            assert (found[:, i] != i).all()
            torch.testing.assert_close(share, rows[i][others].softmax(0), rtol=0, atol=0.04)
    best = matching.hard_negatives(similarity, highest=True)
    assert best.texts.tolist() == [1, 2, 0] and best.images.tolist() == [2, 0, 1]
    grouped = matching.hard_negatives(similarity, highest=True, groups=torch.tensor([0, 0, 1]))
    assert grouped.texts.tolist() == [2, 2, 0]


def test_a_batch_without_negatives_is_refused():
    with pytest.raises(ValueError, match=r"the batch has 1 example\(s\), must have at least 2"):
        matching.sample_mismatches(1)
    with pytest.raises(ValueError, match="rate is 1.2"):
        matching.sample_mismatches(2, rate=1.2)
    with pytest.raises(ValueError, match=r"groups: has shape \[3\], must be \[2\]"):
        matching.sample_mismatches(2, groups=torch.zeros(3))
    with pytest.raises(ValueError, match="an example has no negative in the batch"):
        matching.hard_negatives(torch.eye(3), groups=torch.zeros(3))
    with pytest.raises(ValueError, match=r"similarity has shape \[2, 3\], must be \[B, B\]"):
        matching.hard_negatives(torch.zeros(2, 3))


def test_the_class_of_a_match_is_an_argument():
    logits, matched = torch.randn(4, 2, dtype=torch.float64), torch.tensor([True, False, True, True])
    for index in (0, 1):
        total = sum(-logits[i].log_softmax(0)[index if matched[i] else 1 - index] for i in range(4))
        torch.testing.assert_close(matching.matching_loss(logits, matched, index), total / 4)
    swapped = matching.matching_loss(logits, ~matched, 1)
    torch.testing.assert_close(matching.matching_loss(logits, matched, 0), swapped)
    with pytest.raises(ValueError, match="match_index is 2, must be 0 or 1"):
        matching.matching_loss(logits, matched, 2)


def ipot_by_loop(cost):
    n, m = cost.shape
    kernel, plan, sigma = (-cost / 0.5).exp(), torch.ones_like(cost), torch.full((n,), 1 / n, dtype=cost.dtype)
    for _ in range(50):
        q = kernel * plan
        delta = 1 / (m * (sigma @ q))
        sigma = 1 / (n * (q @ delta))
        plan = sigma[:, None] * q * delta
    return plan


def test_word_region_alignment_adds_matches_and_takes_off_mismatches():
    text, image = (torch.randn(3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    keep_text = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    keep_image = torch.arange(6) < torch.tensor([4, 6, 1])[:, None]
    matched, total = torch.tensor([True, False, True]), 0
    for i in range(3):
        cost = 1 - F.normalize(text[i][keep_text[i]], dim=-1) @ F.normalize(image[i][keep_image[i]], dim=-1).T
        distance = (ipot_by_loop(cost.detach()) * cost).sum()
        total = total + (distance if matched[i] else -distance)
    found = matching.word_region_alignment(text, image, matched, keep_text=keep_text, keep_image=keep_image)
    torch.testing.assert_close(found, total / 3)
    for mine, true in zip(torch.autograd.grad(found, (text, image)), torch.autograd.grad(total / 3, (text, image)),
                          strict=True):
        torch.testing.assert_close(mine, true)
    empty = matching.word_region_alignment(text, image, matched, keep_text=keep_text & False, keep_image=keep_image)
    assert empty == 0 and all(not g.any() for g in torch.autograd.grad(empty, (text, image)))
    with pytest.raises(ValueError, match="text is 8 wide, image 7; they must be equal"):
        matching.word_region_alignment(text, image[..., 1:])
