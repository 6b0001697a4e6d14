"""Every layer of the package, small, for the tests that all of them pass (test_layers.py, test_modes.py)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from timm_gsop.layers import (
    FLAVORS,
    GSOP_TYPES,
    SECOND_ORDER_POOLS,
    GsopBlock,
    accepted_arguments,
    create_gsop,
    create_second_order_pool,
)

CHANNELS = 64  # the fewest that the official concatenation accepts


def _scaling(gsop_type: str, flavor: str) -> Callable[..., nn.Module]:
    side = None if gsop_type == "channel" else 3
    return lambda **dd: create_gsop(gsop_type, CHANNELS, cov_dim=8, spatial_size=side, flavor=flavor, **dd)


def _head(pool_type: str, rank: int | None = None, **kwargs) -> nn.Module:
    small = dict(isqrt_dim=8, compact_bilinear_dim=64)
    shared = {name: small[name] for name in accepted_arguments(pool_type) if name in small}
    options = {**SMALL_OPTIONS.get(pool_type, {}), "rank": rank}
    return create_second_order_pool(pool_type, CHANNELS, **{**shared, **kwargs}, pool_kwargs=options)


SMALL_OPTIONS = {"svpn": dict(num_heads=2, head_dim=5, drop=0.0), "moment": dict(hidden_dim=28)}
"""Options of heads that are not small without them, or random in training."""

# Each takes ``device`` and ``dtype``.
SCALING_LAYERS: dict[str, Callable[..., nn.Module]] = {
    f"{gsop_type} {flavor}": _scaling(gsop_type, flavor) for gsop_type in GSOP_TYPES for flavor in FLAVORS
}
BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "block of channel": lambda **dd: GsopBlock(SCALING_LAYERS["channel paper"](**dd)),
    "block of concat": lambda **dd: GsopBlock(SCALING_LAYERS["concat paper"](**dd), scale=2 / 3),
}
# With so few channels DropCov's rate is zero, and training not random, unless importance and covariance disagree.
HEADS: dict[str, Callable[..., nn.Module]] = {
    **{pool_type: partial(_head, pool_type) for pool_type in SECOND_ORDER_POOLS},
    "isqrt of few positions": partial(_head, "isqrt", isqrt_dim=128),
    "isqrt of low rank": partial(_head, "isqrt", rank=5),
    "isqrt official": partial(_head, "isqrt", flavor="official"),
}
LAYERS = {**SCALING_LAYERS, **BLOCKS, **HEADS}


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value, so that none hides behind a zero or a one."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.5)
    return module
