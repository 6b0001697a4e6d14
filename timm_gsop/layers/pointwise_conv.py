"""1×1 convolution as a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PointwiseConv2d"]


class PointwiseConv2d(nn.Conv2d):
    """1×1 convolution, as a matrix product where PyTorch's convolution takes longer for the same.

    On the CPU, PyTorch's convolution copies a map whose channels are not last into another order, and back. Where
    channels are last, on other devices, and in what is compiled or exported, it is used.

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output.
        bias: Whether a bias is added.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, out_channels, H, W)."""
        if torch.jit.is_scripting() or torch.compiler.is_compiling() or self.stride != (1, 1):
            return self._conv_forward(input, self.weight, self.bias)
        return _pointwise_conv(input, self.weight, self.bias)


def _pointwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.device.type != "cpu" or x.ndim != 4:
        return F.conv2d(x, weight, bias)
    batch, _, height, width = x.shape
    if height == width == 1:
        return F.linear(x.flatten(1), weight.flatten(1), bias)[:, :, None, None]
    # The product makes a gradient of the weight for each sample: on small maps, they would be larger than these.
    heavy = torch.is_grad_enabled() and height * width < weight.shape[0]
    if heavy or not x.is_contiguous():
        return F.conv2d(x, weight, bias)
    weights, x = weight.flatten(1).expand(batch, -1, -1), x.flatten(2)
    product = torch.bmm(weights, x) if bias is None else torch.baddbmm(bias[:, None], weights, x)
    return product.unflatten(2, (height, width))


torch.fx.wrap("_pointwise_conv")  # a leaf in torch.fx's graphs: within a trace, it could not test the layout
