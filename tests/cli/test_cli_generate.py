"""`vlmfast train dalle` and `vlmfast generate`, as a user runs them."""

import json
import shutil

import pytest
import torch
from PIL import Image

import vlmfast
from vlmfast import models
from vlmfast.cli import main
from vlmfast.training.log import read_log

TINY = ["--epochs", "2", "--batch-size", "12", "--dim", "64", "--depth", "2", "--vocab-size", "560", "--val-fraction",
        "0.1", "--no-progress", "--device", "cpu"]


@pytest.fixture(scope="module")
def dvae_folder(tmp_path_factory):
    """A discrete VAE that was never trained: what it draws is noise, but its codes differ between pictures."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dvae")
    vae = models.create("dvae-small", num_tokens=64, codebook_dim=16, hidden_dim=16, num_layers=3)
    with torch.no_grad():
        for value in vae.parameters():
            value.add_(torch.randn_like(value), alpha=0.2)
    assert len(vae.encode(torch.rand(8, 3, 32, 32)).unique()) > 4
    vlmfast.save_pretrained(vae, folder / "run-dvae")
    return folder / "run-dvae"


def train(dvae, data, out, *more):
    return main(["train", "dalle", "--dvae", str(dvae), "--data", str(data), "--out", str(out), *TINY, *more])


@pytest.fixture(scope="module")
def dalle_folder(dvae_folder, pairs_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run-dalle"
    assert train(dvae_folder, pairs_folder, out) == 0
    return out


def generate(*parts):
    return main(["generate", *(str(part) for part in parts), "--no-progress"])


def test_training_writes_a_run_that_draws(dalle_folder, dvae_folder):
    names = {"config.json", "model.safetensors", "vocab.json", "merges.txt", "training_state.pt", "train.json",
             "log.jsonl", "loss.png", "samples.png", "vae"}
    assert names <= {path.name for path in dalle_folder.iterdir()}
    model = vlmfast.load(dalle_folder)
    assert model.config.image_grid == (4, 4) and model.config.num_image_tokens == 64
    assert model.config.num_text_tokens == model.tokenizer.vocab_size + 1 and model.config.token_offset == 1
    state = torch.load(dalle_folder / "training_state.pt", weights_only=True)
    assert all(torch.equal(value, state["model"][name]) for name, value in model.state_dict().items())
    vae = vlmfast.load(dvae_folder)
    assert all(torch.equal(value, vae.state_dict()[name]) for name, value in model.vae.state_dict().items())
    records = [record for record in read_log(dalle_folder / "log.jsonl") if record.get("loss")]
    assert len(records) == 4
    for record in records:
        assert record["loss"] == pytest.approx(record["text_loss"] / 8 + record["image_loss"] * 7 / 8, rel=1e-5)
    checks = [record["validation"] for record in read_log(dalle_folder / "log.jsonl") if record.get("validation")]
    assert len(checks) == 2 and checks[1]["loss"] < checks[0]["loss"]


def test_resume_gives_the_same_weights(dalle_folder, dvae_folder, pairs_folder, tmp_path, monkeypatch):
    from vlmfast.training import Trainer

    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: run(self, stop_after=3))
    assert train(dvae_folder, pairs_folder, tmp_path / "run") == 130
    monkeypatch.undo()
    assert main(["train", "dalle", "--out", str(tmp_path / "run"), "--resume", "--no-progress", "--device", "cpu"]) == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(dalle_folder)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_chunks_give_the_gradient_of_the_batch(dalle_folder, dvae_folder, pairs_folder, tmp_path):
    assert train(dvae_folder, pairs_folder, tmp_path / "run", "--accumulate", "3") == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(dalle_folder)
    # other draws of the captions left out, but none of this changes much in four steps
    losses = [[record["loss"] for record in read_log(folder / "log.jsonl") if record.get("loss")]
              for folder in (tmp_path / "run", dalle_folder)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert ours.config == theirs.config


def test_draws_a_sheet_best_first(dalle_folder, run_folder, tmp_path, capsys):
    out = tmp_path / "sheets" / "heart.png"
    assert generate(dalle_folder, "a red heart", "--images", 5, "--rerank", run_folder, "--out", out, "--guidance", 2,
                    "--top-k", 30, "--top-p", 0.95, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 5 and report["scores"] == sorted(report["scores"], reverse=True)
    with Image.open(out) as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 128
    first = out.read_bytes()
    assert generate(dalle_folder, "a red heart", "--images", 5, "--rerank", run_folder, "--out", out, "--guidance", 2,
                    "--top-k", 30, "--top-p", 0.95) == 0
    assert out.read_bytes() == first, "the same seed draws the same"
    assert "best first" in capsys.readouterr().out


def test_primes_with_a_picture(dalle_folder, pairs_folder, tmp_path):
    picture = next(pairs_folder.glob("*.png"))
    assert generate(dalle_folder, "a red heart", "--images", 2, "--prime", picture, "--out", tmp_path / "a.png",
                    "--temperature", 0) == 0
    assert generate(dalle_folder, "a red heart", "--images", 2, "--out", tmp_path / "b.png", "--temperature", 0) == 0
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_shows_a_progress_bar(dalle_folder, tmp_path, capsys):
    assert main(["generate", str(dalle_folder), "a heart", "--images", "2", "--out", str(tmp_path / "a.png")]) == 0
    assert "drawing: 100%" in capsys.readouterr().err


@pytest.fixture
def error(capsys):
    def run(*command):
        assert main([str(part) for part in command]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return run


def test_user_errors_of_generate_are_one_line(error, dalle_folder, dvae_folder, run_folder, tmp_path):
    out = ["--out", tmp_path / "a.png", "--no-progress"]
    line = error("generate", dalle_folder, "a red heart " * 20, *out)
    assert line.startswith("vlmfast generate: error: ") and "tokens, the text context is 24; shorten it" in line
    assert "must end in .png" in error("generate", dalle_folder, "a heart", "--out", tmp_path / "a.jpg")
    assert "must be a DALL-E, DALL-E mini or GLIDE" in error("generate", dvae_folder, "a heart", *out)
    assert "nowhere" in error("generate", tmp_path / "nowhere", "a heart", *out)
    assert "must be a CLIP" in error("generate", dalle_folder, "a heart", "--rerank", dvae_folder, *out)
    assert "temperature is -1.0" in error("generate", dalle_folder, "a heart", "--temperature", "-1", *out)
    assert "share is 1.0" in error("generate", dalle_folder, "a heart", "--prime", dalle_folder / "samples.png",
                                   "--prime-share", "1", *out)
    shutil.copytree(dalle_folder, tmp_path / "bare", ignore=shutil.ignore_patterns("vae"))
    assert "has no discrete VAE; give --dvae" in error("generate", tmp_path / "bare", "a heart", *out)
    other = models.create("dvae-small", num_tokens=32, codebook_dim=16, hidden_dim=16, num_layers=3)
    vlmfast.save_pretrained(other, tmp_path / "other")
    line = error("generate", tmp_path / "bare", "a heart", "--dvae", tmp_path / "other", *out)
    assert "the discrete VAE has 32 codes, num_image_tokens is 64" in line
    one = ["--images", 1, "--out", tmp_path / "a.png"]
    assert generate(tmp_path / "bare", "a heart", "--dvae", dvae_folder, *one) == 0
    (tmp_path / "bare" / "vocab.json").unlink()
    line = error("generate", tmp_path / "bare", "a heart", "--dvae", dvae_folder, *out)
    assert "has no vocabulary beside it; give --tokenizer" in line
    (tmp_path / "bare" / "model.safetensors").write_bytes((dalle_folder / "model.safetensors").read_bytes()[:5000])
    line = error("generate", tmp_path / "bare", "a heart", "--dvae", dvae_folder, *out)
    assert "not a valid safetensors file" in line


def test_user_errors_of_training_are_one_line(error, dvae_folder, run_folder, pairs_folder, tmp_path):
    start = ["train", "dalle", "--out", tmp_path / "run", "--no-progress", "--vocab-size", "560"]
    assert "--data is missing" in error(*start, "--dvae", dvae_folder)
    assert "--dvae is missing" in error(*start, "--data", pairs_folder)
    start += ["--data", pairs_folder]
    assert "must be a discrete VAE" in error(*start, "--dvae", run_folder)
    line = error(*start, "--dvae", dvae_folder, "--image-size", "36")
    assert "--image-size is 36, must be a multiple of 8" in line
    line = error(*start, "--dvae", dvae_folder, "--model", "dalle-tini")
    assert "unknown model 'dalle-tini'; did you mean dalle-tiny" in line
    assert "--drop-text is 1.0" in error(*start, "--dvae", dvae_folder, "--drop-text", "1")
    assert not (tmp_path / "run").exists(), "nothing is written before everything fits"
