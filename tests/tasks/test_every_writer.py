"""Every model that `vlmfast.tasks.table` lists for captioning and translation: training, evaluation, saving."""

import warnings

import pytest
import torch
from tasks.writer_helpers import (
    PICTURES,
    REGIONS,
    TEXTS,
    caption_batch,
    seq2seq,
    seq2seq_objective,
    translation_batch,
    uniter,
    vdbert,
)

import vlmfast
from vlmfast.tasks import Generation, table

pytest.importorskip("sacrebleu")

BUILD = {"ImageSeq2Seq": seq2seq, "VDBERT": vdbert, "UNITER": uniter}
ROWS = {(row.task, row.model): row for task in ("captioning", "translation") for row in table(task)}
# beside each row, the other ways of the encoder-decoder to take a picture
CASES = [(*key, {}) for key in ROWS] + [("translation", "ImageSeq2Seq", dict(fusion="gated")),
                                        ("translation", "ImageSeq2Seq", dict(visual="none"))]
GENERATION = Generation(beams=3, max_tokens=8)
SOURCES, GERMAN = TEXTS[:2], TEXTS[3:]


class Case:
    """A small model, what it is to learn, and what it writes."""

    def __init__(self, task: str, kind: str, fields: dict):
        torch.manual_seed(2)
        self.row, self.model = ROWS[task, kind], BUILD[kind](0.05, hidden_dropout_prob=0.0, **fields)
        self.pictures = PICTURES if self.row.reads == "pictures" else REGIONS
        if task == "captioning":
            self.references, self.asked = TEXTS[:3], (self.pictures,)
            self.batch = caption_batch(self.model, self.pictures, self.references)
        else:
            shown = None if fields.get("visual") == "none" else self.pictures[:2]
            self.references, self.asked = GERMAN, (SOURCES, shown)
            self.batch = translation_batch(self.model, SOURCES, shown, GERMAN)

    def writer(self, model):
        return getattr(vlmfast.tasks, self.row.interface)(model, GENERATION)

    def losses(self, steps: int) -> list[float]:
        objective, found = seq2seq_objective(), []
        optimizer = torch.optim.Adam(self.model.train().parameters(), lr=3e-3)
        for _ in range(steps):
            loss = objective(self.model, self.batch).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        self.model.eval()
        return found


@pytest.mark.parametrize("task, kind, fields", CASES, ids=str)
def test_trains_evaluates_saves_and_reloads_to_identical_outputs(task, kind, fields, tmp_path):
    case = Case(task, kind, fields)
    assert case.row.heads[0] in case.model.available() and case.row.loss == "seq2seq"
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    losses = case.losses(20)
    assert all(map(torch.isfinite, torch.tensor(losses))) and sum(losses[-5:]) < 0.8 * sum(losses[:5]), losses
    moved = {name for name, value in case.model.state_dict().items() if not torch.equal(value, before[name])}
    assert any("word_embeddings" in name for name in moved)
    sees = any(part in name for name in moved for part in ("visual.", "vis_embed", "img_embeddings"))
    assert sees != (fields.get("visual") == "none"), moved

    wanted = case.writer(case.model).hypotheses(*case.asked)
    texts = case.writer(case.model)(*case.asked)
    for name in case.row.metric:
        score = getattr(vlmfast.tasks, name)(texts, case.references)
        assert 0 <= score.value <= (10 if name == "cider_d" else 100)
        perfect = getattr(vlmfast.tasks, name)(case.references, case.references)
        assert perfect.value > score.value or texts == case.references
    vlmfast.save_pretrained(case.model, tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = vlmfast.load(tmp_path / "run")
    assert type(loaded) is type(case.model)
    assert case.writer(loaded).hypotheses(*case.asked) == wanted and case.writer(loaded)(*case.asked) == texts


def test_the_table_lists_what_the_interfaces_take():
    for row in ROWS.values():
        assert row.model in {kind.__name__ for kind in getattr(vlmfast.tasks, row.interface).models}
    captioners = {kind.__name__ for kind in vlmfast.tasks.Captioner.models}
    assert {row.model for row in table("captioning")} == captioners == set(BUILD)
