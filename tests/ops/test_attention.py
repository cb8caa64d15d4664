"""attention, cross_attention, co_attention and the packed forms against the formulae in float64."""

import pytest
import torch
from attention_helpers import check, naive, outputs_and_gradients, prefix_mask, tensors

import vlmfast
from vlmfast.ops import (
    attention,
    attention_varlen,
    co_attention,
    co_attention_varlen,
    cross_attention,
    dropout_mask,
)

# B, Sq, Sk, H, D, Dv
SHAPES = [(2, 38, 37, 2, 128, 128), (1, 20, 36, 12, 64, 64), (2, 1, 5, 2, 8, 3), (1, 65, 101, 3, 20, 48),
          (3, 7, 1, 1, 1, 1), (1, 300, 130, 1, 16, 16), (1, 33, 577, 1, 64, 40)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(shape, dtype=torch.float32):
    batch, sq, sk, heads, width, dv = shape
    return tensors((batch, sq, heads, width), (batch, sk, heads, width), (batch, sk, heads, dv), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-Q{}-K{}-H{}-D{}-V{}".format(*s))
def test_matches_definition(shape, dtype):
    def ours(q, k, v):
        return cross_attention(q, k, v).out

    def formula(q, k, v, reorder=False):
        return naive(q, k, v, reorder=reorder)[0]

    # softmax over one key has no gradient with respect to the scores
    check(ours, formula, case(shape, dtype), cancelling=(0, 1) if shape[2] == 1 else ())


def masks(kind, batch, heads, sq, sk):
    """(options of cross_attention, live pairs of the formula)"""
    lengths_q, lengths_k = torch.randint(0, sq + 1, (batch,)), torch.randint(0, sk + 1, (batch,), dtype=torch.int32)
    rows, columns = prefix_mask(lengths_q, sq)[:, None, :, None], prefix_mask(lengths_k, sk)[:, None, None, :]
    position = torch.arange(sq)[:, None]
    holes, plane = torch.rand(batch, sk) < 0.6, torch.rand(batch, sq, sk) < 0.5
    full = torch.rand(batch, heads, sq, sk) < 0.5
    prefix = torch.randint(0, sk + 1, (batch,))
    offset = lengths_k[:, None, None, None] - lengths_q[:, None, None, None]
    return {
        "lengths": ({"lengths_q": lengths_q, "lengths_k": lengths_k}, rows & columns),
        "holes": ({"mask": holes}, holes[:, None, None]),
        "holes and lengths": ({"mask": holes, "lengths_k": lengths_k}, holes[:, None, None] & columns),
        "plane": ({"mask": plane}, plane[:, None]),
        "plane and lengths": ({"mask": plane, "lengths_q": lengths_q}, plane[:, None] & rows),
        "full plane": ({"mask": full}, full),
        "shared plane": ({"mask": plane[:1]}, plane[:1, None]),
        "query mask": ({"mask": plane[:, :, :1]}, plane[:, None, :, :1].expand(-1, -1, -1, sk)),
        "causal": ({"causal": True}, torch.arange(sk) <= position + sk - sq),
        "causal and lengths": ({"causal": True, "lengths_q": lengths_q, "lengths_k": lengths_k},
                               rows & columns & (torch.arange(sk) <= position + offset)),
        "prefix": ({"prefix": prefix}, (torch.arange(sk) <= position + sk - sq)
                   | (torch.arange(sk) < prefix[:, None, None, None])),
        "one prefix": ({"prefix": 3, "mask": holes}, ((torch.arange(sk) <= position + sk - sq)
                                                       | (torch.arange(sk) < 3)) & holes[:, None, None]),
    }[kind]


KINDS = ["lengths", "holes", "holes and lengths", "plane", "plane and lengths", "full plane", "shared plane",
         "query mask", "causal", "causal and lengths", "prefix", "one prefix"]


@pytest.mark.parametrize("shape", [(3, 19, 35, 2, 16, 24), (2, 40, 9, 1, 8, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masks(kind, shape):
    batch, sq, sk, heads = shape[:4]
    options, live = masks(kind, batch, heads, sq, sk)

    def ours(q, k, v):
        return cross_attention(q, k, v, return_probs=True, **options)[:2]

    def formula(q, k, v, reorder=False):
        return naive(q, k, v, live=live, reorder=reorder)

    check(ours, formula, case(shape))


@pytest.mark.parametrize("kind", [None, "holes and lengths", "plane", "causal"])
@pytest.mark.parametrize("bias_shape", ["bhqk", "1hqk", "b1qk", "11qk", "bh1k", "1h1k", "111k", "bhq1", "1111"])
def test_bias_and_its_gradient(bias_shape, kind):
    shape = batch, sq, sk, heads, *_ = 5, 17, 21, 3, 16, 16
    sizes = {"b": batch, "h": heads, "q": sq, "k": sk, "1": 1}
    bias = torch.randn([sizes[c] for c in bias_shape])
    options, live = ({}, None) if kind is None else masks(kind, batch, heads, sq, sk)

    def ours(q, k, v, b):
        return cross_attention(q, k, v, bias=b, **options).out

    def formula(q, k, v, b, reorder=False):
        return naive(q, k, v, bias=b, live=live, reorder=reorder)[0]

    # what is the same for all keys does not change a softmax
    check(ours, formula, [*case(shape), bias], cancelling=(3,) if bias_shape[3] == "1" else ())


def test_narrow_bias_has_a_narrow_gradient():
    shape = 4, 17, 21, 3, 16, 16
    leaves = [*case(shape, torch.bfloat16), torch.randn(1, 3, 17, 21).bfloat16()]
    check(lambda q, k, v, b: cross_attention(q, k, v, bias=b).out,
          lambda q, k, v, b, reorder=False: naive(q, k, v, bias=b, reorder=reorder)[0], leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [None, "holes and lengths", "causal", "plane"])
@pytest.mark.parametrize("probs_dropout", [False, True])
def test_dropout_is_the_published_mask(kind, probs_dropout, dtype):
    shape = batch, sq, sk, heads, *_ = 2, 18, 39, 2, 16, 16
    options, live = ({}, None) if kind is None else masks(kind, batch, heads, sq, sk)
    keep = dropout_mask(11, batch, heads, sq, sk, 0.3)

    def ours(q, k, v):
        return cross_attention(q, k, v, dropout=0.3, seed=11, return_probs=True, probs_dropout=probs_dropout,
                               **options)[:2]

    def formula(q, k, v, reorder=False):
        out, probs = naive(q, k, v, live=live, dropout=0.3, seed=11, reorder=reorder)
        return out, probs.masked_fill(~keep, 0.0) / 0.7 if probs_dropout else probs

    check(ours, formula, case(shape, dtype))


def test_dropout_of_everything_gives_zero():
    q, k, v = case((2, 5, 6, 2, 8, 8))
    outputs, gradients = outputs_and_gradients(lambda *x: cross_attention(*x, dropout=1.0, seed=1).out, (q, k, v))
    assert not outputs[0].any() and not any(g.any() for g in gradients)


def test_dropout_keeps_its_share_and_follows_the_generator():
    assert abs(dropout_mask(3, 4, 8, 64, 100, 0.1).double().mean() - 0.9) < 0.002
    masks = [dropout_mask(seed, 1, 2, 30, 40, 0.5, direction) for seed in (1, 2) for direction in (0, 1)]
    assert all((a == b).double().mean() < 0.55 for i, a in enumerate(masks) for b in masks[:i])
    q, k, v = case((1, 8, 8, 2, 8, 8))
    torch.manual_seed(4)
    first, second = (cross_attention(q, k, v, dropout=0.5).out for _ in range(2))
    torch.manual_seed(4)
    assert torch.equal(first, cross_attention(q, k, v, dropout=0.5).out) and not torch.equal(first, second)


def test_random_words_are_philox():
    # known answers of the algorithm's authors
    from vlmfast.ops.reference.attention import philox

    for word, key, expected in ((0, 0, (0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8)),
                                (0xffffffff, 0xffffffff, (0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd))):
        words = philox([torch.tensor(word)] * 4, [torch.tensor(key)] * 2)
        assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("kind", [None, "lengths", "plane"])
def test_log_sum_exp_and_its_gradient(kind):
    shape = batch, sq, sk, heads, *_ = 2, 9, 23, 2, 16, 16
    options, live = ({}, None) if kind is None else masks(kind, batch, heads, sq, sk)
    seen = torch.ones(batch, heads, sq, sk, dtype=torch.bool) if live is None else live.expand(batch, heads, sq, sk)

    def finite(lse):
        return lse.masked_fill(~seen.any(-1), 0.0)

    def ours(q, k, v):
        out, _, lse = cross_attention(q, k, v, return_lse=True, **options)
        assert (lse[~seen.any(-1)] == -torch.inf).all()
        return out, finite(lse)

    def formula(q, k, v, reorder=False):
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * 0.25
        scores = scores.masked_fill(~seen & seen.any(-1, keepdim=True), -torch.inf)
        return naive(q, k, v, live=live, reorder=reorder)[0], finite(scores.logsumexp(-1))

    check(ours, formula, case(shape))


def co_case(dtype=torch.float32, batch=3, sa=12, sb=19, heads=2, width=16):
    a, b = (batch, sa, heads, width), (batch, sb, heads, width)
    return tensors(a, a, a, b, b, b, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "lengths", "everything"])
def test_co_attention_is_two_directions(options, dtype):
    leaves = co_case(dtype)
    lengths = torch.tensor([12, 0, 5]), torch.tensor([19, 7, 1])
    holes = torch.rand(3, 12) < 0.7, torch.rand(3, 19) < 0.7
    given, kwargs = {"plain": (False, {}), "lengths": (True, {"lengths_a": lengths[0], "lengths_b": lengths[1]}),
                     "everything": (True, {"lengths_a": lengths[0], "lengths_b": lengths[1], "mask_a": holes[0],
                                           "mask_b": holes[1], "dropout_a": 0.1, "dropout_b": 0.4, "seed": 9})}[options]
    valid = [prefix_mask(n, s) for n, s in zip(lengths, (12, 19), strict=True)]
    keys = [v & h if options == "everything" else v for v, h in zip(valid, holes, strict=True)]
    live_a = valid[0][:, None, :, None] & keys[1][:, None, None] if given else None
    live_b = valid[1][:, None, :, None] & keys[0][:, None, None] if given else None

    def ours(*x):
        found = co_attention(*x, return_probs=True, **kwargs)
        return found.out_a, found.out_b, found.probs_a, found.probs_b

    def formula(qa, ka, va, qb, kb, vb, reorder=False):
        a = naive(qa, kb, vb, live=live_a, reorder=reorder, dropout=kwargs.get("dropout_a", 0.0), seed=9)
        b = naive(qb, ka, va, live=live_b, reorder=reorder, dropout=kwargs.get("dropout_b", 0.0), seed=9, direction=1)
        return a[0], b[0], a[1], b[1]

    check(ours, formula, leaves)


def test_pair_indices_equal_expanded_inputs():
    leaves = co_case(batch=4)
    pair_a, pair_b = torch.tensor([0, 0, 3, 2, 0]), torch.tensor([1, 2, 3, 1, 1], dtype=torch.int32)
    lengths, holes = torch.tensor([12, 3, 0, 7]), torch.rand(4, 19) < 0.7
    bias = torch.randn(5, 1, 12, 19)
    rows = {"a": pair_a, "b": pair_b.long()}

    def ours(*x):
        return co_attention(*x[:6], bias_a=x[6], lengths_a=lengths, mask_b=holes, pair_a=pair_a, pair_b=pair_b,
                            dropout_a=0.2, seed=3)[:2]

    def expanded(*x):
        parts = [y[rows["a" if i < 3 else "b"]] for i, y in enumerate(x[:6])]
        return co_attention(*parts, bias_a=x[6], lengths_a=lengths[pair_a], mask_b=holes[rows["b"]], dropout_a=0.2,
                            seed=3)[:2]

    indexed, copied = (outputs_and_gradients(f, [*leaves, bias]) for f in (ours, expanded))
    for mine, other in zip(indexed, copied, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a - b).norm() <= 2e-7 * b.norm()
    narrow = [x.bfloat16() for x in leaves]
    gradients = outputs_and_gradients(lambda *x: co_attention(*x, pair_a=pair_a, pair_b=pair_b)[:2], narrow)[1]
    assert all(g.dtype == torch.bfloat16 for g in gradients)


def pack(x, lengths):
    return torch.cat([x[i, :n] for i, n in enumerate(lengths)])


def test_packed_padded_and_single_sample_agree_bit_for_bit():
    leaves = co_case(sa=40, sb=70, batch=4, width=32)
    lengths_a, lengths_b = torch.tensor([40, 17, 0, 3]), torch.tensor([70, 33, 5, 1])
    options = {"dropout_a": 0.1, "dropout_b": 0.2, "seed": 77}
    cu_a, cu_b = (torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (lengths_a, lengths_b))
    upstream = torch.randn(4, 40, 2, 32), torch.randn(4, 70, 2, 32)

    def run(function, leaves, upstream):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        outputs = function(*leaves)[:2]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    def padded(*x):
        return co_attention(*x, lengths_a=lengths_a, lengths_b=lengths_b, **options)

    lengths = lengths_a, lengths_b, *[lengths_a] * 3, *[lengths_b] * 3
    whole = run(padded, leaves, upstream)
    # three rows behind the last sequence belong to nobody
    nobody = torch.full((3, 2, 32), torch.nan)
    packed = run(lambda *x: co_attention_varlen(*x, cu_a, cu_b, **options),
                 [torch.cat([pack(x, n), nobody]) for x, n in zip(leaves, lengths[2:], strict=True)],
                 [torch.cat([pack(u, n), nobody]) for u, n in zip(upstream, lengths, strict=False)])
    for mine, other, n in zip(packed, whole, lengths, strict=True):
        assert torch.equal(mine[:-3], pack(other, n)) and not mine[-3:].any()
    # dropout counts sequences, so only the first can stand alone with it
    alone = run(lambda *x: co_attention(*x, **options), [x[:1] for x in leaves], [u[:1] for u in upstream])
    for mine, other in zip(alone, whole, strict=True):
        assert torch.equal(mine[0], other[0])
    single = run(lambda *x: co_attention(*x), [x[1:2, :n[1]] for x, n in zip(leaves, lengths[2:], strict=True)],
                 [u[1:2, :n[1]] for u, n in zip(upstream, lengths, strict=False)])
    plain = run(lambda *x: co_attention(*x, lengths_a=lengths_a, lengths_b=lengths_b), leaves, upstream)
    for mine, other, n in zip(single, plain, lengths, strict=True):
        assert torch.equal(mine[0], other[1, :n[1]])


def test_packed_self_attention_is_causal_within_sequences():
    q, k, v = (torch.randn(11, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 4, 4, 9])
    found = attention_varlen(q, k, v, cu, causal=True, return_lse=True)
    for start, end in ((0, 4), (4, 9)):
        alone = attention(*(x[None, start:end] for x in (q, k, v)), causal=True, return_lse=True)
        assert torch.equal(found.out[start:end], alone.out[0])
        assert torch.equal(found.lse[start:end], alone.lse[0].T)
    assert not found.out[9:].any() and (found.lse[9:] == -torch.inf).all()


def test_queries_behind_a_cache_continue_the_sequence():
    q, k, v = case((2, 12, 12, 2, 16, 16))
    whole = attention(q, k, v, causal=True).out
    cache_k, cache_v = (torch.cat([x, torch.full_like(x, torch.nan)], 1) for x in (k, v))
    step = cross_attention(q[:, 9:], cache_k, cache_v, lengths_k=torch.tensor([12, 12]), causal=True).out
    assert (step - whole[:, 9:]).abs().max() < 1e-6


POISON = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_masked_never_leaks(kind, backend, poison):
    shape = batch, sq, sk, heads, *_ = 2, 18, 21, 2, 8, 8
    options, live = masks(kind, batch, heads, sq, sk)
    live = live.expand(batch, heads, sq, sk)
    q, k, v = case(shape)
    bad = torch.zeros(batch, sk, dtype=torch.bool)
    bad[:, ::5] = True
    # whatever sees a poisoned key may show it; everything else must be as before
    touched = (live & bad[:, None, None]).any(-1).transpose(1, 2)
    with vlmfast.backend(backend):
        clean = cross_attention(q, k, v, **options).out
        found = cross_attention(q, k.masked_fill(bad[:, :, None, None], poison),
                                v.masked_fill(bad[:, :, None, None], poison), **options).out
    assert torch.equal(found[~touched], clean[~touched])


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("kind", ["lengths", "holes", "plane", "causal"])
def test_what_is_masked_never_reaches_a_gradient(kind, poison):
    shape = batch, sq, sk, heads, *_ = 2, 18, 21, 2, 8, 8
    options, live = masks(kind, batch, heads, sq, sk)
    live = live.expand(batch, heads, sq, sk)
    q, k, v = case(shape)
    upstream = torch.randn(batch, sq, heads, 8)
    unseen_k, unseen_q = ~live.any(1).any(1), ~live.any(1).any(2)
    # a query that sees nothing and a key that nobody sees hold anything at all
    results = []
    for value in (0.0, poison):
        leaves = [x.masked_fill(u[:, :, None, None], value).requires_grad_() for x, u in
                  ((q, unseen_q), (k, unseen_k), (v, unseen_k))]
        out = cross_attention(*leaves, **options).out
        results.append(torch.autograd.grad(out, leaves, upstream.masked_fill(unseen_q[:, :, None, None], value)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    if kind in ("plane", "causal"):
        # the last key is seen by some queries only: the others' gradients must not notice
        dirty = v.clone()
        dirty[:, -1] = poison
        seen = live[..., -1].transpose(1, 2)
        pair = [torch.autograd.grad(cross_attention(leaf, k, x, **options).out, leaf, upstream)[0]
                for x in (v, dirty) for leaf in [q.detach().clone().requires_grad_()]]
        assert torch.equal(pair[0][~seen], pair[1][~seen])


def test_finite_biases_are_honoured_literally():
    q, k, v = case((2, 6, 9, 2, 16, 16))
    plain = cross_attention(q, k, v).out
    assert (cross_attention(q, k, v, bias=torch.full((2, 1, 1, 9), -10000.0)).out - plain).abs().max() < 2e-3
    hidden = torch.zeros(2, 1, 1, 9)
    hidden[:, :, :, 4:] = -10000.0
    assert torch.equal(cross_attention(q, k, v, bias=hidden).out,
                       cross_attention(q, k, v, bias=hidden.masked_fill(hidden < 0, -torch.inf)).out)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_row_without_keys_is_zero(backend):
    q, k, v = (x.requires_grad_() for x in case((2, 5, 7, 2, 8, 8)))
    mask = torch.rand(2, 5, 7) < 0.5
    mask[0, 2] = False
    bias = torch.zeros(2, 1, 5, 7)
    bias[1, 0, 4] = -torch.inf
    with vlmfast.backend(backend):
        out, probs, lse = cross_attention(q, k, v, mask=mask, bias=bias, return_probs=True, return_lse=True)
        d_q, d_k, d_v = torch.autograd.grad(out.sum() + probs.square().sum(), (q, k, v))
    for b, i in ((0, 2), (1, 4)):
        assert not out[b, i].any() and not probs[b, :, i].any() and not d_q[b, i].any()
        assert (lse[b, :, i] == -torch.inf).all()
    assert d_k.isfinite().all() and d_v.isfinite().all()


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 3, 4)], ids=str)
def test_empty_dimensions(size):
    batch, sq, sk = size
    q, k, v = case((batch, sq, sk, 2, 8, 8))
    bias = torch.zeros(1, 2, sq, sk)
    outputs, gradients = outputs_and_gradients(lambda q, k, v, b: cross_attention(q, k, v, bias=b).out, (q, k, v, bias))
    assert outputs[0].shape == (batch, sq, 2, 8) and all(g.isfinite().all() for g in gradients)
    if sk == 0:
        assert not outputs[0].any() and not gradients[0].any()
    none = tensors((2, 3, 0, 8), (2, 3, 0, 8), (2, 3, 0, 8))
    assert cross_attention(*none).out.shape == (2, 3, 0, 8)


def test_gradcheck():
    shape = 2, 4, 5, 2, 3, 2
    q, k, v = (x.double().requires_grad_() for x in case(shape))
    bias = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    lengths, plane = torch.tensor([5, 3]), torch.rand(2, 4, 5) < 0.8
    plane[:, :, 0] = True
    for options in ({}, {"lengths_k": lengths}, {"mask": plane}, {"causal": True}, {"dropout": 0.3, "seed": 2},
                    {"dropout": 0.3, "seed": 2, "probs_dropout": True}):
        def function(q, k, v, b, o=options):
            return cross_attention(q, k, v, bias=b, return_probs=True, return_lse=True, **o)

        assert torch.autograd.gradcheck(function, (q, k, v, bias)), options
    leaves = [x.double().requires_grad_() for x in co_case(batch=2, sa=3, sb=4, width=2)]
    pairs = {"pair_a": torch.tensor([0, 1, 1]), "pair_b": torch.tensor([0, 0, 1])}
    assert torch.autograd.gradcheck(lambda *x: co_attention(*x, **pairs)[:2], leaves)
    packed = [torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: attention_varlen(*x, torch.tensor([0, 2, 6])).out, packed)


def test_second_derivative_is_refused():
    q, k, v = (x.requires_grad_() for x in case((1, 3, 4, 1, 8, 8)))
    (gradient,) = torch.autograd.grad(cross_attention(q, k, v).out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: the second derivative is not implemented"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_gradients_one_by_one(which):
    leaves = [*case((5, 9, 13, 2, 16, 16)), torch.randn(1, 2, 9, 13)]
    whole = outputs_and_gradients(lambda q, k, v, b: cross_attention(q, k, v, bias=b).out, leaves)[1][which]

    def alone(x):
        parts = [x if i == which else y for i, y in enumerate(leaves)]
        return cross_attention(*parts[:3], bias=parts[3]).out

    assert torch.equal(outputs_and_gradients(alone, [leaves[which]])[1][0], whole)


def test_thread_count_changes_nothing():
    leaves = [*case((6, 70, 90, 4, 32, 32)), torch.randn(1, 4, 70, 90)]
    pairs = {"pair_q": torch.randint(0, 6, (7,)), "pair_k": torch.randint(0, 6, (7,))}
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for options in ({}, pairs):
                def function(q, k, v, b, o=options):
                    return cross_attention(q, k, v, bias=b, dropout=0.1, seed=1, **o).out

                results.append([x for part in outputs_and_gradients(function, leaves) for x in part])
    finally:
        torch.set_num_threads(before)
    for at, found in enumerate(results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(found, results[at % 2], strict=True))


LAYOUTS = {
    "packed qkv": lambda: torch.randn(2, 11, 3, 2, 16).unbind(2),
    "heads first": lambda: [torch.randn(2, 2, 11, 16).transpose(1, 2) for _ in range(3)],
    "transposed": lambda: [torch.randn(16, 2, 11, 2).permute(3, 2, 1, 0) for _ in range(3)],
    "expanded batch": lambda: [torch.randn(1, 11, 2, 16).expand(2, -1, -1, -1) for _ in range(3)],
    "every second row": lambda: [torch.randn(2, 22, 2, 16)[:, ::2] for _ in range(3)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    views = LAYOUTS[layout]()
    copies = [x.clone(memory_format=torch.contiguous_format) for x in views]
    upstream = torch.randn(2, 16, 2, 11).permute(0, 3, 2, 1)
    results = []
    for inputs in (views, copies):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attention(*leaves).out
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_output_is_written():
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = case((3, 9, 21, 2, 16, 16))
        options = {"lengths_q": torch.tensor([0, 4, 9]), "lengths_k": torch.tensor([3, 0, 21]), "return_probs": True}
        found = outputs_and_gradients(lambda *x: cross_attention(*x, **options)[:2], (q, k, v))
        packed = [torch.randn(9, 2, 8) for _ in range(3)]
        found += outputs_and_gradients(lambda *x: attention_varlen(*x, torch.tensor([0, 3, 3])).out, packed)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(x.isfinite().all() for part in found for x in part)


def test_saved_probabilities_and_recomputed_ones_give_the_same():
    # with a width of 8 the probabilities outweigh the inputs and are computed again, with 64 they are kept
    for width in (8, 64):
        leaves = case((2, 40, 50, 2, width, 16))
        check(lambda *x: cross_attention(*x).out, lambda *x, reorder=False: naive(*x, reorder=reorder)[0], leaves)


def test_reference_backend_computes_the_same():
    q, k, v = case((2, 9, 14, 2, 16, 8))
    options = {"lengths_k": torch.tensor([14, 6]), "causal": True, "bias": torch.randn(1, 2, 9, 14), "dropout": 0.2,
               "seed": 5, "return_probs": True, "return_lse": True}
    native = cross_attention(q, k, v, **options)
    with vlmfast.backend("reference"):
        plain = cross_attention(q, k, v, **options)
    for mine, same in zip(native, plain, strict=True):
        assert torch.allclose(mine, same, rtol=1e-5, atol=1e-6)
