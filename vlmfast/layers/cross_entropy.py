"""Cross-entropy of a linear layer's scores."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops

SMALL = 1 << 20  # scores that are cheaper to write than to avoid


def linear_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a linear layer's scores without the scores in memory.

    Equivalent to `F.cross_entropy(F.linear(states, weight, bias), labels)`.

    Args:
        states: [N, C] floating point.
        weight: [V, C] and bias: [V] or None, of the layer or of the rows that these states can emit.
        labels: [N] integers in 0 ... V - 1.

    Returns:
        [] float32 (float64 for float64 states); 0 for N = 0.
    """
    if not len(states):
        return states.sum(dtype=torch.promote_types(states.dtype, torch.float32))
    if len(states) * len(weight) <= SMALL:
        wide = torch.promote_types(states.dtype, torch.float32)
        return F.cross_entropy(F.linear(states, weight, bias).to(wide), labels)
    if bias is not None:  # the bias is the weight of a channel that is 1
        states = torch.cat([states, states.new_ones(len(states), 1)], 1)
        weight = torch.cat([weight, bias[:, None]], 1)
    classes = torch.arange(len(weight), device=labels.device)
    return ops.info_nce(states, weight, 1.0, labels=labels.contiguous(), text_labels=classes,
                        direction="image_to_text", comm="local")
