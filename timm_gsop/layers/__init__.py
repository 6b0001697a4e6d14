"""Second-order pooling as layers, and the functions behind them."""

from timm_gsop.layers.cov_pool import IsqrtCovPool2d, MpnCovPool2d
from timm_gsop.layers.covariance import covariance_pool, triu_vectorize
from timm_gsop.layers.create_gsop import GSOP_TYPES, create_gsop
from timm_gsop.layers.gsop import ChannelGsop, CovarianceExcitation, GsopBlock
from timm_gsop.layers.matrix_sqrt import eigh_power, newton_schulz_sqrt

__all__ = [
    "GSOP_TYPES",
    "ChannelGsop",
    "CovarianceExcitation",
    "GsopBlock",
    "IsqrtCovPool2d",
    "MpnCovPool2d",
    "covariance_pool",
    "create_gsop",
    "eigh_power",
    "newton_schulz_sqrt",
    "triu_vectorize",
]
