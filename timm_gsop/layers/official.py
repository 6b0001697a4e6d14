"""The blocks as the paper's authors released them: the flavor "official".

They differ from the paper's text; a network trained with that code needs each difference. The blocks are inside the
last bottleneck's residual branch, before the addition, where an SE layer is, and have no shortcut of their own.

Source: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks (its structure; no code of it).
"""

import math
from typing import Any

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.adaptive_pool import adaptive_avg_pool2d
from timm_gsop.layers.cov_pool import IsqrtCovPool2d
from timm_gsop.layers.covariance import second_moment
from timm_gsop.layers.gsop import (
    FUSIONS,
    GSOP_CLASSES,
    ChannelGsop,
    CovarianceExcitation,
    Fuse,
    FusedGsop,
    Fusion,
    Gsop,
    Maximum,
    PositionGsop,
)
from timm_gsop.layers.triangle import tril_vectorize

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
    """Channel-wise GSoP as released: nothing between the last two convolutions, all with biases.

    Args:
        channels: Channels of the input, C.
        cov_dim: Channels after reduction, the size of the covariance matrix.
        stride: Stride of the reduction: 2 in the first stage of the released networks, else 1.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.

    Examples:
        >>> gsop = OfficialChannelGsop(64, cov_dim=16, stride=2)
        >>> gsop(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
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
        check_positive_int("channels", channels)
        check_positive_int("cov_dim", cov_dim)
        check_positive_int("stride", stride)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        Gsop.__init__(
            self,
            OfficialReduction(channels, cov_dim, nn.ReLU(inplace=True), stride, **dd),
            CovarianceExcitation(cov_dim, channels, row_conv_bn=False, act=nn.Identity(), **dd),
        )


def official_position_covariance(x: torch.Tensor) -> torch.Tensor:
    r"""What the released code takes for the covariance between positions.

    .. math:: X^\top \left( \tfrac{1}{M} I - \tfrac{1}{M^2} 1 1^\top \right) X

    It divides by M, the number of positions. A covariance over channels divides by their number C.

    Args:
        x: Features, (B, C, H, W), M = H·W positions.

    Returns:
        (B, M, M), in float32, or in float64 if ``x`` is. Autocast has no effect.
    """
    return second_moment(x.flatten(2).transpose(1, 2), "official")


class OfficialPositionGsop(PositionGsop):
    """Position-wise GSoP as released: its own covariance, nearest-neighbour weights, and a ReLU on what it scaled.

    Args:
        channels: Channels of the input, C.
        rd_channels: Channels after reduction.
        spatial_size: Side of the square that the map is pooled to.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions.
    """

    only_scales = False

    def __init__(
        self,
        channels: int,
        rd_channels: int = 128,
        spatial_size: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("channels", channels)
        check_positive_int("rd_channels", rd_channels)
        check_positive_int("spatial_size", spatial_size)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        positions = spatial_size**2
        Gsop.__init__(
            self,
            OfficialReduction(channels, rd_channels, nn.Identity(), **dd),
            CovarianceExcitation(positions, positions, row_conv_bn=False, act=nn.ReLU(), **dd),
        )
        self.spatial_size = spatial_size

    def covariance(self, reduced: torch.Tensor) -> torch.Tensor:
        """See :func:`official_position_covariance`; of the pooled map, (B, d, H, W) to (B, s², s²)."""
        return official_position_covariance(adaptive_avg_pool2d(reduced, self.spatial_size, self.spatial_size))

    def resize(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Bring weights (B, s², 1, 1) to the size of ``x`` by adaptive average pooling, up as well as down."""
        weights = weights.reshape(-1, 1, self.spatial_size, self.spatial_size)
        return adaptive_avg_pool2d(weights, x.shape[2], x.shape[3])

    # A block adds its shortcut itself.
    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Scale the positions of ``x``, (B, C, H, W), and rectify."""
        # Not F.relu, which keeps its output for the gradient: timm's bottleneck adds the shortcut in place.
        return (x * self.weights(x)).clamp_min(0)


class Sum(Fuse):
    """Sum of two tensors: the released "average"."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return a + b."""
        return a + b


class OfficialConcatenation(Fuse):
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
            in ``forward``, if the input does not have four dimensions.
    """

    only_scales = False

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
        check_choice("fusion", fusion, FUSIONS)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        channel = OfficialChannelGsop(channels, cov_dim, stride, **dd)
        position = OfficialPositionGsop(channels, cov_dim, spatial_size, **dd)
        fuse: Fuse
        if fusion == "avg":
            fuse = Sum()
        elif fusion == "max":
            fuse = Maximum()
        else:
            fuse = OfficialConcatenation(channels, **dd)
        Fusion.__init__(self, channel, position, fuse)


GSOP_CLASSES["official"] = {
    "channel": OfficialChannelGsop,
    "position": OfficialPositionGsop,
    "fused": OfficialFusedGsop,
}


class OfficialIsqrtCovPool2d(IsqrtCovPool2d):
    """Covariance pooling as in the released GSoP-Net2: three iterations, and the lower triangle.

    Args:
        in_features: Channels of the input.
        dim: Channels after reduction, the size of the covariance matrix; the output has dim·(dim+1)/2 features.
        num_iters: Newton–Schulz iterations.
        act_layer: Activation before the covariance, ``"relu"`` or ``"relu6"``.

    Raises:
        ValueError: If an argument < 1, or ``act_layer`` is unknown; in ``forward``, if the input does not have
            four dimensions.
    """

    def __init__(
        self,
        in_features: int,
        dim: int = 256,
        num_iters: int = 3,
        act_layer: str = "relu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, dim, num_iters, act_layer, device=device, dtype=dtype)

    def vectorize(self, mat: torch.Tensor) -> torch.Tensor:
        """See :func:`tril_vectorize`."""
        return tril_vectorize(mat)
