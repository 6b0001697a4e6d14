"""GSoP layers by name."""

import torch
from torch import nn

from timm_gsop.layers.checks import check_choice, check_positive_int
from timm_gsop.layers.gsop import ChannelGsop

__all__ = ["GSOP_TYPES", "create_gsop"]

GSOP_TYPES = ("channel",)


def create_gsop(
    gsop_type: str,
    channels: int,
    cov_dim: int = 128,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Create a GSoP layer, without shortcut.

    Args:
        gsop_type: One of ``GSOP_TYPES``.
        channels: Channels of the input.
        cov_dim: Channels after reduction.
        device: Device of the weights.
        dtype: Precision of the weights.

    Raises:
        ValueError: If ``gsop_type`` is unknown, or ``channels`` or ``cov_dim`` < 1.
    """
    check_choice("gsop_type", gsop_type, GSOP_TYPES)
    check_positive_int("cov_dim", cov_dim)
    return ChannelGsop(channels, cov_dim, device=device, dtype=dtype)
