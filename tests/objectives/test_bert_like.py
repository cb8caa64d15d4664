"""Every loss against its formula written out, at float64, and its edge cases."""

import pytest
import torch
from torch.autograd import gradcheck

from vlmfast.objectives import bert_like as losses

B, R, C = 3, 5, 7


@pytest.fixture
def regions():
    prediction = torch.randn(B, R, C, dtype=torch.float64, requires_grad=True)
    target = torch.rand(B, R, C, dtype=torch.float64)
    target[0, 0, 0] = 0
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    return prediction, target / target.sum(-1, keepdim=True), mask


def rows(mask):
    return [tuple(row) for row in mask.nonzero().tolist()]


def test_cross_entropy_is_the_mean_over_labels_that_count():
    logits = torch.randn(B, R, C, dtype=torch.float64)
    labels = torch.full((B, R), -100)
    labels[0, 1], labels[2, 3], labels[1, 1] = 4, 0, -1
    total = -logits[0, 1].log_softmax(0)[4] - logits[2, 3].log_softmax(0)[0]
    torch.testing.assert_close(losses.cross_entropy(logits, labels), total / 2)
    torch.testing.assert_close(losses.cross_entropy(logits, labels, normalizer="batch"), total / B)
    labels[labels == -100], labels[0, 2] = -1, 5
    torch.testing.assert_close(losses.cross_entropy(logits, labels, ignore_index=5),
                               losses.cross_entropy(logits, labels.where(labels != 5, -1)))


def test_kl_divides_by_masked_regions(regions):
    prediction, target, mask = regions
    total = sum((target[i, j] * (target[i, j].clamp(min=1e-300).log() - prediction[i, j].log_softmax(0))).sum()
                for i, j in rows(mask))
    torch.testing.assert_close(losses.masked_region_kl(prediction, target, mask), total / 3)
    torch.testing.assert_close(losses.masked_region_kl(prediction, target, mask, normalizer="elements"),
                               total / (3 * C))


def test_regression_divides_by_masked_numbers(regions):
    prediction, target, mask = regions
    total = sum(((prediction[i, j] - target[i, j]) ** 2).sum() for i, j in rows(mask))
    torch.testing.assert_close(losses.masked_region_regression(prediction, target, mask), total / (3 * C))
    torch.testing.assert_close(losses.masked_region_regression(prediction, target, mask, normalizer="mask"), total / 3)


def test_nce_scores_the_own_feature_against_the_negatives(regions):
    prediction, target, mask = regions
    negatives = torch.randint(B * R, (B, R, 4))
    total = 0
    for i, j in rows(mask):
        samples = torch.stack([target[i, j], *(target.reshape(-1, C)[k] for k in negatives[i, j])])
        total = total - (samples @ prediction[i, j]).log_softmax(0)[0]
    torch.testing.assert_close(losses.masked_region_nce(prediction, target, mask, negatives), total / 3)


def test_region_label_loss_counts_every_region_by_its_confidence():
    logits, confidence = torch.randn(B, R, C, dtype=torch.float64), torch.rand(B, R, dtype=torch.float64)
    labels = torch.randint(C, (B, R))
    labels[1, 2] = -1
    total = sum(-confidence[i, j] * logits[i, j].log_softmax(0)[labels[i, j]]
                for i in range(B) for j in range(R) if labels[i, j] >= 0)
    torch.testing.assert_close(losses.region_label_loss(logits, labels, confidence), total / (B * R) / 0.15)
    torch.testing.assert_close(
        losses.region_label_loss(logits, labels, confidence, factor=6.67, normalizer="labels"),
        6.67 * total / (B * R - 1),
    )


def test_region_feature_loss_is_smooth_l1(regions):
    prediction, target, mask = regions
    prediction = prediction * 3
    distance = (prediction - target).abs()
    each = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean(-1)
    total = sum(each[i, j] for i, j in rows(mask))
    torch.testing.assert_close(losses.region_feature_loss(prediction, target, mask), total / (B * R) / 0.15)
    torch.testing.assert_close(losses.region_feature_loss(prediction, target, mask, factor=1, normalizer="mask"),
                               total / 3)


