"""Second-order pooling as layers, and the functions behind them."""

from timm_gsop.layers.cov_pool import IsqrtCovPool2d, MpnCovPool2d
from timm_gsop.layers.covariance import covariance_pool, position_covariance, triu_vectorize
from timm_gsop.layers.factory import FLAVORS, GSOP_TYPES, check_gsop, create_gsop
from timm_gsop.layers.gsop import ChannelGsop, CovarianceExcitation, FusedGsop, Gsop, GsopBlock, PositionGsop
from timm_gsop.layers.matrix_sqrt import eigh_power, newton_schulz_sqrt
from timm_gsop.layers.official import (
    OfficialChannelGsop,
    OfficialFusedGsop,
    OfficialIsqrtCovPool2d,
    OfficialPositionGsop,
)

__all__ = [
    "FLAVORS",
    "GSOP_TYPES",
    "ChannelGsop",
    "CovarianceExcitation",
    "FusedGsop",
    "Gsop",
    "GsopBlock",
    "IsqrtCovPool2d",
    "MpnCovPool2d",
    "OfficialChannelGsop",
    "OfficialFusedGsop",
    "OfficialIsqrtCovPool2d",
    "OfficialPositionGsop",
    "PositionGsop",
    "check_gsop",
    "covariance_pool",
    "create_gsop",
    "eigh_power",
    "newton_schulz_sqrt",
    "position_covariance",
    "triu_vectorize",
]
