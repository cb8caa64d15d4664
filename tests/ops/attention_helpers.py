"""The attention formulae as a user would write them, with autograd, and their comparison with the ops."""

import torch
from tolerance import assert_grad_not_dropped, assert_no_worse_than_torch

from vlmfast.ops.reference.attention import dropout_mask


def tensors(*shapes, dtype=torch.float32):
    """Views [B, S, H, D] of a Linear's output with something behind each row."""
    found = []
    for batch, length, heads, width in shapes:
        found.append(torch.randn(batch, length, heads * width + 8).to(dtype)[..., :heads * width]
                     .unflatten(2, (heads, width)))
    return found


def prefix_mask(lengths, size):
    return torch.arange(size) < lengths[:, None]


def naive(query, key, value, *, live=None, bias=None, scale=None, dropout=0.0, seed=None, direction=0, reorder=False):
    """(out, probs before dropout) from [B, S, H, D]; live and bias broadcast to [B, H, Sq, Sk].

    A row without a live key gives 0. `reorder` scales the queries instead of the scores, an order that is as good.
    """
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = (query * scale) @ key.transpose(-1, -2) if reorder else scale * (query @ key.transpose(-1, -2))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    if live is not None:
        scores = scores.masked_fill(~live, -torch.inf)
        empty = ~live.expand(scores.shape).any(-1, keepdim=True)
        probs = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(~live, 0.0).masked_fill(empty, 0.0)
    else:
        probs = scores.softmax(-1)
    dropped = probs
    if dropout:
        keep = dropout_mask(seed, *probs.shape, dropout, direction)
        dropped = probs.masked_fill(~keep, 0.0) / (1 - dropout)
    return (dropped @ value).transpose(1, 2), probs


def outputs_and_gradients(function, leaves, seed=5):
    """The outputs of function(*leaves) and the gradients of their inner product with fixed random directions."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for out in outputs:
        upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        total = total + (out.double() * upstream.double()).sum()
    return [out.detach() for out in outputs], list(torch.autograd.grad(total, leaves))


def check(ours, formula, leaves, *, cancelling=(), what=""):
    """`ours` and `formula` are functions of the leaves; formula takes `reorder`.

    Gradients in `cancelling`, by position, are sums whose terms cancel: they are judged by the largest gradient's size.
    """
    outputs, gradients = outputs_and_gradients(ours, leaves)
    double = [x.double() for x in leaves]
    truth = outputs_and_gradients(formula, double)
    # two orders of operations, the worse one counts
    eager = [outputs_and_gradients(lambda *x, r=r: formula(*x, reorder=r), leaves) for r in (False, True)]
    for kind, factor in ((0, 2.0), (1, 3.0)):
        for at, (mine, true) in enumerate(zip((outputs, gradients)[kind], truth[kind], strict=True)):
            name = f"{what} {'gradient' if kind else 'output'} {at}"
            worst = max((run[kind][at] for run in eager), key=lambda x, t=true: (x.double() - t).norm().item())
            size = max(g.norm().item() for g in truth[1]) if kind and at in cancelling else None
            assert_no_worse_than_torch(mine, true, worst.to(mine.dtype), factor=factor, size=size, what=name)
            if kind and at not in cancelling and true.numel() and true.norm() > 0:
                assert_grad_not_dropped(mine, true, what=name)
