"""`vlmfast answer`: table, JSON, picture, and one-line errors."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tasks.every_model import SIDE, build, options
from tasks.pair_helpers import ANSWERS, GQA_ANSWERS, PICTURES, TEXTS, TOKENIZER, lxmert, vilbert

import vlmfast
from vlmfast.cli import main
from vlmfast.data import write_regions
from vlmfast.tasks import GQA, VQA, with_head, write_answers

QUESTION = TEXTS[0]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models with their answers, region files and a photo."""
    folder = tmp_path_factory.mktemp("answer")
    torch.manual_seed(0)
    models = {"vilbert": (vilbert(), ANSWERS), "lxmert": (lxmert(heads="vqa"), GQA_ANSWERS),
              "gqa": (vilbert(heads=("gqa",)), GQA_ANSWERS), "blind": (lxmert(heads="none"), GQA_ANSWERS)}
    for name, (model, answers) in models.items():
        vlmfast.save_pretrained(model, folder / name)
        write_answers(folder / name, answers)
    write_regions(folder / "one.tsv", PICTURES[:1])
    write_regions(folder / "four.tsv", PICTURES)
    Image.new("RGB", (320, 200), "teal").save(folder / "img2.png")
    return folder


@pytest.mark.parametrize("name", ["vilbert", "lxmert"])
def test_the_table_holds_the_best_answers(home, capsys, name):
    command = ["answer", str(home / name), QUESTION, "--regions", str(home / "four.tsv"), "--image-id", "img1"]
    assert main([*command, "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    model = vlmfast.load(home / name)
    wanted = VQA(model, home / name)(QUESTION, PICTURES[1], top=3)
    assert [line.split() for line in lines[:3]] == \
        [[str(i), *text.split(), f"{value:.4f}"] for i, (text, value) in enumerate(wanted.top, 1)]
    assert lines[3:] == ["picture img1, 3 regions"]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    best = {"answer": wanted.answer, "probability": pytest.approx(wanted.probability, abs=1e-6)}
    assert printed["answers"][0] == best
    assert len(printed["answers"]) == 5 and printed["image_id"] == "img1" and printed["picture"] is None


def test_the_picture_is_found_by_its_name_and_drawn(home, tmp_path, capsys):
    photo, out = home / "img2.png", tmp_path / "new" / "maps.png"
    command = ["answer", str(home / "vilbert"), QUESTION, "--regions", str(home / "four.tsv"), "--image", str(photo)]
    assert main([*command, "--show", str(out)]) == 0
    assert f"picture img2, 8 regions; attention in {out}" in capsys.readouterr().out
    drawn = Image.open(out)
    assert drawn.width > 500 and len(drawn.getcolors(1 << 20)) > 100
    first = tmp_path / "first.png"
    assert main([*command, "--show", str(first), "--layer", "0"]) == 0
    assert Image.open(first).tobytes() != drawn.tobytes()


def test_the_only_picture_needs_no_id_and_the_only_head_no_name(home, capsys):
    assert main(["answer", str(home / "gqa"), QUESTION, "--regions", str(home / "one.tsv"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    wanted = GQA(vlmfast.load(home / "gqa"), GQA_ANSWERS)(QUESTION, PICTURES[0])
    assert [entry["answer"] for entry in printed["answers"]] == [text for text, _ in wanted.top]


def test_vocabulary_and_answers_can_lie_elsewhere(home, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(home / "vilbert", bare)
    for name in ("vocab.txt", "tokenizer_config.json", "answers.json"):
        (bare / name).unlink()
    command = ["answer", str(bare), QUESTION, "--regions", str(home / "one.tsv")]
    assert main(command) == 2 and "has no vocabulary beside it; give --tokenizer" in capsys.readouterr().err
    TOKENIZER.save(tmp_path / "words")
    command += ["--tokenizer", str(tmp_path / "words")]
    assert main(command) == 2 and "has no list of answers beside it; give --answers" in capsys.readouterr().err
    (tmp_path / "list.txt").write_text("\n".join(ANSWERS))
    assert main([*command, "--answers", str(tmp_path / "list.txt")]) == 0
    elsewhere = capsys.readouterr().out
    assert main(["answer", str(home / "vilbert"), QUESTION, "--regions", str(home / "one.tsv")]) == 0
    assert capsys.readouterr().out == elsewhere


@pytest.mark.parametrize("change, text", [
    ({"model": "nowhere"}, "nowhere: no such file or folder"), ({"model": "one.tsv"}, "not a checkpoint"),
    ({"regions": "nowhere.tsv"}, "nowhere.tsv"), ({"regions": "img2.png"}, "img2.png"),
    ({"regions": "wide.tsv"}, "have 12 values, the model takes 20"),
    ({"image-id": "img7"}, "--image-id is img7, the region file holds img0, img1, img2, img3"),
    ({"image-id": None}, "the region file holds 4 pictures, name one of img0, img1, img2, img3"),
    ({"question": "  "}, "must be a sentence"), ({"show": "maps.pdf"}, "must end in .png"),
    ({"show": "maps.png"}, "give --image"), ({"image": "nowhere.png"}, "nowhere.png"),
    ({"image": "one.tsv"}, "one.tsv"), ({"show": "maps.png", "image": "img2.png", "layer": "9"}, "layer is 9"),
    ({"model": "blind"}, "the heads (none), must have vqa"), ({"task": "gqa", "model": "lxmert"}, None),
    ({"answers": "short.json"}, "answers has 2 entries, the model's 'vqa' head has 17 labels"),
    ({"answers": "nowhere.json"}, "nowhere.json does not exist"), ({"tokenizer": "nowhere.txt"}, "no file"),
    ({"device": "tpu9"}, "device is 'tpu9'"),
])
def test_errors_are_one_line(home, capsys, monkeypatch, change, text):
    monkeypatch.chdir(home)
    write_answers(home / "short.json", ["yes", "no"])
    write_regions(home / "wide.tsv", [vlmfast.data.Regions("img1", torch.ones(2, 12), torch.ones(2, 4), 10, 10)])
    values = {"model": "vilbert", "question": QUESTION, "regions": "four.tsv", "image-id": "img1", **change}
    command = ["answer", values.pop("model"), values.pop("question")]
    for name, value in values.items():
        command += [] if value is None else [f"--{name}", value]
    if text is None:
        assert main(command) == 0
        return
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("vlmfast answer: error: ") and text in lines[0], lines


@pytest.mark.parametrize("kind", ["VisualBERT", "UNITER", "VLBERT", "VDBERT", "ImageBERT", "PixelBERT"])
def test_every_model_answers(home, tmp_path, capsys, kind):
    model = with_head(build(kind), "vqa", len(ANSWERS))
    vlmfast.save_pretrained(model, tmp_path / "run")
    write_answers(tmp_path / "run", ANSWERS)
    photo, show = home / "img2.png", tmp_path / "maps.png"
    pixels = kind == "PixelBERT"
    picture = ["--image-size", str(SIDE)] if pixels else ["--regions", str(tmp_path / "one.tsv")]
    one = PICTURES[2]  # with attributes, so that the file keeps classes and confidences
    write_regions(tmp_path / "one.tsv", [replace(one, attributes=one.classes, attribute_confidences=one.confidences)])
    command = ["answer", str(tmp_path / "run"), QUESTION, *picture, "--image", str(photo)]
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    loaded = vlmfast.load(tmp_path / "run")
    wanted = VQA(loaded, ANSWERS, **options(kind, loaded))(QUESTION, str(photo) if pixels else PICTURES[2])
    assert [entry["answer"] for entry in printed["answers"]] == [text for text, _ in wanted.top]
    assert printed["answers"][0]["probability"] == pytest.approx(wanted.probability, abs=1e-5)
    assert main([*command, "--show", str(show)]) == 0 and Image.open(show).width > 500
    assert ("read by its pixels" in capsys.readouterr().out) is pixels
    bare = [part for part in command if part not in (picture if not pixels else ["--image", str(photo)])]
    assert main(bare) == 2
    assert f"reads {'pixels; give --image' if pixels else 'region features; give --regions'}" in capsys.readouterr().err
    if not pixels:
        assert main([*command, "--image-size", "64"]) == 2
        assert f"--image-size belongs to Pixel-BERT, the model is a {kind}" in capsys.readouterr().err


def test_the_drawing_has_a_name_where_none_is_given(home, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["answer", str(home / "vilbert"), QUESTION, "--regions", str(home / "four.tsv"), "--image",
               str(home / "img2.png"), "--show"]  # fmt: skip
    assert main(command) == 0 and Image.open("attention.png").width > 500
    assert "attention in attention.png" in capsys.readouterr().out


def test_a_clip_is_refused(home, tmp_path, capsys):
    vlmfast.save_pretrained(vlmfast.create("clip-tiny", vocab_size=600, context_length=16), tmp_path / "clip")
    assert main(["answer", str(tmp_path / "clip"), QUESTION, "--regions", str(home / "one.tsv")]) == 2
    assert "is a CLIP, must be one of ViLBERT, LXMERT" in capsys.readouterr().err
