"""Row-wise convolution of a covariance matrix."""

import torch
from torch import nn

__all__ = ["RowConv2d"]


class RowConv2d(nn.Conv2d):
    """Grouped convolution with a group for each row of a matrix, whose kernel is the whole row (paper section 3.4).

    It computes what ``nn.Conv2d`` does with as many groups, as one batched product: grouped convolutions are slow where
    groups are many and each has one output position.

    Args:
        rows: Rows, and columns, of the matrix, R.
        bias: Whether a bias is added.
    """

    def __init__(
        self,
        rows: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(rows, 4 * rows, (rows, 1), groups=rows, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, R, R, 1) to (B, 4·R, 1, 1); outputs 4·r to 4·r + 3 belong to row r."""
        kernels = self.weight.view(self.groups, 4, self.groups)
        y = torch.bmm(input.squeeze(-1).transpose(0, 1), kernels.transpose(1, 2))  # (R, B, 4)
        y = y.transpose(0, 1).flatten(1)
        bias = self.bias  # TorchScript sees through the test of a local name only
        if bias is not None:
            y = y + bias
        return y.unsqueeze(-1).unsqueeze(-1)
