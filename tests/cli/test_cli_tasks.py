"""`vlmfast tasks`: the grid, one task, one model, JSON."""

import json

from vlmfast.cli import main
from vlmfast.tasks import table


def test_the_grid_has_a_mark_for_every_row_of_the_table(capsys):
    assert main(["tasks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    models = lines[0].split()
    grid = {line.split()[0]: line.split()[1:] for line in lines[1:] if len(line.split()) == len(models) + 1}
    for task in {row.task for row in table()}:
        does = {row.model for row in table(task)}
        assert {model for model, mark in zip(models, grid[task], strict=True) if mark == "x"} == does


def test_one_task_and_one_model_and_json(capsys):
    assert main(["tasks", "--task", "nlvr2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["task", "model", "heads"] and len(lines) == 1 + len(table("nlvr2"))
    assert main(["tasks", "--model", "ViLBERT", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["task"] for row in rows] == [row.task for row in table(model="ViLBERT")]
    assert main(["tasks", "--task", "ocr"]) == 2
    assert "task is 'ocr', must be one of vqa" in capsys.readouterr().err
