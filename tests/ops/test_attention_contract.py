"""Registration, compilation, instruction sets and refusals of the attention family."""

import pytest
import torch
from attention_helpers import tensors
from instruction_sets import assert_agree

from vlmfast.ops import (
    attention,
    attention_varlen,
    axial_attention,
    bi_attention,
    co_attention,
    co_attention_varlen,
    cross_attention,
    dropout_mask,
    window_attention,
)
from vlmfast.ops.attention_call import CAUSAL, KEEP, LSE, PROBS, Options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("flags", [0, CAUSAL | LSE, PROBS | LSE | KEEP])
def test_opcheck(dtype, flags):
    q, k, v = tensors((2, 5, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16), dtype=dtype)
    bias = torch.randn(1, 2, 5, 7, dtype=dtype)
    seed = torch.tensor(3)
    options = Options(lengths_k=torch.tensor([7, 3]), key_mask=torch.rand(2, 7) < 0.8)
    inputs, ops = [q, k, v, q, k, v], torch.ops.vlmfast
    arguments = [bias, None], [*options, *Options()], seed
    numbers = [0.3, 0.25], [0.1, 0.0], [flags, flags]
    forward = (inputs, *arguments, *numbers, "co_attention")
    # what is kept for the backward is private and partly unwritten, so it cannot be compared
    torch.library.opcheck(ops.attention_fwd.default, forward,
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
                          if flags & KEEP else ("test_schema", "test_autograd_registration", "test_faketensor",
                                                "test_aot_dispatch_dynamic"))
    found = ops.attention_fwd(*forward)
    upstream = [x for i in range(2) for x in (torch.randn_like(found[4 * i]),
                                               torch.randn_like(found[4 * i + 1]) if flags & PROBS else None,
                                               torch.zeros_like(found[4 * i + 2]) if flags & LSE else None)]
    kept, needs = [found[3], found[7]], [True] * 7 + [False]
    torch.library.opcheck(ops.attention_bwd.default,
                          (upstream, inputs, *arguments, kept, *numbers, needs, "co_attention"))


@pytest.mark.slow
def test_compiles_to_one_graph():
    leaves = tensors(*[(2, 6, 2, 16)] * 3, *[(2, 9, 2, 16)] * 3)
    leaves = [x.clone().requires_grad_() for x in leaves]
    bias = torch.randn(1, 2, 6, 9, requires_grad=True)
    lengths = torch.tensor([6, 2])

    def step(*x):
        found = co_attention(*x[:6], bias_a=x[6], lengths_a=lengths, dropout_b=0.2, seed=3, return_probs=True)
        more = cross_attention(x[0] * 1.0, x[4], x[5], causal=True, return_lse=True)
        return found.out_a.sum() + found.out_b.square().sum() + found.probs_b.square().sum() + more.out.sum() \
            + more.lse.clamp(min=-9).sum()

    leaves.append(bias)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    plain, ours = step(*leaves), compiled(*leaves)
    assert abs(plain - ours) < 1e-4 * abs(plain)
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves), strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm() + 1e-6


@pytest.mark.slow
def test_compiled_dropout_follows_the_generator():
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    compiled = torch.compile(lambda x: attention(x, x, x, dropout=0.5).out, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(2)
    again = compiled(x)
    assert torch.equal(first, again) and not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(again.sum(), x)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.slow
def test_grid_ops_compile_to_one_graph():
    qkv, table = torch.randn(1, 8, 8, 3, 2, 8, requires_grad=True), torch.randn(49, 2, requires_grad=True)
    sequence = [torch.randn(1, 20, 2, 8, requires_grad=True) for _ in range(3)]

    def step(qkv, table, *sequence):
        windows = window_attention(qkv * 1.0, table, window=4, shift=2)
        return windows.square().sum() + axial_attention(*sequence, text_len=4, grid=(4, 4)).square().sum()

    leaves = qkv, table, *sequence
    plain, ours = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert abs(plain - ours) < 1e-4 * abs(plain)
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves), strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


