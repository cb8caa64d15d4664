"""`examples/draw_pictures.py` on the stamps, cut short."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("draw_pictures")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def pack(shared_dir):
    return shared_dir / "data" / "tuxpaint.zip"


def test_stamps_are_split_without_shared_captions(example, pack):
    train, held_out = example.stamps(pack)
    assert train.images.shape[1:] == (3, 32, 32) and 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    assert not {caption.lower() for caption in train.captions} & {caption.lower() for caption in held_out.captions}


def test_writes_the_report_of_both_sets(example, pack, tmp_path):
    assert example.main(["--data", str(pack), "--out", str(tmp_path), "--seconds", "1", "--no-progress",
                         "--threads", "1"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "tuxpaint, held out" in text and "emoji, held-out concepts" in text
    assert (tmp_path / "drawn.png").exists() and (tmp_path / "model" / "vae" / "config.json").exists()


def test_a_glide_draws_them_too(example, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(example.demo_diffusion, "STEPS", 2)
    monkeypatch.setattr(example.demo_diffusion, "JUDGED", 3)
    assert example.main(["--data", str(pack), "--model", "glide", "--out", str(tmp_path), "--seconds", "1",
                         "--no-progress", "--threads", "1"]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "tuxpaint, held out" in text and "--model glide" in text and (tmp_path / "denoising.gif").exists()


@pytest.mark.training
def test_a_small_dalle_foresees_pictures_by_their_captions():
    """`vlmfast demo generate` to its end."""
    from vlmfast.cli.demo_pictures import Drawing

    drawing = Drawing.prepare(0)
    drawing.train_dvae(progress=False)
    for name, report in drawing.reconstructions().items():
        assert report.psnr > report.mean_colour_psnr + 8 and report.codes_used > 0.8, name
    drawing.train_dalle(progress=False)
    for row in drawing.code_rows():
        assert row.loss < row.other - 0.3 < row.frequency - 1, row


@pytest.mark.training
def test_a_small_glide_sees_less_noise_where_it_knows_the_caption(tmp_path):
    """A shortened `vlmfast demo diffusion`."""
    from vlmfast.cli.demo_diffusion import Diffusion

    run = Diffusion.prepare(0)
    run.config = replace(run.config, epochs=5)
    run.train_model(tmp_path, progress=False)
    for name, (own, none) in run.losses().items():
        assert own < 0.3 and own < none, name
