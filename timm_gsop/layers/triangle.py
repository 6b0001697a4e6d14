"""The triangle of a symmetric matrix as a vector, in an order that is part of the weights."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from timm_gsop.checks import check_matrices
from timm_gsop.layers.exporting import is_exporting

__all__ = ["tril_vectorize", "triu_unvectorize", "triu_vectorize"]


def triu_vectorize(mat: torch.Tensor, scale: bool = False) -> torch.Tensor:
    """Upper triangle of symmetric matrices, diagonal included, in row-major order.

    The order is part of the weights of every classifier that reads these vectors, and never changes.

    Args:
        mat: Matrices, (…, C, C). Of each, the upper triangle is read.
        scale: Multiply what is off the diagonal by √2: norms and inner products of vectors are then those of matrices.

    Returns:
        (…, C·(C+1)/2), in the dtype of ``mat``: row 0 from column 0, row 1 from column 1, and so on.

    Raises:
        ValueError: If ``mat`` has no square matrices.

    Examples:
        >>> triu_vectorize(torch.tensor([[[1, 2], [2, 3]]]))
        tensor([[1, 2, 3]])
    """
    if not torch.jit.is_scripting():
        check_matrices("mat", mat)
    if scale:
        mat = mat * _off_diagonal(mat, 2**0.5)
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if torch.jit.is_tracing() or is_exporting(mat.shape[-1]):
            return _take_constant(mat, np.triu_indices)
    # Made at each call and not kept as a buffer: a non-persistent one is garbage after meta-device loading.
    return _take(mat, torch.triu_indices(mat.shape[-1], mat.shape[-1], device=mat.device))


def triu_unvectorize(vectors: torch.Tensor, scale: bool = False) -> torch.Tensor:
    """Symmetric matrices from their upper triangles: the inverse of :func:`triu_vectorize`.

    Args:
        vectors: Triangles, (…, C·(C+1)/2).
        scale: Divide what is off the diagonal by √2, which ``triu_vectorize(scale=True)`` multiplied it by.

    Returns:
        (…, C, C), in the dtype of ``vectors``.

    Raises:
        ValueError: If the last dimension is not C·(C+1)/2 for any C.

    Examples:
        >>> triu_unvectorize(torch.tensor([[1, 2, 3]]))
        tensor([[[1, 2],
                 [2, 3]]])
    """
    length = int(vectors.shape[-1])  # that of the weights: constant in a trace
    size = int(((8 * length + 1) ** 0.5 - 1) / 2 + 0.5)
    if size * (size + 1) // 2 != length:
        raise ValueError(f"vectors has {length} elements in its last dimension; accepted: C·(C+1)/2, 1, 3, 6, 10, …")
    position = torch.arange(size, device=vectors.device)
    row, column = torch.minimum(position[:, None], position), torch.maximum(position[:, None], position)
    index = row * (2 * size - 1 - row) // 2 + column
    mat = vectors.index_select(-1, index.flatten()).unflatten(-1, (size, size))
    return mat * _off_diagonal(mat, 0.5**0.5) if scale else mat


def _off_diagonal(mat: torch.Tensor, factor: float) -> torch.Tensor:
    """One on the diagonal, and ``factor`` elsewhere."""
    dtype = mat.dtype if mat.is_floating_point() else torch.float32
    eye = torch.eye(mat.shape[-1], dtype=dtype, device=mat.device)
    return factor + (1 - factor) * eye


def tril_vectorize(mat: torch.Tensor) -> torch.Tensor:
    """Lower triangle of symmetric matrices, diagonal included, in row-major order: that of the released code.

    Args:
        mat: Matrices, (…, C, C). Of each, the lower triangle is read.

    Returns:
        (…, C·(C+1)/2), in the dtype of ``mat``: row 0 to column 0, row 1 to column 1, and so on.

    Raises:
        ValueError: If ``mat`` has no square matrices.
    """
    if not torch.jit.is_scripting():
        check_matrices("mat", mat)
        if torch.jit.is_tracing() or is_exporting(mat.shape[-1]):
            return _take_constant(mat, np.tril_indices)
    return _take(mat, torch.tril_indices(mat.shape[-1], mat.shape[-1], device=mat.device))


def _take(mat: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return mat.flatten(-2).index_select(-1, indices[0] * mat.shape[-1] + indices[1])


def _take_constant(mat: torch.Tensor, triangle: Callable[[int], tuple[Any, Any]]) -> torch.Tensor:
    """As :func:`_take`, with indices that a graph holds as constants: converters lack an operation that makes them."""
    if not torch.jit.is_tracing():
        return mat.flatten(-2).index_select(-1, _indices(mat.shape[-1], triangle, mat.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the size is that of the weights: it is constant
        indices = _indices(int(mat.shape[-1]), triangle, mat.device)
    return mat.flatten(-2).index_select(-1, indices)


@torch.compiler.assume_constant_result
def _indices(size: int, triangle: Callable[[int], tuple[Any, Any]], device: torch.device) -> torch.Tensor:
    rows, columns = triangle(size)
    return torch.as_tensor(rows * size + columns, device=device)
