"""The attention family's benchmark: every peer computes what the float64 truth says."""

import pytest
import torch

from bench import attention, harness
from bench.harness import Settings, Step, Workload

SMALL = {"co_attention": (2, 6, 9, 2, 8), "co_attention_fwd": (2, 6, 9, 2, 8),
         "co_attention_ragged_fwd": (3, 6, 9, 2, 8),
         "bi_attention_fwd": (1, 20, 6, 2, 8), "bi_attention": (1, 20, 6, 2, 8),
         "window_attention_fwd": (2, 8, 4, 2, 2, 8), "window_attention": (2, 8, 4, 2, 2, 8),
         "axial_attention_fwd": (1, 5, 4, 2, 8)}


def test_every_op_is_covered():
    assert set(SMALL) == {*attention.OPS, *attention.OTHERS} and set(attention.OTHERS) == set(attention.QUICK_OTHERS)


@pytest.mark.parametrize("dtype, bound", [("float32", 2e-6), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("op", SMALL)
def test_every_peer_computes_the_truth(op, dtype, bound):
    workload = Workload(op, SMALL[op], dtype)
    tensors, compared = attention.inputs(workload), 0
    truth = attention.truth(workload, tensors)
    for peer in attention.peers(workload, quick=True):
        if not peer.skip:
            found = harness.errors(Step(peer.make(workload), tensors)(), truth)
            assert max(found.values()) < bound, (peer.name, found)
            compared += 1
    assert compared >= 2


def test_floor_does_the_products_of_the_op(monkeypatch):
    flops = []
    monkeypatch.setattr(torch, "bmm", lambda a, b: flops.append(2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]))
    for op, times, products in (("co_attention_fwd", 1, 4), ("co_attention", 3, 4), ("bi_attention_fwd", 1, 3)):
        flops.clear()
        batch, sa, sb, heads, width = SMALL[op]
        (floor,) = attention.floors(Workload(op, SMALL[op]))
        floor.run()
        assert sum(flops) == times * products * 2 * batch * heads * sa * sb * width


def test_targets_come_from_the_rows():
    settings = Settings(repeats=1, quick=True, shapes=((2, 6, 9, 2, 8),))
    groups = [harness.measure_group(attention, Workload(op, SMALL[op]), settings)[0] for op in attention.OPS]
    rows = [row for group in groups for row in group]
    rows += attention._with_dropout(Workload("co_attention_dropout", SMALL["co_attention"]), settings)
    found = {target.figure.split(", ")[-1].split(" ")[0]: target for target in attention.targets(rows)}
    assert set(found) == {*attention.OPS, "co_attention_dropout"}
    assert all(target.value > 0 and target.bound == ">=" for target in found.values())
