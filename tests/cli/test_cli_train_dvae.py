"""`vlmfast train dvae`, as a user runs it."""

import json
import math

import numpy as np
import pytest
import torch
from cli_helpers import write_pairs
from PIL import Image

import vlmfast
from vlmfast.cli import main
from vlmfast.data import load_emoji
from vlmfast.tasks import measure_reconstruction, psnr, reconstruction_sheet
from vlmfast.training import DVAEObjective, DVAETrainer, TensorLoader, TrainConfig
from vlmfast.training.log import read_log

QUICK = ["--epochs", "2", "--batch-size", "10", "--lr", "2e-3", "--vocab-size", "32", "--kl-weight", "0.1",
         "--sheet-every", "2", "--no-progress", "--device", "cpu"]


def train(data, out, *more):
    return main(["train", "dvae", "--data", str(data), "--out", str(out), *QUICK, *more])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty emoji, some in a folder below, without captions."""
    folder = tmp_path_factory.mktemp("data") / "images"
    (folder / "more").mkdir(parents=True)
    pairs = load_emoji()
    for i in range(40):
        pairs[i * 90][0].save(folder / ("more" if i % 3 else ".") / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def dvae_run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(pictures, out) == 0
    return out


def test_writes_a_run_that_loads_again(dvae_run, pictures):
    names = {"config.json", "model.safetensors", "training_state.pt", "train.json", "log.jsonl", "loss.png",
             "reconstruction.png"}
    assert names <= {path.name for path in dvae_run.iterdir()}
    model = vlmfast.load(dvae_run)
    assert model.vocab_size == 32 and not model.training
    records = read_log(dvae_run / "log.jsonl")
    steps = [record for record in records if "loss" in record]
    assert len(steps) == 6 and steps[0]["tau"] == 1 and steps[-1]["tau"] == pytest.approx(1 / 16)
    assert steps[0]["kl_weight"] == 0 and steps[-1]["kl_weight"] == 0.1 and steps[-1]["kl"] >= 0
    checks = [record["validation"] for record in records if "validation" in record]
    assert len(checks) == 2 and checks[-1]["images"] == 5
    assert 0 < checks[-1]["codes_used"] <= 1 <= checks[-1]["perplexity"] <= 32 and checks[-1]["psnr"] > 0
    with Image.open(dvae_run / "reconstruction.png") as sheet:
        assert sheet.format == "PNG" and min(sheet.size) > 100
    settings = json.loads((dvae_run / "train.json").read_text())
    assert settings["kl_weight"] == 0.1 and settings["ema"] == 0.999


def test_resume_gives_the_same_weights(pictures, dvae_run, tmp_path, monkeypatch):
    from vlmfast.training import Trainer

    run = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: run(self, stop_after=2))
    assert train(pictures, tmp_path / "run") == 130
    monkeypatch.undo()
    assert main(["train", "dvae", "--out", str(tmp_path / "run"), "--resume", "--no-progress", "--device", "cpu"]) == 0
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(dvae_run)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("model, more", [
    ("dvae-tiny", []), ("vqgan-tiny", ["--reconstruction", "l1"]),
    ("dvae-small", ["--amp", "bf16", "--accumulate", "3"])])
def test_other_models_train(pictures, tmp_path, model, more, capsys):
    crops = ["--flip", "0.5", "--crop", "0.8"]
    assert train(pictures, tmp_path / "run", "--model", model, "--steps", "3", *crops, *more) == 0
    found = vlmfast.load(tmp_path / "run")
    assert found.vocab_size == 32 and torch.isfinite(next(found.parameters())).all()
    out = capsys.readouterr().out
    assert "35 pairs for training, 5 for validation" in out and "PSNR" in out


def test_a_checkpoint_and_captioned_pairs_are_taken(dvae_run, tmp_path, capsys):
    write_pairs(tmp_path / "pairs", 24)
    captions = str(tmp_path / "pairs" / "captions.csv")
    command = ["train", "dvae", "--data", captions, "--val", captions, "--out", str(tmp_path / "run"),
               "--model", str(dvae_run), "--steps", "1", "--no-progress", "--device", "cpu"]
    assert main(command) == 0
    assert "24 pairs for training, 24 for validation" in capsys.readouterr().out
    ours, theirs = vlmfast.load(tmp_path / "run"), vlmfast.load(dvae_run)
    assert ours.config == theirs.config
    assert not torch.equal(ours.codebook.weight, theirs.codebook.weight)
    assert (ours.codebook.weight - theirs.codebook.weight).abs().max() < 0.1


@pytest.mark.parametrize("more, message", [
    (["--model", "dvae-huge"], "unknown model"), (["--model", "clip-tiny"], "is a CLIP, must be a discrete VAE"),
    (["--model", "absent/run"], "does not exist"), (["--image-size", "30"], "multiple of"),
    (["--tau-end", "0"], "tau_end is 0.0, must be above 0"), (["--kl-anneal", "2"], "kl_anneal is 2.0"),
    (["--reconstruction", "logit_laplace"], "must be 'logit_laplace' for a DVAE"),
    (["--data", "absent"], "absent"), (["--val-fraction", "1"], "val-fraction is 1")])
def test_bad_arguments_give_one_line(pictures, tmp_path, capsys, more, message):
    assert train(pictures, tmp_path / "run", *more) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1, captured.err


def test_folders_without_usable_pictures_are_refused(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no picture")
    assert train(tmp_path / "images", tmp_path / "run") == 2
    assert "holds no picture that can be read" in capsys.readouterr().err


def test_objective_over_a_run():
    objective = DVAEObjective(kl_weight=6.6, kl_anneal=0.5, tau_anneal=0.5)
    assert objective.at(0, 100) == (1.0, 0.0) and objective.at(50, 100) == (1 / 16, 6.6)
    tau, beta = objective.at(25, 100)
    assert tau == pytest.approx((1 + 1 / 16) / 2) and beta == pytest.approx(3.3)
    assert DVAEObjective(kl_weight=2.0, kl_anneal=0.0).at(0, 10)[1] == 2.0
    assert DVAEObjective(kl_weight=2.0, shape="exponential").at(0, 100)[1] > 0


def first_records(model, objective):
    """Two steps that hardly move the weights, on one batch; (the batch, log records)."""
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    loader = TensorLoader(images, torch.zeros(4, 1, dtype=torch.int64), 4, (0.0,) * 3, (1.0,) * 3)
    trainer = DVAETrainer(model, loader, TrainConfig(steps=2, seed=5, lr=1e-12), objective, progress=False)
    return images.float() / 255, trainer.run().records


def test_logged_loss_is_the_published_objective():
    from vlmfast.objectives import dalle_loss

    torch.manual_seed(1)
    model = vlmfast.create("dvae-tiny", vocab_size=24, n_hid=8)
    image, records = first_records(model, DVAEObjective("logit_laplace", 6.6, 0.0, tau=0.8, tau_end=0.8))
    order = image[torch.from_numpy(np.random.default_rng((0, 0)).permutation(4))]
    out = model(order, 0.8, 5 << 40)
    expected = dalle_loss(out.raw, out.kl, order, 16, 6.6)
    assert records[0]["loss"] == pytest.approx(expected.total.item(), rel=1e-5)
    assert records[0]["kl"] == pytest.approx(expected.kl.item(), rel=1e-4) and records[0]["kl_weight"] == 6.6
    # the second step draws other noise, of the next seed
    order = image[torch.from_numpy(np.random.default_rng((0, 1)).permutation(4))]
    out = model(order, 0.8, (5 << 40) + 1)
    assert records[1]["loss"] == pytest.approx(dalle_loss(out.raw, out.kl, order, 16, 6.6).total.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["dvae-small", "vqgan-tiny"])
def test_other_models_are_compared_in_their_own_units(name):
    torch.manual_seed(1)
    model = vlmfast.create(name)
    image, records = first_records(model, DVAEObjective("l1", 0.5, 0.0, tau=0.8))
    order = image[torch.from_numpy(np.random.default_rng((0, 0)).permutation(4))]
    out = model(order, 0.8, 5 << 40)
    error = (out.raw - (2 * order - 1)).abs().mean().item()
    assert records[0]["reconstruction"] == pytest.approx(error, rel=1e-5)
    rest = out.codebook_loss.item() if name == "vqgan-tiny" else 0.5 * 64 / 3072 * out.kl.item()
    assert rest > 0 and records[0]["loss"] == pytest.approx(error + rest, rel=1e-5)


class Echo(torch.nn.Module):
    """A VAE of four grey levels, one code a picture."""

    vocab_size = 4

    def encode(self, image):
        return (image.mean((1, 2, 3)) * 3).round().long()[:, None, None]

    def decode(self, codes):
        return (codes / 3).view(-1, 1, 1, 1).expand(-1, 3, 4, 4)


def test_figures_of_reconstruction():
    images = torch.tensor([0.0, 0.0, 1 / 3, 1.0]).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone()
    images[3, :, :2] -= 0.1
    report = measure_reconstruction(Echo(), images.split(3))
    assert report.images == 4 and report.codes_used == 0.75
    assert report.perplexity == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    exact, off = 100.0, -10 * math.log10(0.1**2 / 2)
    assert report.psnr == pytest.approx((3 * exact + off) / 4, rel=1e-4)
    assert report.mean_colour_psnr == pytest.approx((3 * exact - 10 * math.log10(0.05**2)) / 4, rel=1e-4)
    red = torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert measure_reconstruction(Echo(), [red]).mean_colour_psnr == pytest.approx(exact)
    assert psnr(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)).item() == 0
    assert reconstruction_sheet(Echo(), images, columns=3, size=32).width == 10 + 3 * 42
    with pytest.raises(ValueError, match="batches is empty"):
        measure_reconstruction(Echo(), [])
