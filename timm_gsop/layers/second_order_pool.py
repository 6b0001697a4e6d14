"""What every head has in common, and what it says of itself to the registry (``pool_factory``)."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from timm_gsop.checks import check_positive_int
from timm_gsop.layers.precision import at_least_float32

__all__ = ["SecondOrderPool2d", "check_token", "first_moment_of"]


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
