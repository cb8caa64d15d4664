"""A linear layer of models that write one token at a time."""

from torch import Tensor, nn

from ..ops.decoding import few_row_linear


class Linear(nn.Linear):
    """`nn.Linear`, fast for few rows without gradients (see `vlmfast.ops.decoding`)."""

    def forward(self, x: Tensor) -> Tensor:
        return few_row_linear(x, self.weight, self.bias)
