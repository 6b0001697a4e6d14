"""What every head has in common, and the registry of heads.

A head is a class in a file of its own, with :func:`register_pool` above it, and an import in ``timm_gsop.layers``.
Networks, cards, tables, tests and the probe read the registry::

    for name, pool_class in SECOND_ORDER_POOLS.items():
        print(name, pool_class.take_when, pool_class.options(), accepted_arguments(name))
"""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers.gradients import at_least_float32

__all__ = [
    "FIRST_ORDER_POOLS",
    "SECOND_ORDER_POOLS",
    "SHARED",
    "SecondOrderPool2d",
    "check_token",
    "first_moment_of",
    "register_pool",
]

FIRST_ORDER_POOLS = (
    *("", "avg", "max", "avgmax", "catavgmax"),
    *("fast", "fastavg", "fastmax", "fastavgmax", "fastcatavgmax"),
)
"""timm's pools."""
SHARED: dict[str, Any] = dict(isqrt_dim=256, isqrt_iters=None, compact_bilinear_dim=8192, flavor="paper")
"""Arguments that all networks have, and their defaults."""


def check_token(token: torch.Tensor | None, channels: int) -> None:
    """Raise ``ValueError`` unless ``token`` is None or (B, ``channels``)."""
    if token is not None and (token.ndim != 2 or (not torch.jit.is_tracing() and token.shape[1] != channels)):
        raise ValueError(f"token has shape {tuple(token.shape)}; accepted: (B, {channels}), or None.")


def first_moment_of(x: torch.Tensor, token: torch.Tensor | None) -> torch.Tensor:
    """The class token (B, C) where there is one, else the average of (B, C, H, W) over the positions."""
    return at_least_float32(x).mean(dim=(2, 3)) if token is None else token


class SecondOrderPool2d(nn.Module):
    """A head: pools a feature map (B, C, H, W) to a vector (B, ``out_features``).

    A subclass is a head. It sets the class attributes, calls this constructor and defines ``forward``. Its
    constructor takes ``in_features``, then keywords with defaults, ``device`` and ``dtype``. A keyword that
    ``shared`` does not name is an option of the head's own.

    Attributes:
        pool_type: The name that ``global_pool`` calls it by. timm reads it when it saves a model.
        take_when: When to take it, in a few words, for tables.
        citation: BibTeX of its paper, for cards; indented as the class is.
        shared: The arguments of networks that it uses, and the constructor's names for them.
        in_features: Channels of the input, C.
        out_features: Features of the output.
        takes_token: Whether ``forward`` has a second argument, a class token (B, C).

    Args:
        in_features: Channels of the input.
        out_features: Features of the output.

    Raises:
        ValueError: If an argument < 1.
    """

    pool_type: str
    take_when: str
    citation = ""
    shared: ClassVar[Mapping[str, str]] = {}
    takes_token = False

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        check_positive_int("in_features", in_features)
        check_positive_int("out_features", out_features)
        self.in_features = int(in_features)  # TorchScript knows no integers of NumPy's
        self.out_features = int(out_features)

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Options of the head's own, those that ``pool_kwargs`` may set, with their defaults."""
        others = {"in_features", "device", "dtype", *cls.shared.values()}
        return {name: p.default for name, p in inspect.signature(cls).parameters.items() if name not in others}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay would harm."""
        return set()


SECOND_ORDER_POOLS: dict[str, type[SecondOrderPool2d]] = {}
"""Every head by its name."""
Pool = TypeVar("Pool", bound=type[SecondOrderPool2d])


def register_pool(pool: Pool) -> Pool:
    """Register a head under its ``pool_type``: a decorator of subclasses of :class:`SecondOrderPool2d`.

    ::

        @register_pool
        class VarPool2d(SecondOrderPool2d):
            '''Variance of each channel.'''

            pool_type = "var"
            take_when = "products of two channels are too many"

            def __init__(self, in_features, *, device=None, dtype=None):
                super().__init__(in_features, in_features)

            def forward(self, x):
                return x.flatten(2).var(dim=2)

    From then on ``global_pool`` accepts the name in every network, ``pool_kwargs`` the options, and the probe compares
    the head. To load a saved network, import the head's module first.

    Raises:
        ValueError: If the class lacks its name or says nothing for tables, another class has the name, ``shared`` has
            what no network has, an option has no default or is called rank.
    """
    for attribute in ("pool_type", "take_when"):
        value = getattr(pool, attribute, None)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{pool.__name__}.{attribute}={value!r} is not accepted; it must be a string, not empty.")
    if pool.pool_type in FIRST_ORDER_POOLS:
        raise ValueError(f"pool_type={pool.pool_type!r} is not accepted; it is the name of timm's.")
    known = SECOND_ORDER_POOLS.get(pool.pool_type, pool)
    if (known.__module__, known.__qualname__) != (pool.__module__, pool.__qualname__):  # a notebook runs a cell again
        raise ValueError(f"pool_type={pool.pool_type!r} is not accepted; it is the name of {known.__name__}.")
    for argument in pool.shared:
        check_choice(f"{pool.__name__}.shared", argument, SHARED)
    for name, default in pool.options().items():
        if default is inspect.Parameter.empty:
            raise ValueError(f"{pool.__name__} has no default for {name}, one of its options.")
        if name == "rank":
            raise ValueError(f"{pool.__name__} has an option rank, which every head has: pool_kwargs sets that.")
    SECOND_ORDER_POOLS[pool.pool_type] = pool
    return pool
