"""The captioning and translation runs: at tiny size what they write, at full size that they beat their baselines."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sacrebleu")

from examples.test_real_run_data import picture, write_pack
from PIL import Image

import vlmfast
from vlmfast.cli import main as vlmfast_main
from vlmfast.tasks import Captioner
from vlmfast.training import TrainConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
COLORS = {"red": (220, 30, 30), "blue": (40, 60, 230), "green": (30, 170, 40)}
GERMAN = {"red": "rotes", "blue": "blaues", "green": "grünes"}
SIZES = dict(hidden_size=32, num_attention_heads=2, intermediate_size=48, decoder_layers=1, stem_widths=(8, 12, 16))


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """90 rectangles in three colours, every text different by its number."""
    names = [list(COLORS)[i % 3] for i in range(90)]
    records = [{"en": f"A {name} thing {i}.", "de": f"Ein {GERMAN[name]} Ding {i}.", "cat": f"c{i % 4}/x"}
               for i, name in enumerate(names)]
    pictures = [picture(i, COLORS[name]) for i, name in enumerate(names)]
    return write_pack(tmp_path_factory.mktemp("pack") / "pack.zip", records, pictures)


def config(steps):
    return TrainConfig(steps=steps, lr=5e-3, weight_decay=0.1, label_smoothing=0.1, ema=0.9, log_every=5)


def test_captioning_run_writes_model_tables_and_sheet(example, pack, tmp_path):
    module = example("train_captioning")
    result = module.run(pack, tmp_path, config(30), emoji=False, vocab_size=120, image_size=32, progress=False, **SIZES)
    assert {"model.safetensors", "config.json", "vocab.txt", "log.jsonl", "loss.png", "result.json", "result.md",
            "captions.jsonl", "captions.png"} <= {file.name for file in tmp_path.iterdir()}  # fmt: skip
    assert json.loads((tmp_path / "result.json").read_text()) == result
    log = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    rows = [json.loads(line) for line in open(tmp_path / "captions.jsonl", encoding="utf-8")]
    assert len(rows) == result["pictures"] == 9
    mean = float(np.mean([row["cider_d"] for row in rows]))
    assert result["scores"]["model"]["cider_d"] == pytest.approx(mean)
    difference = result["model_minus"]["best constant"]["pictures"]["difference"]
    assert difference == pytest.approx(mean - result["scores"]["best constant"]["cider_d"])
    assert set(result["model_minus"]["best constant"]) == {"pictures", "categories"}
    # the folder is a checkpoint that writes the same
    test = example("text_training").read_examples(tmp_path / "data", "test", 32, "en")
    again = Captioner(vlmfast.load(tmp_path), module.GENERATION)
    assert again([Image.fromarray(one.pixels) for one in test]) == [row["caption"] for row in rows]
    assert vlmfast_main(["caption", str(tmp_path), str(tmp_path / "data" / "images" / "0.png")]) == 0


def test_translation_run_compares_its_variants(example, pack, tmp_path):
    module = example("train_translation")
    options = dict(emoji=False, vocab_size=160, image_size=32, progress=False, **SIZES)
    first = module.run(pack, tmp_path, ["text"], config(12), **options)
    assert set(first["scores"]) == {"text", "copy source", "most frequent"}
    result = module.run(pack, tmp_path, ["concat"], config(12), **options)
    assert set(result["scores"]) == {"concat", "concat, other pictures", "text", "copy source", "most frequent"}
    assert result["scores"]["text"] == first["scores"]["text"]
    assert set(result["bleu_differences"]) == {
        "concat minus copy source", "text minus copy source", "concat minus text",
        "concat minus concat, other pictures"}  # fmt: skip
    scores = result["scores"]
    assert result["bleu_differences"]["concat minus text"]["difference"] == pytest.approx(
        scores["concat"]["bleu"] - scores["text"]["bleu"], abs=1e-9)  # fmt: skip
    assert (tmp_path / "translations.png").is_file() and "| concat |" in (tmp_path / "result.md").read_text()


def test_equal_seeds_give_equal_models(example, pack, tmp_path):
    module = example("train_captioning")
    options = dict(emoji=False, vocab_size=120, image_size=32, progress=False, **SIZES)
    models = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        module.run(pack, tmp_path / name, config(3), **options)
        models.append(vlmfast.load(tmp_path / name).state_dict())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_augmentation_keeps_the_ground_white_and_changes_the_rest(example):
    module = example("text_training")
    pixels = torch.ones(64, 3, 32, 32)
    assert torch.equal(module.augment(pixels, torch.Generator()), pixels)
    pixels[:, :, 8:24, 8:24] = torch.tensor([0.8, 0.2, 0.2]).view(3, 1, 1)
    found = module.augment(pixels, torch.Generator().manual_seed(0))
    assert found.amin() >= 0 and found.amax() <= 1 and len({tuple(one.flatten().tolist()) for one in found}) == 64
    shares = (found[:, 1] < 0.9).float().mean((1, 2))
    assert shares.mean() == pytest.approx(0.25, abs=0.05) and shares.std() > 0.02


def test_the_share_of_emoji_falls(example):
    module = example("text_training")
    own = [module.Example(np.zeros((16, 16, 3), np.uint8), "own") for _ in range(5)]
    other = [module.Example(np.zeros((16, 16, 3), np.uint8), "other") for _ in range(5)]
    tokenizer = module.make_tokenizer([*own, *other], 60)
    batches = module.Batches(own, other, tokenizer, config(10), 20, 0.75)
    word = tokenizer.encode("other")[-1]
    shares = [float((batches[step][1] == word).any(1).float().mean()) for step in range(10)]
    assert shares[0] == 0.75 and shares == sorted(shares, reverse=True) and shares[7:] == [0, 0, 0]


@pytest.mark.slow
def test_the_real_run_beats_its_baseline(example, shared_dir, tmp_path):
    data = shared_dir / "data" / "tuxpaint.zip"
    if not data.is_file():
        pytest.skip(f"no {data}")
    assert example("train_captioning").main(["--data", str(data), "--out", str(tmp_path), "--no-progress"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["model_minus"]["best constant"]["pictures"]["standard_errors"] > 2
