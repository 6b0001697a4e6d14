"""Global second-order pooling networks (GSoP-Net, CVPR 2019) for timm. Importing this registers every model."""

import timm  # noqa: F401  # first: it may trigger our autoload, which must not find us half imported

from timm_gsop import models
from timm_gsop.insert import insert_gsop
from timm_gsop.layers import (
    BdcPool2d,
    BilinearPool2d,
    ChannelGsop,
    CompactBilinearPool2d,
    CovPool2d,
    DropCovPool2d,
    FusedGsop,
    GsopBlock,
    IsqrtCovPool2d,
    MomentPool2d,
    MpnCovPool2d,
    PositionGsop,
    SvpnPool2d,
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
    "BdcPool2d",
    "BilinearPool2d",
    "ChannelGsop",
    "CompactBilinearPool2d",
    "CovPool2d",
    "DropCovPool2d",
    "FusedGsop",
    "GsopBlock",
    "IsqrtCovPool2d",
    "MomentPool2d",
    "MpnCovPool2d",
    "PositionGsop",
    "SvpnPool2d",
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
