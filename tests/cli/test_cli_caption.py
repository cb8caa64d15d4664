"""`vlmfast caption`: lines, JSON, translation, and one-line errors."""

import json
import shutil

import pytest
import torch
from tasks.writer_helpers import PICTURES, REGIONS, TOKENIZER, seq2seq, uniter, vdbert

import vlmfast
from vlmfast.cli import main
from vlmfast.data import write_regions
from vlmfast.tasks import Captioner, Generation, Translator


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, photos and region features."""
    folder = tmp_path_factory.mktemp("caption")
    torch.manual_seed(0)
    models = {"run": seq2seq(), "gated": seq2seq(fusion="gated"), "text": seq2seq(visual="none"), "vdbert": vdbert(),
              "uniter": uniter(), "itm": uniter(heads=("itm",))}  # fmt: skip
    for name, model in models.items():
        vlmfast.save_pretrained(model, folder / name)
    for name, picture in zip(("red", "blue", "green"), PICTURES, strict=True):
        picture.save(folder / f"{name}.png")
    write_regions(folder / "three.tsv", REGIONS)
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def test_one_photo_gives_its_sentence_and_several_a_line_each(home, capsys):
    captioner = Captioner(vlmfast.load(home / "run"))
    assert main(["caption", str(home / "run"), str(home / "red.png")]) == 0
    assert capsys.readouterr().out == captioner(PICTURES[0]) + "\n"
    photos = [str(home / f"{name}.png") for name in ("red", "blue", "green")]
    assert main(["caption", str(home / "run"), *photos]) == 0
    wanted = [f"{name}  {text}" for name, text in zip(photos, captioner(PICTURES), strict=True)]
    assert capsys.readouterr().out.splitlines() == wanted


def test_settings_of_decoding_reach_the_model(home, capsys):
    model, photo = vlmfast.load(home / "run"), str(home / "blue.png")
    command = ["caption", str(home / "run"), photo, "--json", "--max-tokens", "8"]

    def printed(*more):
        assert main([*command, *more]) == 0
        return json.loads(capsys.readouterr().out)[0]

    found = printed("--beams", "2", "--length-penalty", "0")
    wanted = Captioner(model, Generation(2, length_penalty=0.0, max_tokens=8)).hypotheses(PICTURES[1:2])[0]
    assert found["log_probability"] == pytest.approx(wanted.log_probability, abs=1e-5)
    assert found["image"] == photo and found["finished"] == wanted.finished
    drawn = printed("--top-p", "0.95", "--seed", "3", "--temperature", "2")
    generation = Generation(top_p=0.95, temperature=2.0, max_tokens=8)
    wanted = Captioner(model, generation)(PICTURES[1], generator=torch.Generator().manual_seed(3))
    assert drawn["text"] == wanted and drawn == printed("--top-p", "0.95", "--seed", "3", "--temperature", "2")
    assert drawn != printed("--top-p", "0.95", "--seed", "4", "--temperature", "2")


@pytest.mark.parametrize("name", ["vdbert", "uniter"])
def test_regions_are_captioned(home, capsys, name):
    captioner = Captioner(vlmfast.load(home / name))
    command = ["caption", str(home / name), "--regions", str(home / "three.tsv"), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in found] == ["img0", "img1", "img2"]
    assert [row["text"] for row in found] == captioner(REGIONS)
    assert main([*command, "--image-id", "img2"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["text"] == captioner(REGIONS[2])


@pytest.mark.parametrize("name, photo", [("run", "red.png"), ("gated", "red.png"), ("text", None), ("run", None)])
def test_texts_are_translated(home, capsys, name, photo):
    photos = [] if photo is None else [str(home / photo)]
    assert main(["caption", str(home / name), *photos, "--translate", "A red square."]) == 0
    picture = PICTURES[0] if photo else None
    assert capsys.readouterr().out == Translator(vlmfast.load(home / name))("A red square.", picture) + "\n"


def test_the_vocabulary_can_lie_elsewhere(home, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(home / "run", bare)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (bare / name).unlink()
    command = ["caption", str(bare), str(home / "red.png")]
    assert main(command) == 2 and "has no vocabulary beside it; give --tokenizer" in capsys.readouterr().err
    TOKENIZER.save(tmp_path / "words")
    assert main([*command, "--tokenizer", str(tmp_path / "words")]) == 0


@pytest.mark.parametrize("command, text", [
    (["nowhere", "red.png"], "nowhere: no such file or folder"),
    (["run", "nowhere.png"], "nowhere.png does not exist"),
    (["run", "broken.png"], "broken.png is not a picture"),
    (["run"], "there is no picture; give PHOTO"), (["uniter"], "there is no picture; give --regions"),
    (["uniter", "red.png"], "is a UNITER that reads region features; give --regions"),
    (["run", "--regions", "three.tsv"], "is a ImageSeq2Seq that reads pictures; give PHOTO"),
    (["run", "red.png", "--regions", "three.tsv"], "give either pictures or region features"),
    (["uniter", "--regions", "three.tsv", "--image-id", "img7"], "--image-id is img7, the region file holds img0"),
    (["run", "red.png", "--image-id", "img0"], "--image-id names a picture in --regions"),
    (["run", "red.png", "--top-p", "0.9", "--beams", "2"], "--beams belongs to beam search"),
    (["run", "red.png", "--temperature", "2"], "--temperature belongs to drawing; give --top-p"),
    (["run", "red.png", "--top-p", "1.5"], "top_p is 1.5, must be above 0 and at most 1"),
    (["gated", "red.png"], "fusion is 'gated'"), (["text", "red.png", "--translate", "A"], "reads texts alone"),
    (["itm", "--regions", "three.tsv"], "has no 'mlm' head"),
    (["uniter", "--translate", "A"], "is a UNITER, must be ImageSeq2Seq"),
])  # fmt: skip
def test_mistakes_are_one_line(home, capsys, monkeypatch, command, text):
    monkeypatch.chdir(home)
    assert main(["caption", *command]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("vlmfast caption: error: ") and text in captured.err