def test_checkpointing_repeats_the_dropout():
    from torch.utils.checkpoint import checkpoint

    q, k, v = (x.clone().requires_grad_() for x in tensors(*[(1, 9, 2, 8)] * 3))

    def step(q, k, v):
        return attention(q, k, v, dropout=0.5).out.square().sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(step(q, k, v), (q, k, v))
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(step, q, k, v, use_reentrant=False), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_autocast_promotes_mixed_streams():
    q, k, v = tensors(*[(1, 5, 2, 8)] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q.bfloat16(), k, v).out
    assert out.dtype == torch.float32
    assert torch.equal(out, attention(q.bfloat16().float(), k, v).out)


ISA_SCRIPT = """
import torch, vlmfast._native
from vlmfast.ops import co_attention, window_attention, axial_attention, bi_attention
torch.manual_seed(3)
leaves = [torch.randn(3, s, 2, 24, requires_grad=True) for s in (21, 21, 21, 37, 37, 37)]
qkv, table = torch.randn(1, 8, 8, 3, 2, 24, requires_grad=True), torch.randn(49, 2, requires_grad=True)
found = co_attention(*leaves, lengths_a=torch.tensor([21, 5, 9]), dropout_a=.2, seed=8, return_probs=True)
loss = sum(x.square().sum() for x in found[:4]) + window_attention(qkv, table, window=4, shift=1).square().sum()
loss = loss + axial_attention(*(x[:, :20] for x in leaves[:3]), text_len=4, grid=(4, 4)).square().sum()
loss = loss + sum(x.square().sum() for x in bi_attention(leaves[3], leaves[1], leaves[2], leaves[5])[:2])
loss.backward()
print(vlmfast._native.build_info()["isa"], loss.item(), *[x.grad.double().norm().item() for x in (*leaves, qkv, table)])
"""


def test_instruction_sets_agree():
    assert_agree(ISA_SCRIPT)


