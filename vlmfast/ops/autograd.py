"""What the ops' autograd functions share."""

import functools

import torch


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, gradient, *_sources):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _gradient):
        raise RuntimeError(f"{ctx.op}: the second derivative is not implemented")


def first_order(op: str):
    """Decorates the backward of an autograd function: its results are not differentiable again.

    Unlike `once_differentiable` this also holds where the upstream gradient is a constant, as in a gradient penalty,
    whose contribution would otherwise be lost without a word.
    """
    def decorate(backward):
        @functools.wraps(backward)
        def run(ctx, *upstream):
            with torch.no_grad():
                results = backward(ctx, *upstream)
            if not torch.is_grad_enabled():
                return results
            sources = [x for x in (*ctx.saved_tensors, *upstream) if x is not None and x.requires_grad]
            return tuple(x if x is None or not sources else _Refuse.apply(op, x, *sources) for x in results)

        return run

    return decorate
