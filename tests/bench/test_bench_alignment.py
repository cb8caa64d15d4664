"""The alignment family's benchmark: every peer computes what the float64 truth says."""

import pytest
import torch

from bench import alignment, harness
from bench.harness import Settings, Step, Workload

SHAPE = (3, 6, 9, 16)


@pytest.mark.parametrize("dtype", alignment.DTYPES)
@pytest.mark.parametrize("op", alignment.OPS)
def test_every_peer_computes_the_truth(op, dtype):
    workload = Workload(op, SHAPE, dtype)
    tensors, compared = alignment.inputs(workload), 0
    truth = alignment.truth(workload, tensors)
    for peer in alignment.peers(workload, quick=True):
        if not peer.skip:
            found = harness.errors(Step(peer.make(workload), tensors)(), truth)
            assert max(found.values()) < (2e-5 if dtype == "float32" else 1e-2), (peer.name, found)
            assert found[op] < 2e-5
            compared += 1
    assert compared == 2


def test_ragged_batches_have_an_example_of_padding_alone():
    cost, lengths_x, lengths_y = alignment.inputs(Workload("ipot_ragged", SHAPE))
    assert lengths_x[-1] == lengths_y[-1] == 0 and lengths_x[0] > 0
    assert torch.isfinite(alignment.plan_by_loop(cost, lengths_x, lengths_y)).all()


def test_targets_come_from_the_rows():
    settings = Settings(repeats=1, quick=True)
    rows = [row for op in alignment.OPS
            for row in harness.measure_group(alignment, Workload(op, SHAPE), settings)[0]]
    found = alignment.targets(rows)
    assert len(found) == 6 and {target.bound for target in found} == {">=", "<="}
    assert all(target.met for target in found if target.bound == "<=")
