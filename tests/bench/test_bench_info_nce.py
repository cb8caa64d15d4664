"""The family: peers compute one loss, the truth is its definition, floors and targets are what they say."""

import dataclasses
import types

import pytest
import torch

from bench import harness, info_nce
from bench.harness import Peer, Row, Settings, Skip, Step, Workload

SMALL = {op: Workload(op, (24, 12)) for op in info_nce.OPS}


@pytest.fixture
def stand_in(monkeypatch):
    """`vlmfast.ops` with the eager formulas in place of the kernels."""
    asked = []

    def loss(image, text, logit_scale, *, memory="auto"):
        asked.append(memory)
        return info_nce.log_sum_exp(image.float(), text.float(), logit_scale)

    def sigmoid(image, text, logit_scale, logit_bias):
        return info_nce.log_sigmoid(image.float(), text.float(), logit_scale, logit_bias)

    monkeypatch.setattr(info_nce, "load_ops", lambda: types.SimpleNamespace(info_nce=loss, siglip_loss=sigmoid))
    return asked


def test_inputs_are_unit_rows_and_repeatable():
    image, text, scale = info_nce.inputs(SMALL["info_nce"])
    assert torch.allclose(image.norm(dim=1), torch.ones(24)) and not torch.equal(image, text)
    assert isinstance(scale, torch.nn.Parameter) and scale.item() == pytest.approx(1 / 0.07)
    assert torch.equal(image, info_nce.inputs(SMALL["info_nce"])[0])
    assert len(info_nce.inputs(SMALL["siglip_loss"])) == 4


@pytest.mark.parametrize("chunk", [5, 24, 100])
@pytest.mark.parametrize("op", info_nce.OPS)
def test_truth_is_the_definition_in_float64(op, chunk):
    tensors = [x.detach().double().requires_grad_() for x in info_nce.inputs(SMALL[op])]
    formula, compute = {
        "info_nce": (info_nce.two_cross_entropies, info_nce._info_nce_truth),
        "siglip_loss": (info_nce.log_sigmoid, info_nce._siglip_truth),
    }[op]
    truth = compute(*(x.detach() for x in tensors), chunk=chunk)
    assert max(harness.errors(Step(formula, tensors)(), truth).values()) < 1e-13


@pytest.mark.parametrize("dtype, bound", [("float32", 2e-6), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("op", info_nce.OPS)
def test_every_peer_computes_the_loss(op, dtype, bound, stand_in):
    workload = dataclasses.replace(SMALL[op], dtype=dtype)
    tensors, compared = info_nce.inputs(workload), 0
    truth = info_nce.truth(workload, tensors)
    for peer in info_nce.peers(workload, quick=True):
        if not peer.skip:
            found = harness.errors(Step(peer.make(workload), tensors)(), truth)
            assert max(found.values()) < bound, (peer.name, found)
            compared += 1
    assert compared >= 2


def test_our_modes_are_asked_for_by_name(stand_in):
    for peer in info_nce.peers(SMALL["info_nce"], quick=True)[:2]:
        peer.make(SMALL["info_nce"])(*info_nce.inputs(SMALL["info_nce"]))
    assert stand_in == ["cache", "recompute"]


def test_missing_package_is_a_reason_not_a_crash(monkeypatch):
    def absent():
        raise ImportError("no module named vlmfast")

    monkeypatch.setattr(info_nce, "load_ops", absent)
    ours = [peer for peer in info_nce.peers(SMALL["info_nce"]) if peer.ours]
    assert len(ours) == 2 and all("no module named vlmfast" in peer.skip for peer in ours)


def test_compile_is_left_out_without_a_compiler_and_in_quick_mode(monkeypatch):
    def reason(quick):
        named = {peer.name: peer for peer in info_nce.peers(SMALL["info_nce"], quick)}
        return named[info_nce.COMPILED].skip

    assert "quick" in reason(True)
    monkeypatch.setattr(harness.shutil, "which", lambda name: None)
    assert "compiler" in reason(False)


def test_formulas_that_do_not_fit_are_left_out_and_ours_is_not(monkeypatch, stand_in):
    monkeypatch.setattr(info_nce.memory, "available_bytes", lambda device: 1000)
    peers = {peer.name: peer.skip for peer in info_nce.peers(SMALL["info_nce"], quick=True)}
    assert "GiB" in peers["naive log-sum-exp"] and peers[info_nce.RECOMPUTE] is None


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("op", info_nce.OPS)
def test_floor_does_the_flops_in_its_name(op, in_blocks, monkeypatch):
    """With one block of rows and with several, by every library."""
    flops, (n, d) = [], SMALL[op].shape

    def counting(a, b):
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])

    monkeypatch.setattr(torch, "mm", counting)
    monkeypatch.setattr(info_nce, "_onednn_works", lambda: True)
    monkeypatch.setattr(info_nce, "_onednn_mm", counting)
    if in_blocks:
        monkeypatch.setattr(info_nce, "LOGITS_AT_ONCE", 5 * n)
    floors = info_nce.floors(SMALL[op])
    assert {floor.by for floor in floors} == {"torch.mm", "oneDNN"}
    products = {"gemm 6N^2D": 3, "gemm 8N^2D": 4} if op == "info_nce" else {"gemm 6N^2D": 3}
    assert {floor.name for floor in floors} == set(products)
    for floor in floors:
        flops.clear()
        floor.run()
        assert sum(flops) == 2 * products[floor.name] * n * n * d


