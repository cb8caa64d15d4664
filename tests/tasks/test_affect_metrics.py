"""Affect metrics by hand."""

import math

import pytest
import torch

from vlmfast.tasks.affect_metrics import classification_scores, intensity_scores, multi_label_scores, pearson


def test_classification_by_hand():
    target = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2, 2, 2])
    predicted = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 0, 0])
    # right 3, 1, 2; predicted 5, 2, 3; targets 4, 2, 4
    scores = classification_scores(predicted, target)
    f1 = [6 / 9, 2 / 4, 4 / 7]
    assert scores.accuracy == pytest.approx(0.6) and scores.standard_error == pytest.approx(math.sqrt(0.024))
    assert scores.f1.tolist() == pytest.approx(f1) and scores.support.tolist() == [4, 2, 4]
    assert scores.macro_f1 == pytest.approx(sum(f1) / 3)
    assert scores.weighted_f1 == pytest.approx((4 * f1[0] + 2 * f1[1] + 4 * f1[2]) / 10)


def test_macro_f1_leaves_absent_classes_out():
    scores = classification_scores(torch.tensor([0, 0, 2]), torch.tensor([0, 0, 0]), classes=5)
    assert scores.f1.tolist() == pytest.approx([0.8, 0, 0, 0, 0])
    assert scores.macro_f1 == pytest.approx(0.4)  # classes 0 and 2 occur
    assert scores.weighted_f1 == pytest.approx(0.8)


@pytest.mark.oracle
def test_classification_matches_sklearn():
    metrics = pytest.importorskip("sklearn.metrics")
    predicted, target = torch.randint(0, 4, (2, 50))
    scores = classification_scores(predicted, target)
    for average, ours in (("macro", scores.macro_f1), ("weighted", scores.weighted_f1)):
        assert ours == pytest.approx(metrics.f1_score(target, predicted, average=average, zero_division=0))


def test_multi_label_by_hand():
    target = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    predicted = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    scores = multi_label_scores(predicted, target)
    f1 = [4 / 5, 2 / 3, 0.0]  # right 2, 1, 0; predicted 2, 2, 0; targets 3, 1, 1
    assert scores.f1.tolist() == pytest.approx(f1) and scores.macro_f1 == pytest.approx(sum(f1) / 3)
    assert scores.weighted_f1 == pytest.approx((3 * f1[0] + f1[1]) / 5)
    assert scores.micro_f1 == pytest.approx(2 * 3 / (4 + 5)) and scores.subset_accuracy == 0.25
    with pytest.raises(TypeError, match="must be bool"):
        multi_label_scores(predicted.float(), target)


def test_intensity_by_hand():
    target = torch.tensor([-2.0, -0.4, 0.0, 1.0, 3.0])
    predicted = torch.tensor([-1.0, 0.2, -0.1, 1.4, 4.0])
    scores = intensity_scores(predicted, target)
    assert scores.mae == pytest.approx((1 + 0.6 + 0.1 + 0.4 + 1) / 5)
    assert scores.accuracy_7 == pytest.approx(4 / 5)  # only -1 for -2 is wrong; 4 is clipped
    assert scores.accuracy_2 == pytest.approx(3 / 5)  # not negative: -.4 -> .2 and 0 -> -.1 are wrong
    assert scores.f1_2 == pytest.approx((2 * 0.5 + 3 * 4 / 6) / 5)
    assert scores.accuracy_2_nonzero == pytest.approx(3 / 4)
    assert scores.f1_2_nonzero == pytest.approx((2 * 2 / 3 + 2 * 4 / 5) / 4)
    expected = torch.corrcoef(torch.stack([predicted, target]).double())[0, 1].item()
    assert scores.pearson == pytest.approx(expected)


def test_pearson_of_a_constant_is_not_a_number():
    assert math.isnan(pearson(torch.ones(3), torch.tensor([1.0, 2, 3])))
    assert pearson(torch.tensor([1.0, 2, 3]), torch.tensor([-2.0, -4, -6])) == pytest.approx(-1)
    assert math.isnan(intensity_scores(torch.ones(2), torch.zeros(2)).accuracy_2_nonzero)


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long), r"predicted is \[2\], target is \[3\]"),
        (torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), "N >= 1"),
        (torch.tensor([0, 3]), torch.tensor([0, 1]), "must be 0 ... 2, the greatest is 3"),
        (torch.tensor([0, -1]), torch.tensor([0, 1]), "must be 0 ... 2"),
    ],
)
def test_labels_are_checked(predicted, target, message):
    with pytest.raises(ValueError, match=message):
        classification_scores(predicted, target, classes=3)


def test_kinds_of_numbers_are_checked():
    with pytest.raises(TypeError, match="predicted is torch.float32, must be integers"):
        classification_scores(torch.zeros(2), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="target holds NaN"):
        intensity_scores(torch.zeros(1), torch.tensor([math.nan]))
