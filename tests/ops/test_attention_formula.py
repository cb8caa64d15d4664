"""The attention ops against plain formulas written here, in float64, on the native backend and by the definition."""

import math

import pytest
import torch
from tolerance import assert_no_worse_than_torch

import vlmfast
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
from vlmfast.ops.reference.attention import axial_mask

BACKENDS = ["native", "reference"]


def streams(batch, sa, sb, heads, d, dtype=torch.float32):
    """(query_a, key_a, value_a, query_b, key_b, value_b) as views of one projection each, with strides of their own."""
    a, b = (torch.randn(batch, s, 3, heads, d, dtype=torch.float64).to(dtype) for s in (sa, sb))
    return [*a.unbind(2), *b.unbind(2)]


def plain(query, key, value, live=None, bias=None, keep=None, dropout=0.0, scale=None):
    """[B, S, H, D] -> (out, probs, lse) by the formula; `live` is broadcastable to [B, H, Sq, Sk]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = (q @ k.mT) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores if bias is None else scores + bias
    if live is not None:
        scores = scores.masked_fill(~live, -torch.inf)
    probs = scores.softmax(-1)
    dropped = probs if keep is None else probs * keep / (1 - dropout)
    return (dropped @ v).transpose(1, 2), probs, scores.logsumexp(-1)


def gradients(results, leaves, weights):
    total = sum((result * weight.to(result.dtype)).sum() for result, weight in zip(results, weights, strict=True))
    return torch.autograd.grad(total, leaves)


def compare(ours, definition, tensors, dtype):
    """Outputs and all gradients of `ours` and `definition`, functions of the tensors that give a list of tensors."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    mine = ours(*leaves)
    weights = [torch.randn(x.shape, dtype=torch.float64) for x in mine]
    results = [*mine, *gradients(mine, leaves, weights)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    true = definition(*wide)
    truth = [*true, *gradients(true, wide, weights)]
    # the formula in float32 from 16-bit inputs, rounded at the end
    eager_leaves = [x.detach().requires_grad_() for x in tensors]
    eager = definition(*(x if dtype == torch.float32 else x.float() for x in eager_leaves))
    same = [*(x.to(y.dtype) for x, y in zip(eager, mine, strict=True)), *gradients(eager, eager_leaves, weights)]
    for i, (a, b, c) in enumerate(zip(results, truth, same, strict=True)):
        assert_no_worse_than_torch(a.detach(), b.detach(), c.detach(), factor=2.0 if i < len(mine) else 3.0,
                                   what=f"result {i}")


def key_live(lengths, size):
    return (torch.arange(size) < lengths[:, None])[:, None, None, :]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 20, 36, 3, 64), (3, 38, 101, 2, 17), (2, 130, 70, 1, 32)],
                         ids=str)
