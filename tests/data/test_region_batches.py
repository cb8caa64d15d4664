"""Box inputs and global rows of every region model, and padded batches."""

import pytest
import torch

from vlmfast.data import (
    Regions,
    collate_regions,
    encode_regions,
    lxmert_boxes,
    oscar_boxes,
    uniter_boxes,
    uniter_region_count,
    vd_bert_boxes,
    vilbert_boxes,
    vilbert_global_region,
    vl_bert_boxes,
    vl_bert_global_region,
)

BOXES = torch.tensor([[10.0, 20.0, 60.0, 100.0], [0.0, 0.0, 200.0, 400.0]])
W, H = 200, 400


def make(count: int, dim: int = 4, image_id: str = "x") -> Regions:
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 100
    return Regions(
        image_id,
        torch.randn(count, dim, generator=generator),
        torch.cat([corner, corner + 50], dim=1),
        W,
        H,
        classes=torch.arange(count),
        confidences=torch.rand(count, generator=generator),
    )


def test_box_values_by_hand():
    cases = {
        lxmert_boxes: [0.05, 0.05, 0.3, 0.25],
        vilbert_boxes: [0.05, 0.05, 0.3, 0.25, 50 * 80 / (200 * 400)],
        oscar_boxes: [0.05, 0.05, 0.3, 0.25, 0.25, 0.2],
        uniter_boxes: [0.05, 0.05, 0.3, 0.25, 0.25, 0.2, 0.05],
        vl_bert_boxes: [17.5, 15.0, 25.0, 20.0],
    }
    for function, expected in cases.items():
        out = function(BOXES, W, H)
        assert out.dtype == torch.float32 and out.shape == (2, len(expected)), function.__name__
        torch.testing.assert_close(out[0], torch.tensor(expected), msg=function.__name__)
    assert vilbert_boxes(BOXES, W, H)[1].tolist() == [0, 0, 1, 1, 1]
    assert uniter_boxes(BOXES, W, H)[1].tolist() == [0, 0, 1, 1, 1, 1, 1]
    torch.testing.assert_close(lxmert_boxes(lxmert_boxes(BOXES, W, H), 1, 1), lxmert_boxes(BOXES, W, H))


def test_vd_bert_scales_by_the_largest_coordinates():
    boxes = torch.tensor([[10.0, 20.0, 60.0, 100.0], [5.0, 0.0, 100.0, 50.0]])
    out = vd_bert_boxes(boxes, torch.tensor([7, 3]), torch.tensor([0.5, 0.25]))
    x, y = 100 + 1e-5, 100 + 1e-5
    expected = [10 / x, 20 / y, 60 / x, 100 / y, 50 / x * 80 / y, 7, 0.5]
    torch.testing.assert_close(out[0], torch.tensor(expected))
    assert out.shape == (2, 7)
    with pytest.raises(ValueError, match=r"vd_bert_boxes: classes is \[1\], must be \[2\]"):
        vd_bert_boxes(boxes, torch.tensor([7]), torch.tensor([0.5, 0.25]))


def test_vilbert_global_row():
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    feature, box = vilbert_global_region(features)
    torch.testing.assert_close(feature, torch.tensor([[3.0, 3.0]]))
    assert box.tolist() == [[0, 0, 1, 1, 1]]
    # masked rows are zeroed by the caller; overlapping ones stay in the sum and leave the divisor
    features[0] = 0
    feature, _ = vilbert_global_region(features, torch.tensor([True, True, False]))
    assert feature.tolist() == [[8.0, 7.0]]
    feature, _ = vilbert_global_region(features, torch.tensor([True, True, True]))
    assert feature.tolist() == [[8.0, 7.0]]
    with pytest.raises(ValueError, match=r"excluded is torch.int64 \[3\], must be bool \[3\]"):
        vilbert_global_region(features, torch.tensor([1, 0, 0]))


def test_vl_bert_global_row():
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    feature, box = vl_bert_global_region(features, W, H)
    assert feature.tolist() == [[3.0, 3.0]] and box.tolist() == [[0, 0, 199, 399]]
    feature, _ = vl_bert_global_region(features, W, H, torch.tensor([False, True, False]))
    torch.testing.assert_close(feature, torch.tensor([[6.0, 3.0]]) / (2 + 1e-5))


def test_uniter_keeps_confident_regions():
    confidences = torch.linspace(1, 0, 60)
    assert uniter_region_count(confidences) == int((confidences > 0.2).sum()) == 48
    assert uniter_region_count(confidences, threshold=0.99) == 10
    assert uniter_region_count(confidences, threshold=-1, max_regions=36) == 36
    assert uniter_region_count(confidences[:4]) == 4


@pytest.mark.parametrize(
    ("boxes", "width", "extra"),
    [(None, 4, 0), ("lxmert", 4, 0), ("vilbert", 5, 1), ("imagebert", 5, 0), ("uniter", 7, 0), ("oscar", 6, 0),
     ("vl_bert", 4, 1), ("vd_bert", 7, 0), (lxmert_boxes, 4, 0)],
)  # fmt: skip
def test_batches_are_padded_with_zeros(boxes, width, extra):
    images = [make(3, image_id="a"), make(5, image_id="b"), make(1, image_id="c")]
    batch = collate_regions(images, boxes)
    assert batch.features.shape == (3, 5 + extra, 4) and batch.boxes.shape == (3, 5 + extra, width)
    assert batch.lengths.tolist() == [3 + extra, 5 + extra, 1 + extra] and batch.ids == ("a", "b", "c")
    assert batch.mask().sum(dim=1).tolist() == batch.lengths.tolist()
    assert not batch.features[~batch.mask()].any() and not batch.boxes[~batch.mask()].any()
    for i, regions in enumerate(images):
        features, box = encode_regions(regions, boxes)
        assert torch.equal(batch.features[i, : len(features)], features)
        assert torch.equal(batch.boxes[i, : len(box)], box)
        assert torch.equal(features[extra:], regions.features)


def test_max_regions_counts_the_global_row_but_its_mean_sees_all():
    regions = make(5)
    batch = collate_regions([regions, make(2)], "vilbert", max_regions=3)
    assert batch.lengths.tolist() == [3, 3] and batch.features.shape == (2, 3, 4) and batch.boxes.shape == (2, 3, 5)
    torch.testing.assert_close(batch.features[0, 0], regions.features.mean(dim=0))
    assert torch.equal(batch.features[0, 1:], regions.features[:2])


def test_first_cuts_every_field():
    cut = make(5).first(2)
    assert len(cut) == len(cut.boxes) == len(cut.classes) == len(cut.confidences) == 2 and cut.width == W


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match=r"boxes is \[2, 5\], must be \[R, 4\]"):
        lxmert_boxes(torch.zeros(2, 5), W, H)
    with pytest.raises(ValueError, match="picture size is 0 x 400, must be positive"):
        uniter_boxes(BOXES, 0, H)
    with pytest.raises(ValueError, match="boxes is 'bert', must be one of lxmert"):
        collate_regions([make(2)], "bert")
    with pytest.raises(ValueError, match=r"features are \[4, 6\] wide"):
        collate_regions([make(2), make(2, 6)])
    with pytest.raises(ValueError, match="images is empty"):
        collate_regions([])
    with pytest.raises(ValueError, match="max_regions is 0"):
        collate_regions([make(2)], max_regions=0)
    plain = Regions("p", torch.zeros(1, 4), torch.zeros(1, 4), W, H)
    with pytest.raises(ValueError, match="image p has no classes and confidences"):
        encode_regions(plain, "vd_bert")