@pytest.mark.parametrize("shape", [(B, C), (B, R, 1)], ids=str)
def test_bce_sums_classes(shape):
    logits, target = torch.randn(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    each = -target * logits.sigmoid().log() - (1 - target) * (-logits).sigmoid().log()
    torch.testing.assert_close(losses.soft_target_bce(logits, target), each.mean() * shape[1])
    torch.testing.assert_close(losses.soft_target_bce(logits, target, normalizer="elements"), each.mean())


def test_gradients(regions):
    prediction, target, mask = regions
    labels, weight = torch.randint(C, (B, R)), torch.rand(B, R, dtype=torch.float64)
    negatives = torch.randint(B * R, (B, R, 4))
    for loss in (
        lambda x: losses.cross_entropy(x, labels),
        lambda x: losses.masked_region_kl(x, target, mask),
        lambda x: losses.masked_region_regression(x, target, mask),
        lambda x: losses.masked_region_nce(x, target, mask, negatives),
        lambda x: losses.region_label_loss(x, labels, weight),
        lambda x: losses.region_feature_loss(x, target, mask),
        lambda x: losses.soft_target_bce(x, target),
    ):
        assert gradcheck(loss, (prediction,))


def test_nothing_masked_gives_zero_loss_and_gradient(regions):
    prediction, target, mask = regions
    empty, ignored = torch.zeros_like(mask), torch.full((B, R), -1)
    negatives = torch.zeros(B, R, 2, dtype=torch.long)
    for loss in (
        losses.cross_entropy(prediction, ignored),
        losses.masked_region_kl(prediction, target, empty),
        losses.masked_region_regression(prediction, target, empty),
        losses.masked_region_nce(prediction, target, empty, negatives),
        losses.region_label_loss(prediction, ignored, empty, normalizer="labels"),
        losses.region_feature_loss(prediction, target, empty, normalizer="mask"),
    ):
        assert loss == 0
        (gradient,) = torch.autograd.grad(loss, prediction)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_half_precision_logits_give_float32_losses(regions):
    prediction, target, mask = regions
    for dtype in (torch.bfloat16, torch.float16):
        loss = losses.masked_region_kl(prediction.detach().to(dtype), target, mask)
        exact = losses.masked_region_kl(prediction.detach().to(dtype).double(), target, mask)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact.float())


