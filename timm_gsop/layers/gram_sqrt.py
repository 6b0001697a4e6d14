"""The square root of a covariance from the features; on small maps by way of their Gram matrix, which is smaller."""

import warnings

import torch
from torch.torch_version import TorchVersion

from timm_gsop.checks import check_features, check_positive_int
from timm_gsop.layers.covariance import (
    bilinear_pool,
    centre,
    centre_weighted,
    covariance_pool,
    normalize_weights,
    quadratic_form,
)
from timm_gsop.layers.leading_dims import flatten_positions, leading_dims_of_features, with_leading_dims
from timm_gsop.layers.matrix_sqrt import inverse_sqrt_of_trace_one, largest_zero, newton_schulz_sqrt

__all__ = ["covariance_sqrt"]

_DYNAMO_KNOWS_INEQUALITIES = TorchVersion(torch.__version__) >= "2.8"


def covariance_sqrt(
    x: torch.Tensor, num_iters: int = 5, weights: torch.Tensor | None = None, spatial_dims: int | None = None
) -> torch.Tensor:
    r"""Square root of the covariance between channels, ``newton_schulz_sqrt(covariance_pool(x, weights), num_iters)``.

    Where a map has at most half as many positions M as channels C, the iteration runs on M×M matrices instead of C×C.
    With :math:`\bar X` the features, centred and divided by their norm, :math:`\bar X \bar X^\top` is the covariance
    with trace one. What the iteration makes of a matrix, :math:`Y_N` and :math:`Z_N`, are polynomials in it, so that

    .. math:: Y_N(\bar X \bar X^\top) = \bar X \, Z_N(\bar X^\top \bar X) \, \bar X^\top

    for every number of steps N: both ways give the same result, but for rounding. Weights that need a gradient are the
    exception: then the iteration runs on C×C matrices, because the gradient of a weight's square root has no limit at
    zero.

    Args:
        x: Features: (B, C, H, W), or (…, C, M) of at most three dimensions. A constant map gives zeros, and zero
            gradients.
        num_iters: Number of Newton–Schulz iterations N.
        weights: Weights of the positions, as in :func:`covariance_pool`.
        spatial_dims: As in :func:`covariance_pool`.

    Returns:
        (…, C, C), in float32, or in float64 if ``x`` is. Autocast has no effect; PyTorch's TF32 setting has.

    Raises:
        ValueError: If ``x`` has other dimensions, no positions, or is complex, ``weights`` has another shape, or
            ``num_iters`` < 1.

    Examples:
        >>> x = torch.randn(2, 64, 3, 3)
        >>> torch.allclose(covariance_sqrt(x), newton_schulz_sqrt(covariance_pool(x)), atol=1e-5)
        True
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_features("x", x, weights, spatial_dims)
        check_positive_int("num_iters", num_iters)
    leading = leading_dims_of_features(x, spatial_dims)
    x = flatten_positions(x, spatial_dims)
    if weights is None and _has_few_positions(x):
        root = _sqrt_from_gram(centre(x), x.shape[2], num_iters)
    elif weights is not None and not weights.requires_grad and _has_few_positions(x):
        weights = normalize_weights(weights, x)
        root = _sqrt_from_gram(centre_weighted(x, weights) * weights.sqrt()[:, None, :], 1, num_iters)
    else:
        if weights is not None:
            weights = weights.reshape(x.shape[0], x.shape[2])
        cov = covariance_pool(x, weights)
        del x  # not needed during the iteration
        root = newton_schulz_sqrt(cov, num_iters)
    return with_leading_dims(root, leading)


def _has_few_positions(x: torch.Tensor) -> bool:
    """Whether M×M matrices are the cheaper ones; no if a graph is made for sizes that it does not know."""
    if torch.jit.is_scripting():
        return 2 * x.shape[2] <= x.shape[1]
    if torch.jit.is_tracing():
        with warnings.catch_warnings():  # a trace keeps the choice, and is right for every size
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            return bool(2 * x.shape[2] <= x.shape[1])
    return _is_certain(2 * x.shape[2] <= x.shape[1])


def _is_certain(inequality: bool | torch.SymBool) -> bool:
    """Whether an inequality holds for all sizes of a graph. A plain ``if`` would restrict the graph to some of them."""
    is_dynamo = torch.compiler.is_dynamo_compiling()
    if is_dynamo and not _DYNAMO_KNOWS_INEQUALITIES:
        return False
    if is_dynamo or isinstance(inequality, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow, and rarely needed

        return statically_known_true(inequality)
    return inequality


def _sqrt_from_gram(centred: torch.Tensor, divisor: int, num_iters: int) -> torch.Tensor:
    """Root of what the centred features, times their transpose, give divided by a number."""
    # Times, not divided by: OpenVINO takes a sum that is divided for a mean, by whatever it is divided.
    trace = (centred * centred).sum(dim=(1, 2), keepdim=True) * (1 / divisor)
    # Guards 0/0: constant features are zero, and so is their root, whatever they are divided by.
    norm = trace.clamp_min(largest_zero(trace)).sqrt()
    # Divided by it first: the inverse root of a tiny matrix, or its gradient, would leave float32's range. What
    # bilinear_pool makes of them, which divides by C, has trace one.
    channels = centred.shape[1]
    centred = centred * ((channels / divisor) ** 0.5 / norm)
    root = quadratic_form(centred, inverse_sqrt_of_trace_one(bilinear_pool(centred.transpose(1, 2)), num_iters))
    return root * (norm / channels)
