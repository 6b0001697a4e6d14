"""Global second-order pooling (GSoP): reduction → covariance → excitation → rescale (paper section 3, Table 2)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from timm_gsop.checks import (
    check_batch_for_training,
    check_choice,
    check_ndim,
    check_positive,
    check_positive_int,
    warn_of_one_position,
)
from timm_gsop.layers import kernels
from timm_gsop.layers.adaptive_pool import adaptive_avg_pool2d
from timm_gsop.layers.channel_reduction import ChannelReduction, can_fuse, fused_covariance, output_is_hooked
from timm_gsop.layers.covariance import covariance_pool, position_covariance
from timm_gsop.layers.row_conv import RowConv2d

__all__ = [
    "FLAVORS",
    "FUSIONS",
    "GSOP_CLASSES",
    "GSOP_TYPES",
    "NEUTRAL_SCALE",
    "ChannelGsop",
    "CovarianceExcitation",
    "FusedGsop",
    "Fusion",
    "Gsop",
    "GsopBlock",
    "PositionGsop",
    "check_gsop",
    "create_gsop",
    "start_at_half",
]

FUSIONS = ("avg", "max", "concat")

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in (
    "adaptive_avg_pool2d",
    "check_batch_for_training",
    "check_ndim",
    "covariance_pool",
    "position_covariance",
    "rescale",
    "warn_of_one_position",
):
    torch.fx.wrap(_leaf)


def rescale(x: torch.Tensor, weights: torch.Tensor, shortcut: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Return ``scale · (shortcut · x + x · weights)``, in one pass over ``x``.

    Args:
        x: Features, (B, C, H, W).
        weights: (B, C, 1, 1) or (B, 1, H, W).
        shortcut: How much of ``x`` is added to what is scaled: 0 for none.
        scale: Factor on the whole.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if kernels.usable(x, weights, dtypes=kernels.FLOATS) and _channels_are_scaled(x, weights):
            return kernels.load("rescale").scale_channels(x, weights, shortcut, scale)
    return plain_rescale(x, weights, shortcut, scale)


def _channels_are_scaled(x: torch.Tensor, weights: torch.Tensor) -> bool:
    return x.ndim == 4 and weights.shape == (x.shape[0], x.shape[1], 1, 1) and weights.dtype in kernels.FLOATS


def plain_rescale(x: torch.Tensor, weights: torch.Tensor, shortcut: float, scale: float) -> torch.Tensor:
    """As :func:`rescale`, in plain operations."""
    if shortcut != 0.0:
        weights = shortcut + weights
    return x * (weights if scale == 1.0 else scale * weights)


class Gsop(nn.Module):
    """What every GSoP layer is made of: reduction → covariance → excitation → rescale.

    Subclasses define the covariance of the reduced features, and how the weights are resized to the input.

    Args:
        reduction: Maps (B, C, H, W) to (B, d, H', W').
        excitation: Maps covariance matrices (B, n, n) to weights (B, m, 1, 1).
    """

    only_scales = True  # and does nothing else to the features

    def __init__(self, reduction: nn.Module, excitation: "CovarianceExcitation") -> None:
        super().__init__()
        self.reduction = reduction
        self.excitation = excitation

    def covariance(self, reduced: torch.Tensor) -> torch.Tensor:
        """Covariance of the reduced features, (B, d, H', W') to (B, n, n)."""
        raise NotImplementedError

    def resize(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Bring weights (B, m, 1, 1) to a shape that multiplies ``x``, (B, C, H, W)."""
        return weights

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance of ``x``, reduced: (B, C, H, W) to (B, n, n), in at least float32."""
        return self.covariance(self.reduction(x))

    def weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights between 0 and 1 that scale ``x``, (B, C, H, W): (B, C, 1, 1) or (B, 1, H, W)."""
        if not torch.jit.is_scripting():
            check_ndim("input", x, (4,), "(B, C, H, W)")
            check_batch_for_training("input", x, self.excitation.row_conv_bn)
        return self.resize(self.excitation(self.squeeze(x)), x)

    def forward(self, x: torch.Tensor, shortcut: float = 0.0, scale: float = 1.0) -> torch.Tensor:
        """Scale ``x``, (B, C, H, W): ``scale · (shortcut · x + x · w)``.

        A :class:`GsopBlock` gives the factors, so that its shortcut costs no pass over the features.
        """
        return rescale(x, self.weights(x), shortcut, scale)


