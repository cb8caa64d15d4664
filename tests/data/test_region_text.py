"""Captions with region features: caption layouts, counted skips, batches in each model's layout and their order."""

import json

import numpy as np
import pytest
import torch
from region_text_helpers import WIDTH, picture, sentence, tokenizer, write_set

from vlmfast.data import RegionFeatures, write_regions
from vlmfast.data.region_boxes import BOXES, vd_bert_boxes, vilbert_global_region, vl_bert_global_region
from vlmfast.data.region_text import RegionTextPairs, find_files
from vlmfast.data.region_text_batches import LAYOUTS, LengthBatches, PairCollate, RegionTextEncoder, in_order


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "regions", 10)


def test_opens_a_folder_with_its_captions(folder):
    pairs = RegionTextPairs.open(folder)
    assert len(pairs) == 10 and pairs.feature_dim == WIDTH and pairs.report().used == 10
    regions, text = pairs[3]
    assert text == sentence(picture(3)) and torch.equal(regions.features, picture(3).features)
    assert pairs.images == [f"pic{i:03d}" for i in range(10)] and pairs.texts[0] == sentence(picture(0))


RECORDS = [("pic001", "one"), ("pic002", "two"), ("pic002", "two again"), ("nowhere", "three")]
CAPTIONS = {
    "c.csv": "image,caption\npic001.jpg,one\nsome/pic002.jpg,two\npic002,two again\nnowhere.jpg,three\n",
    "ids.tsv": "image_id\tcaption\npic001\tone\npic002\ttwo\npic002\ttwo again\nnowhere\tthree\n",
    "c.jsonl": "".join(json.dumps({"image_id": i, "caption": c}) + "\n" for i, c in RECORDS),
    "list.json": json.dumps([{"image": f"{i}.png", "caption": c} for i, c in RECORDS]),
    "map.json": json.dumps({"pic001": "one", "pic002": ["two", "two again"], "nowhere": "three"}),
    "karpathy.json": json.dumps({"images": [
        {"split": "train", "filename": f"{i}.jpg", "sentences": [{"raw": c} for c in texts]} for i, texts in
        (("pic001", ["one"]), ("pic002", ["two", "two again"]), ("nowhere", ["three"]))]}),
    "coco.json": json.dumps({
        "images": [{"id": k, "file_name": f"{i}.jpg"} for k, i in enumerate(("pic001", "pic002", "nowhere"))],
        "annotations": [{"image_id": k, "caption": c} for k, c in ((0, "one"), (1, "two"), (1, "two again"),
                                                                   (2, "three"))]}),
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_every_layout_of_captions(folder, name):
    (folder / name).write_text(CAPTIONS[name])
    pairs = RegionTextPairs.open(folder / "features.tsv", folder / name)
    assert pairs.entries == [("pic001", "one"), ("pic002", "two"), ("pic002", "two again")]
    assert pairs.report().skipped["image without features"] == 1 and "nowhere" in str(pairs.report())
    assert str(pairs.report()).startswith("3 pairs used, 1 skipped")


def test_splits_and_names_of_karpathys_files(folder):
    content = {"images": [{"split": split, "cocoid": number, "filename": f"{number}.jpg", "sentences": [{"raw": split}]}
                          for number, split in ((1, "train"), (2, "restval"), (3, "test"))]}
    content["images"].append({"split": "test", "cocoid": 4, "filename": "4.jpg", "sentences": []})
    (folder / "k.json").write_text(json.dumps(content))
    report = RegionTextPairs.open(folder, folder / "k.json", image_name="pic{:0>3}").report()
    assert dict(report.skipped) == {"image without caption": 1} and "4.jpg" in str(report)

    def found(**options):
        return RegionTextPairs.open(folder, folder / "k.json", image_name="pic{:0>3}", **options).entries

    expected = [("pic001", "train"), ("pic002", "restval")]
    assert found(splits=("train", "restval")) == expected
    rows = [{"image_id": f"pic00{n}", "split": split, "caption": split} for n, split in enumerate(
        ("train", "restval", "test"), 1)]
    for name, text in (("s.json", json.dumps(rows)), ("s.jsonl", "\n".join(map(json.dumps, rows)))):
        (folder / name).write_text(text)
        assert RegionTextPairs.open(folder, folder / name, splits=("train", "restval")).entries == expected
    assert found(splits="test") == [("pic003", "test")] and len(found()) == 3
    with pytest.raises(ValueError, match="splits is .*'dev'.*, the file has"):
        found(splits="dev")


def test_bad_rows_are_counted_and_bad_files_named(folder, tmp_path):
    lines = ['{"image_id": "pic001", "caption": "one"}', "{broken", '{"image_id": "pic002"}', '{"caption": "x"}',
             '{"image_id": "pic003", "caption": "  "}', "[1]"]
    (folder / "c.jsonl").write_text("\n".join(lines))
    report = RegionTextPairs.open(folder / "features.tsv", folder / "c.jsonl").report()
    assert report.used == 1
    assert dict(report.skipped) == {"malformed JSON": 2, "missing field": 2, "empty caption": 1}
    (folder / "none.jsonl").write_text('{"image_id": "nowhere", "caption": "x"}\n')
    with pytest.raises(ValueError, match="no usable pair\n0 pairs used, 1 skipped"):
        RegionTextPairs.open(folder / "features.tsv", folder / "none.jsonl")
    with pytest.raises(FileNotFoundError, match="no file of captions at"):
        RegionTextPairs.open(folder / "features.tsv", folder / "absent.csv")
    with pytest.raises(FileNotFoundError, match="holds no captions"):
        RegionTextPairs.open(folder / "features.tsv")
    (folder / "odd.json").write_text('{"a": {"b": 1}}')
    with pytest.raises(ValueError, match="neither Karpathy's nor COCO's"):
        RegionTextPairs.open(folder / "features.tsv", folder / "odd.json")
    (folder / "more.tsv").write_text("x")
    with pytest.raises(ValueError, match="several region files"):
        find_files(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        RegionTextPairs.open(tmp_path / "absent")


def test_folders_of_arrays_hold_their_captions_too(tmp_path):
    for i in range(3):
        one = picture(i)
        np.savez(tmp_path / f"{one.image_id}.npz", features=one.features.numpy(), boxes=one.boxes.numpy(),
                 image_w=100, image_h=90)
    (tmp_path / "captions.csv").write_text("image,caption\npic000,a\npic002,b\n")
    assert RegionTextPairs.open(tmp_path).entries == [("pic000", "a"), ("pic002", "b")]


def test_a_damaged_record_is_replaced_and_counted(folder):
    lines = (folder / "features.tsv").read_bytes().splitlines(keepends=True)
    cells = lines[4].split(b"\t")
    lines[4] = b"\t".join([*cells[:-1], cells[-1][:40] + b"\n"])
    (folder / "features.tsv").write_bytes(b"".join(lines))
    pairs = RegionTextPairs.open(folder)
    assert [pairs.readable(i) for i in (3, 4, 5)] == [3, 5, 5]
    assert pairs.readable(4) == 5 and pairs.report().skipped["damaged record"] == 1


def test_split_keeps_the_texts_of_a_picture_together(folder):
    features = RegionFeatures.open(folder / "features.tsv")
    pairs = RegionTextPairs(features, [(f"pic{i:03d}", f"{i} {k}") for i in range(10) for k in range(3)])
    rest, held = pairs.split(0.3, seed=1)
    assert len(held) == 9 and len(rest) == 21 and not set(rest.images) & set(held.images)
    assert pairs.split(0.3, seed=1)[1].entries == held.entries != pairs.split(0.3, seed=2)[1].entries
    with pytest.raises(ValueError, match="fraction is 1.0"):
        pairs.split(1.0)


def test_facts_are_those_of_the_detector(folder):
    pictures = [picture(i) for i in range(10)]
    facts = RegionTextPairs.open(folder).facts()
    assert facts.classes == max(int(one.classes.max()) for one in pictures) + 1
    assert facts.attributes == max(int(one.attributes.max()) for one in pictures) + 1
    assert (facts.probabilities, facts.regions, facts.complete) == (0, 4, True)
    assert not RegionTextPairs.open(folder).facts(limit=3).complete


def test_cache_is_bounded(folder):
    pairs = RegionTextPairs.open(folder, cache_bytes=picture(0).features.nbytes + picture(0).boxes.nbytes)
    assert pairs.regions("pic000") is pairs.regions("pic000")
    assert pairs.regions("pic001") is not pairs.regions("pic001")


def encoder(model, **options):
    return RegionTextEncoder(model, tokenizer(), 12, slots=5 if model == "vdbert" else 0, **options)


@pytest.mark.parametrize("model", LAYOUTS)
def test_images_are_in_the_models_layout(model):
    regions = [picture(i) for i in (0, 1, 2)]
    found = encoder(model, class_offset=1).image(regions)
    whole, counts = int(LAYOUTS[model].whole_image), torch.tensor([2, 3, 4])
    size = 5 if model == "vdbert" else 4 + whole
    assert torch.equal(found["num_regions"], counts + whole)
    assert found["image_feat"].shape == (3, size, WIDTH) and found["boxes"].shape == (3, size, 4)
    for row, one in enumerate(regions):
        rows = slice(whole, whole + len(one))
        if model == "vdbert":
            loc = vd_bert_boxes(one.boxes, one.classes, one.confidences)
        else:
            loc = BOXES[LAYOUTS[model].boxes](one.boxes, 100, 90)
        assert torch.equal(found["image_feat"][row, rows], one.features)
        assert torch.equal(found["image_loc"][row, rows], loc)
        assert torch.allclose(found["boxes"][row, rows], one.boxes / torch.tensor([100.0, 90, 100, 90]))
        assert torch.equal(found["region_classes"][row, rows], one.classes + 1)
        assert torch.equal(found["region_attributes"][row, rows], one.attributes)
        assert torch.equal(found["region_confidence"][row, rows], one.confidences)
        for name in ("image_feat", "boxes", "region_classes", "region_confidence"):
            assert not found[name][row, whole + len(one) :].any(), name
        if whole:
            mean = vilbert_global_region if model == "vilbert" else lambda x: vl_bert_global_region(x, 100, 90)
            assert torch.equal(found["image_feat"][row, 0], mean(one.features)[0][0])
            assert found["boxes"][row, 0].tolist() == [0, 0, 1, 1] and found["region_confidence"][row, 0] == 0


def test_regions_are_cut(folder):
    found = encoder("vilbert", max_regions=3).image([picture(0), picture(2)])
    assert found["num_regions"].tolist() == [3, 3] and torch.equal(found["image_feat"][1, 1:], picture(2).features[:2])


def test_fields_that_one_picture_lacks_are_left_away():
    from dataclasses import replace

    found = encoder("uniter").image([picture(0), replace(picture(1), classes=None)])
    assert "region_classes" not in found and "region_attributes" in found and "region_probs" not in found


def test_texts_are_cut_and_counted():
    coder, texts = encoder("uniter"), ["a red cat", "a red cat, a blue dog, a green tree, a red boat"]
    lengths, cut = coder.lengths(texts)
    assert lengths.tolist() == [5, 12] and cut == 1
    found = coder.text(texts)
    assert found["text_lengths"].tolist() == [5, 12]
    special = [[True] + [False] * 3 + [True] * 8, [True] + [False] * 10 + [True]]
    assert found["special"].tolist() == special


def test_vdbert_has_the_image_in_the_text():
    coder = encoder("vdbert")
    words = coder.tokenizer
    found = coder.text(["a red cat"])
    ids = [words.cls, *[words.unk] * 5, words.sep, *words.encode("a red cat"), words.sep]
    assert found["input_ids"].tolist() == [ids] and found["text_lengths"].tolist() == [11]
    assert found["token_type_ids"].tolist() == [[0] * 7 + [1] * 4]
    assert found["special"].tolist() == [[True] * 7 + [False] * 3 + [True]]


def test_encoder_errors():
    with pytest.raises(ValueError, match="model is 'bert', must be one of vilbert"):
        RegionTextEncoder("bert", tokenizer(), 12)
    with pytest.raises(ValueError, match="slots is 0, must be positive for vdbert"):
        RegionTextEncoder("vdbert", tokenizer(), 12)
    with pytest.raises(ValueError, match="max_tokens is 2"):
        RegionTextEncoder("uniter", tokenizer(), 2)


def batches(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    return list(loader)


def test_batches_are_of_like_length_and_see_everything_once():
    lengths = np.random.default_rng(0).integers(3, 40, 203)
    loader = LengthBatches(lengths, 10, list, pool=5)
    found = batches(loader, 0)
    assert len(found) == len(loader) == 20 and len({i for batch in found for i in batch}) == 200
    spread = np.mean([np.ptp(lengths[batch]) for batch in found])
    assert spread < 0.35 * np.mean([np.ptp(lengths[k : k + 10]) for k in range(0, 200, 10)])
    starts = [lengths[batch].mean() for batch in found]
    assert starts != sorted(starts), "batches come in random order"
    assert batches(loader, 1) != found


def test_order_is_a_function_of_seed_epoch_and_position():
    lengths = np.arange(60) % 7
    whole = batches(LengthBatches(lengths, 4, list, seed=3), 5)
    assert batches(LengthBatches(lengths, 4, list, seed=3), 5, start=6) == whole[6:]
    assert batches(LengthBatches(lengths, 4, list, seed=4), 5) != whole
    one, two = (batches(LengthBatches(lengths, 2, list, seed=3, rank=rank, world_size=2), 5) for rank in (0, 1))
    assert [sorted(a + b) for a, b in zip(one, two, strict=True)] == [sorted(batch) for batch in whole]


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match=r"batch_size is 4, must be between 1 and 3 \(7 examples on 2 processes\)"):
        LengthBatches(np.ones(7), 4, list, world_size=2)


def test_in_order_covers_all():
    found = in_order(np.array([3, 1, 2, 9, 1]), 2)
    assert found == [[1, 4], [2, 0], [3]]


def test_pairs_of_one_picture_share_a_group(folder):
    features = RegionFeatures.open(folder / "features.tsv")
    pairs = RegionTextPairs(features, [("pic004", "a cat"), ("pic001", "a dog"), ("pic004", "a red cat")])
    image, text = PairCollate(pairs, encoder("uniter"))([2, 0, 1])
    assert image["groups"].tolist() == [0, 0, 1] and len(text["input_ids"]) == 3
    assert torch.equal(image["image_feat"][0], image["image_feat"][1])


def test_write_and_open_again(tmp_path):
    write_regions(tmp_path / "f.tsv", [picture(0)])
    pairs = RegionTextPairs.open(tmp_path / "f.tsv", _csv(tmp_path, "pic000,cat"))
    assert torch.equal(pairs[0][0].classes, picture(0).classes)


def _csv(folder, row):
    (folder / "c.csv").write_text(f"image,caption\n{row}\n")
    return folder / "c.csv"
