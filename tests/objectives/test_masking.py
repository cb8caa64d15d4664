"""Rates, splits and determinism of the masks, and the overlap rules against literal loops."""

import pytest
import torch
from pretraining_helpers import assert_rate

from vlmfast.data.region_boxes import vilbert_global_region, vl_bert_global_region
from vlmfast.objectives.masking import box_iou, mask_regions, mask_tokens, whole_image_feature, word_ids

OPTIONS = dict(mask_id=3, random_ids=(10, 1000))
NEVER = 10**9  # an id that no random token can be


def texts(batch=200, tokens=60):
    ids = torch.full((batch, tokens), NEVER)
    special = torch.zeros(batch, tokens, dtype=torch.bool)
    special[:, 0] = True
    special[torch.arange(tokens) >= torch.randint(20, tokens, (batch, 1))] = True
    return ids, special


def test_tokens_keep_the_15_80_10_10_convention():
    ids, special = texts()
    found = mask_tokens(ids, special, **OPTIONS)
    selected, total = found.labels != -100, int((~special).sum())
    count = int(selected.sum())
    assert_rate(count, total, 0.15)
    assert not selected[special].any() and (found.labels[selected] == NEVER).all()
    assert torch.equal(found.input_ids[~selected], ids[~selected])
    read = found.input_ids[selected]
    random = read[(read != 3) & (read != NEVER)]
    for rate, part in ((0.8, read == 3), (0.1, read == NEVER), (0.1, (read != 3) & (read != NEVER))):
        assert_rate(int(part.sum()), count, rate)
    assert 10 <= random.min() and random.max() < 1000 and len(random.unique()) > len(random) / 2


def test_other_rates_and_splits_are_kept():
    ids, special = texts()
    found = mask_tokens(ids, special, **OPTIONS, rate=0.4, split=(0.5, 0.0, 0.5))
    selected = found.labels != -100
    assert_rate(int(selected.sum()), int((~special).sum()), 0.4)
    assert set(found.input_ids[selected].unique().tolist()) == {3, NEVER}
    assert_rate(int((found.input_ids[selected] == 3).sum()), int(selected.sum()), 0.5)
    none = mask_tokens(ids, special, **OPTIONS, rate=0.0)
    assert (none.labels == -100).all() and torch.equal(none.input_ids, ids)
    every = mask_tokens(ids, special, **OPTIONS, rate=1.0)
    assert torch.equal(every.labels != -100, ~special)


def test_whole_words_are_selected_and_treated_alike():
    ids, special = texts(400)
    words = word_ids(torch.rand(ids.shape) < 0.5, special)
    found = mask_tokens(ids, special, **OPTIONS, words=words)
    selected = found.labels != -100
    kinds = torch.where(found.input_ids == 3, 0, torch.where(found.input_ids == NEVER, 2, 1))
    chosen = total = 0
    actions = torch.zeros(3)
    for b in range(len(ids)):
        for word in words[b][words[b] >= 0].unique():
            pieces = words[b] == word
            assert selected[b, pieces].all() or not selected[b, pieces].any()
            total += 1
            if selected[b, pieces].all():
                assert len(kinds[b, pieces].unique()) == 1
                actions[kinds[b, pieces][0]] += 1
                chosen += 1
    assert_rate(chosen, total, 0.15)
    assert_rate(int(actions[0]), chosen, 0.8)
    pieces = (found.input_ids != 3) & (found.input_ids != NEVER) & selected
    assert len(found.input_ids[pieces].unique()) > pieces.sum() / 2, "each piece has a random token of its own"


def test_word_ids_count_from_each_start():
    special = torch.tensor([[1, 0, 0, 0, 0, 1, 0, 0, 1]]).bool()
    continues = torch.tensor([[0, 0, 1, 0, 1, 0, 1, 0, 0]]).bool()
    found = word_ids(continues, special)
    assert found[special].tolist() == [-1, -1, -1]
    rest = found[~special].tolist()  # a b##, c d##, [SEP], ##e at a start, f
    assert rest[0] == rest[1] and rest[2] == rest[3] and len({rest[0], rest[2], rest[4], rest[5]}) == 4


