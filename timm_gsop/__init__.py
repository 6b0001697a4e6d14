"""Global second-order pooling networks (GSoP-Net, CVPR 2019) for timm. Importing this registers every model."""

import timm  # noqa: F401  # first: it may trigger our autoload, which must not find us half imported

from timm_gsop import models
from timm_gsop.insert import insert_gsop
from timm_gsop.layers import (
    BilinearPool2d,
    ChannelGsop,
    CompactBilinearPool2d,
    FusedGsop,
    GsopBlock,
    IsqrtCovPool2d,
    MpnCovPool2d,
    PositionGsop,
    covariance_pool,
    covariance_sqrt,
    eigh_log,
    eigh_power,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
    position_covariance,
    triu_unvectorize,
    triu_vectorize,
)

__version__ = "0.2.0"

__all__ = [
    "BilinearPool2d",
    "ChannelGsop",
    "CompactBilinearPool2d",
    "FusedGsop",
    "GsopBlock",
    "IsqrtCovPool2d",
    "MpnCovPool2d",
    "PositionGsop",
    "__version__",
    "covariance_pool",
    "covariance_sqrt",
    "eigh_log",
    "eigh_power",
    "insert_gsop",
    "models",
    "newton_schulz_inverse_sqrt",
    "newton_schulz_sqrt",
    "position_covariance",
    "triu_unvectorize",
    "triu_vectorize",
]
