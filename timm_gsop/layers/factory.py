"""Heads by name, out of the registry (``second_order_pool``), with their options and cost.

::

    pool = create_second_order_pool("isqrt", 512, isqrt_dim=64)
    pool(torch.randn(2, 512, 7, 7)).shape  # (2, pool.out_features)
    pool_cost(pool, 7, 7)

Pools with ``takes_token`` are called as ``pool(map, token)`` where there is a class token (B, C).
"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.gsop import FLAVORS
from timm_gsop.layers.official import OfficialIsqrtCovPool2d
from timm_gsop.layers.projected_pool import ProjectedPool2d
from timm_gsop.layers.second_order_pool import SECOND_ORDER_POOLS, SHARED, SecondOrderPool2d

__all__ = [
    "PoolCost",
    "accepted_arguments",
    "check_pool_kwargs",
    "check_second_order_pool",
    "create_second_order_pool",
    "pool_cost",
]

OFFICIAL: dict[str, type[SecondOrderPool2d]] = {"isqrt": OfficialIsqrtCovPool2d}
"""Pools that the released code of GSoP-Net has in another way."""


FOR_EVERY_POOL: dict[str, Any] = dict(rank=None)
"""What ``pool_kwargs`` may have besides the options of a pool's own, and the defaults."""


class PoolCost(NamedTuple):
    """What a pool costs.

    Attributes:
        params: Its parameters.
        macs: Multiply-accumulates for one map: its convolutions and matrix products, as PyTorch counts them.
    """

    params: int
    macs: int


def accepted_arguments(pool_type: str) -> tuple[str, ...]:
    """Of the arguments that all networks have, those that a pool uses.

    Args:
        pool_type: One of ``SECOND_ORDER_POOLS``.

    Returns:
        Names among ``"isqrt_dim"``, ``"isqrt_iters"``, ``"compact_bilinear_dim"`` and ``"flavor"``.

    Raises:
        ValueError: If there is no such pool.

    Examples:
        >>> accepted_arguments("isqrt")
        ('isqrt_dim', 'isqrt_iters', 'flavor')
    """
    check_choice("pool_type", pool_type, SECOND_ORDER_POOLS)
    return (*SECOND_ORDER_POOLS[pool_type].shared, *(("flavor",) if pool_type in OFFICIAL else ()))


def check_second_order_pool(isqrt_dim: int, isqrt_iters: int | None, compact_bilinear_dim: int) -> None:
    """Raise ``ValueError`` unless the arguments, which all networks have, are what some pool accepts."""
    check_positive_int("isqrt_dim", isqrt_dim)
    if isqrt_iters is not None:
        check_positive_int("isqrt_iters", isqrt_iters)
    check_positive_int("compact_bilinear_dim", compact_bilinear_dim)


def check_pool_kwargs(pool_type: str, pool_kwargs: Mapping[str, Any] | None) -> None:
    """Raise ``ValueError`` unless ``pool_kwargs`` is None, or has nothing but options of a pool's own, or ``"rank"``.

    Args:
        pool_type: Any global pooling; only those in ``SECOND_ORDER_POOLS`` have options.
        pool_kwargs: The options.
    """
    if pool_kwargs is None:
        return
    pool_class = SECOND_ORDER_POOLS.get(pool_type)
    options = {**pool_class.options(), **FOR_EVERY_POOL} if pool_class else {}
    accepted = ", ".join(map(repr, options)) or "none, because it has no options"
    if not isinstance(pool_kwargs, Mapping):
        raise ValueError(f"pool_kwargs={pool_kwargs!r} is not accepted; it must be a dictionary, or None.")
    for name, value in pool_kwargs.items():
        if name not in options:
            shared = {own: argument for argument, own in pool_class.shared.items()} if pool_class else {}
            hint = f" Its {name} is set by {shared[name]}." if name in shared else ""
            raise ValueError(
                f"pool_kwargs has {name}={value!r}, which is no option of global_pool={pool_type!r}; "
                f"accepted: {accepted}.{hint}"
            )


def create_second_order_pool(
    pool_type: str,
    in_features: int,
    isqrt_dim: int = SHARED["isqrt_dim"],
    isqrt_iters: int | None = SHARED["isqrt_iters"],
    compact_bilinear_dim: int = SHARED["compact_bilinear_dim"],
    flavor: str = SHARED["flavor"],
    pool_kwargs: Mapping[str, Any] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> SecondOrderPool2d:
    """Create a pooling layer.

    Args:
        pool_type: One of ``SECOND_ORDER_POOLS``.
        in_features: Channels of the input.
        isqrt_dim: Channels after reduction, in every pool that reduces.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"``; None for the flavor's own.
        compact_bilinear_dim: Features of ``"compact_bilinear"``.
        flavor: Of ``"isqrt"``: ``"paper"`` or ``"official"``.
        pool_kwargs: Options of the pool's own, ``{"num_heads": 6}`` of ``"svpn"`` for one. With ``"rank"``, which every
            pool has, a projection to so many features follows (:class:`ProjectedPool2d`).
        device: Device of the weights.
        dtype: Precision of the weights.

    Raises:
        ValueError: If an argument is not among the accepted ones, or is not its default though the pool does not use
            it (:func:`accepted_arguments`).

    Examples:
        >>> create_second_order_pool("isqrt", 64, isqrt_dim=16)(torch.randn(2, 64, 7, 7)).shape
        torch.Size([2, 136])
    """
    used = accepted_arguments(pool_type)
    check_second_order_pool(isqrt_dim, isqrt_iters, compact_bilinear_dim)
    check_choice("flavor", flavor, FLAVORS)
    check_pool_kwargs(pool_type, pool_kwargs)
    given: dict[str, Any] = dict(
        isqrt_dim=isqrt_dim, isqrt_iters=isqrt_iters, compact_bilinear_dim=compact_bilinear_dim, flavor=flavor
    )
    for name, value in given.items():
        if name not in used and value != SHARED[name]:
            raise ValueError(
                f"{name}={value!r} is not accepted with pool_type={pool_type!r}, which does not use it; "
                f"accepted: {', '.join(used)}."
            )
    pool_class: Any = OFFICIAL[pool_type] if flavor == "official" else SECOND_ORDER_POOLS[pool_type]
    options = {own: given[name] for name, own in pool_class.shared.items() if given[name] is not None}
    own = {**FOR_EVERY_POOL, **(pool_kwargs or {})}
    rank = own.pop("rank")
    pool: SecondOrderPool2d = pool_class(in_features, **options, **own, device=device, dtype=dtype)
    return pool if rank is None else ProjectedPool2d(pool, rank, device=device, dtype=dtype)


def pool_cost(pool: SecondOrderPool2d, height: int, width: int) -> PoolCost:
    """Count the parameters of a pool, and its multiply-accumulates in evaluation for one map.

    Args:
        pool: The pool, on any device.
        height: Height of the map.
        width: Width of the map.

    Examples:
        >>> pool_cost(create_second_order_pool("cov", 64, isqrt_dim=16), 7, 7)  # 7·7·64·16 + 7·7·16·16
        PoolCost(params=1056, macs=62720)
    """
    weightless = copy.deepcopy(pool).to("meta").eval()
    dtype = next((p.dtype for p in weightless.parameters()), None)
    x = torch.empty(1, pool.in_features, height, width, device="meta", dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        weightless(x)
    # It counts two operations for a multiply-accumulate.
    return PoolCost(sum(p.numel() for p in pool.parameters()), counter.get_total_flops() // 2)
