"""Covariance of feature maps, and its triangle as a vector."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from timm_gsop.checks import check_features, check_matrices
from timm_gsop.layers import kernels
from timm_gsop.layers.exporting import is_exporting
from timm_gsop.layers.gradients import evaluate, function_of_input
from timm_gsop.layers.half_covariance import half_covariance, half_covariance_gradient, has_exact_products
from timm_gsop.layers.leading_dims import flatten_positions, leading_dims_of_features, with_leading_dims
from timm_gsop.layers.weighted import centre_weighted, normalize_weights, weighted_product

__all__ = ["covariance_pool", "position_covariance", "tril_vectorize", "triu_unvectorize", "triu_vectorize"]


def covariance_pool(
    x: torch.Tensor, weights: torch.Tensor | None = None, spatial_dims: int | None = None
) -> torch.Tensor:
    r"""Covariance between channels, over the positions of a feature map (paper section 3.1).

    .. math:: \Sigma = \frac{1}{M} \bar{X} \bar{X}^\top, \qquad \bar{X} = X - \frac{1}{M} X 1 1^\top

    It is the biased estimate, ``torch.cov(x, correction=0)`` of each sample. With weights,

    .. math:: \Sigma = \sum_m \frac{w_m}{\sum w} (x_m - \mu)(x_m - \mu)^\top, \qquad
        \mu = \sum_m \frac{w_m}{\sum w} x_m,

    it is ``torch.cov(x, aweights=w, correction=0)``. Weights of 0 and 1 are a mask.

    Args:
        x: Features: (B, C, H, W), or (…, C, M) of at most three dimensions. An image without its batch, (C, H, W),
            would be read as (B, C, M): pass ``x[None]``, or ``spatial_dims=2``.
        weights: A weight for each position, >= 0 (not checked), in the shape of ``x`` without C: (B, H, W) or (B, M).
            Their gradient is right at zero too. If all weights of a sample are zero, its covariance is zero.
        spatial_dims: How many dimensions after C are positions, after any before it: 1 for (…, C, M), 3 for volumes.

    Returns:
        (…, C, C), symmetric and positive semi-definite, in float32, or in float64 if ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has other dimensions, no positions, or is complex, or ``weights`` has another shape.

    Examples:
        >>> x = torch.tensor([[[1.0, 3.0, 9.0], [2.0, 6.0, 9.0]]])  # one image, two channels, three positions
        >>> covariance_pool(x, weights=torch.tensor([[1, 1, 0]]))
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_features("x", x, weights, spatial_dims)
    flat = flatten_positions(x, spatial_dims)
    if weights is not None:
        weights = normalize_weights(weights, flat)
        cov = weighted_product(centre_weighted(flat, weights), weights)
    elif torch.jit.is_scripting():  # knows neither autocast nor our gradient
        cov = _covariance(flat)
    elif kernels.usable(flat):
        cov = kernels.load("covariance").map_covariance(flat)
    else:
        cov = evaluate(_Covariance, _covariance, flat)
    return with_leading_dims(cov, leading_dims_of_features(x, spatial_dims))


def _covariance(x: torch.Tensor) -> torch.Tensor:
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if has_exact_products(x):
            return half_covariance(x)
    x = centre(x)
    return torch.bmm(x, x.transpose(1, 2)) / x.shape[2]


def centre(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean before any product: E[xx'] - mm' would cancel where the mean is large beside the spread."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x - x.mean(dim=2, keepdim=True, dtype=dtype)  # a half-precision x becomes float32 on the way, uncopied


def _covariance_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    grad = (grad + grad.transpose(1, 2)) / x.shape[2]
    if has_exact_products(x):
        return half_covariance_gradient(x, grad)
    centred = centre(x)
    # The gradient of a channels-last map is channels last too. The compiler chooses layouts itself.
    if not torch.compiler.is_compiling() and x.stride(1) == 1:
        return torch.bmm(centred.transpose(1, 2), grad).transpose(1, 2).to(x.dtype)
    return torch.bmm(grad, centred).to(x.dtype)


# Autograd would keep the centred features too.
_Covariance = function_of_input(_covariance, _covariance_gradient)


def position_covariance(x: torch.Tensor, spatial_dims: int | None = None) -> torch.Tensor:
    r"""Covariance between positions, over the channels of a feature map (paper section 3.2).

    .. math:: \Sigma = \frac{1}{C} \bar{X}^\top \bar{X}

    where X̄ is centred over the channels of each position. It is the biased estimate.

    Args:
        x: Features: (B, C, H, W), or (…, C, M) of at most three dimensions.
        spatial_dims: As in :func:`covariance_pool`.

    Returns:
        (…, M, M), positions in row-major order, symmetric and positive semi-definite, in float32, or in float64 if
        ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has other dimensions, no positions, no channels, or is complex.

    Examples:
        >>> position_covariance(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 16, 16])
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_features("x", x, None, spatial_dims)
    cov = covariance_pool(flatten_positions(x, spatial_dims).transpose(1, 2))
    return with_leading_dims(cov, leading_dims_of_features(x, spatial_dims))


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