def test_at_least_one_masks_the_first_free_token():
    ids, special = torch.full((50, 3), NEVER), torch.tensor([True, False, False]).expand(50, 3).clone()
    special[7] = True
    found = mask_tokens(ids, special, **OPTIONS, rate=0.01, at_least_one=True)
    assert ((found.labels != -100).any(1) == ~special.all(1)).all()
    forced = mask_tokens(ids, special, **OPTIONS, rate=0.0, at_least_one=True)
    assert torch.equal(forced.labels != -100, torch.tensor([False, True, False]) & ~special)
    assert (forced.input_ids[forced.labels != -100] == 3).all()
    assert (mask_tokens(ids, special, **OPTIONS, rate=0.01).labels == -100).all(1).sum() > 40


def test_a_fixed_number_of_tokens_may_be_selected():
    ids, special = texts()
    free = (~special).sum(1)
    for rate, most in ((0.15, 30), (0.15, 4), (0.01, 3)):
        found = mask_tokens(ids, special, **OPTIONS, rate=rate, most=most)
        selected = found.labels != -100
        assert selected.sum(1).tolist() == [max(1, min(most, round(rate * n))) for n in free.tolist()]
        assert not selected[special].any()
    share = torch.stack([mask_tokens(ids[:1, :11], special[:1, :11], **OPTIONS, rate=0.2, most=9).labels[0] != -100
                         for _ in range(600)]).float().mean(0)
    assert share[0] == 0 and (share[1:] - 0.2).abs().max() < 0.09
    with pytest.raises(ValueError, match="most is 3, must be at least 1, and None with words"):
        mask_tokens(ids, special, **OPTIONS, most=3, words=torch.zeros_like(ids))


def features(batch=300, regions=20, width=4):
    return torch.arange(1, batch * regions + 1).float().reshape(batch, regions, 1).expand(-1, -1, width)


def test_regions_keep_the_rate_and_the_split():
    given, keep = features(), torch.rand(300, 20) < 0.8
    found = mask_regions(given, keep, split=(0.8, 0.1, 0.1))
    count = int(found.masked.sum())
    assert_rate(count, int(keep.sum()), 0.15)
    assert not found.masked[~keep].any() and torch.equal(found.features[~found.masked], given[~found.masked])
    read, old = found.features[found.masked], given[found.masked]
    zero, same = (read == 0).all(1), (read == old).all(1)
    for rate, part in ((0.8, zero), (0.1, same), (0.1, ~zero & ~same)):
        assert_rate(int(part.sum()), count, rate)
    strange = read[~zero & ~same]
    assert (strange == strange[:, :1]).all(), "a random region's whole feature"
    sources = strange[:, 0].long() - 1
    assert keep.flatten()[sources].all() and len(sources.unique()) > len(sources) / 2
    assert torch.equal(found.hidden, (found.features != given).all(-1))
    assert not found.near.any()
    assert given[0, 0, 0] == 1, "the caller's features are not changed"


def test_uniter_masks_at_least_one_region_with_zeros():
    given, keep = features(400, 3), torch.rand(400, 3) < 0.9
    keep[5] = False
    found = mask_regions(given, keep, rate=0.05, split=(1.0, 0.0, 0.0), at_least_one=True)
    assert torch.equal(found.masked.any(1), keep.any(1)) and torch.equal(found.masked, found.hidden)
    assert (found.features[found.masked] == 0).all()
    share = found.masked.float().sum(0) / found.masked.sum()
    assert (share - 1 / 3).abs().max() < 0.12, "the forced region is a random one"


