"""Row-wise convolution of a covariance matrix."""

import torch
import torch.nn.functional as F
from torch import nn

from timm_gsop.layers.exporting import is_exporting

__all__ = ["RowConv2d"]


class RowConv2d(nn.Conv2d):
    """Convolution of matrices with a group for each row, whose kernel is the whole row (paper section 3.4).

    It takes the arguments of ``nn.Conv2d`` and computes the same. If there is one group for each row and the kernel
    covers the input, it uses one batched product, because PyTorch's grouped convolution takes ten times as long. What
    ``torch.export`` makes has the convolution, into which runtimes fold the batch normalization that follows.

    Shape:
        Input (B, R, R, 1), output (B, n·R, 1, 1); outputs n·r to n·r + n - 1 belong to row r.

    Examples:
        >>> conv = RowConv2d(8, 32, (8, 1), groups=8)
        >>> conv(torch.randn(2, 8, 8, 1)).shape
        torch.Size([2, 32, 1, 1])
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, R, R, 1) to (B, n·R, 1, 1)."""
        rows = self.in_channels
        if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
            if is_exporting():
                return self._conv_forward(input, self.weight, self.bias)
        if self.groups == rows and self.kernel_size == (rows, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return _one_product(input, self.weight, self.bias)
        return self._conv_forward(input, self.weight, self.bias)


def _one_product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    rows = weight.shape[2]
    if not torch.jit.is_tracing() and (x.shape[2] != rows or x.shape[3] != 1):  # the kernel has several positions
        return F.conv2d(x, weight, bias, groups=rows)
    y = torch.bmm(x.squeeze(3).transpose(0, 1), weight.view(rows, -1, rows).transpose(1, 2))  # (R, B, n)
    y = y.transpose(0, 1).flatten(1)
    if bias is not None:
        y = y + bias
    return y.unsqueeze(2).unsqueeze(3)


torch.fx.wrap("_one_product")  # a leaf in torch.fx's graphs: within a trace, it could not test shapes
