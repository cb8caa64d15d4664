"""`vlmfast train glide` and `vlmfast demo diffusion`, as a user runs them."""

import json

import pytest
import torch
from cli_helpers import write_pairs
from PIL import Image

import vlmfast
from vlmfast.cli import main
from vlmfast.training.log import read_log

QUICK = ["--epochs", "2", "--batch-size", "12", "--sheet-every", "2", "--sheet-steps", "2", "--vocab-size", "300",
         "--no-progress", "--device", "cpu"]


def train(data, out, *more):
    return main(["train", "glide", "--data", str(data), "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "pairs"
    write_pairs(folder, 40)
    return folder / "captions.csv"


@pytest.fixture(scope="module")
def glide_run(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(pairs, out) == 0
    return out


def test_writes_a_run_that_loads_again(glide_run):
    names = {"config.json", "model.safetensors", "training_state.pt", "train.json", "log.jsonl", "loss.png",
             "samples.png", "samples", "vocab.json", "merges.txt"}
    assert names <= {path.name for path in glide_run.iterdir()}
    assert [path.name for path in sorted((glide_run / "samples").iterdir())] == [
        "0000002.png", "0000003.png", "0000004.png", "0000006.png"]
    with Image.open(glide_run / "samples.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 100
    model = vlmfast.load(glide_run)
    assert model.config.image_size == 32 and model.tokenizer.vocab_size == model.config.n_vocab and not model.training
    records = read_log(glide_run / "log.jsonl")
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 6 and all(0 < record["mse"] < 3 and record["vb"] > 0 for record in steps)
    checks = [record["validation"] for record in records if "validation" in record]
    assert len(checks) == 2 and set(checks[-1]) == {"loss", "mse", "mse_without_text"}
    settings = json.loads((glide_run / "train.json").read_text())
    assert settings["drop_text"] == 0.2 and settings["ema"] == 0.999


def test_resume_gives_the_same_weights(pairs, glide_run, tmp_path, monkeypatch):
    from vlmfast.training import Trainer

    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: run(self, stop_after=2))
    assert train(pairs, tmp_path / "run") == 130
    monkeypatch.undo()
    assert main(["train", "glide", "--out", str(tmp_path / "run"), "--resume", "--no-progress", "--device", "cpu"]) == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(glide_run)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_an_upsampler_trains_on_small_pictures(pairs, tmp_path, capsys):
    assert train(pairs, tmp_path / "run", "--model", "glide-tiny-upsample", "--scale", "2", "--steps", "2") == 0
    model = vlmfast.load(tmp_path / "run")
    assert model.config.super_res and (tmp_path / "run" / "samples.png").exists()
    assert "37 pairs for training, 3 for validation" in capsys.readouterr().out


def test_a_checkpoint_goes_on(glide_run, pairs, tmp_path):
    more = ["--steps", "1", "--lr", "1e-4", "--amp", "bf16"]
    assert train(pairs, tmp_path / "run", "--model", str(glide_run), *more) == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(glide_run)
    assert ours.config == theirs.config and ours.tokenizer == theirs.tokenizer
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert 0 < gap < 1e-2


@pytest.mark.parametrize("more, message", [
    (["--model", "glide-huge"], "unknown model"), (["--model", "clip-tiny"], "must be a GLIDE"),
    (["--model", "absent/run"], "no such file"), (["--image-size", "30"], "multiple of"),
    (["--drop-text", "1"], "drop-text is 1"), (["--data", "absent"], "absent"),
    (["--model", "glide-tiny-upsample", "--scale", "5"], "--scale is 5"),
    (["--tokenizer", "absent"], "absent")])
def test_bad_arguments_give_one_line(pairs, tmp_path, capsys, more, message):
    assert train(pairs, tmp_path / "run", *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, captured.err


@pytest.mark.slow
def test_demo_trains_draws_and_writes_its_report(tmp_path, capsys, monkeypatch):
    from vlmfast.cli import demo_diffusion

    monkeypatch.setattr(demo_diffusion, "STEPS", 3)
    monkeypatch.setattr(demo_diffusion, "JUDGED", 4)
    out = tmp_path / "demo"
    assert main(["demo", "diffusion", "--out", str(out), "--seconds", "2", "--no-progress"]) == 0
    text = (out / "report.md").read_text()
    assert "drawn with guidance 2" in text and "held-out concepts" in text and "own in 10" in text
    assert {"drawn.png", "denoising.gif", "samples.png", "loss.png", "model"} <= {p.name for p in out.iterdir()}
    with Image.open(out / "denoising.gif") as film:
        assert film.n_frames >= 3
    assert "vlmfast generate" in capsys.readouterr().out
    assert vlmfast.load(out / "model").tokenizer is not None
