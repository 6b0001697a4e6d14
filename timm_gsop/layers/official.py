"""The blocks as the paper's authors released them: the flavor "official".

They differ from the paper's text; a network trained with that code needs each difference. The blocks stand inside the
last bottleneck's residual branch, before the addition, as an SE layer does, and have no shortcut of their own.

Source: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks (its structure; no code of it).
"""

import math
from typing import Any

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.adaptive_pool import adaptive_avg_pool2d
from timm_gsop.layers.cov_pool import IsqrtCovPool2d
from timm_gsop.layers.covariance import tril_vectorize
from timm_gsop.layers.gsop import ChannelGsop, CovarianceExcitation, FusedGsop, PositionGsop
from timm_gsop.layers.precision import at_least_float32, autocast_disabled
from timm_gsop.layers.row_conv import RowConv2d

__all__ = [
    "OfficialChannelGsop",
    "OfficialFusedGsop",
    "OfficialIsqrtCovPool2d",
    "OfficialPositionGsop",
    "official_position_covariance",
]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("adaptive_avg_pool2d", "official_position_covariance", "tril_vectorize"):
    torch.fx.wrap(_leaf)


class OfficialExcitation(CovarianceExcitation):
    """Excitation without batch normalization after the row-wise convolution, which has a bias instead.

    Args:
        cov_dim: Rows of the covariance matrix.
        out_features: Number of weights.
        act: Activation between the two convolutions.
    """

    def __init__(
        self,
        cov_dim: int,
        out_features: int,
        act: nn.Module,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(cov_dim, out_features, device=device, dtype=dtype)
        self.row_conv = RowConv2d(cov_dim, bias=True, device=device, dtype=dtype)
        self.row_conv_bn = nn.Identity()
        self.act = act
        self.reset_parameters()


class OfficialReduction(nn.Sequential):
    """ReLU, 1×1 convolution with bias, BN, and an activation.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        act: The activation at the end.
        stride: Stride of the convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        act: nn.Module,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_act = nn.ReLU()  # not in place: the input is what the weights will scale
        self.conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.act = act
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]


class OfficialChannelGsop(ChannelGsop):
    """Channel-wise GSoP as released: nothing between the two last convolutions, all with biases.

    Args:
        channels: Channels of the input, C.
        cov_dim: Channels after reduction, the size of the covariance matrix.
        stride: Stride of the reduction: 2 in the first stage of the released networks, else 1.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input has not four dimensions.
    """

    def __init__(
        self,
        channels: int,
        cov_dim: int = 128,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("stride", stride)
        super().__init__(channels, cov_dim, device=device, dtype=dtype)
        act = nn.ReLU(inplace=True)
        self.reduction = OfficialReduction(channels, cov_dim, act, stride, device=device, dtype=dtype)
        self.excitation = OfficialExcitation(cov_dim, channels, nn.Identity(), device=device, dtype=dtype)


def official_position_covariance(x: torch.Tensor) -> torch.Tensor:
    r"""What the released code takes for the covariance between positions.

    .. math:: X^\top \left( \tfrac{1}{M} I - \tfrac{1}{M^2} 1 1^\top \right) X

    with M, the number of positions, where a covariance over channels has their number C.

    Args:
        x: Features, (B, C, H, W), M = H·W positions.

    Returns:
        (B, M, M), in float32, or in float64 if ``x`` is. Autocast has no effect.
    """
    if torch.jit.is_scripting():  # does not know autocast
        return _official_position_covariance(x)
    with autocast_disabled(x.device):
        return _official_position_covariance(x)


def _official_position_covariance(x: torch.Tensor) -> torch.Tensor:
    x = at_least_float32(x.flatten(2))
    positions = x.shape[2]
    mean = x.sum(dim=1, keepdim=True) / positions
    return torch.bmm(x.transpose(1, 2), x) / positions - mean * mean.transpose(1, 2)


class OfficialPositionGsop(PositionGsop):
    """Position-wise GSoP as released: its own covariance, nearest-neighbour weights, and a ReLU on what it scaled.

    Args:
        channels: Channels of the input, C.
        rd_channels: Channels after reduction.
        spatial_size: Side of the square that the map is pooled to.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input has not four dimensions.
    """

    def __init__(
        self,
        channels: int,
        rd_channels: int = 128,
        spatial_size: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, rd_channels, spatial_size, device=device, dtype=dtype)
        positions = spatial_size**2
        self.reduction = OfficialReduction(channels, rd_channels, nn.Identity(), device=device, dtype=dtype)
        act = nn.ReLU(inplace=True)
        self.excitation = OfficialExcitation(positions, positions, act, device=device, dtype=dtype)

    def covariance(self, x: torch.Tensor) -> torch.Tensor:
        """See :func:`official_position_covariance`."""
        return official_position_covariance(x)

    def resize(self, weights: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring the map of weights to the size of the input by adaptive average pooling, up as well as down."""
        return adaptive_avg_pool2d(weights, height, width)

    def forward(self, x: torch.Tensor, shortcut: bool = False) -> torch.Tensor:
        """Scale the positions of ``x``, (B, C, H, W), and rectify; with ``shortcut``, add ``x``."""
        # Not F.relu, which keeps its output for the gradient: timm's bottleneck adds the shortcut in place.
        scaled = (x * self.position_weights(x)).clamp_min(0)
        return x + scaled if shortcut else scaled


class Sum(nn.Module):
    """Sum of two tensors: the released "average"."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a + b."""
        return a + b


class OfficialConcatenation(nn.Module):
    """The released "concatenation": a grouped k×1 convolution of each tensor, their sum, BN.

    Args:
        channels: Channels of each, 64 times a power of two up to 2048: they set the number of groups and k.

    Raises:
        ValueError: If ``channels`` is another number.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_choice("channels", channels, [64 * 2**i for i in range(6)])
        groups = channels // 64
        factor = int(math.log2(32 // groups))
        kwargs: dict[str, Any] = dict(padding=(factor + 2, 0), groups=groups, device=device, dtype=dtype)
        self.conv1 = nn.Conv2d(channels, channels, (2 * factor + 5, 1), **kwargs)
        self.conv2 = nn.Conv2d(channels, channels, (2 * factor + 5, 1), **kwargs)
        self.bn = nn.BatchNorm2d(channels, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization."""
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Convolve, add and normalize."""
        return self.bn(self.conv1(a) + self.conv2(b))


class OfficialFusedGsop(FusedGsop):
    """Channel- and position-wise GSoP as released, fused as released.

    Args:
        channels: Channels of the input, C.
        fusion: ``"avg"`` (a sum), ``"max"``, or ``"concat"`` (see :class:`OfficialConcatenation`).
        cov_dim: Channels after reduction in both, the size of the channel covariance.
        spatial_size: Side of the square that the position-wise part pools to.
        stride: Stride of the channel-wise reduction: 2 in the first stage of the released networks, else 1.

    Raises:
        ValueError: If ``fusion`` is unknown, another argument < 1, or the concatenation cannot have as many channels;
            in ``forward``, if the input has not four dimensions.
    """

    def __init__(
        self,
        channels: int,
        fusion: str = "avg",
        cov_dim: int = 128,
        spatial_size: int = 8,
        stride: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, fusion, cov_dim, spatial_size, device=device, dtype=dtype)
        self.channel = OfficialChannelGsop(channels, cov_dim, stride, device=device, dtype=dtype)
        self.position = OfficialPositionGsop(channels, cov_dim, spatial_size, device=device, dtype=dtype)
        if fusion == "avg":
            self.fuse = Sum()
        elif fusion == "concat":
            self.fuse = OfficialConcatenation(channels, device=device, dtype=dtype)


class OfficialIsqrtCovPool2d(IsqrtCovPool2d):
    """Covariance pooling as in the released GSoP-Net2: three iterations, and the lower triangle.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.
        num_iters: Newton–Schulz iterations.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input has not four dimensions.
    """

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        num_iters: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, dim, num_iters, device=device, dtype=dtype)

    def vectorize(self, mat: torch.Tensor) -> torch.Tensor:
        """See :func:`tril_vectorize`."""
        return tril_vectorize(mat)
