"""The two-stream models' benchmark: all peers compute the truth on small models, and a wrong one is not timed."""

import pytest
import torch
from torch import nn

from bench import harness, two_stream
from bench.harness import Settings, Workload

TINY = {
    "vilbert_fwd": two_stream.Case("vilbert-base", 12, 15, 3, dict(
        vocab_size=97, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
        v_feature_size=20, v_hidden_size=24, v_num_hidden_layers=2, v_num_attention_heads=3, v_intermediate_size=24,
        bi_hidden_size=24, bi_num_attention_heads=2, t_biattention_id=(1, 2), v_biattention_id=(0, 1),
        heads=("vqa",), vqa_labels=7)),
    **{name: two_stream.Case("lxmert-base", 12, 9, least, dict(
        vocab_size=97, hidden_size=32, num_attention_heads=4, intermediate_size=40, l_layers=2, r_layers=1, x_layers=1,
        visual_feat_dim=20, heads="none")) for name, least in (("lxmert_ragged_fwd", 3), ("lxmert_fwd", 9))},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(two_stream, "CASES", TINY)
    yield
    torch.set_num_threads(threads)


def test_cases_are_those_of_the_benchmark(monkeypatch):
    assert set(TINY) == set(two_stream.OPS)
    monkeypatch.undo()
    assert set(two_stream.CASES) == set(two_stream.OPS)


def test_questions_and_images_are_ragged_as_in_vqa(monkeypatch):
    monkeypatch.setitem(TINY, "vilbert_fwd", two_stream.Case("vilbert-base", 23, 101, 10, TINY["vilbert_fwd"].config))
    *_, text_mask, image_mask, words, regions = two_stream.inputs(Workload("vilbert_fwd", (256,)))
    assert 8.5 < words.float().mean() < 9.5 and words.min() >= 4 and words.max() <= 23
    assert 10 <= regions.min() < 20 and 90 < regions.max() <= 101
    assert torch.equal(text_mask.sum(1), words) and torch.equal(image_mask.sum(1), regions)
    assert two_stream.inputs(Workload("lxmert_fwd", (8,)))[-1].tolist() == [9] * 8


@pytest.mark.parametrize("op", two_stream.OPS)
def test_every_peer_computes_the_truth_on_rows_that_exist(op):
    workload = Workload(op, (5,))
    tensors, compared = two_stream.inputs(workload), 0
    truth = two_stream.truth(workload, tensors)
    assert truth["text"].dtype == torch.float64 and len(truth["text"]) == tensors[5].sum()
    assert len(truth["image"]) == tensors[6].sum()
    for peer in two_stream.peers(workload):
        if not peer.skip:
            found = harness.errors(harness.Step(peer.make(workload), tensors)(), truth)
            assert max(found.values()) < 2e-6, (peer.name, found)
            compared += 1
    assert compared >= 3


def test_a_peer_that_is_wrong_is_not_timed(monkeypatch):
    eager = two_stream._eager
    monkeypatch.setattr(two_stream, "_eager", lambda q, k, v, bias: eager(q, k, v, None if q.dtype == torch.float32
                                                                         else bias))
    two_stream._truth.cache_clear()
    rows, skips = harness.measure_group(two_stream, Workload("vilbert_fwd", (5,)), Settings(repeats=1))
    assert {row.peer for row in rows} == {two_stream.PACKED, two_stream.MASKED}
    assert [skip.peer for skip in skips if skip.failed] == [two_stream.FORMULA]
    assert "differs from float64" in skips[0].reason


def test_peers_share_their_weights():
    workload = Workload("lxmert_fwd", (2,))
    weights = two_stream.model(TINY["lxmert_fwd"]).state_dict().values()
    pytest.importorskip("transformers")
    run = two_stream._transformers(workload)
    (net,) = [cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, nn.Module)]
    assert {x.data_ptr() for x in net.parameters()} == {x.data_ptr() for x in weights}


def test_floor_multiplies_the_rows_that_exist(monkeypatch):
    workload = Workload("lxmert_ragged_fwd", (4,))
    words, regions = (int(x.sum()) for x in two_stream.inputs(workload)[-2:])
    (floor,) = two_stream.floors(workload)
    found = []
    monkeypatch.setattr(two_stream.F, "linear", lambda x, weight: found.append(len(x) * weight.numel()))
    floor.run()
    text, image = 2 * (4 * 32 * 32 + 2 * 32 * 40) * words, (4 * 32 * 32 + 2 * 32 * 40) * regions
    cross = (8 * 32 * 32 + 2 * 32 * 40) * (words + regions)
    ends = (20 + 4) * 32 * regions + 32 * 32 * 4  # region embeddings and pooler
    assert sum(found) == text + image + cross + ends


def test_targets_are_against_the_padded_eager_model():
    rows = []
    for op in two_stream.OPS:
        rows += harness.measure_group(two_stream, Workload(op, (3,)), Settings(repeats=1))[0]
    found = {target.figure.split(", ")[1].split()[0]: target for target in two_stream.targets(rows)}
    assert found["vilbert_fwd"].target == 1.6 and found["vilbert_fwd"].value > 0
    if len(found) > 1:
        assert found["lxmert_ragged_fwd"].target == 1.6 and found["lxmert_fwd"].met is None
        assert "transformers" in found["lxmert_ragged_fwd"].figure
