"""Dimensions before those that a function is about: brought to one batch, and back."""

import torch

__all__ = ["as_batch", "flatten_positions", "leading_dims_of_features", "with_leading_dims"]


def as_batch(mat: torch.Tensor) -> torch.Tensor:
    """(…, R, C) to (B, R, C)."""
    if mat.dim() == 3:
        return mat
    return mat[None] if mat.dim() == 2 else mat.flatten(0, -3)


def _spatial_dims(x: torch.Tensor, spatial_dims: int | None) -> int:
    if spatial_dims is None:
        return 2 if x.dim() == 4 else 1
    return spatial_dims


def flatten_positions(x: torch.Tensor, spatial_dims: int | None) -> torch.Tensor:
    """(…, C, *positions) to (B, C, M); positions are two dimensions of four, otherwise one, unless said."""
    spatial_dims = _spatial_dims(x, spatial_dims)
    return as_batch(x.flatten(-spatial_dims) if spatial_dims > 1 else x)


def leading_dims_of_features(x: torch.Tensor, spatial_dims: int | None) -> list[int]:
    """Sizes of the dimensions that :func:`flatten_positions` makes a batch of."""
    return list(x.shape[: -_spatial_dims(x, spatial_dims) - 1])


def with_leading_dims(result: torch.Tensor, leading: list[int]) -> torch.Tensor:
    """(B, …) with these dimensions instead of B."""
    return result if len(leading) == 1 else result.reshape(leading + list(result.shape[1:]))
