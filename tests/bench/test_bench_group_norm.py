"""The group_norm family's benchmark: every peer computes what the float64 truth says."""

import pytest

from bench import group_norm, harness
from bench.harness import Settings, Step, Workload

SHAPE = (2, 64, 5)


@pytest.mark.parametrize("op", group_norm.OPS)
def test_every_peer_computes_the_truth(op):
    workload, compared = Workload(op, SHAPE), 0
    tensors = group_norm.inputs(workload)
    truth = group_norm.truth(workload, tensors)
    assert len(truth) == 1 + (0 if op.endswith("_fwd") else len(tensors))
    for peer in group_norm.peers(workload, quick=True):
        if not peer.skip:
            found = harness.errors(Step(peer.make(workload), tensors)(), truth)
            assert max(found.values()) < 2e-6, (peer.name, found)
            compared += 1
    assert compared == 2


def test_targets_hold_for_the_backward_alone():
    rows = [row for op in group_norm.OPS
            for row in harness.measure_group(group_norm, Workload(op, SHAPE), Settings(repeats=1, quick=True))[0]]
    assert [target.target for target in group_norm.targets(rows)] == [None, None, group_norm.LEAST, group_norm.LEAST]
