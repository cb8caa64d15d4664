"""`vlmfast generate` and `vlmfast inpaint` with GLIDE, as a user runs them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfast
from vlmfast import models
from vlmfast.cli import main
from vlmfast.data.gpt2_tokenizer import GPT2Tokenizer

SMALL = dict(image_size=16, num_channels=32, channel_mult=(1, 2), attention_resolutions=(8,), num_head_channels=16,
             text_ctx=12, xf_width=32, xf_layers=1, xf_heads=2)


def save(folder, upsampler=False, **changes):
    """A GLIDE that was never trained, but whose every layer does something."""
    torch.manual_seed(0)
    tokenizer = GPT2Tokenizer.train(["a red circle", "a vase of flowers"] * 3, 270)
    models_ = [models.create("glide-tiny", **{**SMALL, "n_vocab": tokenizer.vocab_size, **changes})]
    if upsampler:
        models_.append(models.create("glide-tiny-upsample", **{**SMALL, "n_vocab": tokenizer.vocab_size,
                                                               "image_size": 32, **changes}))
        models_[0].attach_upsampler(models_[1])
    with torch.no_grad():
        for model in models_:
            for value in model.parameters():
                value.add_(torch.randn_like(value), alpha=0.05)
    models_[0].tokenizer = tokenizer
    vlmfast.save_pretrained(models_[0], folder)
    return folder


@pytest.fixture(scope="module")
def glide_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("glide") / "glide-run", upsampler=True)


@pytest.fixture(scope="module")
def inpaint_folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("glide") / "inpaint-run", inpaint=True)


@pytest.fixture
def photo(tmp_path):
    """A picture whose right half may be painted anew."""
    Image.new("RGB", (48, 48), (30, 160, 220)).save(tmp_path / "photo.png")
    mask = Image.new("L", (48, 48), 0)
    mask.paste(255, (24, 0, 48, 48))
    mask.save(tmp_path / "mask.png")
    return tmp_path / "photo.png", tmp_path / "mask.png"


def run(*parts):
    return main([str(part) for part in (*parts, "--no-progress")])


def test_draws_a_sheet_and_an_animation(glide_folder, tmp_path, capsys):
    sheet, film = tmp_path / "sheets" / "sheet.png", tmp_path / "films" / "denoising.gif"
    command = ["generate", glide_folder, "a red circle", "--images", 3, "--sampler", "ddim", "--steps", 6,
               "--guidance-scale", 3, "--seed", 0, "--upsample-steps", 2, "--out", sheet, "--gif", film]
    assert run(*command, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"prompt": "a red circle", "images": 3, "seed": 0, "scores": None, "sheet": str(sheet)}
    with Image.open(sheet) as picture:
        assert picture.width > 3 * 128 and picture.height > 128
    with Image.open(film) as animation:
        assert animation.n_frames >= 4 and animation.info["loop"] == 0
        first = np.asarray(animation.convert("RGB"), dtype=int)
        animation.seek(animation.n_frames - 1)
        assert np.abs(first - np.asarray(animation.convert("RGB"), dtype=int)).mean() > 1, "it moves"
    first = sheet.read_bytes()
    assert run(*command) == 0
    assert sheet.read_bytes() == first, "the same seed draws the same"
    assert "3 pictures of 'a red circle'" in capsys.readouterr().out
    for other in (["--seed", 1], ["--guidance-scale", 1], ["--sampler", "plms"], ["--steps", 5], ["--eta", 1]):
        assert run(*command, *other) == 0
        assert sheet.read_bytes() != first, other


def test_the_sheet_shows_what_the_pipeline_draws(glide_folder, tmp_path):
    assert run("generate", glide_folder, "a red circle", "--images", 1, "--sampler", "ddim", "--steps", 4, "--seed", 5,
               "--upsample-steps", 2, "--out", tmp_path / "a.png") == 0
    options = dict(sampler="ddim", steps=4, upsample_steps=2, progress=False)
    drawn = vlmfast.load(glide_folder)("a red circle", seed=5, **options)
    assert drawn.size == (32, 32)
    with Image.open(tmp_path / "a.png") as sheet:
        below = sheet.height - 10 - 128
        cell = sheet.crop((10, below, 138, below + 128)).resize((32, 32), Image.Resampling.BOX)
    assert np.abs(np.asarray(cell, dtype=int) - np.asarray(drawn, dtype=int)).max() <= 1


def test_a_clip_ranks_the_pictures(glide_folder, run_folder, tmp_path, capsys):
    assert run("generate", glide_folder, "a red circle", "--images", 3, "--steps", 2, "--upsample-steps", 2, "--rerank",
               run_folder, "--out", tmp_path / "a.png", "--json") == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True)


def test_progress_is_shown(glide_folder, tmp_path, capsys):
    assert main(["generate", str(glide_folder), "a red circle", "--images", "1", "--steps", "2", "--upsample-steps",
                 "2", "--out", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().err
    assert "drawing: 100%" in shown and "enlarging: 100%" in shown


@pytest.mark.parametrize("trained", [True, False], ids=["trained-to", "not-trained-to"])
def test_paints_the_white_part_anew(inpaint_folder, glide_folder, photo, tmp_path, capsys, trained):
    picture, mask = photo
    out = tmp_path / "out" / "out.png"
    folder = inpaint_folder if trained else glide_folder
    assert run("inpaint", folder, picture, "--mask", mask, "a vase of flowers", "--steps", 5, "--upsample-steps", 2,
               "--out", out) == 0
    assert f"in {out}" in capsys.readouterr().out
    with Image.open(out) as result:
        pixels = np.asarray(result, dtype=int)
    half = pixels.shape[1] // 2
    assert np.abs(pixels[:, :half] - (30, 160, 220)).max() <= 1
    assert np.abs(pixels[:, half:] - (30, 160, 220)).mean() > 5


def test_several_inpaintings_make_a_sheet(inpaint_folder, photo, tmp_path, capsys):
    picture, mask = photo
    assert run("inpaint", inpaint_folder, picture, "--mask", mask, "a vase of flowers", "--steps", 3, "--images", 2,
               "--out", tmp_path / "out.png", "--gif", tmp_path / "a.gif", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == 2
    with Image.open(tmp_path / "out.png") as sheet, Image.open(tmp_path / "a.gif") as film:
        assert sheet.width > 3 * 128 and film.n_frames == 3


@pytest.fixture
def error(capsys):
    def check(*command):
        assert run(*command) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return check


def test_user_errors_are_one_line(error, glide_folder, run_folder, photo, tmp_path):
    draw, out = ["generate", glide_folder, "a circle"], ["--out", tmp_path / "a.png"]
    assert "--top-k does not go with" in error(*draw, "--top-k", 5, *out)
    assert "must be a DALL-E, DALL-E mini or GLIDE" in error("generate", run_folder, "a circle", *out)
    assert "steps is 'many'" in error(*draw, "--steps", "many", *out)
    assert "steps asks for 1001" in error(*draw, "--steps", 1001, *out)
    assert "must end in .gif" in error(*draw, "--gif", tmp_path / "a.png", *out)
    assert "tokens, context is 12" in error("generate", glide_folder, "a red circle " * 9, *out)
    assert "eta is 3.0" in error(*draw, "--sampler", "ddim", "--eta", 3, *out)
    assert "is an upsampler" in error("generate", glide_folder / "upsample", "a circle", *out)
    picture, mask = photo
    paint = ["inpaint", glide_folder, picture]
    assert "must be a GLIDE" in error("inpaint", run_folder, picture, "--mask", mask, "a vase", *out)
    assert "nowhere.png" in error(*paint, "--mask", tmp_path / "nowhere.png", "a vase", *out)
    Image.new("L", (5, 5)).save(tmp_path / "small.png")
    assert "mask has 5 x 5 pixels, must be 48 x 48" in error(*paint, "--mask", tmp_path / "small.png", "a vase", *out)
    for name in ("vocab.json", "merges.txt"):
        (glide_folder / name).rename(tmp_path / name)
    try:
        assert "no vocabulary beside it; give --tokenizer" in error(*draw, *out)
        assert run(*draw, "--tokenizer", tmp_path, "--images", 1, "--steps", 2, "--upsample-steps", 2, *out) == 0
    finally:
        for name in ("vocab.json", "merges.txt"):
            (tmp_path / name).rename(glide_folder / name)