def test_co_attention_matches_two_plain_directions(shape, dtype, backend):
    tensors = streams(*shape, dtype=dtype)
    batch, sa, sb = shape[:3]
    mask_b = torch.rand(batch, sb) < 0.7
    mask_b[:, 0] = True
    bias = torch.randn(1, shape[3], sa, 1).to(dtype)

    def ours(qa, ka, va, qb, kb, vb, bias):
        with vlmfast.backend(backend):
            found = co_attention(qa, ka, va, qb, kb, vb, mask_b=mask_b, bias_a=bias, return_probs=True)
        return found.out_a, found.out_b, found.probs_a, found.probs_b

    def definition(qa, ka, va, qb, kb, vb, bias):
        out_a, probs_a, _ = plain(qa, kb, vb, mask_b[:, None, None, :], bias)
        out_b, probs_b, _ = plain(qb, ka, va)
        return out_a, out_b, probs_a, probs_b

    # a bias that is the same for all keys has no gradient to compare, so only one over keys as well does
    bias = bias + torch.randn(1, shape[3], sa, sb).to(dtype)
    if shape[1] > 1:
        compare(ours, definition, [*tensors, bias], dtype)
    else:
        assert (ours(*tensors, bias)[0] - tensors[5]).abs().max() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_skip_padding_and_what_stands_there(backend):
    tensors = streams(4, 12, 19, 2, 16)
    lengths_a, lengths_b = torch.tensor([12, 5, 1, 0]), torch.tensor([19, 7, 0, 4])
    live_a, live_b = key_live(lengths_a, 12), key_live(lengths_b, 19)
    clean = [x.double() for x in tensors]
    for x, lengths in zip(tensors, (lengths_a,) * 3 + (lengths_b,) * 3, strict=True):
        for i, length in enumerate(lengths):
            x[i, length:] = torch.nan
    leaves = [x.detach().requires_grad_() for x in tensors]
    with vlmfast.backend(backend):
        found = co_attention(*leaves, lengths_a=lengths_a, lengths_b=lengths_b, return_lse=True)
    grads = torch.autograd.grad(found.out_a.sum() + (found.out_b ** 2).sum(), leaves)
    for result in (found.out_a, found.out_b, *grads):
        assert torch.isfinite(result).all()
    for out, queries, keys, size in ((found.out_a, live_a, live_b, 12), (found.out_b, live_b, live_a, 19)):
        index = (0, 4, 5) if size == 12 else (3, 1, 2)
        truth = plain(*(clean[i] for i in index), keys)[0].nan_to_num(0.0)
        truth = torch.where(queries.squeeze(1).squeeze(1)[:, :, None, None], truth, 0.0)
        assert (out - truth).abs().max() < 1e-5
    assert found.lse_a[2].isneginf().all() and not found.out_a[2].any()
    for grad, lengths in zip(grads, (lengths_a,) * 3 + (lengths_b,) * 3, strict=True):
        for i, length in enumerate(lengths):
            assert not grad[i, length:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_is_the_public_mask(backend):
    tensors = streams(2, 9, 14, 3, 8)
    keep_a, keep_b = dropout_mask(77, 2, 3, 9, 14, 0.3, 0), dropout_mask(77, 2, 3, 14, 9, 0.2, 1)

    def ours(*x):
        with vlmfast.backend(backend):
            return co_attention(*x, dropout_a=0.3, dropout_b=0.2, seed=77)[:2]

    def definition(qa, ka, va, qb, kb, vb):
        return (plain(qa, kb, vb, keep=keep_a, dropout=0.3)[0], plain(qb, ka, va, keep=keep_b, dropout=0.2)[0])

    compare(ours, definition, tensors, torch.float32)
    assert 0.6 < keep_a.float().mean() < 0.8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ["causal", "prefix", "3-D mask", "4-D mask", "cache"])
