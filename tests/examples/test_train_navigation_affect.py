"""The navigation and affect runs at tiny size: what they write fits together."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import vlmfast
from vlmfast.data import load_emoji
from vlmfast.tasks import Affect, Navigator

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))


def test_navigation_run_writes_an_agent_that_loads(example, tmp_path):
    pytest.importorskip("minigrid")
    module = example("train_navigation")
    result = module.run(tmp_path, rooms=8, test=4, steps=2, moves=12, progress=False)
    assert set(result["scores"]) == {"agent", "blind", "random"} and result["held_out"] == 4
    for own in result["scores"].values():
        assert 0 <= own["spl"] <= own["success_rate"] <= 1 and 0 < own["steps"] <= 12
    agent = Navigator(vlmfast.load(tmp_path))
    shown = module.demonstrations(module.LEVEL, 2, 5, 40, False)
    assert agent.scores(shown).shape[2] == module.ACTIONS and (tmp_path / "walk.gif").is_file()
    assert "| blind |" in (tmp_path / "result.md").read_text()


def test_the_bot_arrives_on_the_shortest_way_or_nearly(example):
    pytest.importorskip("minigrid")
    module = example("train_navigation")
    for seed in range(6):
        (shown,) = module.demonstrations(module.LEVEL, 1, 100 * seed, 40, False)
        own = next(room for room in (module.Room(module.LEVEL, 100 * seed + i, 40) for i in range(50))
                   if room.instruction == shown.instruction
                   and len(room.observe().feat) == len(shown.observations[0].feat))
        for choice in shown.choices:
            assert not own.done
            own.act(choice)
        assert own.success and own.shortest <= len(shown.choices)


def test_affect_run_counts_every_picture_once(example, tmp_path):
    module = example("train_affect")
    result = module.run(tmp_path, clip_epochs=1, epochs=1, progress=False)
    rows = [json.loads(line) for line in open(tmp_path / "predictions.jsonl", encoding="utf-8")]
    assert len(rows) == result["pictures"] and (tmp_path / "sheet.png").is_file()
    mae = sum(abs(row["score"] - row["predicted"]) for row in rows) / len(rows)
    assert result["scores"]["model"]["mae"] == pytest.approx(mae, abs=1e-4)
    report = json.loads((tmp_path / "report.json").read_text())
    assert result["scores"]["mean"]["mae"] == pytest.approx(report["baselines"]["mean_score_mae"])
    task = Affect(vlmfast.load(tmp_path, task="affect"))
    assert task.config.reads == "pair" and task.config.kind == "intensity"


def test_the_tower_learns_from_emoji_that_are_not_rated(example):
    pairs = load_emoji()
    rows = [{"index": 12}, {"index": 900}]
    others = example("train_affect").unrated(pairs, rows)
    bases = {pairs.records[row["index"]]["base"] for row in rows}
    assert 0 < len(pairs.records) - len(others) < 60 and not bases & {pairs.records[i]["base"] for i in others}


@pytest.mark.training
def test_the_agent_arrives_more_often_than_a_blind_one(example, tmp_path):
    pytest.importorskip("minigrid")
    assert example("train_navigation").main(["--out", str(tmp_path), "--no-progress"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    for name in ("blind", "random"):
        assert result["agent_minus"][name]["standard_errors"] > 2, name
