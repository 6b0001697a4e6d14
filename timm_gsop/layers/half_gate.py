"""Blocks whose weights start at one half, so that training can continue from a trained network."""

import torch
from torch import nn

from timm_gsop.layers.gsop import ChannelGsop, Concatenation, FusedGsop, PositionGsop
from timm_gsop.layers.official import OfficialFusedGsop, OfficialPositionGsop

__all__ = ["NEUTRAL_SCALE", "start_at_half"]

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
    if isinstance(gsop, OfficialPositionGsop | OfficialFusedGsop):
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
    elif isinstance(gsop, ChannelGsop | PositionGsop):
        nn.init.zeros_(gsop.excitation.expand_conv.weight)
        nn.init.zeros_(gsop.excitation.expand_conv.bias)  # type: ignore[arg-type]
    else:
        raise ValueError(
            f"gsop={type(gsop).__name__} cannot start neutral; accepted: ChannelGsop, PositionGsop, FusedGsop."
        )
