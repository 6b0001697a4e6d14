"""Covariance of feature maps, and its triangle as a vector."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from timm_gsop.checks import check_ndim, check_square
from timm_gsop.layers import kernels
from timm_gsop.layers.exporting import is_exporting
from timm_gsop.layers.gradients import evaluate, function_of_input
from timm_gsop.layers.half_covariance import half_covariance, half_covariance_gradient, has_exact_products

__all__ = ["covariance_pool", "position_covariance", "tril_vectorize", "triu_vectorize"]


def covariance_pool(x: torch.Tensor) -> torch.Tensor:
    r"""Covariance between channels, over the positions of a feature map (paper section 3.1).

    .. math:: \Sigma = \frac{1}{M} \bar{X} \bar{X}^\top, \qquad \bar{X} = X - \frac{1}{M} X 1 1^\top

    It is the biased estimate, ``torch.cov(x, correction=0)`` of each sample.

    Args:
        x: Features, (B, C, H, W) or (B, C, M), M = H·W positions.

    Returns:
        (B, C, C), symmetric and positive semi-definite, in float32, or in float64 if ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has neither three nor four dimensions.

    Examples:
        >>> x = torch.tensor([[[1.0, 3.0], [2.0, 6.0]]])  # one image, two channels, two positions
        >>> covariance_pool(x)
        tensor([[[1., 2.],
                 [2., 4.]]])
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our checks, nor our gradient
        return _covariance(x.flatten(2))
    check_ndim("x", x, (3, 4), "(B, C, H, W) or (B, C, M)")
    x = x.flatten(2)
    if kernels.usable(x):
        return kernels.load("covariance").map_covariance(x)
    return evaluate(_Covariance, _covariance, x)


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
    # Channels last: so is the gradient then. The compiler decides about layouts itself.
    if not torch.compiler.is_compiling() and x.stride(1) == 1:
        return torch.bmm(centred.transpose(1, 2), grad).transpose(1, 2).to(x.dtype)
    return torch.bmm(grad, centred).to(x.dtype)


# Autograd would keep the centred features too.
_Covariance = function_of_input(_covariance, _covariance_gradient)


def position_covariance(x: torch.Tensor) -> torch.Tensor:
    r"""Covariance between positions, over the channels of a feature map (paper section 3.2).

    .. math:: \Sigma = \frac{1}{C} \bar{X}^\top \bar{X}

    where X̄ is centred over the channels of each position. It is the biased estimate.

    Args:
        x: Features, (B, C, H, W) or (B, C, M), M = H·W positions.

    Returns:
        (B, M, M), positions in row-major order, symmetric and positive semi-definite, in float32, or in float64 if
        ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has neither three nor four dimensions.

    Examples:
        >>> position_covariance(torch.randn(2, 16, 4, 4)).shape
        torch.Size([2, 16, 16])
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_ndim("x", x, (3, 4), "(B, C, H, W) or (B, C, M)")
    return covariance_pool(x.flatten(2).transpose(1, 2))


def triu_vectorize(mat: torch.Tensor) -> torch.Tensor:
    """Upper triangle of symmetric matrices, diagonal included, in row-major order.

    The order is part of the weights of every classifier that reads these vectors, and never changes.

    Args:
        mat: Matrices, (B, C, C).

    Returns:
        (B, C·(C+1)/2), in the dtype of ``mat``: row 0 from column 0, row 1 from column 1, and so on.

    Raises:
        ValueError: If ``mat`` is not a batch of square matrices.

    Examples:
        >>> triu_vectorize(torch.tensor([[[1, 2], [2, 3]]]))
        tensor([[1, 2, 3]])
    """
    if not torch.jit.is_scripting():
        check_square("mat", mat)
        if torch.jit.is_tracing() or is_exporting(mat.shape[2]):
            return _take_constant(mat, np.triu_indices)
    # Made at each call and not kept as a buffer: a non-persistent one is garbage after meta-device loading.
    return _take(mat, torch.triu_indices(mat.shape[2], mat.shape[2], device=mat.device))


def tril_vectorize(mat: torch.Tensor) -> torch.Tensor:
    """Lower triangle of symmetric matrices, diagonal included, in row-major order: that of the released code.

    Args:
        mat: Matrices, (B, C, C).

    Returns:
        (B, C·(C+1)/2), in the dtype of ``mat``: row 0 to column 0, row 1 to column 1, and so on.

    Raises:
        ValueError: If ``mat`` is not a batch of square matrices.
    """
    if not torch.jit.is_scripting():
        check_square("mat", mat)
        if torch.jit.is_tracing() or is_exporting(mat.shape[2]):
            return _take_constant(mat, np.tril_indices)
    return _take(mat, torch.tril_indices(mat.shape[2], mat.shape[2], device=mat.device))


def _take(mat: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return mat.flatten(1).index_select(1, indices[0] * mat.shape[2] + indices[1])


def _take_constant(mat: torch.Tensor, triangle: Callable[[int], tuple[Any, Any]]) -> torch.Tensor:
    """As :func:`_take`, with indices that a graph holds as constants: converters lack an operation that makes them."""
    if not torch.jit.is_tracing():
        return mat.flatten(1).index_select(1, _indices(mat.shape[2], triangle, mat.device))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # the size is that of the weights: it is constant
        indices = _indices(int(mat.shape[2]), triangle, mat.device)
    return mat.flatten(1).index_select(1, indices)


@torch.compiler.assume_constant_result
def _indices(size: int, triangle: Callable[[int], tuple[Any, Any]], device: torch.device) -> torch.Tensor:
    rows, columns = triangle(size)
    return torch.as_tensor(rows * size + columns, device=device)
