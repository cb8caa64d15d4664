"""IPOT and the optimal transport distance against their formulae as loops, and the contract of every op."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from torch.autograd import gradcheck

import vlmfast
from vlmfast.ops import ipot, optimal_transport_distance
from vlmfast.ops.reference import alignment as reference

BACKENDS = ["native", "reference"]


def formula(cost, beta=0.5, iterations=50, k=1):
    """One example without padding, [N, M], as in the paper."""
    n, m = cost.shape
    kernel, plan = torch.exp(-cost / beta), torch.ones_like(cost)
    sigma = torch.full((n,), 1 / n, dtype=cost.dtype)
    for _ in range(iterations):
        q = kernel * plan
        for _ in range(k):
            delta = 1 / (m * (q.T @ sigma))
            sigma = 1 / (n * (q @ delta))
        plan = torch.diag(sigma) @ q @ torch.diag(delta)
    return plan


def eager_loop(cost, lengths_x, lengths_y, beta=0.5, iterations=50):
    """UNITER's batched loop in the dtype of the cost: transposed, and with 1e4 added to the factors of padding."""
    pad_x = torch.arange(cost.shape[1]) >= lengths_x[:, None]
    pad_y = torch.arange(cost.shape[2]) >= lengths_y[:, None]
    joint = pad_x[:, None] | pad_y[:, :, None]
    kernel = torch.exp(-cost.transpose(1, 2).masked_fill(joint, 0) / beta).masked_fill(joint, 0)
    plan = (~joint).to(cost.dtype)
    n, m = lengths_x.to(cost.dtype)[:, None], lengths_y.to(cost.dtype)[:, None]
    sigma = (~pad_x).to(cost.dtype) / n
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (m * (q @ sigma[:, :, None])[..., 0] + 1e4 * pad_y)
        sigma = 1 / (n * (delta[:, None] @ q)[:, 0] + 1e4 * pad_x)
        plan = delta[:, :, None] * q * sigma[:, None]
    return plan.masked_fill(joint, 0).transpose(1, 2)


def cosine_costs(batch, n, m, dtype=torch.float32, width=32):
    x, y = torch.randn(batch, n, width, dtype=torch.float64), torch.randn(batch, m, width, dtype=torch.float64)
    return (1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT).to(dtype)


def ragged(batch, n, m, least=1):
    return torch.randint(least, n + 1, (batch,)), torch.randint(least, m + 1, (batch,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{}, {"k": 3, "iterations": 7}, {"beta": 2.0}, {"beta": 0.1, "iterations": 20},
                                     {"iterations": 1}], ids=str)
