"""GSoP layers by name."""

from typing import Any

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.gsop import FUSIONS, ChannelGsop, FusedGsop, PositionGsop
from timm_gsop.layers.official import OfficialChannelGsop, OfficialFusedGsop, OfficialPositionGsop

__all__ = ["FLAVORS", "GSOP_TYPES", "check_gsop", "create_gsop"]

GSOP_TYPES = ("channel", "position", *FUSIONS)
FLAVORS = ("paper", "official")


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
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    if flavor == "official":
        if gsop_type == "channel":
            return OfficialChannelGsop(channels, cov_dim, stride, **dd)
        if gsop_type == "position":
            return OfficialPositionGsop(channels, cov_dim, spatial_size, **dd)
        return OfficialFusedGsop(channels, gsop_type, cov_dim, spatial_size, stride, **dd)
    if gsop_type == "channel":
        return ChannelGsop(channels, cov_dim, **dd)
    if gsop_type == "position":
        return PositionGsop(channels, cov_dim, spatial_size, **dd)
    return FusedGsop(channels, gsop_type, cov_dim, spatial_size, **dd)
