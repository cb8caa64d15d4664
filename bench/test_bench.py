"""The peers under pytest-benchmark: `pytest bench --benchmark-only`, with all of its options for saving and comparing.

One small size per op, float32, one thread, wall time; `python -m bench` is the place for figures to quote.
"""

import importlib

import pytest
import torch

from bench import FAMILIES
from bench.harness import Step, Workload, errors

pytest.importorskip("pytest_benchmark")


def _cases():
    for name in FAMILIES:
        family = importlib.import_module(f"bench.{name}")
        for op in family.OPS:
            workload = Workload(op, family.QUICK_SHAPES[0])
            for peer in family.peers(workload):
                yield pytest.param(family, workload, peer, id=f"{op}-{peer.name.replace(' ', '-')}")


@pytest.mark.parametrize("family, workload, peer", _cases())
def test_forward_backward(benchmark, family, workload, peer):
    if peer.skip:
        pytest.skip(peer.skip)
    threads = torch.get_num_threads()
    torch.set_num_threads(workload.threads)
    try:
        inputs = family.inputs(workload)
        step = Step(peer.make(workload), inputs)
        found = errors(step(), family.truth(workload, inputs))
        assert max(found.values()) < 1e-4, found
        benchmark.group = str(workload)
        benchmark.extra_info.update(ours=peer.ours, error=found)
        benchmark(step)
    finally:
        torch.set_num_threads(threads)
