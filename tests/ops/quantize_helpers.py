"""The quantize family's formulas as one would write them, and comparisons with them."""

import math

import torch
import torch.nn.functional as F
from tolerance import assert_no_worse_than_torch

MODES = ["soft", "straight_through", "reinmax", "argmax"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, V, H, W, D): sizes that no block divides, whole blocks, a single position, several blocks of entries and positions
SHAPES = [(1, 1, 1, 1, 1), (2, 37, 3, 5, 7), (1, 130, 1, 1, 33), (3, 16, 4, 4, 16), (1, 300, 16, 9, 24),
          (2, 2100, 2, 3, 5), (1, 64, 20, 13, 128)]


def rows_of(x, layout):
    """[B, V, H, W] or [B, L, V] -> [N, V]."""
    return (x.movedim(1, -1) if layout == "nchw" else x).reshape(-1, x.shape[1 if layout == "nchw" else -1])


def formula(logits, codebook, noise, *, tau, mode, kl_weight, layout, reorder=False):
    """(z, kl, indices) with the noise given, in the dtype of the inputs; `reorder` sums in another order."""
    flat, count = rows_of(logits, layout), len(codebook)
    g = rows_of(noise, layout).to(flat.dtype) if mode != "argmax" else 0
    s = (flat + g) / tau
    y = s.softmax(-1)
    hard = F.one_hot(s.argmax(-1), count).to(flat.dtype)
    if mode == "straight_through":
        y = hard + (y - y.detach())
    elif mode == "argmax":
        y = hard
    elif mode == "reinmax":
        first = (hard + (flat / tau).softmax(-1)) / 2
        first = ((first.log() - flat).detach() + flat).softmax(-1)
        second = 2 * first - flat.softmax(-1) / 2
        y = hard + (second - second.detach())
    z = y.flip(-1) @ codebook.flip(0) if reorder else y @ codebook
    if layout == "nchw":
        batch, _, height, width = logits.shape
        z = z.view(batch, height, width, -1).movedim(-1, 1)
    else:
        z = z.view(*logits.shape[:2], -1)
    log_q = flat.log_softmax(-1)
    each = (log_q.exp() * (log_q + math.log(count))).sum(-1) if not reorder else \
        (log_q.exp() * flat).sum(-1) - flat.logsumexp(-1) + math.log(count)
    return z, kl_weight * each.mean(), s.argmax(-1)


def gradients(function, leaves):
    """(z, kl) and the gradients of their inner product with fixed directions."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in leaves]
    z, kl = function(*leaves)
    upstream = torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(z.dtype)
    found = torch.autograd.grad([z, kl], leaves, [upstream, torch.tensor(3.0, dtype=kl.dtype)], allow_unused=True)
    return z.detach(), kl.detach(), *(torch.zeros_like(x) if g is None else g
                                      for x, g in zip(leaves, found, strict=True))


def compare(ours, logits, codebook, noise, what="", **options):
    """`ours(logits, codebook)` -> (z, kl): values and gradients against the formula in float64 and in the same dtype.
    """
    def plain(leaves, reorder):
        return gradients(lambda x, c: formula(x, c, noise.to(x.dtype), reorder=reorder, **options)[:2], leaves)

    mine = gradients(ours, (logits, codebook))
    truth = plain((logits.double(), codebook.double()), False)
    if logits.dtype == torch.float64:
        for name, a, b in zip(("z", "kl", "d_logits", "d_codebook"), mine, truth, strict=True):
            assert (a - b).norm() <= 1e-13 * (b.norm() + math.log(len(codebook))), f"{what} {name}"
        return mine, truth
    eager = [plain((logits, codebook), reorder) for reorder in (False, True)]
    for at, name in enumerate(("z", "kl", "d_logits", "d_codebook")):
        worst = max((run[at] for run in eager), key=lambda x, t=truth[at]: (x.double() - t).norm().item())
        # the divergence is a difference of numbers of the size of log V
        size = options["kl_weight"] * math.log(len(codebook) + 1) if name == "kl" else None
        assert_no_worse_than_torch(mine[at], truth[at], worst.to(mine[at].dtype), factor=2.0 if at < 2 else 3.0,
                                   size=size, what=f"{what} {name}")
    return mine, truth


def case(shape, dtype=torch.float32, layout="nchw", scale=2.0):
    """(logits, codebook, noise) of one size."""
    batch, entries, height, width, dim = shape
    logits = torch.randn(batch, entries, height, width, dtype=torch.float64) * scale
    noise = -torch.empty_like(logits).exponential_().log()
    if layout == "nlc":
        logits, noise = (x.flatten(2).transpose(1, 2).contiguous() for x in (logits, noise))
    return logits.to(dtype), torch.randn(entries, dim, dtype=torch.float64).to(dtype), noise.float()