def bad_calls():
    q, k, v = (torch.randn(2, 3, 2, 8) for _ in range(3))
    long = torch.randn(2, 5, 2, 8)
    packed = torch.randn(6, 2, 8)
    cu = torch.tensor([0, 2, 6])

    def co(**options):
        return lambda: co_attention(q, k, v, long, long, long, **options)

    def cross(*tensors, **options):
        return lambda: cross_attention(*(tensors or (q, long, long)), **options)

    yield "not a tensor", TypeError, "key is a list", cross(q, [1.0], v)
    yield "rank", ValueError, r"query has shape \(3, 2, 8\), it must be \[B, S, H, D\]", cross(q[0], k, v)
    yield "dtype", ValueError, "value is torch.float64, query is torch.float32", cross(q, k, v.double())
    yield "integers", TypeError, "query is torch.int64", cross(q.long(), k.long(), v.long())
    yield "device", ValueError, "key is on meta, query on cpu", cross(q, k.to("meta"), v)
    yield "heads", ValueError, r"key has heads and width \(1, 8\), query has \(2, 8\)", cross(
        q, k[:, :, :1], v[:, :, :1])
    yield "width", ValueError, r"key has heads and width \(2, 7\)", cross(q, k[..., :7], v)
    yield "batch", ValueError, "key has batch 1, query has 2", cross(q, k[:1], v[:1])
    yield "value length", ValueError, "value has shape .* they must agree", cross(q, long, v)
    yield "stream length", ValueError, "key_a has batch and length", lambda: co_attention(
        q, long, long, long, long, long)
    yield "lengths beyond", ValueError, "co_attention: lengths_a reaches from 1 to 4, it must lie between 0 and 3", co(
        lengths_a=torch.tensor([4, 1]))
    yield "negative lengths", ValueError, "lengths_b reaches from -1", co(lengths_b=torch.tensor([-1, 1]))
    yield "lengths shape", ValueError, r"lengths_q has shape \(3,\), it must be \[2\]", cross(
        lengths_q=torch.ones(3).int())
    yield "float lengths", TypeError, "lengths_k is torch.float32", cross(lengths_k=torch.ones(2))
    yield "own lengths", ValueError, "attention: lengths reaches from 2 to 9", lambda: attention(
        q, k, v, lengths=torch.tensor([2, 9]))
    yield "float mask", TypeError, "mask_a is torch.float32, it must be a bool tensor, True where a key is kept", co(
        mask_a=torch.ones(2, 3))
    yield "mask shape", ValueError, r"mask_b has shape \(2, 3\), it must be \[2, 5\]", co(
        mask_b=torch.ones(2, 3).bool())
    yield "plane shape", ValueError, r"mask has shape .* it must broadcast to \[2, 2, 3, 5\]", cross(
        mask=torch.ones(2, 4, 5).bool())
    yield "bias shape", ValueError, r"bias_b has shape \(2, 2, 3, 5\), it must broadcast to \[2, 2, 5, 3\]", co(
        bias_b=torch.zeros(2, 2, 3, 5))
    yield "bool bias", TypeError, "bias is torch.bool", cross(bias=torch.ones(1, 1, 1, 5).bool())
    yield "dropout", ValueError, "dropout_a is 1.5", co(dropout_a=1.5)
    yield "scale tensor", TypeError, "scale is a tensor", cross(scale=torch.tensor(1.0))
    yield "scale NaN", ValueError, "scale is NaN", cross(scale=float("nan"))
    yield "lone pair", ValueError, "pair_a and pair_b go together", co(pair_a=torch.tensor([0]))
    yield "pair range", ValueError, "pair_b reaches from 0 to 2, it must lie between 0 and 1", co(
        pair_a=torch.tensor([0, 1]), pair_b=torch.tensor([0, 2]))
    yield "pair lengths", ValueError, r"pair_b has shape \(1,\), it must be \[2\]", co(
        pair_a=torch.tensor([0, 1]), pair_b=torch.tensor([0]))
    yield "seed", ValueError, "seed is 9223372036854775808", cross(dropout=0.1, seed=2**63)
    yield "seed dtype", TypeError, "seed is .* torch.float32", cross(dropout=0.1, seed=torch.tensor(1.0))
    yield "prefix shape", ValueError, r"prefix has shape \(3,\)", cross(prefix=torch.tensor([1, 2, 3]))
    yield "offsets fall", ValueError, "cu_q must start at 0", lambda: attention_varlen(
        packed, packed, packed, torch.tensor([0, 4, 2]))
    yield "offsets beyond", ValueError, "ends at 9", lambda: co_attention_varlen(
        *[packed] * 6, cu, torch.tensor([0, 3, 9]))
    yield "offsets missing", TypeError, "cu_b is None", lambda: co_attention_varlen(*[packed] * 6, cu, None)
    yield "mask rate", ValueError, "p is -0.1", lambda: dropout_mask(0, 1, 1, 2, 2, -0.1)
    yield "bi heads", ValueError, "bi_attention: key_a has shape", lambda: bi_attention(q, k[:, :, :1], v, v)
    yield "bi value", ValueError, "value_b has shape", lambda: bi_attention(q, k, v, long)
    yield "bi lengths", ValueError, "lengths_a reaches from 1 to 4", lambda: bi_attention(
        q, k, v, v, lengths_a=torch.tensor([1, 4]))
    grid = torch.randn(1, 8, 8, 3, 2, 8)
    yield "window parts", ValueError, "qkv has 2 parts in dimension 3", lambda: window_attention(
        grid[:, :, :, :2], window=4)
    yield "window rank", ValueError, r"it must be \[B, h, w, 3, H, D\]", lambda: window_attention(q, window=4)
    yield "window size", ValueError, "window is 3 on axis 0, it must divide the length 8", lambda: window_attention(
        grid, window=3)
    yield "window shift", ValueError, "shift is 4 on axis 1", lambda: window_attention(grid, window=4, shift=(0, 4))
    yield "window bias", ValueError, r"bias has shape \(48, 2\), it must be the table \[49, 2\]", (
        lambda: window_attention(grid, torch.zeros(48, 2), window=4))
    yield "axial length", ValueError, "query has length 3, it must be 6", lambda: axial_attention(
        q, k, v, text_len=2, grid=(2, 2))
    yield "axial mode", ValueError, "mode is 'diagonal'", lambda: axial_attention(
        q, k, v, text_len=1, grid=(1, 2), mode="diagonal")
    yield "axial kernel", ValueError, "kernel is 4", lambda: axial_attention(
        q, k, v, text_len=1, grid=(1, 2), mode="conv", kernel=4)


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_is_named(case):
    _, error, message, call = case
    with pytest.raises(error, match=message):
        call()
