"""The real run of ViLBERT and LXMERT: it learns, its files give the same model back, blindness and masks are what they
say, and on the real pictures it beats the majority answer."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlmfast
from vlmfast.data import RegionFeatures, collate_regions
from vlmfast.data.wordpiece import WordPieceTokenizer
from vlmfast.objectives.bert_like import IGNORE

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODELS = ("vilbert", "lxmert")
KINDS = ("apple", "truck", "hat", "tree")  # of the stamps
SMALL = {"train": 40, "test": 12, "batch_size": 16, "progress": False}


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import train_two_stream
        import two_stream_data
        import two_stream_models
    finally:
        sys.path.remove(str(EXAMPLES))
    return train_two_stream, two_stream_data, two_stream_models


@pytest.fixture(scope="module")
def finished(example, stamps, tmp_path_factory):
    """A short run of both models by the command line."""
    out = tmp_path_factory.mktemp("run")
    status = example[0].main(["--pictures", str(stamps), "--out", str(out), "--steps", "60", "--train", "40", "--test",
                              "12", "--batch-size", "16", "--no-progress"])
    assert status == 0
    return out, json.loads((out / "result.json").read_text())


def read(example, out):
    """The scenes, the tokenizer and the texts of a finished run."""
    _, data, _ = example
    scenes = data.Scenes.read(out / "scenes")
    tokenizer = WordPieceTokenizer.from_file(out / "lxmert")
    return scenes, tokenizer, {split: data.Texts.of(scenes.rows(split), scenes, tokenizer)
                               for split in ("train", *data.SPLITS)}


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["pretraining", "."])
def test_the_loss_falls(finished, name, part):
    found = losses(finished[0] / name / part)
    assert len(found) == 30
    assert np.mean(found[-4:]) < 0.9 * np.mean(found[:4])


def test_everything_is_written(finished, capsys):
    out, result = finished
    for name in ("result.md", "held_out.tsv", "scenes/features.tsv", "boxes/test_scene_00000.png",
                 "boxes/test_cutout_00000.png", *(f"{model}/{file}" for model in MODELS for file in (
                     "config.json", "vocab.txt", "answers.json", "loss.png", "training_state.pt",
                     "attention_color.png", "attention_count.png"))):
        assert (out / name).is_file(), name
    assert Image.open(out / "vilbert" / "attention_color.png").width > 400
    assert len(RegionFeatures.open(out / "held_out.tsv")) == 24
    for model in MODELS:
        for part in ("accuracy", "blind"):
            for split in ("test_scene", "test_cutout"):
                values = result["models"][model][part][split]
                assert set(values["questions"]) >= {"all", "color", "count", "exists"}
                assert all(0 <= value <= 1 for group in values.values() for value in group.values())
    lines = (out / "result.md").read_text().splitlines()
    assert "vilbert" in lines[0] and "same text" in lines[0] and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("name", MODELS)
def test_the_saved_model_answers_as_the_trained_one(example, finished, name):
    out, result = finished
    train, data, models = example
    recipe = models.RECIPES[name]
    scenes, tokenizer, texts = read(example, out)
    loaded = vlmfast.load(out / name)
    trained = recipe.make(scenes, tokenizer.vocab_size).eval()
    trained.load_state_dict(torch.load(out / name / "training_state.pt", weights_only=True)["model"])
    regions = RegionFeatures.open(out / "held_out.tsv")
    question = next(row for row in scenes.questions if row["split"] == "test_scene")
    tokens = tokenizer([question["question"]])
    batch = collate_regions([regions[question["image_id"]]], recipe.boxes)
    with torch.no_grad():
        a, b = (model(tokens.input_ids, batch.features, batch.boxes, text_lengths=tokens.lengths,
                      num_regions=batch.lengths).logits for model in (loaded, trained))
    assert set(a) == set(b) and all(torch.equal(a[head], b[head]) for head in a)
    assert len(json.loads((out / name / "answers.json").read_text())) == a["vqa"].shape[1]
    pictures = data.Pictures.of(scenes, recipe.boxes)
    found = train.accuracies(texts["test_scene"], models.correct(loaded, recipe, texts["test_scene"], pictures))
    assert found == result["models"][name]["accuracy"]["test_scene"]


def test_equal_seeds_give_equal_weights_and_a_stopped_run_goes_on(example, stamps, tmp_path, monkeypatch):
    train, _, models = example
    options = {**SMALL, "models": ("lxmert",), "steps": 9}
    run = models.TwoStreamTrainer.run

    def weights(folder, seed=1, resume=False):
        train.run(stamps, tmp_path / folder, seed=seed, resume=resume, **options)
        return torch.load(tmp_path / folder / "lxmert" / "training_state.pt", weights_only=True)["model"]

    whole = weights("a")
    monkeypatch.setattr(models.TwoStreamTrainer, "run", lambda self: run(self, stop_after=4))
    with pytest.raises(KeyboardInterrupt):  # in the middle of fine-tuning
        weights("b")
    monkeypatch.setattr(models.TwoStreamTrainer, "run", run)
    resumed, other = weights("b", resume=True), weights("c", seed=2)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not all(torch.equal(whole[key], other[key]) for key in whole)


@pytest.mark.parametrize("boxes", MODELS)
def test_pretraining_batches_are_masked_and_exchanged(example, finished, boxes):
    _, data, _ = example
    scenes, tokenizer, _ = read(example, finished[0])
    texts = data.Texts.of(scenes.captions(0), scenes, tokenizer)
    pictures = data.Pictures.of(scenes, boxes)
    loader = data.BatchLoader(texts, pictures, 64, mask_id=tokenizer.mask, vocab_size=tokenizer.vocab_size,
                              pretraining=True, seed=3)
    original = {tuple(row[:length].tolist()) for row, length in zip(texts.input_ids, texts.lengths, strict=True)}
    (inputs, targets), first = next(iter(loader)), int(boxes == "vilbert")
    ids, lengths = inputs["input_ids"], inputs["text_lengths"]
    true = targets.truths == 1
    assert 45 <= true.sum() < 52 and set(targets.truths.tolist()) == {0, 1}
    asked = targets.words != IGNORE
    assert asked[true].any() and not asked[~true].any() and not asked[:, 0].any()
    assert (ids[asked] == tokenizer.mask).float().mean() > 0.6
    restored = torch.where(asked, targets.words, ids)
    for row in true.nonzero()[:, 0].tolist():
        assert tuple(restored[row, : lengths[row]].tolist()) in original
    assert targets.masked[true].any() and not targets.masked[~true].any() and not targets.masked[:, :first].any()
    changed = (inputs["image_feat"] != targets.features).any(-1)
    assert not (changed[true] & ~targets.masked[true])[:, first:].any()
    hidden = targets.masked & (inputs["image_feat"] == 0).all(-1)
    assert hidden.sum() > 0.5 * targets.masked.sum()
    if first:
        row = int((changed[:, 1:].sum(1) * true).argmax())
        count = int(inputs["num_regions"][row])
        left = ~targets.masked[row, 1:count]
        mean = inputs["image_feat"][row, 1:count].sum(0) / left.sum()
        torch.testing.assert_close(inputs["image_feat"][row, 0], mean)
    again = next(iter(loader))[0]
    assert all(torch.equal(again[key], inputs[key]) for key in inputs)


def test_captions_name_what_is_there(example, finished):
    _, data, _ = example
    scenes, _, _ = read(example, finished[0])
    rng = np.random.default_rng(0)
    numbers = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
    for regions in scenes.regions[:30]:
        words = data.caption(regions, scenes.kinds, scenes.colors, rng)
        found = {}
        count, color = 1, []
        for word in words.split():
            kind = word if word in KINDS else word.removesuffix("s")
            if kind not in KINDS:
                count, color = numbers.get(word, 1), [word] if word in scenes.colors else []
                continue
            found[kind] = count
            if color:
                at = [scenes.kinds[i] for i in regions.classes].index(kind)
                assert scenes.colors[regions.attributes[at]] == color[0]
            count, color = 1, []
        kinds = [scenes.kinds[i] for i in regions.classes]
        assert found == {kind: kinds.count(kind) for kind in kinds}


@pytest.mark.parametrize("boxes", MODELS)
def test_the_blind_twin_sees_nothing_of_the_scene(example, finished, boxes):
    _, data, _ = example
    scenes, _, texts = read(example, finished[0])
    pictures = data.Pictures.of(scenes, boxes)
    inputs, targets = data.make_batch(texts["test_scene"], pictures.unseen(), torch.arange(20))
    for name in ("image_feat", "image_loc", "num_regions"):
        assert (inputs[name] == inputs[name][:1]).all(), name
    assert not inputs["image_feat"].any() and (targets.kinds == IGNORE).all()
    seen, _ = data.make_batch(texts["test_scene"], pictures, torch.arange(20))
    assert torch.equal(seen["input_ids"], inputs["input_ids"]) and seen["num_regions"].unique().numel() > 1


def test_a_batch_larger_than_the_data_is_refused(example, finished):
    _, data, _ = example
    scenes, _, texts = read(example, finished[0])
    with pytest.raises(ValueError, match="batch_size is 100000, must be 1 ... "):
        data.BatchLoader(texts["train"], data.Pictures.of(scenes, "lxmert"), 100000, mask_id=4, vocab_size=50)


@pytest.mark.training
@pytest.mark.parametrize("name", MODELS)
def test_real_pictures_are_answered_well_above_the_majority(example, shared_dir, tmp_path, name):
    data = shared_dir / "data" / "tuxpaint.zip"
    if not data.is_file():
        pytest.skip(f"no {data}")
    result = example[0].run(data, tmp_path, models=(name,), progress=False)
    model = result["models"][name]
    for split, margin in (("test_scene", 0.3), ("test_cutout", 0.02)):
        found, base = (part[split]["questions"] for part in (model["accuracy"], result["baselines"]))
        assert found["all"] > base["all"]["text"] + margin
        assert found["all"] > model["blind"][split]["questions"]["all"] + margin
