"""Every layer of the package, small, for the tests that all of them pass (test_layers.py, test_modes.py)."""

from collections.abc import Callable

import torch
from torch import nn

from timm_gsop.layers import (
    FLAVORS,
    GSOP_TYPES,
    BdcPool2d,
    BilinearPool2d,
    CompactBilinearPool2d,
    CovPool2d,
    DropCovPool2d,
    GsopBlock,
    IsqrtCovPool2d,
    MomentPool2d,
    MpnCovPool2d,
    OfficialIsqrtCovPool2d,
    SvpnPool2d,
    create_gsop,
)

CHANNELS = 64  # the fewest that the official concatenation accepts


def _scaling(gsop_type: str, flavor: str) -> Callable[..., nn.Module]:
    side = None if gsop_type == "channel" else 3
    return lambda **dd: create_gsop(gsop_type, CHANNELS, cov_dim=8, spatial_size=side, flavor=flavor, **dd)


# Each takes ``device`` and ``dtype``.
SCALING_LAYERS: dict[str, Callable[..., nn.Module]] = {
    f"{gsop_type} {flavor}": _scaling(gsop_type, flavor) for gsop_type in GSOP_TYPES for flavor in FLAVORS
}
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "block of channel": lambda **dd: GsopBlock(SCALING_LAYERS["channel paper"](**dd)),
    "block of concat": lambda **dd: GsopBlock(SCALING_LAYERS["concat paper"](**dd), scale=2 / 3),
}
HEADS: dict[str, Callable[..., nn.Module]] = {
    "isqrt": lambda **dd: IsqrtCovPool2d(CHANNELS, 8, **dd),
    "isqrt of few positions": lambda **dd: IsqrtCovPool2d(CHANNELS, 128, **dd),
    "isqrt official": lambda **dd: OfficialIsqrtCovPool2d(CHANNELS, 8, **dd),
    "mpn": lambda **dd: MpnCovPool2d(CHANNELS, 8, **dd),
    "bilinear": lambda **dd: BilinearPool2d(CHANNELS, 8, **dd),
    "compact bilinear": lambda **dd: CompactBilinearPool2d(CHANNELS, 64, **dd),
    "cov": lambda **dd: CovPool2d(CHANNELS, 8, **dd),
    # With so few channels the rate is zero, and training not random, unless importance and covariance disagree.
    "dropcov": lambda **dd: DropCovPool2d(CHANNELS, 8, **dd),
    "bdc": lambda **dd: BdcPool2d(CHANNELS, 8, **dd),
    "svpn": lambda **dd: SvpnPool2d(CHANNELS, 2, 5, drop=0.0, **dd),
    "moment": lambda **dd: MomentPool2d(CHANNELS, 28, **dd),
}
LAYERS = {**SCALING_LAYERS, **BLOCKS, **HEADS}


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value, so that none hides behind a zero or a one."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.5)
    return module