def test_masks_of_one_direction(case, backend):
    query, key, value = torch.randn(2, 7, 2, 16), torch.randn(2, 11, 2, 16), torch.randn(2, 11, 2, 24)
    rows, columns = torch.arange(7)[:, None], torch.arange(11)
    mask = torch.rand(2, 1, 7, 11) < 0.6
    mask[..., 0] = True
    options, live = {
        "causal": ({"causal": True}, columns <= rows + 4),
        "prefix": ({"prefix": 6}, (columns <= rows + 4) | (columns < 6)),
        "3-D mask": ({"mask": mask[:, 0]}, mask),
        "4-D mask": ({"mask": mask.expand(2, 2, 7, 11)}, mask),
        "cache": ({"lengths_k": torch.tensor([9, 8]), "causal": True},
                  columns <= rows + (torch.tensor([9, 8]) - 7).view(2, 1, 1, 1)),
    }[case]

    def ours(*x):
        with vlmfast.backend(backend):
            found = cross_attention(*x, return_lse=True, **options)
        return found.out, found.lse

    def definition(*x):
        out, _, lse = plain(*x, live)
        return out, lse

    compare(ours, definition, [query, key, value], torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_equal_expanded_inputs(backend):
    tensors = streams(3, 6, 8, 2, 16)
    pair_a, pair_b = torch.tensor([0, 0, 2, 1]), torch.tensor([1, 2, 2, 0])

    def ours(*x):
        with vlmfast.backend(backend):
            return co_attention(*x, pair_a=pair_a, pair_b=pair_b)[:2]

    def definition(*x):
        a, b = [y[pair_a] for y in x[:3]], [y[pair_b] for y in x[3:]]
        return plain(a[0], b[1], b[2])[0], plain(b[0], a[1], a[2])[0]

    compare(ours, definition, tensors, torch.float32)


def test_packed_equals_padded_equals_single_bit_for_bit():
    tensors = streams(3, 10, 15, 2, 16)
    lengths_a, lengths_b = torch.tensor([10, 3, 7]), torch.tensor([4, 15, 9])
    options = {"dropout_a": 0.2, "dropout_b": 0.1, "seed": 5}
    padded = co_attention(*tensors, lengths_a=lengths_a, lengths_b=lengths_b, **options)

    def pack(x, lengths):
        return torch.cat([x[i, :length] for i, length in enumerate(lengths)])

    packed = [pack(x, lengths_a) for x in tensors[:3]] + [pack(x, lengths_b) for x in tensors[3:]]
    cu_a, cu_b = (torch.cat([torch.zeros(1, dtype=torch.int64), x.cumsum(0)]) for x in (lengths_a, lengths_b))
    found = co_attention_varlen(*packed, cu_a, cu_b, **options)
    assert torch.equal(found.out_a, pack(padded.out_a, lengths_a))
    assert torch.equal(found.out_b, pack(padded.out_b, lengths_b))
    # the first sample alone, without dropout's batch index in the way
    alone = co_attention(*(x[:1, :10] for x in tensors[:3]), *(x[:1, :4] for x in tensors[3:]), **options)
    assert torch.equal(alone.out_a[0], padded.out_a[0]) and torch.equal(alone.out_b[0], padded.out_b[0, :4])
    self_attention = attention_varlen(*packed[:3], cu_a, causal=True)
    whole = attention(*tensors[:3], lengths=lengths_a, causal=True)
    assert torch.equal(self_attention.out, pack(whole.out, lengths_a))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads):
    tensors = [x.requires_grad_() for x in streams(5, 33, 40, 3, 32)]
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            found = co_attention(*tensors, dropout_a=0.1, seed=3)
            results.append([*found[:2], *torch.autograd.grad(found.out_a.sum() + found.out_b.square().sum(), tensors)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_finite_biases_are_literal(backend):
    query, key, value = (torch.randn(1, 4, 1, 8) for _ in range(3))
    with vlmfast.backend(backend):
        # exact in float32: the scores lose digits to -10000, as they do in the public checkpoints' own code
        out = attention(query, key, value, bias=torch.full((1, 1, 1, 4), -10000.0)).out
        none = attention(query, key, value, bias=torch.full((1, 1, 1, 4), -torch.inf)).out
    assert (out - plain(query, key, value)[0]).abs().max() < 2e-3
    assert not none.any()


def test_gradcheck_native():
    tensors = [x.requires_grad_() for x in streams(2, 3, 4, 2, 3, torch.float64)]
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(bias, *x):
        found = co_attention(*x, bias_a=bias, lengths_a=torch.tensor([3, 2]), dropout_b=0.2, seed=1, return_probs=True,
                             return_lse=True)
        # a query without keys has a log-sum-exp of -inf, whose difference quotient is not a number
        return found.out_a, found.out_b, found.probs_a, found.lse_a[:, :, :2]

    assert torch.autograd.gradcheck(loss, (bias, *tensors))


def test_bi_attention_shares_one_score_matrix():
    query_b, key_a, value_a, value_b = (torch.randn(2, s, 2, 16) for s in (13, 6, 6, 13))

    def ours(*x):
        found = bi_attention(*x)
        return found.out_a, found.out_b

    def definition(query_b, key_a, value_a, value_b):
        return plain(key_a, query_b, value_b)[0], plain(query_b, key_a, value_a)[0]

    compare(ours, definition, [query_b, key_a, value_a, value_b], torch.float32)


@pytest.mark.parametrize("shift", [0, 2])
def test_window_attention_equals_rolled_windows(shift):
    qkv, bias = torch.randn(2, 8, 8, 3, 2, 8), torch.randn(2, 16, 16)

    def definition(qkv, bias):
        x = qkv.roll((-shift, -shift), (1, 2))

        def windows(y):
            return y.reshape(2, 2, 4, 2, 4, *y.shape[3:]).transpose(2, 3).flatten(3, 4).flatten(0, 2)

        at = torch.arange(8)
        band = (at >= 4).long() + (at >= 8 - shift).long() if shift else torch.zeros_like(at)
        region = windows((3 * band[:, None] + band).expand(2, 8, 8)[..., None])[..., 0]
        live = (region[:, :, None] == region[:, None, :])[:, None]
        out = plain(*windows(x).unbind(2), live, bias)[0]
        out = out.reshape(2, 2, 2, 4, 4, 2, 8).transpose(2, 3).reshape(2, 8, 8, 2, 8)
        return [out.roll((shift, shift), (1, 2))]

    compare(lambda qkv, bias: [window_attention(qkv, bias, window=4, shift=shift)], definition, [qkv, bias],
            torch.float32)


@pytest.mark.parametrize("mode", ["row", "col", "conv", "full"])
def test_axial_attention_equals_masked_attention(mode):
    tensors = [torch.randn(1, 5 + 16, 2, 8) for _ in range(3)]
    live = axial_mask(5, (4, 4), mode, 3)
    compare(lambda *x: [axial_attention(*x, text_len=5, grid=(4, 4), mode=mode, kernel=3)],
            lambda *x: [plain(*x, live)[0]], tensors, torch.float32)
    assert live.diagonal().all() and not live.triu(1).any() and live[5:, :5].all()


def test_second_derivative_is_refused():
    tensors = [x.requires_grad_() for x in streams(1, 2, 3, 1, 4)]
    out = co_attention(*tensors).out_a
    (gradient,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="attention: the second derivative is not implemented"):
        (out.sum() + gradient.square().sum()).backward()


def bad_calls():
    a = torch.randn(2, 5, 2, 8)
    b = torch.randn(2, 7, 2, 8)
    yield "length too long", ValueError, "lengths_b", lambda: co_attention(
        a, a, a, b, b, b, lengths_b=torch.tensor([3, 8]))
    yield "lengths count", ValueError, "lengths_a", lambda: co_attention(a, a, a, b, b, b, lengths_a=torch.tensor([3]))
    yield "float mask", TypeError, "mask_a", lambda: co_attention(a, a, a, b, b, b, mask_a=torch.ones(2, 5))
    yield "mask shape", ValueError, "mask_a", lambda: co_attention(a, a, a, b, b, b, mask_a=torch.ones(2, 7) > 0)
    yield "heads", ValueError, "key_b", lambda: co_attention(a, a, a, b, b[:, :, :1], b)
    yield "pair range", ValueError, "pair_b", lambda: co_attention(
        a, a, a, b, b, b, pair_a=torch.tensor([0]), pair_b=torch.tensor([2]))
    yield "one pair", ValueError, "pair_a and pair_b go together", lambda: co_attention(
        a, a, a, b, b, b, pair_a=torch.tensor([0]))
    yield "rate", ValueError, "dropout_a", lambda: co_attention(a, a, a, b, b, b, dropout_a=1.5)
    yield "rank", ValueError, "query", lambda: attention(a[0], a, a)
    yield "not a tensor", TypeError, "value", lambda: attention(a, a, [1.0])
    yield "bias shape", ValueError, "bias", lambda: attention(a, a, a, bias=torch.zeros(1, 1, 3, 5))
    yield "offsets", ValueError, "cu_q", lambda: attention_varlen(a[0], a[0], a[0], torch.tensor([0, 9]))


@pytest.mark.parametrize("case", list(bad_calls()), ids=lambda case: case[0])
def test_bad_input_is_named(case):
    _, error, message, call = case
    with pytest.raises(error, match=message):
        call()
