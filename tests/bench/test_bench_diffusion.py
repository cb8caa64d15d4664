"""The diffusion family's benchmark: every peer computes the same step, the op's tables are those of the rivals."""

import numpy as np
import pytest
import torch

from bench import diffusion, diffusion_peers, harness
from bench.harness import Row, Settings, Step, Workload
from vlmfast.diffusion import Schedule

SMALL = (2, 3, 8, 8)


def compared(op, quick=True):
    """(truth, {peer: the function it makes}, inputs)."""
    workload = Workload(op, SMALL)
    tensors = diffusion.inputs(workload)
    made = {peer.name: peer.make(workload) for peer in diffusion.peers(workload, quick) if not peer.skip}
    return diffusion.truth(workload, tensors), made, tensors


@pytest.mark.parametrize("op", diffusion.OPS)
def test_every_peer_computes_the_truth(op):
    truth, made, tensors = compared(op)
    assert {diffusion.OURS, diffusion.LEAN} <= set(made)
    for name, run in made.items():
        found = harness.errors(Step(run, tensors)(), truth)
        # diffusers multiplies its products of alphas in float32
        limit = 5e-5 if name == diffusion.DIFFUSERS else 5e-6
        assert max(found.values()) < limit, (name, found)


@pytest.mark.slow
@pytest.mark.parametrize("op", diffusion.OPS)
def test_compiled_peers_compute_the_truth(op):
    truth, made, tensors = compared(op, quick=False)
    if diffusion.COMPILED not in made:
        pytest.skip("torch.compile has no C++ compiler here")
    assert max(harness.errors(Step(made[diffusion.COMPILED], tensors)(), truth).values()) < 5e-6


@pytest.mark.parametrize("op", diffusion.OPS)
def test_only_ops_that_draw_differ_from_call_to_call(op):
    _, made, tensors = compared(op)
    for name, run in made.items():
        first, second, third = (run(*tensors) for _ in range(3))
        drawn = op in diffusion.DRAWN
        assert torch.equal(second, third) != drawn and torch.equal(first, second) != drawn, name


def test_loss_peers_agree_at_the_first_step():
    torch.manual_seed(0)
    x0 = torch.cat([torch.full((1, 3, 8, 8), -1.0), torch.ones(1, 3, 8, 8), torch.randn(2, 3, 8, 8).clamp(-1, 1)])
    noise, t = torch.randn(4, 3, 8, 8), torch.tensor([0, 0, 0, 500])
    out = torch.cat([noise + 0.3 * torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)], 1).requires_grad_()
    tensors = (out, noise, x0, diffusion_peers.noised(x0, t, noise), t)
    truth = diffusion.truth(Workload("loss", tuple(x0.shape)), tensors)
    for peer in diffusion.peers(Workload("loss", SMALL), quick=True):
        if not peer.skip:
            found = harness.errors(Step(peer.make(Workload("loss", SMALL)), tensors)(), truth)
            assert max(found.values()) < 2e-4, (peer.name, found)


@pytest.mark.parametrize("spacing", diffusion_peers.STEPS)
def test_tables_are_those_of_the_schedule(spacing):
    ours, theirs = Schedule.cosine(1000).respace(spacing), diffusion_peers.tables(spacing)
    assert np.array_equal(ours.timestep_map, theirs.kept)
    for name in ("alphas_cumprod", "posterior_mean_coef1", "posterior_mean_coef2", "posterior_log_variance_clipped"):
        assert np.allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-9), name


@pytest.mark.parametrize("op, times", [("guided_ancestral", 5), ("given_noise", 6), ("ddim", 3), ("ddpm", 4),
                                       ("q_sample", 3), ("loss", 8)])
def test_floor_copies_what_has_to_move(op, times, monkeypatch):
    copied = []
    monkeypatch.setattr(diffusion, "copy_floor", lambda size, device: lambda: copied.append(size))
    (floor,) = diffusion.floors(Workload(op, (2, 3, 5, 7)))
    floor.run()
    assert copied == [times * 2 * 3 * 5 * 7 * 4]


def test_diffusers_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(diffusion_peers, "diffusers_missing", lambda: "not installed")
    for op in ("ddim", "ddpm"):
        skips = {peer.name: peer.skip for peer in diffusion.peers(Workload(op, SMALL), quick=True)}
        assert skips[diffusion.DIFFUSERS] == "not installed"


def test_targets_come_from_the_rows():
    settings, rows = Settings(repeats=1, quick=True), []
    for op in diffusion.OPS:
        found, skips = harness.measure_group(diffusion, Workload(op, SMALL), settings)
        assert found and not any(skip.failed for skip in skips) and all(row.error for row in found)
        rows += found
    figures = {target.figure: target for target in diffusion.targets(rows)}
    assert all(target.value > 0 for target in figures.values())
    assert sum(diffusion.COPY in figure for figure in figures) == len(diffusion.OPS)


def test_targets_hold_where_they_were_set():
    def row(op, shape, rival, ratio, over):
        peer = diffusion.peers(Workload(op, shape))[0]
        return Row.of("time", "diffusion", Workload(op, shape), peer, min_s=over, floor_s=1.0, ratio_to={rival: ratio})

    rows = [row("guided_ancestral", (8, 3, 64, 64), diffusion.GLIDE, 11, 2), row("given_noise", (8, 3, 256, 256),
            diffusion.GLIDE, 11, 1.7), row("ddim", (8, 3, 256, 256), diffusion.DIFFUSERS, 2, 1.5),
            row("loss", (16, 3, 32, 32), diffusion.GUIDED, 2, 1.5)]
    met = [target.met for target in diffusion.targets(rows)]
    assert met == [True, None, None, False, False, True, None, None]
