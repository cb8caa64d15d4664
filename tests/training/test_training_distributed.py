"""Two processes under torchrun take the steps of one process on the joined batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_helpers import tiny_batch, tiny_model
from training_worker import CONFIG, loaders

from vlmfast.training import learning_rate
from vlmfast.training.contrastive import Objective, accumulate_gradient
from vlmfast.training.schedule import make_optimizer

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(script: str, *arguments: str, processes: int = 2) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr",
               "127.0.0.1", "--master_port", str(free_port()), str(HERE / script), *arguments]
    path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(command, capture_output=True, text=True, timeout=180,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout + run.stderr


@pytest.mark.parametrize("chunks", [1, 2])
def test_two_processes_equal_one(tmp_path, chunks):
    torchrun("training_worker.py", str(tmp_path), str(chunks))
    states = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name

    # the same batches, both shares at once
    model = tiny_model().double()
    optimizer = make_optimizer(model, CONFIG)
    shares = loaders(2)
    losses = []
    for step in range(CONFIG.steps):
        epoch, first = divmod(step, len(shares[0]))
        batches = []
        for loader in shares:
            loader.set_epoch(epoch, first)
            batches.append(next(iter(loader)))
        images, tokens = (torch.cat(part) for part in zip(*batches, strict=True))
        optimizer.zero_grad()
        loss, _ = accumulate_gradient(model, images.double(), tokens, Objective())
        torch.nn.utils.clip_grad_norm_(model.parameters(), CONFIG.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, CONFIG.steps, CONFIG)
        optimizer.step()
        losses.append(loss.item())
    assert states[0]["losses"] == pytest.approx(losses, rel=1e-9)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(states[0]["model"][name], value, rtol=1e-6, atol=1e-9)


def test_shares_of_a_loader_are_disjoint():
    seen = [torch.cat([tokens for _, tokens in loader]) for loader in loaders(2)]
    assert len(torch.cat(seen).unique(dim=0)) == len(tiny_batch()[1])
