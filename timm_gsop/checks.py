"""Checks of arguments and inputs: a bad one raises a ``ValueError`` that names it, its value and what is accepted."""

import warnings
from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import nn

__all__ = [
    "check_batch_for_training",
    "check_choice",
    "check_features",
    "check_fraction",
    "check_matrices",
    "check_ndim",
    "check_nonnegative",
    "check_positive",
    "check_positive_int",
    "check_real_matrices",
    "check_stages",
    "warn_of_one_position",
]


def check_choice(name: str, value: Any, accepted: Iterable[Any]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``accepted``."""
    accepted = tuple(accepted)
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is not accepted; accepted: {', '.join(map(repr, accepted))}.")


def check_fraction(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number of at least 0 and below 1."""
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not accepted; it must be a number >= 0 and < 1.")


def check_positive(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number above 0."""
    if not value > 0:
        raise ValueError(f"{name}={value!r} is not accepted; it must be a number > 0.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is a number of at least 0."""
    if not value >= 0:
        raise ValueError(f"{name}={value!r} is not accepted; it must be a number >= 0.")


def check_positive_int(name: str, value: Any) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer of at least 1, Python's or NumPy's."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is not accepted; it must be an integer >= 1.")


def check_stages(name: str, value: Any, num_stages: int) -> None:
    """Raise ``ValueError`` unless ``value`` is a sequence of different stages from 1 to ``num_stages``."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_sequence or len(set(value)) < len(value) or not set(value) <= set(range(1, num_stages + 1)):
        raise ValueError(
            f"{name}={value!r} is not accepted; it must be a sequence of different stages from 1 to {num_stages}, "
            "() for none."
        )


def check_ndim(name: str, x: torch.Tensor, accepted: tuple[int, ...], layout: str) -> None:
    """Raise ``ValueError`` unless ``x.ndim`` is one of ``accepted``; ``layout`` describes them in the message."""
    if x.ndim not in accepted:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, with {x.ndim} dimensions; accepted: {layout}.")


def check_features(
    name: str, x: torch.Tensor, weights: torch.Tensor | None = None, spatial_dims: int | None = None
) -> None:
    """Raise ``ValueError`` unless ``x`` has real features of at least one position, and as many weights if any."""
    if spatial_dims is None:
        check_ndim(name, x, (2, 3, 4), "(B, C, H, W), (B, C, M), (C, M), or any with spatial_dims")
        spatial_dims = 2 if x.ndim == 4 else 1
    else:
        check_positive_int("spatial_dims", spatial_dims)
        if x.ndim <= spatial_dims:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, with {x.ndim} dimensions; accepted: channels and {spatial_dims} "
                "of positions at the end (spatial_dims)."
            )
    _check_real(name, x)
    if torch.jit.is_tracing():  # sizes are tensors, and whatever tests them is recorded as a constant, with a warning
        return
    leading, positions = x.shape[: -spatial_dims - 1], x.shape[-spatial_dims:]
    if any(size == 0 for size in positions):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, without positions to average over; accepted: M >= 1.")
    if weights is not None:
        _check_real("weights", weights)
        accepted = (leading + positions, leading + torch.Size([positions.numel()]))
        if weights.shape not in accepted:
            raise ValueError(
                f"weights has shape {tuple(weights.shape)}; accepted for {name} of shape {tuple(x.shape)}: "
                f"{' or '.join(str(tuple(shape)) for shape in dict.fromkeys(accepted))}."
            )


def _check_real(name: str, x: torch.Tensor) -> None:
    if x.is_complex():
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: real numbers.")


def check_matrices(name: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` has square matrices, (…, C, C)."""
    # Within torch.jit.trace sizes are tensors, and whatever tests them is recorded as a constant, with a warning.
    if x.ndim < 2 or (not torch.jit.is_tracing() and x.shape[-1] != x.shape[-2]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (…, C, C), square matrices.")


def check_real_matrices(name: str, x: torch.Tensor) -> None:
    """Raise ``ValueError`` unless ``x`` has real square matrices, (…, C, C)."""
    check_matrices(name, x)
    _check_real(name, x)


def check_batch_for_training(name: str, x: torch.Tensor, bn: nn.Module) -> None:
    """Raise ``ValueError`` for a batch of one where ``bn``, fed one value a channel and sample, is in training."""
    # SyncBatchNorm may see more samples on other processes, a frozen one needs none: neither is a BatchNorm2d.
    if isinstance(bn, nn.BatchNorm2d) and bn.training and not torch.jit.is_tracing() and x.shape[0] == 1:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, a batch of one: in training the excitation's batch normalization "
            "needs a batch of at least 2. Use a larger batch, drop the last incomplete one, or call eval()."
        )


def warn_of_one_position(layer: str, x: torch.Tensor) -> None:
    """Warn of a map (B, C, 1, 1), whose covariance is zero; graphs do not.

    By Python's default filter, a warning is shown once.

    Args:
        layer: Name of the layer that computes the covariance.
        x: The map.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    if x.shape[2] == 1 and x.shape[3] == 1:
        warnings.warn(
            f"{layer} reads a map of 1×1, of which every covariance is zero: it learns nothing there. Use larger "
            "images, a smaller output_stride, or an earlier stage.",
            stacklevel=2,
        )
