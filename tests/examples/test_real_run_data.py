"""Example data sets: splits without leakage, layouts that read back, baselines that are what they say."""

import importlib
import io
import json
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from vlmfast.data import load_emoji, open_pairs
from vlmfast.data.annotations import read_karpathy, read_multi30k

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    """`example("emoji_affect")` -> the module of that script."""
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


def picture(i, color=None):
    image = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    color = color or ((i * 53) % 256, (i * 101) % 256, (i * 29) % 256)
    ImageDraw.Draw(image).rectangle((i % 7, i % 11, 20 + i % 23, 15 + i % 19), fill=(*color, 255))
    return image


def write_pack(path, records, pictures):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps([{"i": i, **record} for i, record in enumerate(records)]))
        for i, image in enumerate(pictures):
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", lossless=True)
            archive.writestr(f"img/{i}.webp", buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """60 stamps: some share an English text, some a German one, two look the same, one has no German, one is empty."""
    records = [{"en": f"A thing {i}.", "de": f"Ein Ding {i}.", "cat": "things"} for i in range(58)]
    for i in (3, 13, 23):
        records[i]["en"] = ["A clock.", "a clock", "A  clock!"][i // 10]
    for i in (5, 13):
        records[i]["de"] = "Eine Uhr."
    records[7]["de"] = ""
    pictures = [picture(i) for i in range(58)]
    pictures[40] = pictures[41]
    pictures[50] = Image.new("RGBA", (48, 40), (0, 0, 0, 0))
    return write_pack(tmp_path_factory.mktemp("stamps") / "stamps.zip", records, pictures)


def test_captions_split_without_leakage(example, stamps, tmp_path):
    pytest.importorskip("sacrebleu")
    report = example("tuxpaint_captions").build(stamps, tmp_path)
    assert report["pictures"] == 56 and report["left_out"] == {"without a text": 1, "invisible": 1}
    assert report["groups_in_several_splits"] == 0 and report["groups"] == 56 - 3 - 1
    assert report["splits"] == {"train": 44, "val": 6, "test": 6}
    side = {}
    for split in ("train", "val", "test"):
        pictures = read_karpathy(tmp_path / "captions.json", split)
        pairs = read_multi30k(*(tmp_path / f"{split}.{suffix}" for suffix in ("en", "de", "txt")))
        assert [p.image_id for p in pictures] == [p.image_id for p in pairs]
        for one, pair in zip(pictures, pairs, strict=True):
            assert one.captions == (pair.source,) and (tmp_path / one.file_name).is_file()
            side[int(pair.image_id)] = split
    # 3, 13 and 23 share an English sentence, 5 and 13 a German one, 40 and 41 the picture
    assert len({side[i] for i in (3, 5, 13, 23)}) == 1 and side[40] == side[41]


@pytest.mark.parametrize("seed", range(6))
def test_related_pictures_stay_together_whatever_the_seed(example, stamps, seed):
    packs = example("picture_packs")
    entries, _ = packs.read_pack(stamps)
    keys = [[packs.plain_text(entry.record["en"])] for entry in entries]
    groups = packs.group_entries(entries, keys)
    splits = packs.split_groups(groups, {"train": 0.5, "test": 0.5}, seed)
    assert packs.leaks(groups, splits) == 0 and 20 < splits.count("test") <= 29
    own = {entry.number: split for entry, split in zip(entries, splits, strict=True)}
    assert own[3] == own[13] == own[23] and own[40] == own[41]
    assert packs.leaks(groups, [str(i) for i in range(len(groups))]) == 2  # the count does find leaks


def test_caption_baselines_are_the_constant_captions(example, tmp_path):
    pytest.importorskip("sacrebleu")
    texts = ["A red car."] * 12 + [f"A red boat {i}." for i in range(28)] + ["One dog."] * 3
    records = [{"en": text, "de": f"{text} (de)"} for text in texts]
    pack = write_pack(tmp_path / "pack.zip", records, [picture(i) for i in range(len(texts))])
    report = example("tuxpaint_captions").build(pack, tmp_path / "out")
    for split in ("val", "test"):
        own = report["captions"][split]
        assert own["most_frequent"]["text"] == "A red car."
        assert own["best_constant"]["cider_d"] >= 0 and own["count"] == report["splits"][split]
        # the German text is the English one and a word more: copying is good, a constant is not
        copied, constant = report["translation"][split]["copy_source"], report["translation"][split]["most_frequent"]
        assert copied["chrf"] > 60 > constant["chrf"]


def test_openclipart_keeps_series_together(example, tmp_path):
    records = [{"en": f"arrow {i:02}", "kw": ["arrow", "sign"], "cat": "shapes"} for i in range(6)]
    records += [{"en": f"kind {chr(97 + i // 26)}{chr(97 + i % 26)}", "kw": [], "cat": "x"} for i in range(54)]
    pack = write_pack(tmp_path / "pack.zip", records, [picture(i) for i in range(60)])
    report = example("openclipart_pairs").build(pack, tmp_path / "out")
    assert report["groups_in_several_splits"] == 0 and sum(report["splits"].values()) == 60
    assert report["groups"] == 1 + 54
    names = {}
    for split in ("train", "val", "test"):
        pairs = open_pairs(tmp_path / "out" / split)
        assert len(pairs) == report["splits"][split]
        assert report["chance"][split]["r1"] == pytest.approx(1 / len(pairs), rel=0.2)
        names[split] = [pairs.caption(i) for i in range(len(pairs))]
    assert sum(any("arrow" in caption for caption in own) for own in names.values()) == 1
    assert any("arrow 03, sign" in own for own in names.values())


def test_openclipart_texts(example):
    module = example("openclipart_pairs")
    record = {"en": "chemistry  flask", "kw": ["Chemistry", "science", "science", " "]}
    assert module.text_of(record, "title") == "chemistry flask"
    assert module.text_of(record, "keywords") == "Chemistry, science, science"
    assert module.text_of(record, "both") == "chemistry flask, science"
    assert module.series({"en": "Arrow 01"}) == "arrow" and module.series({"en": "42"}) == "42"


def test_damaged_packs_are_named(example, tmp_path):
    read_pack = example("picture_packs").read_pack
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ValueError, match="text.zip must be a zip with meta.json"):
        read_pack(tmp_path / "text.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("meta.json", '[{"i": 0, "en": " "}]')
    with pytest.raises(ValueError, match="no picture with a text in en"):
        read_pack(tmp_path / "empty.zip")


def test_affect_of_faces(example, tmp_path):
    report = example("emoji_affect").build(tmp_path)
    rows = [json.loads(line) for line in open(tmp_path / "affect.jsonl", encoding="utf-8")]
    assert len(rows) == report["pictures"] == sum(report["labels"].values()) > 60
    pairs = load_emoji()
    labels = {row["name"]: row["label"] for row in rows}
    assert labels["grinning face"] == "positive" and labels["crying face"] == "negative"
    assert labels["neutral face"] == "neutral"
    assert all(pairs.captions[row["index"]] == row["name"] and pairs.records[row["index"]]["u"] == row["u"]
               for row in rows)  # fmt: skip
    assert max(report["folds"]) - min(report["folds"]) <= 2
    most = max(report["labels"].values()) / len(rows)
    assert report["baselines"]["majority_accuracy"] == pytest.approx(most, abs=1e-9)


def test_affect_from_tweets(example, tmp_path):
    pairs = load_emoji()
    faces = [record["u"].replace("-FE0F", "") for record in pairs.records if record["sub"] == "face-smiling"]
    data = [{"sequence": u, "occurrences": 100, "negative": 10, "neutral": 30, "positive": 60} for u in faces]
    data[0] |= {"negative": 80, "neutral": 20, "positive": 0}
    data[1] |= {"occurrences": 3, "negative": 1, "neutral": 1, "positive": 1}
    data.append({"sequence": "2661", "occurrences": 100, "negative": 0, "neutral": 0, "positive": 100})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(data))
    report = example("emoji_affect").build(tmp_path / "out", path)
    assert report["left_out"] == {"not in the set": 1, "under 20 occurrences": 1}
    assert report["labels"] == {"negative": 1, "neutral": 0, "positive": len(faces) - 2}
    rows = [json.loads(line) for line in open(tmp_path / "out" / "affect.jsonl", encoding="utf-8")]
    scores = {row["u"].replace("-FE0F", ""): row["score"] for row in rows}
    assert scores[faces[0]] == pytest.approx((1 - 81) / 103, abs=1e-6)
    assert scores[faces[2]] == pytest.approx((61 - 11) / 103, abs=1e-6)
    path.write_text('[{"sequence": "1F602"}]')
    with pytest.raises(ValueError, match="must be a JSON list of sequence, negative"):
        example("emoji_affect").build(tmp_path / "out", path)


def test_affect_folds_keep_variants_together(example):
    module, pairs = example("emoji_affect"), load_emoji()
    rows = [{"index": i} for i in range(len(pairs))]
    module.assign_folds(rows, pairs)
    by_base, by_pixels = {}, {}
    for row in rows:
        by_base.setdefault(pairs.records[row["index"]]["base"], set()).add(row["fold"])
        by_pixels.setdefault(pairs.images[row["index"]].tobytes(), set()).add(row["fold"])
    assert all(len(folds) == 1 for folds in by_base.values()) and len(by_base) < len(rows)
    assert all(len(folds) == 1 for folds in by_pixels.values()) and len(by_pixels) < len(rows)
    sizes = [sum(row["fold"] == fold for row in rows) for fold in range(5)]
    assert min(sizes) > len(rows) / 5 - 60


@pytest.mark.slow
def test_real_packs(example, shared_dir, tmp_path, capsys):
    pytest.importorskip("sacrebleu")
    for name, script in (("tuxpaint", "tuxpaint_captions"), ("openclipart", "openclipart_pairs")):
        pack = shared_dir / "data" / f"{name}.zip"
        if not pack.is_file():
            pytest.skip(f"no {pack}")
        out = tmp_path / name
        assert example(script).main(["--data", str(pack), "--out", str(out)]) == 0
        report = json.loads((out / "report.json").read_text())
        assert report["groups_in_several_splits"] == 0 and min(report["splits"].values()) > 80
    printed = capsys.readouterr().out
    assert "copy_source: BLEU" in printed and "random order: R@1" in printed
