"""Covariance of feature maps, and products of channels without centring, with weights of the positions."""

from typing import Any

import torch

from timm_gsop.checks import check_features
from timm_gsop.layers import kernels
from timm_gsop.layers.gradients import at_least_float32, evaluate, function_of_input, without_autocast
from timm_gsop.layers.half_covariance import half_covariance, half_covariance_gradient, has_exact_products
from timm_gsop.layers.leading_dims import flatten_positions, leading_dims_of_features, with_leading_dims

__all__ = [
    "bilinear_pool",
    "centre",
    "centre_weighted",
    "covariance_pool",
    "normalize_weights",
    "position_covariance",
    "quadratic_form",
    "second_moment",
]


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
        cov = quadratic_form(centre_weighted(flat, weights), weights)
    else:
        cov = second_moment(flat, "covariance")
    return with_leading_dims(cov, leading_dims_of_features(x, spatial_dims))


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


def bilinear_pool(
    x: torch.Tensor, weights: torch.Tensor | None = None, spatial_dims: int | None = None
) -> torch.Tensor:
    r"""Products of all pairs of channels, averaged over the positions of a feature map (bilinear pooling, section 3).

    .. math:: G = \frac{1}{M} X X^\top

    It is the covariance between channels without centring. With weights, products are averaged with them.

    Args:
        x: Features: (B, C, H, W), or (…, C, M) of at most three dimensions.
        weights: Weights of the positions, as in :func:`covariance_pool`.
        spatial_dims: As in :func:`covariance_pool`.

    Returns:
        (…, C, C), symmetric and positive semi-definite, in float32, or in float64 if ``x`` is. Autocast has no effect.

    Raises:
        ValueError: If ``x`` has other dimensions, no positions, or is complex, or ``weights`` has another shape.

    Examples:
        >>> x = torch.randn(2, 8, 7, 7)
        >>> pixels = x.flatten(2)
        >>> torch.allclose(bilinear_pool(x), pixels @ pixels.mT / 49, atol=1e-5)
        True
    """
    if not torch.jit.is_scripting():  # does not know our checks
        check_features("x", x, weights, spatial_dims)
    flat = flatten_positions(x, spatial_dims)
    if weights is not None:
        products = quadratic_form(at_least_float32(flat), normalize_weights(weights, flat))
    else:
        products = second_moment(flat, "uncentred")
    return with_leading_dims(products, leading_dims_of_features(x, spatial_dims))


def second_moment(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Products of all pairs of rows, (B, R, N) to (B, R, R).

    Args:
        x: R rows of N elements.
        kind: ``"covariance"``, X̄X̄ᵀ / N with each row centred; ``"uncentred"``, XXᵀ / N; ``"official"``, what the
            released code of GSoP-Net has for positions, X (I / R - 11ᵀ / R²) Xᵀ, R where a covariance has N.

    Returns:
        In float32, or in float64 if ``x`` is. Autocast has no effect.
    """
    if torch.jit.is_scripting():  # knows neither autocast nor our gradient
        return plain_second_moment(x, kind)
    if kind == "covariance" and kernels.usable(x):
        return kernels.load("covariance").map_covariance(x)
    return evaluate(_SecondMoment, plain_second_moment, x, kind)


def plain_second_moment(x: torch.Tensor, kind: str) -> torch.Tensor:
    """As :func:`second_moment`, in plain operations."""
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if kind == "covariance" and has_exact_products(x):
            return half_covariance(x)
    x = centre(x) if kind == "covariance" else at_least_float32(x)
    products = torch.bmm(x, x.transpose(1, 2))
    if kind != "official":
        return products / x.shape[2]
    rows, total = x.shape[1], x.sum(dim=2, keepdim=True)
    # Divided after the product: OpenVINO takes a sum that is divided for a mean, by whatever it is divided.
    return products / rows - total * total.transpose(1, 2) / (rows * rows)


def centre(x: torch.Tensor) -> torch.Tensor:
    """Subtract the mean before any product: E[xx'] - mm' would cancel where the mean is large beside the spread."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x - x.mean(dim=2, keepdim=True, dtype=dtype)  # a half-precision x becomes float32 on the way, uncopied


def _second_moment_gradient(x: torch.Tensor, grad: torch.Tensor, kind: str) -> torch.Tensor:
    divisor = x.shape[1] if kind == "official" else x.shape[2]
    grad = (grad + grad.transpose(1, 2)) / divisor
    if kind == "covariance":
        if has_exact_products(x):
            return half_covariance_gradient(x, grad)
        rows = centre(x)
    else:
        rows = at_least_float32(x)
        if kind == "official":
            rows = rows - rows.sum(dim=2, keepdim=True) / divisor
    # The gradient of a channels-last map is channels last too. The compiler chooses layouts itself.
    if not torch.compiler.is_compiling() and x.stride(1) == 1:
        return torch.bmm(rows.transpose(1, 2), grad).transpose(1, 2).to(x.dtype)
    return torch.bmm(grad, rows).to(x.dtype)


# Autograd would keep the centred features too.
_SecondMoment = function_of_input(plain_second_moment, _second_moment_gradient)


def normalize_weights(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the positions of each sample of ``x``, (B, C, M): to (B, M). All zero stays zero."""
    weights = weights.reshape(x.shape[0], x.shape[2]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def centre_weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Subtract the weighted mean, given weights that :func:`normalize_weights` made."""
    x = at_least_float32(x)
    return x - (x * weights[:, None, :]).sum(dim=2, keepdim=True)


def quadratic_form(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """X S Xᵀ, (B, C, M) to (B, C, C), for a symmetric S, (B, M, M), or one that is given by its diagonal, (B, M)."""
    if torch.jit.is_scripting():
        return _quadratic_form(x, inner)
    return evaluate(_QuadraticForm, _quadratic_form, x, inner)


def _quadratic_form(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    return torch.bmm(_times(x, inner), x.transpose(1, 2))


def _times(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    return x * inner[:, None, :] if inner.dim() == 2 else torch.bmm(x, inner)


class _QuadraticForm(torch.autograd.Function):
    """With a gradient of its own, which autocast does not reach; by no square root, which is steep at zero."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        return _quadratic_form(x, inner)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, inner = ctx.saved_tensors
        product = torch.bmm(grad + grad.transpose(1, 2), x)
        of_inner = (x * product).sum(dim=1) if inner.dim() == 2 else torch.bmm(x.transpose(1, 2), product)
        return _times(product, inner), 0.5 * of_inner
