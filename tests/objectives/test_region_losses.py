"""The losses of masked regions that `test_bert_like` leaves out, against literal formulas."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from vlmfast.objectives import regions

B, T, V = 3, 5, 7


@pytest.fixture
def masked():
    logits = torch.randn(B, T, V, dtype=torch.float64, requires_grad=True)
    target = torch.rand(B, T, V, dtype=torch.float64)
    target = target / target.sum(-1, keepdim=True)
    target[0, 0, 0], target[0, 1] = 5.0, 0.9 * target[0, 1]
    mask = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    return logits, target, mask


def test_region_classes_leave_the_background_out(masked):
    logits, target, mask = masked
    each = []
    for i, j in mask.nonzero().tolist():
        best = max(range(1, V), key=lambda c: target[i, j, c].item())
        each.append(-logits[i, j].log_softmax(0)[best])
    torch.testing.assert_close(regions.masked_region_classification(logits, target, mask), sum(each) / 4)
    plain = sum(-logits[i, j].log_softmax(0)[target[i, j].argmax()] for i, j in mask.nonzero().tolist()) / 4
    torch.testing.assert_close(regions.masked_region_classification(logits, target, mask, background=None), plain)
    assert target[0, 0].argmax() == 0 and not torch.allclose(sum(each) / 4, plain)
    with pytest.raises(ValueError, match="background is 7, must lie in 0..6"):
        regions.masked_region_classification(logits, target, mask, background=7)


def test_soft_cross_entropy_counts_rows_that_are_distributions(masked):
    logits, target, mask = masked
    target[0, 1] *= 0.5  # sums to .45: not a distribution; row 0, 0 sums to more than 5
    valid = [(0, 4), (2, 1)]
    total = sum(-(target[i, j] * logits[i, j].log_softmax(0)).sum() for i, j in valid)
    torch.testing.assert_close(regions.masked_region_soft_cross_entropy(logits, target, mask), total / 2)
    torch.testing.assert_close(regions.masked_region_soft_cross_entropy(logits, target, mask, normalizer="mask"),
                               total / 4)
    entropy = -(target[2, 1] * target[2, 1].log()).sum()
    only = torch.zeros_like(mask)
    only[2, 1] = 1
    torch.testing.assert_close(regions.masked_region_soft_cross_entropy(logits, target, only),
                               regions.masked_region_kl(logits, target, only) + entropy)


def test_new_region_losses_have_gradients_and_empty_batches(masked):
    logits, target, mask = masked
    for loss in (regions.masked_region_classification, regions.masked_region_soft_cross_entropy):
        assert gradcheck(lambda x, loss=loss: loss(x, target, mask), (logits,))
        empty = loss(logits, target, torch.zeros_like(mask))
        assert empty == 0 and not torch.autograd.grad(empty, logits)[0].any()


def test_targets_of_regions_that_do_not_count_are_not_read(masked):
    logits, target, mask = masked
    bad = target.masked_fill((mask == 0)[..., None], math.nan)
    for loss in (regions.masked_region_kl, regions.masked_region_regression, regions.masked_region_classification,
                 regions.masked_region_soft_cross_entropy, regions.region_feature_loss):
        assert torch.equal(loss(logits, bad, mask), loss(logits, target, mask))
        assert torch.isfinite(torch.autograd.grad(loss(logits, bad, mask), logits)[0]).all()
    torch.testing.assert_close(regions.masked_region_regression(logits, target, mask, normalizer="elements"),
                               regions.masked_region_regression(logits, target, mask, normalizer="mask_dim"))