def literal_iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(width, 0) * max(height, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def random_boxes(batch, regions):
    corner = torch.rand(batch, regions, 2, dtype=torch.float64)
    return torch.cat([corner, corner + torch.rand(batch, regions, 2, dtype=torch.float64)], dim=-1)


def test_iou_is_that_of_the_loop():
    boxes = random_boxes(3, 6)
    boxes[0, 1], boxes[0, 2] = boxes[0, 0], 0.0
    found = box_iou(boxes)
    for b in range(3):
        for i in range(6):
            for j in range(6):
                assert found[b, i, j].item() == pytest.approx(literal_iou(boxes[b, i].tolist(), boxes[b, j].tolist()))
    assert found[0, 0, 1] == 1 and found[0, 2, 2] == 0


@pytest.mark.parametrize("hide", [True, False])
def test_regions_that_overlap_a_masked_one_are_near(hide):
    given, keep, boxes = features(40, 12), torch.rand(40, 12) < 0.9, random_boxes(40, 12)
    found = mask_regions(given, keep, rate=0.4, boxes=boxes, neighbour_iou=0.4, hide_neighbours=hide)
    assert found.near.sum() > 20
    for b in range(40):
        for i in range(12):
            near = any(literal_iou(boxes[b, i].tolist(), boxes[b, j].tolist()) > 0.4
                       for j in range(12) if found.masked[b, j])
            assert found.near[b, i].item() == (near and keep[b, i].item() and not found.masked[b, i].item())
    zero = (found.features == 0).all(-1)
    assert zero[found.near].all() == hide and zero[found.near].any() == hide
    assert not zero[~found.masked & ~found.near].any()


def test_whole_image_feature_is_that_of_the_data_module():
    given = torch.randn(4, 6, 5)
    keep = torch.arange(6) < torch.tensor([6, 4, 1, 5])[:, None]
    excluded = (torch.rand(4, 6) < 0.4) & keep
    excluded[2, 0] = True
    vilbert, vlbert = (whole_image_feature(given, keep, excluded, eps=eps) for eps in (None, 1e-5))
    for i in range(4):
        rows, out = given[i, : keep[i].sum()], excluded[i, : keep[i].sum()]
        torch.testing.assert_close(vilbert[i], vilbert_global_region(rows, out)[0][0])
        torch.testing.assert_close(vlbert[i], vl_bert_global_region(rows, 10, 10, out)[0][0], rtol=1e-4, atol=1e-4)


def test_the_same_generator_state_gives_the_same_masks():
    ids, special = texts(6)
    given, boxes = features(6, 9), random_boxes(6, 9)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        words = mask_tokens(ids, special, **OPTIONS, generator=generator)
        regions = mask_regions(given, split=(0.5, 0.3, 0.2), boxes=boxes, neighbour_iou=0.4, generator=generator)
        return *words, *regions

    torch.manual_seed(1)
    first = draw(5)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(6), strict=True))


@pytest.mark.parametrize("change, error, message", [
    (dict(special=torch.zeros(2, 3)), TypeError, "special is torch.float32, must be bool"),
    (dict(special=torch.zeros(2, 4, dtype=torch.bool)), ValueError, r"special has shape \[2, 4\], must be \[2, 3\]"),
    (dict(words=torch.zeros(3, 3)), ValueError, r"words has shape \[3, 3\], must be \[2, 3\]"),
    (dict(rate=1.5), ValueError, "rate is 1.5, must lie between 0 and 1"),
    (dict(split=(0.8, 0.1, 0.2)), ValueError, "split is .*, must be three shares"),
    (dict(random_ids=(5, 5)), ValueError, r"random_ids are \(5, 5\)"),
])
def test_mask_tokens_names_bad_input(change, error, message):
    given = dict(input_ids=torch.ones(2, 3, dtype=torch.long), special=torch.zeros(2, 3, dtype=torch.bool), **OPTIONS)
    with pytest.raises(error, match=f"mask_tokens: {message}"):
        mask_tokens(**{**given, **change})


def test_mask_regions_names_bad_input():
    with pytest.raises(TypeError, match="keep is torch.float32, must be bool"):
        mask_regions(features(2, 3), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"keep has shape \[2, 4\], must be \[2, 3\]"):
        mask_regions(features(2, 3), torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"boxes are None, must be \[2, 3, 4\] with neighbour_iou"):
        mask_regions(features(2, 3), neighbour_iou=0.4)
