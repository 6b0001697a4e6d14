"""Global second-order pooling (GSoP) blocks: a covariance decides how the features are scaled."""

import torch
import torch.nn.functional as F
from torch import nn

from timm_gsop.checks import check_batch_for_training, check_choice, check_ndim, check_positive_int
from timm_gsop.layers.adaptive_pool import adaptive_avg_pool2d
from timm_gsop.layers.channel_reduction import ChannelReduction
from timm_gsop.layers.covariance import covariance_pool, position_covariance
from timm_gsop.layers.pointwise_conv import PointwiseConv2d
from timm_gsop.layers.row_conv import RowConv2d

__all__ = ["FUSIONS", "ChannelGsop", "CovarianceExcitation", "FusedGsop", "GsopBlock", "PositionGsop"]

FUSIONS = ("avg", "max", "concat")

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in (
    "adaptive_avg_pool2d",
    "check_batch_for_training",
    "check_ndim",
    "covariance_pool",
    "position_covariance",
):
    torch.fx.wrap(_leaf)


class CovarianceExcitation(nn.Module):
    """Excitation module: from a covariance matrix to weights between 0 and 1 (paper sections 3.1 and 3.4, Table 2).

    Row-wise batch normalization (one channel a row, statistics over batch and columns); row-wise convolution (a group
    a row, its kernel the whole row), from C to 4·C channels, with BN and LeakyReLU(0.1); 1×1 convolution and sigmoid.

    Args:
        cov_dim: Rows of the covariance matrix, C.
        out_features: Number of weights.
    """

    def __init__(
        self,
        cov_dim: int,
        out_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * cov_dim
        self.cov_bn = nn.BatchNorm2d(cov_dim, device=device, dtype=dtype)
        self.row_conv = RowConv2d(cov_dim, device=device, dtype=dtype)
        self.row_conv_bn: nn.Module = nn.BatchNorm2d(hidden, device=device, dtype=dtype)
        self.act: nn.Module = nn.LeakyReLU(0.1, inplace=True)
        self.expand_conv = PointwiseConv2d(hidden, out_features, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        for conv in (self.row_conv, self.expand_conv):
            nn.init.kaiming_normal_(conv.weight, a=0.1, nonlinearity="leaky_relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def normalize_rows(self, cov: torch.Tensor) -> torch.Tensor:
        """Row-wise batch normalization: (B, C, C) to (B, C, C, 1), in the dtype of the convolutions."""
        # Rows are channels, columns are positions: the row-wise operations are ordinary ones then.
        return self.cov_bn(cov.to(self.row_conv.weight.dtype).unsqueeze(-1))

    def forward(self, cov: torch.Tensor) -> torch.Tensor:
        """Map (B, C, C) to weights (B, out_features, 1, 1), in the dtype of the convolutions."""
        x = self.act(self.row_conv_bn(self.row_conv(self.normalize_rows(cov))))
        return self.gate(self.expand_conv(x))


class ChannelGsop(nn.Module):
    """Channel-wise GSoP: the covariance between channels scales the channels (paper section 3.1, Table 2 left).

    Squeeze: 1×1 convolution to ``cov_dim`` channels, BN, ReLU, covariance over all positions. Excitation: see
    :class:`CovarianceExcitation`. The shortcut of the paper's block is :class:`GsopBlock`'s to ask for; without it,
    this serves as timm's attention layers do: ``create_model("resnet26", block_args=dict(attn_layer=ChannelGsop))``.
    The covariance is computed in at least float32, also under autocast; the output has the dtype of the input.

    Args:
        channels: Channels of the input, C.
        cov_dim: Channels after reduction, the size of the covariance matrix.

    Raises:
        ValueError: If ``channels`` or ``cov_dim`` < 1; in ``forward``, if the input has not four dimensions, or is a
            batch of one in training.
    """

    def __init__(
        self,
        channels: int,
        cov_dim: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive_int("channels", channels)
        check_positive_int("cov_dim", cov_dim)
        self.reduction: nn.Module = ChannelReduction(channels, cov_dim, device=device, dtype=dtype)
        self.excitation = CovarianceExcitation(cov_dim, channels, device=device, dtype=dtype)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the reduced channels of ``x``: (B, C, H, W) to (B, cov_dim, cov_dim)."""
        return covariance_pool(self.reduction(x))

    def channel_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights between 0 and 1 of the channels of ``x``: (B, C, H, W) to (B, C, 1, 1)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_batch_for_training("input", x, self.excitation.row_conv_bn)
        return self.excitation(self.squeeze(x))

    def forward(self, x: torch.Tensor, shortcut: bool = False) -> torch.Tensor:
        """Scale the channels of ``x``, (B, C, H, W); with ``shortcut``, add ``x`` in the same pass over it."""
        weights = self.channel_weights(x)
        return x * (1 + weights) if shortcut else x * weights


class PositionGsop(nn.Module):
    """Position-wise GSoP: the covariance between positions scales the positions (paper section 3.2, Table 2 right).

    Squeeze: 1×1 convolution to ``rd_channels`` channels, BN, ReLU, adaptive average pooling to a fixed square,
    covariance between its positions over the channels. Excitation: see :class:`CovarianceExcitation`; its weights are
    a map, interpolated (bilinear) to the size of the input. The shortcut is :class:`GsopBlock`'s to ask for. The
    covariance is computed in at least float32, also under autocast; the output has the dtype of the input.

    Args:
        channels: Channels of the input, C.
        rd_channels: Channels after reduction.
        spatial_size: Side of the square that the map is pooled to; the covariance matrix has its square as size. Maps
            smaller than the square are accepted.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input has not four dimensions, or is a batch of one in
            training.
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
        super().__init__()
        check_positive_int("channels", channels)
        check_positive_int("rd_channels", rd_channels)
        check_positive_int("spatial_size", spatial_size)
        self.spatial_size = spatial_size
        positions = spatial_size**2
        self.reduction: nn.Module = ChannelReduction(channels, rd_channels, device=device, dtype=dtype)
        self.excitation = CovarianceExcitation(positions, positions, device=device, dtype=dtype)

    def covariance(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the positions of the pooled map, (B, d, s, s) to (B, s², s²)."""
        return position_covariance(x)

    def resize(self, weights: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring the map of weights to the size of the input, (B, 1, s, s) to (B, 1, H, W)."""
        return F.interpolate(weights, size=(height, width), mode="bilinear", align_corners=False)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance between the positions of ``x``, reduced and pooled: (B, C, H, W) to (B, s², s²)."""
        return self.covariance(adaptive_avg_pool2d(self.reduction(x), self.spatial_size, self.spatial_size))

    def position_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights between 0 and 1 of the positions of ``x``: (B, C, H, W) to (B, 1, H, W)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_batch_for_training("input", x, self.excitation.row_conv_bn)
        weights = self.excitation(self.squeeze(x))
        return self.resize(weights.reshape(-1, 1, self.spatial_size, self.spatial_size), x.shape[2], x.shape[3])

    def forward(self, x: torch.Tensor, shortcut: bool = False) -> torch.Tensor:
        """Scale the positions of ``x``, (B, C, H, W); with ``shortcut``, add ``x`` in the same pass over it."""
        weights = self.position_weights(x)
        return x * (1 + weights) if shortcut else x * weights


class Average(nn.Module):
    """Mean of two tensors."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return (a + b) / 2."""
        return (a + b) / 2


class Maximum(nn.Module):
    """Elementwise maximum of two tensors."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return max(a, b)."""
        return torch.maximum(a, b)


class Concatenation(nn.Module):
    """Concatenation of the channels of two tensors, and a 1×1 convolution back to as many as one has.

    Args:
        channels: Channels of each.
    """

    def __init__(
        self, channels: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * channels, channels, 1, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Concatenate and convolve."""
        return self.conv(torch.cat([a, b], dim=1))


class FusedGsop(nn.Module):
    """Channel- and position-wise GSoP of the same input, fused (paper section 4.1, Table 4(b)).

    Args:
        channels: Channels of the input, C.
        fusion: ``"avg"``, ``"max"`` (elementwise), or ``"concat"``, followed by a 1×1 convolution back to C channels.
        cov_dim: Channels after reduction in both, the size of the channel covariance.
        spatial_size: Side of the square that the position-wise part pools to.

    Raises:
        ValueError: If ``fusion`` is unknown or another argument < 1; in ``forward``, if the input has not four
            dimensions, or is a batch of one in training.
    """

    def __init__(
        self,
        channels: int,
        fusion: str = "avg",
        cov_dim: int = 128,
        spatial_size: int = 8,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("fusion", fusion, FUSIONS)
        self.channel = ChannelGsop(channels, cov_dim, device=device, dtype=dtype)
        self.position = PositionGsop(channels, cov_dim, spatial_size, device=device, dtype=dtype)
        self.fuse: nn.Module
        if fusion == "avg":
            self.fuse = Average()
        elif fusion == "max":
            self.fuse = Maximum()
        else:
            self.fuse = Concatenation(channels, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor, shortcut: bool = False) -> torch.Tensor:
        """Scale ``x``, (B, C, H, W), in both ways, and fuse the two; with ``shortcut``, add ``x``."""
        fused = self.fuse(self.channel(x), self.position(x))
        return x + fused if shortcut else fused


class GsopBlock(nn.Module):
    """The paper's residual block: a shortcut adds the input to the scaled features (Table 2, "shortcut connections").

    Args:
        gsop: The scaling layer, which can add the shortcut itself, more cheaply: a :class:`ChannelGsop`, for one.
        scale: Factor on the output. With 2/3, a block all of whose weights are one half is the identity.
    """

    def __init__(self, gsop: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.gsop = gsop
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scale * (x + gsop(x))``, (B, C, H, W)."""
        x = self.gsop(x, shortcut=True)
        return x if self.scale == 1.0 else x * self.scale
