"""Reduction of channels before a covariance, which costs their square."""

import torch
from torch import nn

__all__ = ["ChannelReduction"]


class ChannelReduction(nn.Sequential):
    """1×1 convolution, BN and ReLU: (B, C, H, W) to (B, d, H, W) (paper section 3.1).

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = int(in_channels), int(out_channels)  # TorchScript knows no integers of NumPy's
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.act: nn.Module = nn.ReLU(inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
