"""Second-order global pooling by name."""

from typing import Any

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.bilinear_pool import BilinearPool2d, CompactBilinearPool2d
from timm_gsop.layers.cov_pool import IsqrtCovPool2d, MpnCovPool2d
from timm_gsop.layers.factory import FLAVORS
from timm_gsop.layers.official import OfficialIsqrtCovPool2d

__all__ = ["SECOND_ORDER_POOLS", "check_second_order_pool", "create_second_order_pool"]

SECOND_ORDER_POOLS = ("isqrt", "mpn", "bilinear", "compact_bilinear")


def check_second_order_pool(isqrt_dim: int, isqrt_iters: int | None, compact_bilinear_dim: int) -> None:
    """Raise ``ValueError`` unless :func:`create_second_order_pool` accepts the arguments."""
    check_positive_int("isqrt_dim", isqrt_dim)
    if isqrt_iters is not None:
        check_positive_int("isqrt_iters", isqrt_iters)
    check_positive_int("compact_bilinear_dim", compact_bilinear_dim)


def create_second_order_pool(
    pool_type: str,
    in_features: int,
    isqrt_dim: int = 256,
    isqrt_iters: int | None = None,
    compact_bilinear_dim: int = 8192,
    flavor: str = "paper",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Create a pooling layer.

    Args:
        pool_type: One of ``SECOND_ORDER_POOLS``.
        in_features: Channels of the input.
        isqrt_dim: Channels after reduction in ``"isqrt"``, ``"mpn"`` and ``"bilinear"``. ``"compact_bilinear"`` does
            not reduce.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"``; None for the flavor's own.
        compact_bilinear_dim: Features of ``"compact_bilinear"``.
        flavor: Of ``"isqrt"``: ``"paper"`` or ``"official"``.
        device: Device of the weights.
        dtype: Precision of the weights.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """
    check_choice("pool_type", pool_type, SECOND_ORDER_POOLS)
    check_second_order_pool(isqrt_dim, isqrt_iters, compact_bilinear_dim)
    check_choice("flavor", flavor, FLAVORS)
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    if pool_type == "isqrt":
        pool_class = IsqrtCovPool2d if flavor == "paper" else OfficialIsqrtCovPool2d
        iterations: dict[str, Any] = {} if isqrt_iters is None else dict(num_iters=isqrt_iters)
        return pool_class(in_features, isqrt_dim, **iterations, **dd)
    if pool_type == "mpn":
        return MpnCovPool2d(in_features, isqrt_dim, **dd)
    if pool_type == "bilinear":
        return BilinearPool2d(in_features, isqrt_dim, **dd)
    return CompactBilinearPool2d(in_features, compact_bilinear_dim, **dd)
