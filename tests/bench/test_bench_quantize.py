"""The quantize family's benchmark: every peer computes the same formula, given the noise."""

import pytest
import torch

from bench import harness, quantize, quantize_step
from bench.harness import Row, Settings, Step, Workload
from vlmfast.ops import gumbel_noise, gumbel_quantize

SMALL = (2, 24, 3, 8)


def same_noise(logits):
    return gumbel_noise(logits.shape, 3, layout="nchw").to(logits)


@pytest.mark.parametrize("op", quantize.OPS)
def test_every_formula_equals_the_op_with_the_noise_given(op, monkeypatch):
    monkeypatch.setattr(quantize, "exponential_noise", same_noise)
    monkeypatch.setattr(quantize, "uniform_noise", same_noise)

    class Ops:
        @staticmethod
        def gumbel_quantize(logits, codebook, **options):
            return gumbel_quantize(logits, codebook, seed=3, **options)

    monkeypatch.setattr(quantize, "load_ops", lambda: Ops)
    workload = Workload(op, SMALL)
    tensors = quantize.inputs(workload)
    results = {peer.name: Step(peer.make(workload), tensors)() for peer in quantize.peers(workload, quick=True)
               if not peer.skip}
    assert len(results) >= 3
    ours = results.pop(quantize.OURS)
    for name, other in results.items():
        for part, same in zip(ours, other, strict=True):
            for a, b in zip(part, same, strict=True):
                assert harness.relative_error(a, b) < 1e-5, name


@pytest.mark.parametrize("draw", [quantize.exponential_noise, quantize.uniform_noise])
def test_the_peers_noise_is_gumbel(draw):
    noise = draw(torch.empty(400, 500))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - 1.6449) < 0.04


@pytest.mark.parametrize("op", quantize.OTHERS)
def test_other_peers_compute_the_truth(op):
    workload, compared = Workload(op, (2, 40, 5, 8)), 0
    tensors = quantize.inputs(workload)
    truth = quantize.truth(workload, tensors)
    for peer in quantize.peers(workload, quick=True):
        found = harness.errors(Step(peer.make(workload), tensors)(), truth)
        assert max(found.values()) < 2e-6, (peer.name, found)
        compared += 1
    assert compared == 3


@pytest.mark.parametrize("op, products, moved", [("soft_fwd", 1, 1), ("hard_fwd", 0, 1), ("soft_kl", 3, 3)])
def test_floor_does_the_least_work(op, products, moved, monkeypatch):
    flops, copied = [], []
    monkeypatch.setattr(torch, "mm", lambda a, b: flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1]))
    monkeypatch.setattr(quantize, "copy_floor", lambda size, device: lambda: copied.append(size))
    workload = Workload(op, (2, 24, 33, 8))
    (floor,) = quantize.floors(workload)
    floor.run()
    assert sum(flops) == products * 2 * 2 * 33 * 33 * 24 * 8
    assert copied == [moved * 2 * 24 * 33 * 33 * 4]


def test_targets_come_from_the_rows():
    settings, rows = Settings(repeats=1, quick=True), []
    for op in quantize.OPS:
        found, skips = harness.measure_group(quantize, Workload(op, SMALL), settings)
        assert found and not any(skip.failed for skip in skips) and not any(row.error for row in found)
        rows += found
    peer = quantize.peers(Workload("soft_kl", SMALL))[0]
    rows.append(Row.of("memory", "quantize", Workload("soft_kl", SMALL), peer, peak_extra_bytes=2 * 24 * 9 * 4 * 3))
    found = {(target.figure.split(", ")[-2].split(" ")[0], target.bound): target for target in quantize.targets(rows)}
    assert {op for op, _ in found} == {"soft_fwd", "hard_fwd", "soft", "soft_kl"}
    assert found["soft_kl", "<="].value == 3 and found["soft_kl", "<="].met is False
    assert all(target.value > 0 for target in found.values())


def test_share_of_a_training_step():
    shape, settings, rows = (1, 64, 4, 16), Settings(repeats=1, quick=True), []
    for family, op in ((quantize, "soft_kl"), (quantize_step, quantize_step.OP)):
        found, skips = harness.measure_group(family, Workload(op, shape), settings)
        assert not any(skip.failed for skip in skips)
        rows += found
    shares = {target.figure: target.value for target in quantize.targets(rows) if "share" in target.figure}
    assert len(shares) == 2 and all(0 < share < 1.5 for share in shares.values())
    assert any(quantize.OURS in figure for figure in shares) and any(quantize.DALLE_KL in figure for figure in shares)


def test_both_steps_have_the_gradient_of_every_weight(monkeypatch):
    monkeypatch.setattr(quantize, "exponential_noise", same_noise)
    monkeypatch.setattr("vlmfast.models.dvae.gumbel_quantize",
                        lambda *given, seed=None, **options: gumbel_quantize(*given, seed=3, **options))
    workload = Workload(quantize_step.OP, (1, 64, 4, 16))
    tensors = quantize_step.inputs(workload)
    ours, eager = (Step(peer.make(workload), tensors)() for peer in quantize_step.peers(workload))
    assert len(ours[1]) == len(tensors) - 1 == len(eager[1])
    for a, b in zip([*ours[0], *ours[1]], [*eager[0], *eager[1]], strict=True):
        assert harness.relative_error(a, b) < 2e-5