def test_negatives_are_never_the_region_itself():
    batch, regions = 3, 4
    index = losses.sample_region_negatives(batch, regions, 400)
    assert index.shape == (batch, regions, 280 + 120)
    row, column = index // regions, index % regions
    own_row, own_column = torch.arange(batch)[:, None, None], torch.arange(regions)[:, None]
    assert (row[..., :280] != own_row).all() and (row[..., 280:] == own_row).all()
    assert (column[..., 280:] != own_column).all()
    for i in range(batch):
        assert set(row[i, ..., :280].unique().tolist()) == set(range(batch)) - {i}
        assert set(column[i, 0, 280:].tolist()) == {1, 2, 3}
    assert losses.sample_region_negatives(2, 36, 128).shape[-1] == 127
    again = [losses.sample_region_negatives(2, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(ValueError, match="has 1 examples of 4 regions, must have at least 2 of both"):
        losses.sample_region_negatives(1, 4)


def vilbert_case():
    torch.manual_seed(1)
    logits = {"mlm": torch.randn(B, 4, 9), "image": torch.randn(B, R + 1, C), "nsp": torch.randn(B, 2)}
    words = torch.tensor([[-1, 2, -1, -1], [3, -1, -1, 4], [-1, -1, 8, -1]])
    label = torch.tensor([[1, -1, -1, 1, -1], [1, -1, -1, -1, -1], [-1, 1, -1, -1, -1]])
    return logits, words, label, torch.rand(B, R, C).softmax(-1), torch.tensor([0, 1, 0])


def test_vilbert_drops_the_global_region_and_sums_the_parts():
    logits, words, label, target, matched = vilbert_case()
    loss = losses.vilbert_pretraining_loss(logits, words, label, target, matched, image_weight=0.5)
    assert set(loss.parts) == {"mlm", "image", "nsp"}
    torch.testing.assert_close(loss.total, sum(loss.parts.values()))
    kl = losses.masked_region_kl(logits["image"][:, 1:], target, label == 1)
    torch.testing.assert_close(loss.parts["image"], 0.5 * kl)
    torch.testing.assert_close(loss.parts["nsp"], torch.nn.functional.cross_entropy(logits["nsp"], matched))
    other = losses.vilbert_pretraining_loss(logits, words, label, target, 1 - matched)
    assert not torch.allclose(other.parts["nsp"], loss.parts["nsp"])


def test_vilbert_objective_1_ignores_mismatched_pairs_and_2_alignment():
    logits, words, label, target, matched = vilbert_case()
    loss = losses.vilbert_pretraining_loss(logits, words, label, target, matched, objective=1)
    keep = matched == 0
    some = {name: value[keep] for name, value in logits.items()}
    only = losses.vilbert_pretraining_loss(some, words[keep], label[keep], target[keep], matched[keep])
    torch.testing.assert_close(loss.parts["mlm"], only.parts["mlm"])
    torch.testing.assert_close(loss.parts["image"], only.parts["image"])
    plain = losses.vilbert_pretraining_loss(logits, words, label, target, matched)
    assert torch.equal(loss.parts["nsp"], plain.parts["nsp"]) and loss.parts["mlm"] != plain.parts["mlm"]
    assert losses.vilbert_pretraining_loss(logits, words, label, target, matched, objective=2).parts["nsp"] == 0


@pytest.mark.parametrize("visual_target, loss", [(1, losses.masked_region_regression), (2, losses.masked_region_nce)])
def test_vilbert_visual_targets(visual_target, loss):
    logits, words, label, target, matched = vilbert_case()
    negatives = torch.randint(B * R, (B, R, 6))
    extra = (negatives,) if visual_target == 2 else ()
    found = losses.vilbert_pretraining_loss(logits, words, label, target, matched, visual_target=visual_target,
                                            negative_index=negatives)
    torch.testing.assert_close(found.parts["image"], loss(logits["image"][:, 1:], target, label == 1, *extra))
    torch.manual_seed(3)
    drawn = losses.vilbert_pretraining_loss(logits, words, label, target, matched, visual_target=2, num_negative=10)
    torch.manual_seed(3)
    index = losses.sample_region_negatives(B, R, 10)
    torch.testing.assert_close(drawn.parts["image"],
                               losses.masked_region_nce(logits["image"][:, 1:], target, label == 1, index))


def test_lxmert_adds_only_what_has_targets():
    logits = {"mlm": torch.randn(B, 4, 9), "matched": torch.randn(B, 2), "vqa": torch.randn(B, 6),
              "obj": torch.randn(B, R, C), "attr": torch.randn(B, R, 4), "feat": torch.randn(B, R, 8)}
    words, matched = torch.randint(9, (B, 4)), torch.tensor([1, 0, 1])
    confidence = torch.rand(B, R)
    targets = dict(obj=(torch.randint(C, (B, R)), confidence), attr=(torch.randint(4, (B, R)), confidence),
                   feat=(torch.randn(B, R, 8), (confidence > 0.5).float()))
    loss = losses.lxmert_pretraining_loss(logits, words, matched, torch.tensor([-1, -1, 5]), **targets)
    assert list(loss.parts) == ["mlm", "matched", "obj", "attr", "feat", "vqa"]
    torch.testing.assert_close(loss.total, sum(loss.parts.values()))
    torch.testing.assert_close(loss.parts["vqa"], -logits["vqa"][2].log_softmax(0)[5])
    half = losses.lxmert_pretraining_loss(logits, matched_label=matched, **targets, factor=0.5 / 0.15)
    assert list(half.parts) == ["matched", "obj", "attr", "feat"]
    torch.testing.assert_close(half.parts["feat"] * 2, loss.parts["feat"])
    with pytest.raises(ValueError, match="no targets given"):
        losses.lxmert_pretraining_loss(logits)


def test_bad_input_is_named(regions):
    prediction, target, mask = regions
    with pytest.raises(ValueError, match=r"cross_entropy: labels have shape \[3, 4\], must be \[3, 5\]"):
        losses.cross_entropy(prediction, torch.zeros(B, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"labels run from 0 to 7, must lie in 0..6, or be -100 or -1"):
        losses.cross_entropy(prediction, torch.full((B, R), 7).tril())
    with pytest.raises(ValueError, match="normalizer is 'mean', must be one of mask, elements"):
        losses.masked_region_kl(prediction, target, mask, normalizer="mean")
    with pytest.raises(ValueError, match=r"target has shape \[3, 5, 6\], must be \[3, 5, 7\]"):
        losses.masked_region_regression(prediction, target[..., 1:], mask)
    with pytest.raises(ValueError, match=r"mask has shape \[3, 4\], must be \[3, 5\]"):
        losses.masked_region_kl(prediction, target, mask[:, 1:])
    with pytest.raises(ValueError, match="negative_index has shape"):
        losses.masked_region_nce(prediction, target, mask, torch.zeros(B, 1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"confidence has shape \[3\], must be \[3, 5\]"):
        losses.region_label_loss(prediction, mask, torch.ones(B))
    with pytest.raises(ValueError, match=r"target has shape \[5, 7\], must be \[3, 5, 7\]"):
        losses.soft_target_bce(prediction, target[0])
    logits, words, label, target, matched = vilbert_case()
    with pytest.raises(ValueError, match="visual_target is 3, must be one of"):
        losses.vilbert_pretraining_loss(logits, words, label, target, matched, visual_target=3)