def test_onednn_product_is_the_product():
    if not info_nce._onednn_works():
        pytest.skip("this PyTorch has no oneDNN linear")
    a, b = torch.randn(7, 5), torch.randn(5, 9)
    for x, y in ((a, b), (a.T.contiguous().T, b), (a, b.T.contiguous().T)):
        torch.testing.assert_close(info_nce._onednn_mm(x, y), a @ b)


def test_group_of_the_family_runs_end_to_end(stand_in):
    rows, skips = harness.measure_group(info_nce, SMALL["info_nce"], Settings(repeats=2, quick=True))
    ours = {row.peer: row for row in rows if row.ours}
    assert set(ours) == {info_nce.CACHE, info_nce.RECOMPUTE} and not any(skip.failed for skip in skips)
    assert ours[info_nce.RECOMPUTE].floor == info_nce.RECOMPUTE_FLOOR and ours[info_nce.CACHE].percent_of_floor > 0


def test_overhead_is_measured_over_thousands_of_calls_without_grad(stand_in, monkeypatch):
    monkeypatch.setattr(info_nce, "_memory", lambda settings, device: Skip("", "", ""))
    rows = [item for item in info_nce.extras(Settings(quick=True), "cpu") if isinstance(item, Row)]
    assert {row.kind for row in rows} == {"overhead"} and info_nce.CACHE in {row.peer for row in rows}
    assert all(row.repeats == 1000 and 0 < row.min_s <= row.median_s < 1 for row in rows)


def _timed(peer, dtype, seconds, ours=False, **values):
    workload = Workload("info_nce", (2048, 512), dtype)
    return Row.of("time", "info_nce", workload, Peer(peer, lambda w: None, ours), min_s=seconds, **values)


def test_targets_come_from_the_rows_they_name():
    rows = [
        _timed(
            info_nce.CACHE,
            "float32",
            1.1,
            True,
            floor_s=1.0,
            floor_by={"slow": 2.0, "fast": 1.0},
            error={"loss": 1e-7, "d_image": 9e-6},
        ),
        _timed(info_nce.RECOMPUTE, "float32", 1.5, True, floor_s=1.25),
        _timed(info_nce.OPEN_CLIP, "float32", 2.2),
        _timed(info_nce.COMPILED, "float32", 1.2),
        _timed(info_nce.CACHE, "bfloat16", 2.0, True, floor_s=1.0),
        _timed("naive log-sum-exp", "bfloat16", 6.0),
        _timed("naive log-sum-exp, upcast", "bfloat16", 3.0),
    ]
    rows.append(dataclasses.replace(rows[0], kind="memory", peer=info_nce.RECOMPUTE, shape=[20000, 512]))
    rows[-1].peak_extra_bytes = 5 * 20000 * 512 * 4
    rows.append(dataclasses.replace(rows[0], kind="overhead", shape=[8, 16], min_s=9e-6, median_s=16e-6))
    rows.append(dataclasses.replace(rows[0], threads=2, min_s=1e-9))
    found = {t.figure: t for t in info_nce.targets(rows)}

    def check(figure, value, met):
        target = found[figure]
        assert (target.value, target.met) == (pytest.approx(value), met)

    at = "float32 N=2048 D=512"
    check(f"vlmfast cache over gemm 6N^2D, {at}", 1.1, True)
    assert found[f"vlmfast cache over gemm 6N^2D, {at}"].note == "0.55 over slow; 1.10 over fast"
    check(f"vlmfast recompute over gemm 8N^2D, {at}", 1.2, False)
    check(f"against open_clip ClipLoss, {at}", 2.0, True)
    check(f"against compiled log-sum-exp, {at}", 1.2 / 1.1, False)
    check("against the fastest peer, bfloat16 N=2048 D=512", 1.5, False)
    check("against the fastest peer that works in bfloat16, bfloat16 N=2048 D=512", 3.0, True)
    check("peak extra memory, recompute float32 N=20000 D=512", 5.0, True)
    check("call overhead, no_grad, N=8 D=16", 16.0, False)
    check("error of gradients, info_nce float32", 9e-6, False)
    assert found["vlmfast cache over gemm 6N^2D, float32 N=8192 D=512"].verdict == "not measured"
    assert info_nce.targets([dataclasses.replace(row, device="cuda") for row in rows]) == []
