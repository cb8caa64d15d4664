"""Definition of the `decoding` family in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def few_row_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [.., K], weight [N, K], bias [N] or None -> x weight^T + bias [.., N]."""
    return F.linear(x, weight, bias)
