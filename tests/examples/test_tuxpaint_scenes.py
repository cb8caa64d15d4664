"""The scene generator: exact boxes, answers that hold, balance, splits that share nothing, files that read back."""

import importlib.util
import io
import json
import sys
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from vlmfast.data import RegionFeatures

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "tuxpaint_scenes.py"
RGB = {"red": (220, 20, 20), "green": (20, 180, 40), "blue": (30, 40, 220), "yellow": (240, 220, 10)}


@pytest.fixture(scope="module")
def scenes_module():
    spec = importlib.util.spec_from_file_location("tuxpaint_scenes", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["tuxpaint_scenes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """A zip like the real one: six kinds of five cut-outs, four colours, a caption of no known kind, an empty stamp."""
    path = tmp_path_factory.mktemp("stamps") / "stamps.zip"
    kinds = ["apple", "truck", "hat", "butterfly", "bus", "tree"]
    captions = [f"A big {kind}." for _ in range(5) for kind in kinds] + ["A clock.", "An empty apple."]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("meta.json", json.dumps([{"i": i, "en": text, "cat": "x"} for i, text in enumerate(captions)]))
        for i in range(len(captions)):
            image = Image.new("RGBA", (60, 50), (0, 0, 0, 0))
            if i < len(captions) - 1:
                color = (*list(RGB.values())[(i + i // 6) % 4], 255)
                ImageDraw.Draw(image).ellipse((5, 5 + i % 7, 45 + i % 9, 44), fill=color)
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", lossless=True)
            archive.writestr(f"img/{i}.webp", buffer.getvalue())
    return path


@pytest.fixture(scope="module")
def built(scenes_module, stamps, tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes")
    report = scenes_module.build(stamps, out, train=160, test=40, pictures=2, seed=3)
    rows = {name: [json.loads(line) for line in open(out / f"{name}.jsonl")] for name in ("questions", "statements")}
    return out, report, rows


def test_cutouts_carry_kind_and_color(scenes_module, stamps):
    cutouts = scenes_module.load_cutouts(stamps)
    assert len(cutouts) == 30
    assert Counter(cutout.kind for cutout in cutouts) == dict.fromkeys(
        ["apple", "truck", "hat", "butterfly", "bus", "tree"], 5
    )
    assert [cutout.color for cutout in cutouts] == [list(RGB)[(i + i // 6) % 4] for i in range(30)]
    assert all(cutout.image.getchannel("A").getbbox() == (0, 0, *cutout.image.size) for cutout in cutouts)


def test_test_cutouts_are_never_trained_on(scenes_module, stamps):
    cutouts = scenes_module.load_cutouts(stamps)
    pools = scenes_module.split_cutouts(cutouts, np.random.default_rng(0))
    numbers = {split: {cutout.number for cutout in pool} for split, pool in pools.items()}
    assert numbers["train"] == numbers["test_scene"]
    assert not numbers["train"] & numbers["test_cutout"] and len(numbers["train"] | numbers["test_cutout"]) == 30
    assert len({cutout.kind for cutout in pools["test_cutout"]}) == 6


def test_boxes_are_exact_and_apart(scenes_module, stamps):
    cutouts = scenes_module.load_cutouts(stamps)
    rng = np.random.default_rng(1)
    seen = 0
    for n in range(30):
        scene = scenes_module.compose(f"s{n}", cutouts, rng)
        ground = np.asarray(scene.image)[0, 0] if not any(b[0] == b[1] == 0 for _, b in scene.objects) else None
        pixels = np.asarray(scene.image).astype(int)
        assert scene.image.size == (scenes_module.WIDTH, scenes_module.HEIGHT) and 1 <= len(scene.objects) <= 6
        outside = np.ones(pixels.shape[:2], bool)
        for _, (x1, y1, x2, y2) in scene.objects:
            assert outside[y1:y2, x1:x2].all(), "overlap"
            outside[y1:y2, x1:x2] = False
        if ground is None:
            continue
        changed = np.abs(pixels - ground).max(axis=2) > 12
        assert not (changed & outside).any()
        for _, (x1, y1, x2, y2) in scene.objects:
            part = changed[y1:y2, x1:x2]
            # the outermost rows and columns hold pixels of at least an eighth opacity
            assert part[1:-1].any() and part[:3].any() and part[-3:].any() and part[:, :3].any() and part[:, -3:].any()
            seen += 1
    assert seen > 60


def test_boxes_leave_out_what_resizing_made_invisible(scenes_module):
    image = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (0, 0, 100, 200))
    image.paste((200, 30, 30, 60), (100, 100, 200, 101))  # a faint hair
    cutout = scenes_module.Cutout(0, "apple", "red", image)
    for seed in range(5):
        scene = scenes_module.compose("x", [cutout], np.random.default_rng(seed))
        x1, y1, x2, y2 = scene.objects[0][1]
        assert abs((x2 - x1) - (y2 - y1) / 2) <= 2


def parse(built) -> dict:
    out, _, _ = built
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    features = RegionFeatures.open(out / "features.tsv", "lxmert")
    images = {}
    for regions in features:
        kinds = [vocabulary["kinds"][i] for i in regions.classes]
        colors = [[*vocabulary["colors"], None][i] for i in regions.attributes]
        images[regions.image_id] = (kinds, colors, regions.boxes.tolist(), regions)
    assert features.report().total_skipped == 0
    return images


def singular(word: str) -> str:
    return {"butterflies": "butterfly", "buses": "bus"}.get(word, word.removesuffix("s"))


def side(relation: str, a, b) -> bool:
    return {"left": a[2] <= b[0], "right": b[2] <= a[0], "above": a[3] <= b[1], "below": b[3] <= a[1]}[relation]


def test_every_answer_holds_in_the_written_regions(built):
    images = parse(built)
    checked: Counter = Counter()
    for row in built[2]["questions"]:
        kinds, colors, boxes, _ = images[row["image_id"]]
        words = row["question"].rstrip("?").split()
        if row["type"] == "exists":
            truth = "yes" if words[-1] in kinds else "no"
        elif row["type"] == "count":
            truth = str(kinds.count(singular(words[2])))
        elif row["type"] == "color":
            truth = colors[kinds.index(words[-1])]
        else:
            anchor = boxes[kinds.index(words[-1])]
            assert kinds.count(words[-1]) == 1
            there = [kind for kind, box in zip(kinds, boxes, strict=True) if side(words[2], box, anchor)]
            assert len(there) == 1
            truth = there[0]
        assert row["answer"] == truth, row
        checked[row["type"]] += 1
    assert set(checked) == {"exists", "count", "color", "relation"} and min(checked.values()) > 20


def test_every_statement_is_labelled_rightly(built):
    images = parse(built)
    numbers = {"one": 1, "two": 2, "three": 3}
    checked: Counter = Counter()
    for row in built[2]["statements"]:
        scenes = [images[i] for i in row["image_ids"]]
        kinds, colors, boxes, _ = scenes[0]
        words = row["statement"].rstrip(".").split()
        if row["type"] == "count":
            truth = kinds.count(singular(words[4]) if words[3] != "one" else words[4]) == numbers[words[3]]
        elif row["type"] == "color":
            truth = colors[kinds.index(words[1])] == words[-1]
        elif row["type"] == "relation":
            truth = side(words[3], boxes[kinds.index(words[1])], boxes[kinds.index(words[-1])])
        elif row["type"] == "more":
            a, b = (scene[0].count(singular(words[3])) for scene in scenes)
            truth = a > b if words[6] == "left" else b > a
        else:
            truth = all(words[3] in scene[0] for scene in scenes)
        assert row["label"] is truth, row
        assert len(scenes) == (2 if row["type"] in ("more", "both") else 1)
        checked[row["type"]] += 1
    assert set(checked) == {"count", "color", "relation", "more", "both"} and min(checked.values()) > 20


def test_answers_are_balanced_for_the_same_words(built):
    _, report, rows = built
    train = [row for row in rows["questions"] if row["split"] == "train" and row["type"] == "exists"]
    answers = defaultdict(Counter)
    for row in train:
        answers[row["question"]][row["answer"]] += 1
    assert all(abs(counts["yes"] - counts["no"]) <= 2 for counts in answers.values())
    labels = Counter(row["label"] for row in rows["statements"] if row["split"] == "train")
    assert abs(labels[True] - labels[False]) < 0.1 * labels.total()
    without = report["statements without looking"]["test_scene"]
    assert without["count"] > 50 and max(without["majority"], without["of the type"], without["of the text"]) < 0.7
    assert report["questions without looking"]["test_scene"]["of the text"] < 0.6


def test_splits_and_ids_fit(built):
    out, report, rows = built
    ids = set(parse(built))
    for row in rows["questions"]:
        assert row["image_id"] in ids and row["image_id"].startswith(row["split"] + "_")
    assert len({row["question_id"] for row in rows["questions"]}) == len(rows["questions"])
    assert report["scenes"] == len(ids) == 240
    assert report["cut-outs"] == {"train": 24, "test_scene": 24, "test_cutout": 6}
    vocabulary = json.loads((out / "vocabulary.json").read_text())
    assert {row["answer"] for row in rows["questions"]} == set(vocabulary["answers"])
    assert Image.open(out / "pictures" / "train_00001.png").size == (224, 160)
    assert (out / "pictures" / "scenes.png").is_file()


def test_features_come_from_the_pixels_alone(scenes_module, stamps, built):
    cutouts = scenes_module.load_cutouts(stamps)
    scene = scenes_module.compose("x", cutouts, np.random.default_rng(0))
    features = scenes_module.region_features(scene)
    assert features.shape == (len(scene.objects), 384) and features.dtype == torch.float32
    torch.manual_seed(99)
    assert torch.equal(features, scenes_module.region_features(scene))
    own = next(regions for *_, regions in parse(built).values())
    assert own.features.shape[1] == 384 and own.features.std() > 0.1


def test_the_same_seed_gives_the_same_files(scenes_module, stamps, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        scenes_module.build(stamps, tmp_path / name, train=12, test=3, pictures=0, seed=seed)
    for file in ("features.tsv", "questions.jsonl", "statements.jsonl", "report.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c, file


def test_wrong_arguments_are_told(scenes_module, stamps, tmp_path):
    with pytest.raises(ValueError, match="train 0, test 300, per_scene 3 must be positive"):
        scenes_module.build(stamps, tmp_path / "x", train=0)
    with pytest.raises(FileNotFoundError):
        scenes_module.build(tmp_path / "none.zip", tmp_path / "x")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("meta.json", json.dumps([{"i": 0, "en": "A clock."}]))
    with pytest.raises(ValueError, match="other.zip has no caption of a known kind"):
        scenes_module.load_cutouts(tmp_path / "other.zip")


def test_the_command_line_runs(scenes_module, stamps, tmp_path, capsys):
    arguments = ["--data", str(stamps), "--out", str(tmp_path / "o"), "--train", "6", "--test", "2", "--pictures", "1"]
    assert scenes_module.main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["scenes"] == 10


def test_the_real_stamps_have_enough_of_every_kind(scenes_module, shared_dir):
    data = shared_dir / "data" / "tuxpaint.zip"
    if not data.is_file():
        pytest.skip(f"no {data}")
    counts = Counter(cutout.kind for cutout in scenes_module.load_cutouts(data))
    assert set(counts) == set(scenes_module.KINDS) and min(counts.values()) >= 3
