"""The retrieval run at tiny size: what it writes fits together."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import vlmfast

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("train_retrieval")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def ran(example, shared_dir, tmp_path_factory):
    """Needs the pictures of the shared folder."""
    data = shared_dir / "data" / "openclipart.zip"
    if not data.is_file():
        pytest.skip(f"no {data.name} in the shared folder")
    out = tmp_path_factory.mktemp("retrieval")
    return out, example.run(data, out, epochs=1, steps=2, shortlist=5, progress=False)


def test_the_chosen_weight_is_among_those_tried(ran, example):
    assert ran[1]["dual_weight"] in example.WEIGHTS


@pytest.mark.training
def test_the_real_run_finds_more_than_chance(example, shared_dir, tmp_path):
    data = shared_dir / "data" / "openclipart.zip"
    if not data.is_file():
        pytest.skip(f"no {data.name} in the shared folder")
    for row in example.run(data, tmp_path, progress=False)["scores"].values():
        assert row["dual_minus_chance_in_standard_errors"] > 2
        assert row["reranked"] > row["chance"] + 2 * row["reranked_standard_error"]


def test_recalls_grow_with_k_and_reranking_keeps_the_shortlist(ran):
    _, result = ran
    for way in ("text to picture", "picture to text"):
        rows = [result["scores"][f"{way} R@{k}"] for k in (1, 5, 10)]
        for name in ("chance", "dual", "reranked"):
            assert 0 <= rows[0][name] <= rows[1][name] <= rows[2][name] <= 1
        # a shortlist of five is only put in another order: what lies beyond it stays
        assert rows[1]["dual"] == rows[1]["reranked"] and rows[2]["dual"] == rows[2]["reranked"]


def test_models_load_again(ran, example):
    out, _ = ran
    dual, cross = vlmfast.load(out / "dual"), vlmfast.load(out / "cross")
    paths, captions = example.read_split(out / "pairs" / "test")
    regions = example.grid_regions(dual, paths[:3])
    scores = example.pair_scores(example.CrossEncoderRetriever(cross, max_tokens=32), captions[:3], regions)
    assert scores.shape == (3,) and torch.isfinite(scores).all()
    assert (out / "sheet.png").is_file() and "re-ranked" in (out / "result.md").read_text()