class CovarianceExcitation(nn.Module):
    """Excitation module: from a covariance matrix to weights between 0 and 1 (paper sections 3.1 and 3.4, Table 2).

    Row-wise batch normalization (one channel for each row, statistics over batch and columns); row-wise convolution
    (one group for each row, its kernel the whole row) from n to 4·n channels, with BN and LeakyReLU(0.1); 1×1
    convolution and sigmoid.

    Args:
        cov_dim: Rows of the covariance matrix, n.
        out_features: Number of weights.
        row_conv_bn: Whether batch normalization follows the row-wise convolution, which has a bias otherwise.
        act: Activation after the row-wise convolution; None for LeakyReLU(0.1).
    """

    def __init__(
        self,
        cov_dim: int,
        out_features: int,
        row_conv_bn: bool = True,
        act: nn.Module | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * cov_dim
        self.cov_bn = nn.BatchNorm2d(cov_dim, device=device, dtype=dtype)
        self.row_conv = RowConv2d(
            cov_dim, hidden, (cov_dim, 1), groups=cov_dim, bias=not row_conv_bn, device=device, dtype=dtype
        )
        self.row_conv_bn = nn.BatchNorm2d(hidden, device=device, dtype=dtype) if row_conv_bn else nn.Identity()
        self.act = nn.LeakyReLU(0.1, inplace=True) if act is None else act
        self.expand_conv = nn.Conv2d(hidden, out_features, 1, device=device, dtype=dtype)
        self.gate = nn.Sigmoid()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        for conv in (self.row_conv, self.expand_conv):
            nn.init.kaiming_normal_(conv.weight, a=0.1, nonlinearity="leaky_relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def normalize_rows(self, cov: torch.Tensor) -> torch.Tensor:
        """Row-wise batch normalization: (B, n, n) to (B, n, n, 1), in the dtype of the convolutions."""
        # Treat rows as channels and columns as positions, so that standard batch norm and convolution apply.
        return self.cov_bn(cov.to(self.row_conv.weight.dtype).unsqueeze(-1))

    def forward(self, cov: torch.Tensor) -> torch.Tensor:
        """Map (B, n, n) to weights (B, out_features, 1, 1), in the dtype of the convolutions."""
        x = self.act(self.row_conv_bn(self.row_conv(self.normalize_rows(cov))))
        return self.gate(self.expand_conv(x))


class ChannelGsop(Gsop):
    """Channel-wise GSoP: the covariance between channels scales the channels (paper section 3.1, Table 2 left).

    1×1 convolution to ``cov_dim`` channels, BN, ReLU; covariance over all positions; excitation
    (:class:`CovarianceExcitation`); the input times one weight for each channel. :class:`GsopBlock` adds the paper's
    shortcut. Without it, this serves as timm's attention layers do:
    ``create_model("resnet26", block_args=dict(attn_layer=ChannelGsop))``. The covariance is computed in at least
    float32, also under autocast; the output has the dtype of the input.

    Args:
        channels: Channels of the input, C.
        cov_dim: Channels after reduction, the size of the covariance matrix.

    Raises:
        ValueError: If ``channels`` or ``cov_dim`` < 1; in ``forward``, if the input does not have four dimensions, or
            is a batch of one in training.

    Examples:
        >>> gsop = ChannelGsop(64, cov_dim=16)
        >>> gsop(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        cov_dim: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("channels", channels)
        check_positive_int("cov_dim", cov_dim)
        super().__init__(
            ChannelReduction(channels, cov_dim, device=device, dtype=dtype),
            CovarianceExcitation(cov_dim, channels, device=device, dtype=dtype),
        )

    def covariance(self, reduced: torch.Tensor) -> torch.Tensor:
        """Covariance between channels, (B, d, H, W) to (B, d, d)."""
        if not torch.jit.is_scripting():
            warn_of_one_position("A channel-wise GSoP block", reduced)
        return covariance_pool(reduced)

    def squeeze(self, x: torch.Tensor) -> torch.Tensor:
        """Covariance of ``x``, reduced: (B, C, H, W) to (B, n, n), in at least float32."""
        if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
            if type(self).covariance is ChannelGsop.covariance and can_fuse(self.reduction, x):
                return fused_covariance(self.reduction, x)
        return self.covariance(self.reduction(x))


class PositionGsop(Gsop):
    """Position-wise GSoP: the covariance between positions scales the positions (paper section 3.2, Table 2 right).

    1×1 convolution to ``rd_channels`` channels, BN, ReLU; adaptive average pooling to a fixed square; covariance
    between its positions over the channels; excitation (:class:`CovarianceExcitation`), whose weights are a map,
    interpolated (bilinear) to the size of the input; the input times one weight for each position. :class:`GsopBlock`
    adds the shortcut. The covariance is computed in at least float32, also under autocast; the output has the dtype of
    the input.

    Args:
        channels: Channels of the input, C.
        rd_channels: Channels after reduction.
        spatial_size: Side s of the square that the map is pooled to; the covariance matrix is s²×s². Maps smaller than
            the square are accepted.

    Raises:
        ValueError: If an argument < 1; in ``forward``, if the input does not have four dimensions, or is a batch of one
            in training.

    Examples:
        >>> gsop = PositionGsop(64, rd_channels=16, spatial_size=4)
        >>> gsop(torch.randn(2, 64, 9, 7)).shape
        torch.Size([2, 64, 9, 7])
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
        check_positive_int("channels", channels)
        check_positive_int("rd_channels", rd_channels)
        check_positive_int("spatial_size", spatial_size)
        super().__init__(
            ChannelReduction(channels, rd_channels, device=device, dtype=dtype),
            CovarianceExcitation(spatial_size**2, spatial_size**2, device=device, dtype=dtype),
        )
        self.spatial_size = spatial_size

    def covariance(self, reduced: torch.Tensor) -> torch.Tensor:
        """Covariance between positions of the pooled map, (B, d, H, W) to (B, s², s²)."""
        return position_covariance(adaptive_avg_pool2d(reduced, self.spatial_size, self.spatial_size))

    def resize(self, weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Interpolate weights (B, s², 1, 1) to the size of ``x``, (B, 1, H, W)."""
        weights = weights.reshape(-1, 1, self.spatial_size, self.spatial_size)
        return F.interpolate(weights, size=(x.shape[2], x.shape[3]), mode="bilinear", align_corners=False)


class Fuse(nn.Module):
    """What makes one tensor of two, the part ``fuse`` of a :class:`Fusion`.

    timm's ``reparameterize_model`` takes ``fuse()`` of whatever has it, without arguments, for a function that returns
    a module's replacement. So without arguments, this returns the module that it is a part of.
    """

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """Fuse two tensors."""
        return super().__call__(*tensors) if tensors else vars(self)["whole"]


class Average(Fuse):
    """Mean of two tensors."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return (a + b) / 2."""
        return (a + b) / 2


class Maximum(Fuse):
    """Elementwise maximum of two tensors."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Return max(a, b)."""
        return torch.maximum(a, b)


class Concatenation(Fuse):
    """Concatenation of the channels of two tensors, and a 1×1 convolution back to the channels of one.

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


class Fusion(nn.Module):
    """A channel-wise and a position-wise layer of the same input, fused.

    Args:
        channel: Scales the channels.
        position: Scales the positions.
        fuse: Makes one tensor of the two that they return.
    """

    only_scales = True

    def __init__(self, channel: Gsop, position: Gsop, fuse: Fuse) -> None:
        super().__init__()
        self.channel = channel
        self.position = position
        self.fuse = fuse
        vars(fuse)["whole"] = self  # no child

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale ``x``, (B, C, H, W), in both ways, and fuse the results."""
        return self.fuse(self.channel(x), self.position(x))


class FusedGsop(Fusion):
    """Channel- and position-wise GSoP of the same input, fused (paper section 4.1, Table 4(b)).

    Args:
        channels: Channels of the input, C.
        fusion: ``"avg"``, ``"max"`` (elementwise), or ``"concat"``, followed by a 1×1 convolution back to C channels.
        cov_dim: Channels after reduction in both, the size of the channel covariance.
        spatial_size: Side of the square that the position-wise part pools to.

    Raises:
        ValueError: If ``fusion`` is unknown or another argument < 1; in ``forward``, if the input does not have four
            dimensions, or is a batch of one in training.

    Examples:
        >>> gsop = FusedGsop(64, "max", cov_dim=16, spatial_size=4)
        >>> gsop(torch.randn(2, 64, 9, 7)).shape
        torch.Size([2, 64, 9, 7])
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
        check_choice("fusion", fusion, FUSIONS)
        channel = ChannelGsop(channels, cov_dim, device=device, dtype=dtype)
        position = PositionGsop(channels, cov_dim, spatial_size, device=device, dtype=dtype)
        fuse: Fuse
        if fusion == "avg":
            fuse = Average()
        elif fusion == "max":
            fuse = Maximum()
        else:
            fuse = Concatenation(channels, device=device, dtype=dtype)
        super().__init__(channel, position, fuse)


GSOP_TYPES = ("channel", "position", *FUSIONS)
FLAVORS = ("paper", "official")
GSOP_CLASSES: dict[str, dict[str, type[nn.Module]]] = {
    "paper": {"channel": ChannelGsop, "position": PositionGsop, "fused": FusedGsop}
}
"""The layers of a flavor. Those of the official one put themselves here."""


def check_gsop(gsop_type: str, cov_dim: int, spatial_size: int, flavor: str) -> None:
    """Raise ``ValueError`` unless :func:`create_gsop` accepts the arguments."""
    check_choice("gsop_type", gsop_type, GSOP_TYPES)
    check_positive_int("cov_dim", cov_dim)
    check_positive_int("spatial_size", spatial_size)
    check_choice("flavor", flavor, FLAVORS)


def create_gsop(
    gsop_type: str,
    channels: int,
    cov_dim: int = 128,
    spatial_size: int | None = None,
    flavor: str = "paper",
    stride: int = 1,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Create a GSoP layer, without shortcut.

    Args:
        gsop_type: One of ``GSOP_TYPES``: by channel, by position, or the two fused.
        channels: Channels of the input.
        cov_dim: Channels after reduction.
        spatial_size: By position: side of the square that the map is pooled to; None for 8. By channel there is none.
        flavor: One of ``FLAVORS``: as in the paper's text, or as in its authors' released code.
        stride: Of the official flavor by channel: stride of the reduction.
        device: Device of the weights.
        dtype: Precision of the weights.

    Raises:
        ValueError: If an argument is not among the accepted ones, or the kind has none of that name.

    Examples:
        >>> create_gsop("position", 64, cov_dim=16, spatial_size=4)(torch.randn(2, 64, 8, 8)).shape
        torch.Size([2, 64, 8, 8])
    """
    check_gsop(gsop_type, cov_dim, 8 if spatial_size is None else spatial_size, flavor)
    if gsop_type == "channel" and spatial_size is not None:
        raise ValueError(f"spatial_size={spatial_size!r} is not accepted with gsop_type='channel', which has none.")
    if flavor == "paper" and stride != 1:
        raise ValueError(f"stride={stride!r} is not accepted with flavor='paper'; accepted: 1, or flavor='official'.")
    if gsop_type == "position" and stride != 1:
        raise ValueError(f"stride={stride!r} is not accepted with gsop_type='position', which has none.")
    # TorchScript knows no integers of NumPy's.
    channels, cov_dim, stride = int(channels), int(cov_dim), int(stride)
    spatial_size = 8 if spatial_size is None else int(spatial_size)
    kinds = GSOP_CLASSES[flavor]
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    with_stride = {**dd, "stride": stride} if flavor == "official" else dd
    if gsop_type == "channel":
        return kinds["channel"](channels, cov_dim, **with_stride)
    if gsop_type == "position":
        return kinds["position"](channels, cov_dim, spatial_size, **dd)
    return kinds["fused"](channels, gsop_type, cov_dim, spatial_size, **with_stride)


NEUTRAL_SCALE = 2 / 3
"""Scale of a block, ``scale * (x + gsop(x))``, with which it is the identity while all weights are one half."""


@torch.no_grad()
def start_at_half(gsop: nn.Module) -> None:
    """Make a layer return half of its input, whatever that is, by zeros in the last convolution before its sigmoid.

    The sigmoid is steepest there. That convolution learns from the first step on, and with it the layers before.

    Args:
        gsop: A :class:`ChannelGsop`, :class:`PositionGsop` or :class:`FusedGsop`; changed in place.

    Raises:
        ValueError: If the layer is of the official flavor with a position-wise part, which rectifies or normalizes what
            it scaled, or is no GSoP layer.
    """
    if not isinstance(gsop, ChannelGsop | PositionGsop | FusedGsop):
        raise ValueError(
            f"gsop={type(gsop).__name__} cannot start neutral; accepted: ChannelGsop, PositionGsop, FusedGsop."
        )
    if not gsop.only_scales:
        raise ValueError(
            "flavor='official' with position-wise blocks cannot start neutral, because they rectify or normalize what "
            "they scaled; accepted: gsop_type='channel', or flavor='paper'."
        )
    if isinstance(gsop, FusedGsop):
        start_at_half(gsop.channel)
        start_at_half(gsop.position)
        if isinstance(gsop.fuse, Concatenation):
            weight = gsop.fuse.conv.weight
            halves = torch.eye(weight.shape[0], dtype=weight.dtype, device=weight.device)[:, :, None, None] / 2
            weight.copy_(torch.cat([halves, halves], dim=1))
            nn.init.zeros_(gsop.fuse.conv.bias)  # type: ignore[arg-type]
    else:
        nn.init.zeros_(gsop.excitation.expand_conv.weight)
        nn.init.zeros_(gsop.excitation.expand_conv.bias)  # type: ignore[arg-type]


class GsopBlock(nn.Module):
    """The paper's residual block: a shortcut adds the input to the scaled features (Table 2, "shortcut connections").

    Args:
        gsop: The layer that scales: a :class:`ChannelGsop`, or any attention layer that returns the scaled
            features, as timm's do.
        scale: Factor on the output. With 2/3, a block whose weights are one half is the identity.

    A layer of this package that only scales adds the shortcut itself, in one pass over the features. Where a hook sees
    the layer's output, or the gradient of that, the layer is called without: the hook sees what ``gsop(x)`` returns.

    Raises:
        ValueError: If ``scale`` is not positive.

    Examples:
        >>> from timm.layers import SEModule
        >>> x = torch.randn(2, 64, 8, 8)
        >>> block = GsopBlock(SEModule(64))
        >>> torch.equal(block(x), x + block.gsop(x))
        True
    """

    # For TorchScript, the property is a constant: only one of the two ways may be compiled.
    __constants__ = ("in_one_pass",)
    __jit_unused_properties__ = ("in_one_pass",)

    def __init__(self, gsop: nn.Module, scale: float = 1.0) -> None:
        check_positive("scale", scale)
        super().__init__()
        self.gsop = gsop
        self.scale = float(scale)

    @property
    def in_one_pass(self) -> bool:
        """Whether the layer adds the shortcut itself. Asked at each call, for the layer may be wrapped or exchanged."""
        # A forward of its own, of the class or of this object, need not know a shortcut.
        return getattr(self.gsop.forward, "__func__", None) is Gsop.forward and not output_is_hooked(self.gsop)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scale · (x + gsop(x))``, (B, C, H, W)."""
        if self.in_one_pass:
            return self.gsop(x, shortcut=1.0, scale=self.scale)
        y = x + self.gsop(x)
        return y if self.scale == 1.0 else self.scale * y

    def extra_repr(self) -> str:
        """The factor, where there is one."""
        return "" if self.scale == 1.0 else f"scale={self.scale:g}"
