"""The one tolerance rule: no worse than PyTorch in the same dtype, measured against float64."""

import torch

# relative Frobenius error that float32 results must keep, outputs and gradients
FLOAT32_LIMIT = {2.0: 2e-6, 3.0: 5e-6}
# with fewer numbers than this, torch's own error is a matter of luck: the absolute limit decides
FEW = 100


def _distance(a: torch.Tensor, truth: torch.Tensor) -> float:
    return (a.double() - truth).norm().item()


def assert_no_worse_than_torch(ours, truth, same_dtype, *, factor=2.0, size=None, what="result"):
    """|ours - truth| <= factor |same_dtype - truth| + one ulp of the size, in the Frobenius norm.

    truth is float64, same_dtype is the eager formula in the working dtype; factor is 2 for outputs, 3 for gradients.
    float32 results also keep `FLOAT32_LIMIT` wherever the eager formula does; fewer than `FEW` numbers of them are
    judged by that limit alone. `size` is the norm of the truth, or for a sum whose terms cancel that of the terms.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, must be {tuple(truth.shape)}"
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    error, theirs = _distance(ours, truth), _distance(same_dtype, truth)
    size = truth.norm().item() if size is None else size
    text = f"{what}: error {error:.3g}, torch's own {theirs:.3g}, size {size:.3g}"
    single = ours.dtype == torch.float32
    if single:
        assert error <= max(FLOAT32_LIMIT[factor] * size, theirs), text
    if not single or truth.numel() >= FEW:
        assert error <= factor * theirs + torch.finfo(ours.dtype).eps * size, text


def assert_grad_not_dropped(ours, truth, *, least=0.5, what="gradient"):
    """Every row whose true gradient is not negligible has at least `least` of its magnitude."""
    rows, true_rows = ours.double().flatten(1).norm(dim=1), truth.double().flatten(1).norm(dim=1)
    matters = true_rows > 1e-3 * true_rows.max()
    short = matters & (rows < least * true_rows)
    assert not short.any(), f"{what}: rows {short.nonzero().flatten().tolist()[:10]} are missing"
