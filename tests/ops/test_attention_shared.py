"""bi_attention against two softmaxes over one score matrix, written out with autograd."""

import pytest
import torch
from attention_helpers import check, outputs_and_gradients, tensors

import vlmfast
from vlmfast.ops import bi_attention, dropout_mask

# B, Sb, Sa, H, D, Dv of a, Dv of b
SHAPES = [(2, 70, 20, 2, 16, 24, 8), (1, 200, 33, 1, 40, 16, 33), (1, 64, 65, 2, 8, 8, 8), (3, 5, 3, 1, 1, 1, 1)]


def case(shape, dtype=torch.float32):
    batch, sb, sa, heads, width, dv_a, dv_b = shape
    return tensors((batch, sb, heads, width), (batch, sa, heads, width), (batch, sa, heads, dv_a),
                   (batch, sb, heads, dv_b), dtype=dtype)


def formula(query_b, key_a, value_a, value_b, *, live=None, bias=None, keep=(None, None), rates=(0.0, 0.0),
            reorder=False):
    """(out_a, out_b); live [B, 1, Sb, Sa]."""
    query_b, key_a, value_a, value_b = (x.transpose(1, 2) for x in (query_b, key_a, value_a, value_b))
    scale = query_b.shape[-1] ** -0.5
    scores = (query_b * scale) @ key_a.mT if reorder else scale * (query_b @ key_a.mT)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    outs = []
    for x, seen, value, mask, rate in ((scores.mT, None if live is None else live.mT, value_b, keep[0], rates[0]),
                                       (scores, live, value_a, keep[1], rates[1])):
        if seen is not None:
            empty = ~seen.any(-1, keepdim=True)
            x = x.masked_fill(~seen & ~empty, -torch.inf)
        probs = x.softmax(-1)
        if seen is not None:
            probs = probs.masked_fill(empty, 0.0)
        if mask is not None:
            probs = probs.masked_fill(~mask, 0.0) / (1 - rate)
        outs.append((probs @ value).transpose(1, 2))
    return tuple(outs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_definition(shape, dtype):
    check(lambda *x: bi_attention(*x)[:2], formula, case(shape, dtype))


def masks(kind, batch, sa, sb):
    """(options, live [B, 1, Sb, Sa])"""
    lengths_a, lengths_b = torch.randint(1, sa + 1, (batch,)), torch.randint(0, sb + 1, (batch,), dtype=torch.int32)
    holes_a, holes_b = torch.rand(batch, sa) < 0.6, torch.rand(batch, sb) < 0.6
    live_a, live_b = torch.ones(batch, sa).bool(), torch.ones(batch, sb).bool()
    options = {}
    if "lengths" in kind:
        options.update(lengths_a=lengths_a, lengths_b=lengths_b)
        live_a &= torch.arange(sa) < lengths_a[:, None]
        live_b &= torch.arange(sb) < lengths_b[:, None]
    if "holes" in kind:
        options.update(mask_a=holes_a, mask_b=holes_b)
        live_a, live_b = live_a & holes_a, live_b & holes_b
    return options, (live_a[:, None] & live_b[:, :, None])[:, None]


@pytest.mark.parametrize("kind", ["lengths", "holes", "lengths and holes"])
def test_masks_of_both_streams(kind):
    shape = 3, 90, 21, 2, 16, 16, 16
    options, live = masks(kind, 3, 21, 90)
    check(lambda *x: bi_attention(*x, **options)[:2], lambda *x, reorder=False: formula(*x, live=live, reorder=reorder),
          case(shape))


@pytest.mark.parametrize("kind", ["plain", "holes"])
def test_dropout_is_the_published_mask(kind):
    shape = 2, 131, 19, 2, 16, 16, 16
    options, live = masks(kind, 2, 19, 131)
    keep = dropout_mask(5, 2, 2, 19, 131, 0.2, 0), dropout_mask(5, 2, 2, 131, 19, 0.4, 1)

    def ours(*x):
        return bi_attention(*x, dropout_a=0.2, dropout_b=0.4, seed=5, **options)[:2]

    check(ours, lambda *x, reorder=False: formula(*x, live=live, keep=keep, rates=(0.2, 0.4), reorder=reorder),
          case(shape))


def test_bias_and_its_gradient():
    shape = 2, 30, 11, 2, 16, 16, 16
    leaves = [*case(shape), torch.randn(1, 2, 30, 11)]
    check(lambda *x: bi_attention(*x[:4], bias=x[4])[:2],
          lambda *x, reorder=False: formula(*x[:4], bias=x[4], reorder=reorder), leaves)


def test_many_b_positions_are_summed_in_parts():
    # more than one part of 2048, the last of them short; averages of thousands of values are small
    leaves = case((1, 4700, 5, 1, 8, 8, 8))
    check(lambda *x: bi_attention(*x)[:2], formula, leaves)


def test_padding_changes_no_bit():
    shape = 2, 90, 21, 2, 16, 16, 16
    leaves = case(shape)
    lengths_a, lengths_b = torch.tensor([21, 9]), torch.tensor([90, 37])
    upstream = torch.randn(2, 21, 2, 16), torch.randn(2, 90, 2, 16)

    def run(function, leaves, upstream):
        leaves = [x.detach().clone().requires_grad_() for x in leaves]
        outputs = function(*leaves)[:2]
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    whole = run(lambda *x: bi_attention(*x, lengths_a=lengths_a, lengths_b=lengths_b), leaves, upstream)
    sizes = 37, 9, 9, 37
    alone = run(bi_attention, [x[1:, :n] for x, n in zip(leaves, sizes, strict=True)],
                [upstream[0][1:, :9], upstream[1][1:, :37]])
    for mine, other in zip(alone, whole, strict=True):
        assert torch.equal(mine[0], other[1, :mine.shape[1]]) and not other[1, mine.shape[1]:].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_what_is_masked_never_leaks(backend, poison):
    leaves = case((2, 50, 13, 2, 8, 8, 8))
    options, live = masks("holes", 2, 13, 50)
    dead_a, dead_b = ~options["mask_a"][:, :, None, None], ~options["mask_b"][:, :, None, None]
    results = []
    for value in (0.0, poison):
        inputs = [x.masked_fill(dead, value) for x, dead in zip(leaves, (dead_b, dead_a, dead_a, dead_b), strict=True)]
        with vlmfast.backend(backend):
            results.append([x for part in outputs_and_gradients(lambda *x: bi_attention(*x, **options)[:2], inputs)
                            for x in part])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert not results[0][0].masked_select(dead_a).any() and not results[0][1].masked_select(dead_b).any()


def test_large_scores_do_not_overflow():
    leaves = [20 * x for x in case((1, 130, 9, 1, 16, 16, 16))]
    found = bi_attention(*leaves)
    truth = formula(*(x.double() for x in leaves))
    for mine, true in zip(found[:2], truth, strict=True):
        assert (mine - true).norm() <= 1e-4 * true.norm()


def test_probabilities_and_log_sum_exps():
    leaves = case((2, 40, 9, 2, 16, 16, 16))
    plain = bi_attention(*leaves, return_lse=True)
    full = bi_attention(*leaves, return_lse=True, return_probs=True)
    for mine, other in zip((plain.out_a, plain.out_b, plain.lse_a, plain.lse_b),
                           (full.out_a, full.out_b, full.lse_a, full.lse_b), strict=True):
        assert (mine - other).abs().max() < 1e-5
    assert full.probs_a.shape == (2, 2, 9, 40) and full.probs_b.shape == (2, 2, 40, 9)
    assert (full.probs_a.sum(-1) - 1).abs().max() < 1e-5 and (full.probs_b.sum(-1) - 1).abs().max() < 1e-5


def test_gradcheck():
    leaves = [x.double().requires_grad_() for x in case((2, 5, 4, 1, 3, 2, 3))]
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    for options in ({}, {"mask_a": mask}, {"dropout_a": 0.3, "dropout_b": 0.2, "seed": 1}):
        def function(*x, o=options):
            found = bi_attention(*x, return_lse=True, **o)
            return found.out_a, found.out_b, found.lse_b

        assert torch.autograd.gradcheck(function, leaves), options


@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_empty_streams(size):
    leaves = case((2, size[0], size[1], 1, 8, 8, 8))
    outputs, gradients = outputs_and_gradients(lambda *x: bi_attention(*x)[:2], leaves)
    assert not any(x.any() for x in outputs) and not any(g.any() for g in gradients)


def test_thread_count_changes_nothing():
    leaves = case((1, 4500, 17, 2, 16, 16, 16))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = outputs_and_gradients(lambda *x: bi_attention(*x, dropout_b=0.1, seed=1)[:2], leaves)
            results.append([x for part in found for x in part])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        leaves = case((2, 9, 5, 2, 8, 8, 8), dtype)
        live = torch.rand(2, 9) < 0.7
        arguments = *leaves, None, live, torch.tensor(4), 0.3, 0.1, 0.0
        ops = torch.ops.vlmfast
        torch.library.opcheck(ops.bi_attention_fwd.default, arguments)
        found = ops.bi_attention_fwd(*arguments)
        upstream = [torch.ones_like(x) for x in found[:4]]
        saved = found[0], found[4], found[5]
        torch.library.opcheck(ops.bi_attention_bwd.default,
                              (*upstream, *leaves, None, live, torch.tensor(4), *saved, 0.3, 0.1, 0.0))


@pytest.mark.slow
def test_compiles_to_one_graph():
    leaves = [x.clone().requires_grad_() for x in case((1, 20, 7, 2, 8, 8, 8))]

    def step(*x):
        found = bi_attention(*x, lengths_a=torch.tensor([5]))
        return found.out_a.square().sum() + found.out_b.sum()

    plain, ours = step(*leaves), torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    assert abs(plain - ours) < 1e-5 * abs(plain)
    for a, b in zip(torch.autograd.grad(plain, leaves), torch.autograd.grad(ours, leaves), strict=True):
        assert (a - b).norm() <= 1e-6 * a.norm()


def test_second_derivative_is_refused():
    leaves = [x.clone().requires_grad_() for x in case((1, 4, 3, 1, 8, 8, 8))]
    (gradient,) = torch.autograd.grad(bi_attention(*leaves).out_a.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="bi_attention: the second derivative is not implemented"):
        gradient.square().sum().backward()
