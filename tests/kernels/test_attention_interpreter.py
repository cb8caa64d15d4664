"""Triton's attention kernels, interpreted on the CPU, against the float64 definition of the primitives."""

import pytest
import torch
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch
from vlmfast.kernels import attention as kernels

import vlmfast
from vlmfast.ops import (
    attention,
    attention_varlen,
    axial_attention,
    bi_attention,
    co_attention,
    co_attention_varlen,
    cross_attention,
    window_attention,
)
from vlmfast.ops.reference import attention as reference

pytestmark = [pytest.mark.usefixtures("poisoned_memory", "small_tiles"),
              pytest.mark.filterwarnings("ignore:(.*invalid value|All-NaN slice) encountered:RuntimeWarning")]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SEED = torch.tensor(0x1234_5678_9ABC_DEF0)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 x 16, so that small shapes have several of them and a ragged last one."""
    monkeypatch.setattr(kernels, "tile_for", lambda *arguments: kernels.Tile(16, 16, 4, 1))


def streams(*shapes, dtype=torch.float32):
    """Views [B, S, H, D] of a Linear's output, with NaN behind each row."""
    found = []
    for *lead, heads, width in shapes:
        rows = torch.full((*lead, heads * width + 8), torch.nan)
        rows[..., :heads * width] = torch.randn(*lead, heads * width)
        found.append(rows.to(dtype)[..., :heads * width].unflatten(-1, (heads, width)))
    return found


B, SQ, SK, H, D, DV = 2, 19, 30, 2, 8, 12
LENGTHS = {"lengths_q": torch.tensor([19, 5]), "lengths_k": torch.tensor([0, 23])}


def options_of(kind, batch=B, sq=SQ, sk=SK, heads=H):
    """Keyword arguments of the primitives; a kind may name several."""
    found = {}
    for part in kind.split("+"):
        found |= {
            "plain": {},
            "lengths": LENGTHS,
            "holes": {"key_mask": torch.rand(batch, sk) < 0.6},
            "mask": {"mask": torch.rand(batch, heads, sq, sk) < 0.5},
            "shared mask": {"mask": torch.rand(1, 1, sq, sk) < 0.5},
            "query mask": {"mask": torch.rand(batch, 1, sq, 1) < 0.5},
            "bias": {"bias": torch.randn(1, heads, sq, sk)},
            "own bias": {"bias": torch.randn(batch, 1, sq, sk)},
            "key bias": {"bias": torch.randn(batch, 1, 1, sk)},
            "scalar bias": {"bias": torch.randn(1, heads, 1, 1)},
            "excluding bias": {"bias": torch.where(torch.rand(batch, 1, sq, sk) < 0.3, -torch.inf, 0.5)},
            "causal": {"causal": True},
            "prefix": {"causal": True, "prefix": torch.tensor([3, 28])},
            "dropout": {"dropout": 0.3, "seed": SEED, "direction": 1},
            "dropout after": {"dropout": 0.25, "seed": SEED, "probs_dropout": True},
            "pairs": {"pair_q": torch.tensor([0, 0, 1]), "pair_k": torch.tensor([1, 0, 1])},
        }[part]
    return found


