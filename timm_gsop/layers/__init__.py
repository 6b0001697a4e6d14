"""Second-order pooling as layers, and the functions behind them."""

# First the heads, in the order in which the registry lists them.
# isort: off
from timm_gsop.layers.cov_pool import CovPool2d, IsqrtCovPool2d, MpnCovPool2d
from timm_gsop.layers.bilinear_pool import BilinearPool2d, CompactBilinearPool2d, compact_bilinear_pool
from timm_gsop.layers.dropcov_pool import DropCovPool2d
from timm_gsop.layers.bdc_pool import BdcPool2d
from timm_gsop.layers.svpn_pool import SvpnPool2d
from timm_gsop.layers.moment_pool import MomentPool2d
# isort: on

from timm_gsop.layers.covariance import bilinear_pool, covariance_pool, position_covariance
from timm_gsop.layers.factory import (
    accepted_arguments,
    check_pool_kwargs,
    check_second_order_pool,
    create_second_order_pool,
    pool_cost,
)
from timm_gsop.layers.gram_sqrt import covariance_sqrt
from timm_gsop.layers.gsop import (
    FLAVORS,
    GSOP_TYPES,
    NEUTRAL_SCALE,
    ChannelGsop,
    CovarianceExcitation,
    FusedGsop,
    Gsop,
    GsopBlock,
    PositionGsop,
    check_gsop,
    create_gsop,
    start_at_half,
)
from timm_gsop.layers.matrix_sqrt import eigh_log, eigh_power, newton_schulz_inverse_sqrt, newton_schulz_sqrt
from timm_gsop.layers.official import (
    OfficialChannelGsop,
    OfficialFusedGsop,
    OfficialIsqrtCovPool2d,
    OfficialPositionGsop,
)
from timm_gsop.layers.projected_pool import ProjectedPool2d
from timm_gsop.layers.second_order_pool import SECOND_ORDER_POOLS, SecondOrderPool2d, register_pool
from timm_gsop.layers.triangle import triu_unvectorize, triu_vectorize

__all__ = [
    "FLAVORS",
    "GSOP_TYPES",
    "NEUTRAL_SCALE",
    "SECOND_ORDER_POOLS",
    "BdcPool2d",
    "BilinearPool2d",
    "ChannelGsop",
    "CompactBilinearPool2d",
    "CovPool2d",
    "CovarianceExcitation",
    "DropCovPool2d",
    "FusedGsop",
    "Gsop",
    "GsopBlock",
    "IsqrtCovPool2d",
    "MomentPool2d",
    "MpnCovPool2d",
    "OfficialChannelGsop",
    "OfficialFusedGsop",
    "OfficialIsqrtCovPool2d",
    "OfficialPositionGsop",
    "PositionGsop",
    "ProjectedPool2d",
    "SecondOrderPool2d",
    "SvpnPool2d",
    "accepted_arguments",
    "bilinear_pool",
    "check_gsop",
    "check_pool_kwargs",
    "check_second_order_pool",
    "compact_bilinear_pool",
    "covariance_pool",
    "covariance_sqrt",
    "create_gsop",
    "create_second_order_pool",
    "eigh_log",
    "eigh_power",
    "newton_schulz_inverse_sqrt",
    "newton_schulz_sqrt",
    "pool_cost",
    "position_covariance",
    "register_pool",
    "start_at_half",
    "triu_unvectorize",
    "triu_vectorize",
]
