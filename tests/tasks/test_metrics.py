"""Recall at k on rankings made by hand."""

import itertools

import pytest
import torch

from vlmfast.tasks import best_ranks, recall_at_k, same_caption_ids
from vlmfast.tasks.metrics import chance_recall


def features(scores):
    """(image, text) whose dot products are `scores`."""
    scores = torch.tensor(scores, dtype=torch.float64)
    return scores, torch.eye(scores.shape[1], dtype=torch.float64)


def test_ranks_by_hand():
    image, text = features([[0.9, 0.1, 0.2], [0.8, 0.3, 0.5], [0.1, 0.2, 0.05]])
    ids = torch.arange(3)
    assert best_ranks(image, text, ids, ids).tolist() == [0, 2, 2]
    assert best_ranks(text, image, ids, ids).tolist() == [0, 0, 2]
    assert best_ranks(image, text, ids, ids, chunk=1).tolist() == [0, 2, 2]


def test_recalls_by_hand():
    # row i is nearest to: text 0, text 0, text 2
    image = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.1, 1.0]])
    report = recall_at_k(image, torch.eye(3), ks=(1, 2, 3))
    assert report.image_to_text == pytest.approx({1: 2 / 3, 2: 1.0, 3: 1.0})
    assert report.text_to_image == pytest.approx({1: 1.0, 2: 1.0, 3: 1.0})
    assert report.chance_image_to_text == pytest.approx({1: 1 / 3, 2: 2 / 3, 3: 1.0})
    flat = report.to_dict()
    assert flat["image_to_text_r1"] == pytest.approx(2 / 3) and flat["text_to_image_r2_chance"] == pytest.approx(2 / 3)


def test_equal_captions_answer_each_other():
    ids = same_caption_ids(["a cat", "A cat ", "a dog"])
    assert ids.tolist() == [0, 0, 1]
    image, text = features([[0.2, 0.9, 0.1], [0.9, 0.2, 0.1], [0.0, 0.1, 0.5]])
    apart = best_ranks(image, text, torch.arange(3), torch.arange(3))
    together = best_ranks(image, text, ids, ids)
    assert apart.tolist() == [1, 1, 0]
    assert together.tolist() == [0, 0, 0]


def test_five_captions_of_one_picture():
    image = torch.eye(2)
    text = torch.tensor([[0.9, 0.1]] * 5 + [[0.6, 0.5], [0.1, 0.9], [0.9, 0.2], [0.9, 0.2], [0.9, 0.2]])
    report = recall_at_k(image, text, ks=(1, 5), image_ids=torch.tensor([0, 1]),
                         text_ids=torch.tensor([0] * 5 + [1] * 5))
    assert report.image_to_text == {1: 1.0, 5: 1.0}
    assert report.text_to_image[1] == pytest.approx(6 / 10)
    assert report.chance_text_to_image[1] == pytest.approx(1 / 2)
    assert report.chance_image_to_text[5] == pytest.approx(1 - 1 / 252)  # 1 - C(5, 5) / C(10, 5)


def test_a_collapsed_model_gets_no_credit():
    same = torch.ones(50, 4)
    report = recall_at_k(same, same)
    assert set(report.image_to_text.values()) | set(report.text_to_image.values()) == {0.0}


def test_nan_features_get_no_credit():
    bad = torch.eye(20)
    bad[3] = float("nan")
    report = recall_at_k(bad, torch.eye(20))
    assert report.image_ranks[3] == 20
    assert report.image_to_text[10] == pytest.approx(19 / 20)


def test_length_of_features_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(30, 8, generator=generator), torch.randn(30, 8, generator=generator)
    scaled = recall_at_k(image * torch.rand(30, 1, generator=generator).add(0.1), text * 7)
    assert scaled.image_ranks.tolist() == recall_at_k(image, text).image_ranks.tolist()


def test_chance_is_the_mean_over_all_orders():
    query, candidate, k = torch.tensor([0, 1]), torch.tensor([0, 0, 1, 2, 1]), 2
    hits = total = 0
    for order in itertools.permutations(range(5)):
        for q in query.tolist():
            total += 1
            hits += any(candidate[i] == q for i in order[:k])
    assert chance_recall(query, candidate, k) == pytest.approx(hits / total)


def test_rejects_what_does_not_fit():
    with pytest.raises(ValueError, match="text has 3 rows, image has 4"):
        recall_at_k(torch.eye(4), torch.eye(4)[:3])
    with pytest.raises(ValueError, match="must be 1 or more"):
        recall_at_k(torch.eye(4), torch.eye(4), ks=(0,))
    with pytest.raises(ValueError, match=r"candidate is \[2, 3\]"):
        best_ranks(torch.eye(2), torch.zeros(2, 3), torch.arange(2), torch.arange(2))
    with pytest.raises(ValueError, match=r"query_ids is \[3\], must be \[2\]"):
        best_ranks(torch.eye(2), torch.eye(2), torch.arange(3), torch.arange(2))