def test_matches_the_formula_in_float64(backend, options):
    for n, m in ((1, 1), (1, 5), (6, 1), (3, 4), (17, 33), (40, 50), (9, 70), (70, 9), (5, 131)):
        cost = cosine_costs(2, n, m, torch.float64)
        with vlmfast.backend(backend):
            plan = ipot(cost, **options)
        for example, found in zip(cost, plan, strict=True):
            torch.testing.assert_close(found, formula(example, **options), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_no_worse_than_the_eager_loop(backend, dtype):
    for batch, n, m in ((64, 40, 50), (3, 7, 12)):
        cost, (lengths_x, lengths_y) = cosine_costs(batch, n, m, dtype), ragged(batch, n, m)
        with vlmfast.backend(backend):
            plan = ipot(cost, lengths_x, lengths_y)
        assert plan.dtype == torch.float32
        eager, truth = (eager_loop(cost.to(t), lengths_x, lengths_y) for t in (torch.float32, torch.float64))
        assert (plan - eager).abs().max() < 1e-5
        assert_no_worse_than_torch(plan, truth, eager, what="plan")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_get_equal_shares(backend):
    cost, (lengths_x, lengths_y) = cosine_costs(8, 11, 14, torch.float64), ragged(8, 11, 14)
    with vlmfast.backend(backend):
        plan = ipot(cost, lengths_x, lengths_y, iterations=500)
    assert (plan >= 0).all()
    for i, (n, m) in enumerate(zip(lengths_x.tolist(), lengths_y.tolist(), strict=True)):
        torch.testing.assert_close(plan[i, :n].sum(1), torch.full((n,), 1 / n, dtype=torch.float64))
        torch.testing.assert_close(plan[i, :, :m].sum(0), torch.full((m,), 1 / m, dtype=torch.float64), rtol=0.02,
                                   atol=0)


def test_finds_the_best_assignment():
    """With as many rows as columns the optimal plan is a permutation over N; enough steps come close to its cost."""
    from itertools import permutations

    cost = torch.rand(6, 5, 5, dtype=torch.float64)
    found = (ipot(cost, iterations=2000) * cost).sum((1, 2))
    best = torch.stack([min(c[range(5), list(p)].mean() for p in permutations(range(5))) for c in cost])
    torch.testing.assert_close(found, best, rtol=0, atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_never_reaches_the_plan(backend):
    cost, (lengths_x, lengths_y) = cosine_costs(6, 9, 10), ragged(6, 9, 10)
    keep = reference.keep_of(lengths_x, None, 6, 9, "cpu")[:, :, None] & \
        reference.keep_of(lengths_y, None, 6, 10, "cpu")[:, None]
    with vlmfast.backend(backend):
        plan = ipot(cost, lengths_x, lengths_y)
        for poison in (torch.nan, torch.inf, -torch.inf, 1e30):
            assert torch.equal(ipot(cost.where(keep, poison), lengths_x, lengths_y), plan)
        for i in range(6):
            n, m = int(lengths_x[i]), int(lengths_y[i])
            torch.testing.assert_close(plan[i, :n, :m], ipot(cost[i : i + 1, :n, :m])[0])
    assert plan[~keep].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_may_have_holes(backend):
    cost = cosine_costs(5, 8, 20)
    mask_x, mask_y = torch.rand(5, 8) < 0.6, torch.rand(5, 20) < 0.6
    with vlmfast.backend(backend):
        plan = ipot(cost, mask_x=mask_x, mask_y=mask_y)
        for i in range(5):
            inner = ipot(cost[i][mask_x[i]][:, mask_y[i]][None])[0]
            torch.testing.assert_close(plan[i][mask_x[i]][:, mask_y[i]], inner)
        lengths = torch.tensor([3, 8, 1, 0, 5])
        prefix = torch.arange(8) < lengths[:, None]
        assert torch.equal(ipot(cost, lengths, mask_y=mask_y), ipot(cost, mask_x=prefix, mask_y=mask_y))
    assert plan[~(mask_x[:, :, None] & mask_y[:, None])].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_fully_padded_examples_are_zero(backend):
    x, y = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 5, 6, requires_grad=True)
    lengths_x, lengths_y = torch.tensor([0, 4, 0]), torch.tensor([5, 0, 0])
    poisoned = x + torch.tensor([torch.nan, 0, torch.inf])[:, None, None]
    with vlmfast.backend(backend):
        distance, plan = optimal_transport_distance(poisoned, y, lengths_x, lengths_y, return_plan=True)
        assert torch.equal(distance, torch.zeros(3)) and torch.equal(plan, torch.zeros(3, 4, 5))
        for gradient in torch.autograd.grad(distance.sum(), (x, y)):
            assert torch.equal(gradient, torch.zeros_like(gradient))
        for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
            assert ipot(torch.zeros(shape)).shape == shape
        assert torch.equal(optimal_transport_distance(torch.zeros(2, 0, 3), torch.ones(2, 4, 3)), torch.zeros(2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_costs_give_finite_plans(backend):
    with vlmfast.backend(backend):
        for cost in (torch.rand(2, 5, 6) * 1e6, torch.full((2, 5, 6), 1e30), torch.full((2, 5, 6), torch.inf),
                     torch.eye(5)[None] * 5000):
            assert torch.isfinite(ipot(cost)).all()


def test_constant_added_to_the_cost_cancels():
    cost = cosine_costs(2, 5, 6, torch.float64)
    torch.testing.assert_close(ipot(cost + 4096), ipot(cost), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_distance_and_gradients(dtype):
    x, y = torch.randn(6, 12, 24).to(dtype), torch.randn(6, 15, 24).to(dtype)
    lengths_x, lengths_y = ragged(6, 12, 15)

    def literal(x, y):
        total = []
        for i in range(6):
            n, m = int(lengths_x[i]), int(lengths_y[i])
            cost = 1 - F.normalize(x[i, :n], dim=-1) @ F.normalize(y[i, :m], dim=-1).T
            total.append((formula(cost.detach()) * cost).sum())
        return torch.stack(total)

    def run(function, x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        distance = function(x, y)
        return distance.detach(), *torch.autograd.grad((distance * torch.arange(1, 7)).sum(), (x, y))

    ours = run(lambda x, y: optimal_transport_distance(x, y, lengths_x, lengths_y), x, y)
    truth = run(literal, x.double(), y.double())
    eager = run(lambda x, y: literal(x.float(), y.float()), x, y)
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    for name, mine, true, same in zip(("distance", "d_x", "d_y"), ours, truth, eager, strict=True):
        assert_no_worse_than_torch(mine, true, same, factor=2.0 if name == "distance" else 3.0, what=name)
    assert_grad_not_dropped(ours[1].flatten(0, 1), truth[1].flatten(0, 1), what="d_x")


def test_plan_is_a_constant_of_the_gradient():
    x, y = (torch.randn(2, n, 5, dtype=torch.float64, requires_grad=True) for n in (3, 4))
    _, plan = optimal_transport_distance(x, y, return_plan=True)
    assert not plan.requires_grad and not ipot(torch.rand(1, 2, 3, requires_grad=True)).requires_grad

    def with_fixed_plan(x, y):
        cost = 1 - F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).mT
        return (plan * cost).sum((1, 2))

    truth = torch.autograd.grad(with_fixed_plan(x, y).sum(), (x, y))
    for mine, true in zip(torch.autograd.grad(optimal_transport_distance(x, y).sum(), (x, y)), truth, strict=True):
        torch.testing.assert_close(mine, true)
    assert gradcheck(with_fixed_plan, (x, y))


def test_any_strides_and_threads_give_the_same_bits():
    cost, (lengths_x, lengths_y) = cosine_costs(9, 12, 15), ragged(9, 12, 15, least=0)
    plan = ipot(cost, lengths_x, lengths_y)
    wide = torch.randn(9, 12, 40)
    wide[..., 3:18] = cost
    for view in (cost.mT.contiguous().mT, wide[..., 3:18], cost.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(ipot(view, lengths_x.int(), lengths_y), plan)
    mask_x, mask_y = torch.rand(12, 9).T < 0.5, (torch.rand(9, 30) < 0.5)[:, ::2]
    masked = ipot(cost, mask_x=mask_x.contiguous(), mask_y=mask_y.contiguous())
    assert torch.equal(ipot(cost, mask_x=mask_x, mask_y=mask_y), masked)
    assert torch.equal(ipot(cost[:1].expand(4, -1, -1)), ipot(cost[:1]).expand(4, -1, -1))
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(ipot(cost, lengths_x, lengths_y), plan)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    cost = cosine_costs(3, 4, 5, dtype)
    lengths, mask = torch.tensor([0, 2, 4]), torch.rand(3, 5) < 0.5
    for arguments in ((cost, None, None, None, None), (cost, lengths, None, None, mask), (cost.mT, None, lengths, mask,
                                                                                         None)):
        torch.library.opcheck(torch.ops.vlmfast.ipot.default, (*arguments, 0.5, 5, 1))


def test_compiles_to_one_graph():
    x, y = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 5, 6)
    lengths = torch.tensor([2, 4])
    compiled = torch.compile(optimal_transport_distance, fullgraph=True, backend="aot_eager")
    found, truth = compiled(x, y, lengths), optimal_transport_distance(x, y, lengths)
    torch.testing.assert_close(found, truth)
    torch.testing.assert_close(*(torch.autograd.grad(d.sum(), x)[0] for d in (found, truth)))


def test_autocast_keeps_the_distance_in_float32():
    x, y = torch.randn(2, 4, 64), torch.randn(2, 5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        found = optimal_transport_distance(x, y)
    assert torch.equal(found, optimal_transport_distance(x, y))


SCRIPT = """
import torch, vlmfast
from vlmfast.ops import ipot
cost = torch.rand(7, 13, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
plan = ipot(cost, torch.tensor([13, 0, 1, 5, 12, 7, 9]), torch.tensor([21, 3, 9, 17, 1, 20, 8]))
print(vlmfast._native.build_info()["isa"], *plan.flatten().tolist())
"""


def test_every_instruction_set_agrees():
    results = {}
    for isa in ("scalar", "avx2", "avx512", "avx512bf16"):
        done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True,
                              env={**os.environ, "VLMFAST_ISA": isa}, check=False)
        if done.returncode:
            assert f"VLMFAST_ISA is {isa}, the widest available here" in done.stderr
            continue
        name, *numbers = done.stdout.split()
        assert name == isa
        results[isa] = torch.tensor([float(x) for x in numbers], dtype=torch.float64)
    assert "scalar" in results
    for found in results.values():
        torch.testing.assert_close(found, results["scalar"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("change, error, message", [
    (dict(cost=[[1.0]]), TypeError, "cost is a list, it must be a tensor"),
    (dict(cost=torch.ones(2, 3, 4, dtype=torch.long)), TypeError, "cost is torch.int64"),
    (dict(cost=torch.ones(3, 4)), ValueError, r"cost has shape \(3, 4\), it must be \[B, N, M\]"),
    (dict(lengths_x=torch.tensor([1.0, 2.0])), TypeError, "lengths_x is torch.float32"),
    (dict(lengths_x=torch.tensor([1])), ValueError, r"lengths_x has shape \(1,\), it must be \[2\]"),
    (dict(lengths_x=torch.tensor([1, 4])), ValueError, r"lengths_x runs from 1 to 4, it must lie in 0\.\.3"),
    (dict(lengths_y=torch.tensor([-1, 4])), ValueError, r"lengths_y runs from -1 to 4, it must lie in 0\.\.4"),
    (dict(mask_y=torch.ones(2, 4)), TypeError, "mask_y is torch.float32, it must be a bool tensor"),
    (dict(mask_y=torch.ones(2, 3, dtype=torch.bool)), ValueError, r"mask_y has shape \(2, 3\), it must be \[2, 4\]"),
    (dict(mask_x=torch.ones(2, 3, dtype=torch.bool), lengths_x=torch.tensor([1, 2])), ValueError,
     "mask_x is given with lengths_x"),
    (dict(beta=0.0), ValueError, "beta is 0.0, it must be a positive number"),
    (dict(beta=float("nan")), ValueError, "beta is nan"),
    (dict(iterations=0), ValueError, "iterations is 0, it must be an integer of at least 1"),
    (dict(k=1.5), ValueError, "k is 1.5"),
])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend, change, error, message):
    with vlmfast.backend(backend), pytest.raises(error, match=f"ipot: {message}"):
        ipot(**{"cost": torch.ones(2, 3, 4), **change})


@pytest.mark.parametrize("x, y, error, message", [
    (torch.ones(2, 3), torch.ones(2, 3, 4), ValueError, r"x has shape \(2, 3\), it must be \[B, rows, D\]"),
    (torch.ones(2, 3, 4), torch.ones(2, 3, 5), ValueError, r"y has shape \(2, 3, 5\), x has \(2, 3, 4\)"),
    (torch.ones(2, 3, 4), torch.ones(1, 3, 4), ValueError, r"y has shape \(1, 3, 4\)"),
    (torch.ones(2, 3, 4), torch.ones(2, 3, 4).double(), ValueError, "y is torch.float64, x is torch.float32"),
    (torch.ones(2, 3, 4), None, TypeError, "y is a NoneType"),
])
def test_distance_names_bad_input(x, y, error, message):
    with pytest.raises(error, match=f"optimal_transport_distance: {message}"):
        optimal_transport_distance(x, y)
