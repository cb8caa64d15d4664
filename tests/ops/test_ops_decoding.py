"""`few_row_linear`: every backend against float64, and what goes to PyTorch instead."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse_than_torch

import vlmfast
from vlmfast.ops import decoding
from vlmfast.ops.decoding import MAX_ROWS, few_row_linear


def case(rows, outputs, inputs, dtype=torch.float32, bias=True):
    x, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs).to(dtype) if bias else None


@pytest.fixture
def counted(monkeypatch):
    """How often the kernel ran."""
    calls, kernel = [], decoding._native.few_row_linear

    class Counting:
        def __getattr__(self, name):
            return getattr(native, name)

        def few_row_linear(self, *arguments):
            calls.append(arguments)
            kernel(*arguments)

    native = decoding._native
    monkeypatch.setattr(decoding, "_native", Counting())
    return calls


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 23, MAX_ROWS])
@pytest.mark.parametrize("outputs, inputs", [(1, 1), (5, 7), (67, 33), (130, 512), (3, 16)])
def test_matches_the_formula(counted, rows, outputs, inputs):
    x, weight, bias = case(rows, outputs, inputs)
    truth = F.linear(x.double(), weight.double(), bias.double())
    assert_no_worse_than_torch(few_row_linear(x, weight, bias), truth, F.linear(x, weight, bias), factor=2.0,
                               size=(x.abs().double() @ weight.abs().double().T).norm().item())
    torch.testing.assert_close(few_row_linear(x.double(), weight.double(), bias.double()), truth)
    assert len(counted) == 2


@pytest.mark.parametrize("isa", ["scalar", "avx2"])
def test_narrower_instruction_sets(isa, tmp_path):
    """The set is chosen at import, so each runs in a process of its own."""
    import os
    import subprocess
    import sys

    script = ("import torch; from vlmfast.ops.decoding import few_row_linear as f\n"
              "for rows in (1, 3, 4, 5, 8, 11):\n"
              "    x, w, b = torch.randn(rows, 37), torch.randn(71, 37), torch.randn(71)\n"
              "    assert torch.allclose(f(x, w, b), x @ w.T + b, atol=1e-5), rows\n")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                         env={**os.environ, "VLMFAST_ISA": isa})
    if "the widest available" in run.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert run.returncode == 0, run.stderr


def test_more_threads_give_the_same_bits():
    x, weight, bias = case(4, 1000, 700)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(few_row_linear(x, weight, bias))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_shapes_strides_and_no_bias(counted):
    x, weight, _ = case(6, 40, 24, bias=False)
    weight = torch.randn(50, 60)[5:45, 10:34]
    for shaped in (x.view(2, 3, 24), x.T.contiguous().T, x[::2], x[0]):
        torch.testing.assert_close(few_row_linear(shaped, weight), F.linear(shaped, weight))
    assert len(counted) == 4


def test_what_the_kernel_does_not_take_goes_to_pytorch(counted):
    x, weight, bias = case(4, 8, 16)
    wanted = weight.clone().requires_grad_()
    few_row_linear(x, wanted, bias).sum().backward()
    assert torch.equal(wanted.grad, x.sum(0).expand(8, -1))
    many = torch.randn(MAX_ROWS + 1, 16)
    half = [part.bfloat16() for part in (x, weight, bias)]
    column = torch.randn(16, 8).T
    for parts in ((many, weight, bias), half, (x, column, bias), (x[:0], weight, bias)):
        assert torch.equal(few_row_linear(*parts), F.linear(*parts))
    with vlmfast.backend("reference"):
        assert torch.equal(few_row_linear(x, weight, bias), F.linear(x, weight, bias))
    with pytest.raises(RuntimeError):
        few_row_linear(x, weight[:, :7], bias)
    assert not counted
    with torch.no_grad():
        few_row_linear(x, wanted, bias)
    assert len(counted) == 1