def relative(ours, truth):
    return ((ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def assert_results(ours, truths, sames, names, factor, cancelling=()):
    size = max(truth.norm().item() for truth in truths if truth is not None and truth.numel())
    for name, our, truth, same in zip(names, ours, truths, sames, strict=True):
        assert (our is None) == (truth is None), name
        if our is None:
            continue
        assert our.dtype == same.dtype, f"{name}: {our.dtype}, must be {same.dtype}"
        infinite = truth.isinf()
        assert torch.equal(our.isinf(), infinite), name
        our, truth, same = (x.masked_fill(infinite, 0.0) for x in (our, truth, same))
        assert_no_worse_than_torch(our, truth, same, factor=factor, what=name,
                                   size=size if name in cancelling else None)
        if factor > 2 and name not in cancelling and truth.ndim == 4 and truth.norm() > 0:
            assert_grad_not_dropped(our, truth, what=name)


def eager(query, key, value, *, bias=None, scale, dropout=0.0, seed=None, direction=0, probs_dropout=False, **masks):
    """(out, probs, lse) of the formula people write, in the inputs' own dtype."""
    live = reference.live_pairs(len(query), query.shape[1], key.shape[1], None, bias=bias, **masks)
    x = scale * (query.transpose(1, 2) @ key.permute(0, 2, 3, 1))
    x = x if bias is None else x + bias.to(x.dtype)
    p, lse = reference.softmax(x, live)
    keep = reference.dropout_mask(seed, *p.shape, dropout, direction) if dropout else torch.ones_like(p, dtype=bool)
    dropped = p.masked_fill(~keep, 0.0) / (1 - dropout)
    return (dropped @ value.transpose(1, 2)).transpose(1, 2), dropped if probs_dropout else p, lse.float()


def eager_backward(upstream, query, key, value, bias=None, **options):
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in (query, key, value, bias)]
    outputs = eager(*leaves[:3], bias=leaves[3], **options)
    total = sum((x.masked_fill(x.isinf(), 0.0) * g).sum() for x, g in zip(outputs, upstream, strict=True)
                if g is not None)
    found = iter(torch.autograd.grad(total, [x for x in leaves if x is not None]))
    return [None if x is None else next(found) for x in leaves]


def check(query, key, value, cancelling=(), **options):
    """Results and gradients of the primitives, with and without gradients of probabilities and log-sum-exps."""
    dtype, narrow = query.dtype, query.dtype != torch.float32
    wide = [x.double() for x in (query, key, value)]
    options = {"scale": 0.4} | options
    wide_options = {name: x.double() if name == "bias" else x for name, x in options.items()}
    truth = reference.forward(*wide, **wide_options)
    ours = kernels.forward(query, key, value, **options)
    same = (eager if narrow else reference.forward)(query, key, value, **options)
    assert_results(ours, truth, same, ("out", "probs", "lse"), 2.0)
    everything = [None if x is None else torch.randn(x.shape).to(dtype if i < 2 else torch.float32)
                  for i, x in enumerate(truth)]
    saved = kernels.forward_with_statistics(query, key, value, False, False, True, **options)[::3]
    for upstream, kept in ((everything, None), ((everything[0], None, None), saved)):
        truth = reference.backward(*(None if x is None else x.double() for x in upstream), *wide, **wide_options)
        ours = kernels.backward(*upstream, query, key, value, saved=kept, **options)
        same = eager_backward(upstream, query, key, value, **options) if narrow else \
            reference.backward(*upstream, query, key, value, **options)
        assert_results(ours, truth, same, ("d_query", "d_key", "d_value", "d_bias"), 3.0, cancelling)
        assert all(x is None or x.isfinite().all() for x in ours)


KINDS = ["plain", "lengths", "holes", "mask", "query mask", "bias", "own bias", "key bias", "scalar bias",
         "excluding bias", "causal", "dropout", "dropout after", "pairs", "lengths+prefix",
         "lengths+holes+shared mask+bias", "pairs+lengths+holes+dropout", "holes+excluding bias+prefix+dropout after"]


@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_definition_with_every_option(kind):
    # what is the same for all keys does not change a softmax
    check(*streams((B, SQ, H, D), (B, SK, H, D), (B, SK, H, DV)), **options_of(kind),
          cancelling=("d_bias",) if kind == "scalar bias" else ())


@pytest.mark.parametrize("kind", ["lengths+holes+mask+bias", "dropout after"])
@pytest.mark.parametrize("dtype", list(DTYPES.values())[1:], ids=list(DTYPES)[1:])
def test_16_bit_inputs(dtype, kind):
    check(*streams((B, SQ, H, 16), (B, SK, H, 16), (B, SK, H, 16), dtype=dtype), **options_of(kind))


# B, Sq, Sk, H, D, Dv: one row, whole tiles, widths that are and are not powers of two
SHAPES = [(1, 1, 1, 1, 1, 1), (3, 1, 17, 1, 3, 20), (1, 16, 32, 1, 16, 16), (1, 33, 16, 3, 20, 1),
          (1, 5, 7, 1, 129, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-Q{}-K{}-H{}-D{}-V{}".format(*s))
def test_matches_the_definition_in_every_shape(shape):
    batch, sq, sk, heads, width, dv = shape
    check(*streams((batch, sq, heads, width), (batch, sk, heads, width), (batch, sk, heads, dv)),
          scale=width ** -0.5, cancelling=("d_query", "d_key") if sk == 1 else ())


@pytest.mark.parametrize("kind", ["plain", "lengths+causal+dropout"])
def test_the_tiles_of_a_gpu_give_the_same(kind, monkeypatch):
    monkeypatch.undo()
    torch.use_deterministic_algorithms(True)
    check(*streams((B, SQ, H, 64), (B, SK, H, 64), (B, SK, H, 64)), **(options_of(kind) | {"scale": 0.1}))


@pytest.mark.parametrize("sq, sk", [(37, 19), (19, 37), (16, 16), (40, 5)])
def test_the_last_query_sees_the_last_key(sq, sk):
    check(*streams((1, sq, 1, D), (1, sk, 1, D), (1, sk, 1, D)), causal=True)


@pytest.mark.parametrize("kind", ["plain", "causal", "holes", "dropout"])
def test_packed_streams(kind):
    # an empty sequence, and slack behind the last
    cu_q, cu_k = torch.tensor([0, 9, 9, 40, 41]), torch.tensor([0, 3, 20, 38, 38])
    options = options_of(kind)
    if kind == "holes":
        options = {"key_mask": torch.rand(41) < 0.6}
    query, key, value = streams((44, H, D), (41, H, D), (41, H, DV))
    for x, cu in ((query, cu_q), (key, cu_k), (value, cu_k)):
        x[cu[-1]:] = torch.nan
    check(query, key, value, cu_q=cu_q, cu_k=cu_k, **options)


def test_sequence_starts_may_be_anywhere_in_the_tiles():
    for cu in ([0, 0, 0, 1], [0, 16, 32, 33], [0, 15, 17, 33], [0, 33], [0, 0]):
        cu = torch.tensor(cu)
        query, key, value = streams((33, 1, D), (33, 1, D), (33, 1, D))
        ours = kernels.forward(query, key, value, cu_q=cu, cu_k=cu)
        truth = reference.forward(query, key, value, cu_q=cu, cu_k=cu)
        assert torch.equal(ours[2].isinf(), truth[2].isinf())
        assert relative(ours[0], truth[0]) < 1e-6


@pytest.mark.parametrize("direction", [0, 1])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropout_is_the_published_mask(p, direction):
    query, key, value = torch.zeros(2, 21, 3, 1), torch.zeros(2, 23, 3, 1), torch.ones(2, 23, 3, 1)
    for seed in (-1, 2**62 + 12345):
        probs = kernels.forward(query, key, value, dropout=p, seed=torch.tensor(seed), direction=direction,
                                probs_dropout=True)[1]
        assert torch.equal(probs > 0, reference.dropout_mask(seed, 2, 3, 21, 23, p, direction))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["lengths", "holes", "mask", "excluding bias", "lengths+prefix", "pairs+holes"])
def test_what_is_masked_never_leaks(kind, poison):
    query, key, value = (x.clone() for x in streams((B, SQ, H, D), (B, SK, H, D), (B, SK, H, DV)))
    options = options_of(kind)
    if "key_mask" in options:
        options["key_mask"][0, 7::16] = False
    probs = reference.forward(query, key, value, **options)[1]
    batch = probs.shape[0]
    bad = torch.zeros(B, SK, dtype=torch.bool)
    bad[:, 7::16] = True
    pair_q, pair_k = options.get("pair_q", torch.arange(batch)), options.get("pair_k", torch.arange(batch))
    touched = ((probs > 0) & bad[pair_k][:, None, None]).any(-1).transpose(1, 2)
    assert touched.any() and not touched.all()
    found = []
    for value_of_bad in (0.0, poison):
        k, v = (x.masked_fill(bad[:, :, None, None], value_of_bad) for x in (key, value))
        found.append(kernels.forward(query, k, v, **options)[0])
        # what is seen is not hidden either
        if value_of_bad != 0:
            assert (~kernels.forward(query, key, v, **options)[0].isfinite()).any(-1)[touched].all()
    assert torch.equal(found[1][~touched], found[0][~touched])
    # a query that sees nothing and a key that nobody sees hold anything at all
    live = probs > 0
    unseen_q = torch.ones(B, SQ, dtype=torch.bool).index_put((pair_q,), torch.tensor(False))
    unseen_k = torch.ones(B, SK, dtype=torch.bool)
    for p in range(batch):
        unseen_q[pair_q[p]] = True
    for p in range(batch):
        unseen_q[pair_q[p]] &= ~live[p].any(0).any(-1)
        unseen_k[pair_k[p]] &= ~live[p].any(0).any(0)
    d_out = torch.randn(batch, SQ, H, DV)
    found = []
    for value_of_bad in (0.0, poison):
        q, k, v = (x.masked_fill(u[:, :, None, None], value_of_bad)
                   for x, u in ((query, unseen_q), (key, unseen_k), (value, unseen_k)))
        found.append(kernels.backward(d_out.masked_fill(unseen_q[pair_q][:, :, None, None], value_of_bad), None, None,
                                      q, k, v, **options))
    for clean, dirty in zip(*found, strict=True):
        assert clean is None or torch.equal(clean, dirty)


def test_gradients_of_other_queries_do_not_notice_a_key_they_do_not_see():
    query, key, value = streams((1, SQ, 1, D), (1, SK, 1, D), (1, SK, 1, D))
    mask, d_out = torch.rand(1, 1, SQ, SK) < 0.5, torch.randn(1, SQ, 1, D)
    dirty = value.clone()
    dirty[:, 7] = torch.inf
    clean, found = (kernels.backward(d_out, None, None, query, key, v, mask=mask)[0] for v in (value, dirty))
    seen = mask[0, 0, :, 7]
    assert torch.equal(found[0, ~seen], clean[0, ~seen]) and not found[0, seen].isfinite().any()


@pytest.mark.parametrize("kind", ["mask", "holes", "causal"])
def test_gradients_of_keys_do_not_notice_a_query_that_does_not_see_them(kind):
    query, key, value = (x.clone() for x in streams((1, SQ, 1, D), (1, SK, 1, D), (1, SK, 1, D)))
    options, d_out = options_of(kind, batch=1, heads=1), torch.randn(1, SQ, 1, D)
    seen = reference.forward(query, key, value, **options)[1][0, 0, 11] > 0
    clean = kernels.backward(d_out, None, None, query, key, value, **options)
    for dirty in (query, d_out):
        before = dirty[0, 11].clone()
        dirty[0, 11] = torch.nan
        found = kernels.backward(d_out, None, None, query, key, value, **options)
        dirty[0, 11] = before
        for ours, truth in zip(found[1:3], clean[1:3], strict=True):
            assert torch.equal(ours[0, ~seen], truth[0, ~seen]) and not ours[0, seen].isfinite().any()


def test_a_row_without_keys_is_zero():
    query, key, value = streams((B, SQ, H, D), (B, SK, H, D), (B, SK, H, D))
    mask = torch.rand(B, 1, SQ, SK) < 0.5
    mask[0, 0, 2] = False
    bias = torch.zeros(B, 1, SQ, SK)
    bias[1, 0, 18] = -torch.inf
    options = {"mask": mask, "bias": bias}
    out, probs, lse = kernels.forward(query, key, value, **options)
    d_query, *others = kernels.backward(torch.ones_like(out), torch.ones_like(probs), torch.ones_like(lse), query, key,
                                        value, **options)
    for b, i in ((0, 2), (1, 18)):
        assert not out[b, i].any() and not probs[b, :, i].any() and not d_query[b, i].any()
        assert (lse[b, :, i] == -torch.inf).all()
    assert not others[2][0, 0, 2].any() and not others[2][1, 0, 18].any()
    assert all(x.isfinite().all() for x in (out, probs, d_query, *others))


def test_finite_biases_are_honoured_literally():
    query, key, value = streams((B, SQ, H, D), (B, SK, H, D), (B, SK, H, D))
    plain = kernels.forward(query, key, value)
    sunk = kernels.forward(query, key, value, bias=torch.full((B, 1, 1, SK), -10000.0))
    assert (sunk[0] - plain[0]).abs().max() < 2e-3
    # the normaliser is not rounded at the size of the bias
    assert (sunk[1].sum(-1) - 1).abs().max() < 1e-6
    d_out = torch.randn_like(plain[0])
    for ours, theirs in zip(kernels.backward(d_out, None, None, query, key, value), kernels.backward(
            d_out, None, None, query, key, value, bias=torch.full((B, 1, 1, SK), -10000.0)), strict=True):
        assert ours is None or relative(theirs, ours) < 3e-3


def test_large_scores_do_not_overflow():
    query, key, value = (10 * x for x in streams((1, SQ, 1, D), (1, SK, 1, D), (1, SK, 1, D)))
    d_out, wide = torch.randn(1, SQ, 1, D), [x.double() for x in (query, key, value)]
    ours, truth = kernels.forward(query, key, value), reference.forward(*wide)
    assert truth[2].max() > 300 and all(relative(a, b) < 1e-6 for a, b in zip(ours, truth, strict=True))
    gradients = kernels.backward(d_out, None, None, query, key, value)
    truth = reference.backward(d_out.double(), None, None, *wide)
    # the largest probabilities are all but 1: what is left of the scores' gradients has few digits
    assert all(relative(a, b) < 1e-3 for a, b in zip(gradients[:3], truth, strict=False))


@pytest.mark.parametrize("size", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty_dimensions(size):
    batch, sq, sk = size
    query, key, value = torch.randn(batch, sq, 2, 8), torch.randn(batch, sk, 2, 8), torch.randn(batch, sk, 2, 5)
    bias = torch.zeros(1, 2, sq, sk)
    ours = kernels.forward(query, key, value, bias=bias)
    truth = reference.forward(query, key, value, bias=bias)
    assert all(torch.equal(a, b) for a, b in zip(ours, truth, strict=True))
    gradients = kernels.backward(torch.ones_like(ours[0]), None, None, query, key, value, bias=bias)
    assert all(g.shape == x.shape and not g.any()
               for g, x in zip(gradients, (query, key, value, bias), strict=True))


def test_only_wanted_gradients_are_returned():
    query, key, value = streams((B, SQ, H, D), (B, SK, H, D), (B, SK, H, D))
    bias, d_out = torch.randn(1, H, SQ, SK), torch.randn(B, SQ, H, D)
    everything = kernels.backward(d_out, None, None, query, key, value, bias=bias)
    for needs in ((True, False, False, False), (False, True, False, False), (False, False, True, True)):
        found = kernels.backward(d_out, None, None, query, key, value, bias=bias, needs=needs)
        for ours, whole, need in zip(found, everything, needs, strict=True):
            assert (ours is not None) == need and (ours is None or torch.equal(ours, whole))


def test_repeated_runs_are_bitwise_equal():
    query, key, value = streams((B, SQ, 1, 16), (B, SK, 1, 16), (B, SK, 1, 16), dtype=torch.bfloat16)
    options = options_of("pairs") | {"bias": torch.randn(1, 1, SQ, SK)}
    d_out = torch.randn(3, SQ, 1, 16).bfloat16()
    first, second = ((*kernels.forward(query, key, value, **options),
                      *kernels.backward(d_out, None, None, query, key, value, **options)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_bias_gradients_add_up_over_any_split(splits, monkeypatch):
    query, key, value = streams((5, 7, 1, D), (5, 9, 1, D), (5, 9, 1, D))
    bias, d_out = torch.randn(1, 1, 7, 9), torch.randn(5, 7, 1, D)
    monkeypatch.setattr(kernels, "_splits", lambda programs, device: splits)
    ours = kernels.backward(d_out, None, None, query, key, value, bias=bias)[3]
    assert relative(ours, reference.backward(d_out, None, None, query, key, value, bias=bias)[3]) < 1e-6


def test_rejects_what_the_kernels_do_not_take():
    x = torch.randn(1, 3, 1, 8)
    with pytest.raises(TypeError, match="query is torch.float64, the Triton backend takes float32"):
        kernels.forward(*[x.double()] * 3)
    with pytest.raises(ValueError, match="value has width 257, the Triton backend takes 256 at most"):
        kernels.forward(x, x, torch.randn(1, 3, 1, 257))


# The public ops on this backend against the definition


def both(function, leaves):
    """Outputs and gradients of function(*leaves) on Triton and by the definition."""
    found = []
    for backend in ("triton", "reference"):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        with vlmfast.backend(backend):
            outputs = [x for x in function(*inputs) if x is not None]
        generator = torch.Generator().manual_seed(5)
        total = sum((x.masked_fill(x.isinf(), 0.0).double()
                     * torch.randn(x.shape, generator=generator, dtype=torch.float64)).sum() for x in outputs)
        # outside the block: the backward belongs to the forward
        found.append(([x.detach() for x in outputs], torch.autograd.grad(total, inputs)))
    return found


def assert_both(function, leaves, limit=2e-6):
    ours, theirs = both(function, leaves)
    for kind in (0, 1):
        for at, (a, b) in enumerate(zip(ours[kind], theirs[kind], strict=True)):
            what = f"{'gradient' if kind else 'output'} {at}"
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.isinf(), b.isinf()), what
            infinite = b.isinf()
            assert relative(a.masked_fill(infinite, 0.0), b.masked_fill(infinite, 0.0)) < limit, what


def co_streams(dtype=torch.float32):
    return streams(*[(B, SQ, H, D)] * 3, *[(B, SK, H, D)] * 3, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_co_attention(dtype):
    holes = torch.rand(B, SK) < 0.7
    options = {"lengths_a": torch.tensor([19, 4]), "lengths_b": torch.tensor([0, 26]), "mask_b": holes, "seed": 5,
               "dropout_a": 0.2, "dropout_b": 0.1, "return_probs": True, "return_lse": True}
    bias = torch.randn(1, H, SQ, SK)
    assert_both(lambda *x: co_attention(*x[:6], bias_a=x[6], **options), [*co_streams(dtype), bias],
                2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


def test_co_attention_of_pairs():
    options = {"pair_a": torch.tensor([0, 0, 1]), "pair_b": torch.tensor([1, 0, 1]), "lengths_a": torch.tensor([19, 4])}
    assert_both(lambda *x: co_attention(*x, **options), co_streams())


def test_packed_equals_padded_bit_for_bit():
    leaves = co_streams()
    lengths_a, lengths_b = torch.tensor([19, 4]), torch.tensor([2, 26])
    cu_a, cu_b = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (lengths_a, lengths_b))
    upstream = torch.randn(B, SQ, H, D), torch.randn(B, SK, H, D)

    def pack(x, lengths):
        return torch.cat([x[i, :n] for i, n in enumerate(lengths)])

    def run(function, leaves, upstream):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        outputs = function(*leaves)[:2]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    options = {"dropout_a": 0.1, "dropout_b": 0.2, "seed": 77}
    lengths = lengths_a, lengths_b, *[lengths_a] * 3, *[lengths_b] * 3
    with vlmfast.backend("triton"):
        padded = run(lambda *x: co_attention(*x, lengths_a=lengths_a, lengths_b=lengths_b, **options), leaves, upstream)
        packed = run(lambda *x: co_attention_varlen(*x, cu_a, cu_b, **options),
                     [pack(x, n) for x, n in zip(leaves, lengths[2:], strict=True)],
                     [pack(u, n) for u, n in zip(upstream, lengths, strict=False)])
    for mine, other, n in zip(packed, padded, lengths, strict=True):
        assert torch.equal(mine, pack(other, n))


def test_self_attention_and_its_packed_form():
    leaves = streams(*[(B, SQ, H, D)] * 3)
    assert_both(lambda *x: attention(*x, causal=True, lengths=torch.tensor([19, 7]), return_lse=True), leaves)
    assert_both(lambda *x: attention_varlen(*(y.flatten(0, 1) for y in x), torch.tensor([0, 11, 30]), causal=True,
                                            return_lse=True), leaves)


def test_one_tensor_as_query_key_and_value():
    (x,) = streams((B, SQ, H, D))
    assert_both(lambda x: cross_attention(x, x, x, return_probs=True), [x])


@pytest.mark.parametrize("masks", ["none", "lengths", "holes"])
def test_bi_attention(masks):
    query_b, key_a, value_a, value_b = streams((B, SK, H, D), (B, SQ, H, D), (B, SQ, H, DV), (B, SK, H, 4))
    options = {"none": {}, "lengths": {"lengths_a": torch.tensor([19, 4]), "lengths_b": torch.tensor([30, 0])},
               "holes": {"mask_a": torch.rand(B, SQ) < 0.6, "mask_b": torch.rand(B, SK) < 0.6, "dropout_a": 0.2,
                         "dropout_b": 0.3, "seed": 3}}[masks]
    assert_both(lambda *x: bi_attention(*x[:4], bias=x[4], return_probs=True, return_lse=True, **options),
                [query_b, key_a, value_a, value_b, torch.randn(1, H, SK, SQ)])


def test_bi_attention_never_reads_what_is_masked():
    leaves = [x.clone() for x in streams((B, SK, H, D), (B, SQ, H, D), (B, SQ, H, D), (B, SK, H, D))]
    mask_a, mask_b = torch.rand(B, SQ) < 0.6, torch.rand(B, SK) < 0.6
    results = []
    for poison in (0.0, torch.nan):
        inputs = [x.masked_fill(~mask[:, :, None, None], poison).requires_grad_()
                  for x, mask in zip(leaves, (mask_b, mask_a, mask_a, mask_b), strict=True)]
        with vlmfast.backend("triton"):
            out_a, out_b, *_ = bi_attention(*inputs, mask_a=mask_a, mask_b=mask_b)
        results.append((out_a, out_b, *torch.autograd.grad(out_a.square().sum() + out_b.sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("shift", [0, 1, (1, 2)], ids=str)
def test_window_attention(shift):
    assert_both(lambda x, t: [window_attention(x, t, window=4, shift=shift)],
                [torch.randn(2, 8, 8, 3, 2, 8), torch.randn(49, 2)])


def test_window_attention_over_time_and_with_dropout():
    assert_both(lambda x, t: [window_attention(x, t, window=(2, 2, 4), shift=(1, 0, 2))],
                [torch.randn(1, 4, 4, 4, 3, 2, 8), torch.randn(3 * 3 * 7, 2)])
    assert_both(lambda x, t: [window_attention(x, t, window=4, dropout=0.3, seed=9)],
                [torch.randn(2, 4, 8, 3, 2, 8), torch.randn(2, 16, 16)])


@pytest.mark.parametrize("mode", ["row", "col", "conv", "row_only", "corner", "full"])
def test_axial_attention(mode):
    leaves = streams(*[(2, 29, 2, D)] * 3)
    assert_both(lambda *x: [axial_attention(*x, text_len=5, grid=(4, 6), mode=mode, kernel=3)], leaves)


def test_axial_attention_without_text_and_with_dropout():
    leaves = streams(*[(1, 24, 2, D)] * 3)
    assert_both(lambda *x: [axial_attention(*x, text_len=0, grid=(4, 6), mode="conv", kernel=3)], leaves)
    assert_both(lambda *x: [axial_attention(*x, text_len=4, grid=(4, 5), mode="col", dropout=0.3, seed=4)], leaves)


def test_the_op_keeps_its_contract():
    from vlmfast.ops.attention_call import KEEP, LSE, PROBS, Options

    q, k, v = streams((2, 5, 2, 16), (2, 7, 2, 16), (2, 7, 2, 16))
    arguments = [torch.randn(1, 2, 5, 7)], [*Options(lengths_k=torch.tensor([7, 3]))], torch.tensor(3)
    numbers = [0.3], [0.1], [PROBS | LSE | KEEP]
    with vlmfast.backend("triton"):
        forward = ([q, k, v], *arguments, *numbers, "cross_attention")
        torch.library.opcheck(torch.ops.vlmfast.attention_fwd.default, forward, test_utils=("test_schema",
                                                                                           "test_faketensor"))
        out, probs, lse, kept = torch.ops.vlmfast.attention_fwd(*forward)
        assert kept.shape == (2, 2, 2, 5)
        torch.library.opcheck(torch.ops.vlmfast.attention_bwd.default,
                              ([torch.randn_like(out), torch.randn_like(probs), torch.zeros_like(lse)], [q, k, v],
                               *arguments, [kept, out], *numbers, [True] * 4, "cross_attention"),
                              test_utils=("test_schema", "test_faketensor"))


def test_the_backward_reuses_what_the_forward_kept(monkeypatch):
    leaves = [x.requires_grad_() for x in streams((1, 5, 1, D), (1, 7, 1, D), (1, 7, 1, D))]
    with vlmfast.backend("triton"):
        out = cross_attention(*leaves).out
        monkeypatch.setattr(kernels, "forward_with_statistics", None)
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), leaves))
