"""UNITER on composed scenes: what the run writes, and that on real pictures it beats the majority."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import vlmfast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("train_scenes")
    sys.path.remove(str(EXAMPLES))


def test_writes_models_and_a_table(example, stamps, tmp_path, capsys):
    steps, size = {"pretraining": 6, "vqa": 5, "nlvr": 4}, {"hidden_size": 32, "intermediate_size": 48}
    result = example.run(stamps, tmp_path, steps=steps, train=40, test=12, size=size, progress=False)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("vlmfast train uniter ")]
    assert len(shown) == 3 and "--task nlvr2" in shown[2] and "--config hidden_size=32" in shown[0]
    for name, count in steps.items():
        assert len((tmp_path / name / "log.jsonl").read_text().splitlines()) >= count
        assert vlmfast.load(tmp_path / name).config.hidden_size == 32
    assert [row["on"] for row in result["rows"]] == [
        "questions, new scenes", "questions, new cut-outs", "statements on two pictures, new scenes",
        "statements on two pictures, new cut-outs"]
    assert all(0 <= row["accuracy"] <= 1 and row["count"] >= 6 for row in result["rows"])
    assert len((tmp_path / "result.md").read_text().splitlines()) == 8


@pytest.mark.training
def test_real_pictures_are_answered_well_above_the_majority(example, shared_dir, tmp_path):
    data = shared_dir / "data" / "tuxpaint.zip"
    if not data.is_file():
        pytest.skip(f"no {data}")
    rows = {row["on"]: row for row in example.run(data, tmp_path, progress=False)["rows"]}
    for name, margin in (("questions, new scenes", 0.2), ("statements on two pictures, new scenes", 0.1)):
        row = rows[name]
        assert row["accuracy"] > max(row["of the text"], row["majority"]) + max(margin, 2 * row["standard_error"])
