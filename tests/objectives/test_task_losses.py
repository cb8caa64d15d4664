"""Fine-tuning losses against explicit expressions in float64, with every divisor."""

import pytest
import torch
import torch.nn.functional as F

from vlmfast.objectives import tasks as losses


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def draws(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(found, wanted):
    torch.testing.assert_close(found, torch.as_tensor(wanted, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_answer_kl_uses_targets_as_they_are():
    z, t = draws(3, 5), torch.rand(3, 5, dtype=torch.float64)
    t[0, 2] = 0
    wanted = sum(t[i, c] * (t[i, c].log() - z[i].log_softmax(0)[c]) for i in range(3) for c in range(5) if t[i, c] > 0)
    same(losses.answer_kl(z, t), wanted / 3)
    same(losses.answer_kl(z, t, normalizer="elements"), wanted / 15)
    assert torch.autograd.gradcheck(lambda z: losses.answer_kl(z, t), z)
    with pytest.raises(ValueError, match=r"answer_kl: target has shape \[3, 4\], must be \[3, 5\]"):
        losses.answer_kl(z, t[:, :4])


def test_one_hot_bce_and_choices():
    z, y = draws(4, 3), torch.tensor([0, 2, 1, 2])
    each = F.binary_cross_entropy_with_logits(z, F.one_hot(y, 3).double(), reduction="none")
    same(losses.one_hot_bce(z, y), each.mean())
    same(losses.one_hot_bce(z, y, normalizer="batch_sum_classes"), each.sum() / 4)
    same(losses.choice_cross_entropy(z, y), F.cross_entropy(z, y))
    same(losses.choice_bce(z, y), each.mean())  # weight 1
    p = z.sigmoid()
    chosen = F.one_hot(y, 3).bool()
    weighted = -(3 * p[chosen].log().sum() + (1 - p[~chosen]).log().sum()) * (3 + 1) / (2 * 3)
    same(losses.choice_bce(z, y, positive_weight=3.0), weighted / 12)
    for wrong in (torch.tensor([0, 2, 1]), torch.tensor([0, 3, 1, 1])):
        with pytest.raises(ValueError, match="labels: "):
            losses.choice_bce(z, wrong)


def test_two_class_choices_for_either_index_of_a_match():
    z, y = draws(3, 4, 2), torch.tensor([1, 0, 3])
    right = F.one_hot(y, 4)
    same(losses.choice_two_class(z, y), F.cross_entropy(z.flatten(0, 1), right.flatten()))
    same(losses.choice_two_class(z, y, normalizer="batch"), 4 * F.cross_entropy(z.flatten(0, 1), right.flatten()))
    same(losses.choice_two_class(z, y, match_index=0), F.cross_entropy(z.flatten(0, 1), 1 - right.flatten()))


def test_margin_of_sigmoids():
    z, y = draws(3, 4), torch.tensor([0, 0, 2])
    total = sum(max(0.2 + torch.sigmoid(z[i, k]).item() - torch.sigmoid(z[i, y[i]]).item(), 0)
                for i in range(3) for k in range(4) if k != y[i])
    same(losses.choice_margin(z, y), total / 9)
    same(losses.choice_margin(z, y, normalizer="batch"), total / 3)
    assert losses.choice_margin(torch.tensor([[9.0, -9.0]]), torch.tensor([0])) == 0


def test_region_losses():
    z = draws(2, 5)
    iou = torch.tensor([[0.9, 0.2, 0.6, 0.0, 0.0], [0.1, 0.55, 0.49, 0.0, 0.0]], dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [True, True, True, False, False]])
    soft = torch.where(iou < 0.5, 0, iou)
    each = F.binary_cross_entropy_with_logits(z, soft, reduction="none")
    same(losses.region_bce(z, iou), each.mean() * 5)  # ViLBERT: the mean times R
    hard = F.binary_cross_entropy_with_logits(z, (iou >= 0.5).double(), reduction="none")
    same(losses.region_bce(z, iou, keep, hard=True, normalizer="regions"), hard[keep].mean())
    same(losses.region_cross_entropy(z, iou), F.cross_entropy(z, torch.tensor([0, 1]), reduction="sum"))
    target = torch.tensor([[0.5, 0, 0.5, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.float64)
    same(losses.region_kl(z, iou), F.kl_div(z.log_softmax(1), target, reduction="batchmean"))
    assert losses.region_kl(z, iou * 0) == 0  # nothing matches
    with pytest.raises(ValueError, match="normalizer is 'labels', must be one of sum, batch"):
        losses.region_cross_entropy(z, iou, normalizer="labels")


def test_affect_losses():
    z, t = draws(4, 6), (torch.rand(4, 6) > 0.5)
    same(losses.label_bce(z, t), F.binary_cross_entropy_with_logits(z, t.double()))
    weight = torch.rand(6, dtype=torch.float64)
    same(losses.label_bce(z, t, positive_weight=weight),
         F.binary_cross_entropy_with_logits(z, t.double(), pos_weight=weight))
    score, true = draws(5), torch.randn(5, dtype=torch.float64)
    same(losses.intensity_l1(score, true), (score - true).abs().mean())
    half = losses.intensity_l1(score.detach().bfloat16(), true)
    assert half.dtype == torch.float32
