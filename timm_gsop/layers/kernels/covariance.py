"""Covariance of a half-precision map, and its gradient: the map is read once each way, and nothing else is made of it.

Optionally of what batch normalization and ReLU make of the map, of which nothing is kept then (norm_covariance.py).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd import Function

from timm_gsop.layers.gradients import gradients_of_reference
from timm_gsop.layers.kernels import usable
from timm_gsop.layers.kernels.launch import dense_like, has_large_memory, multiply, on_device_of, tile, triangle
from timm_gsop.layers.kernels.symmetric import plus_transpose

__all__ = ["Norm", "backward", "forward", "map_covariance"]


class Norm(NamedTuple):
    """A batch normalization, which a ReLU follows: statistics and parameters, (C,) each."""

    mean: torch.Tensor
    var: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    eps: float


def map_covariance(x: torch.Tensor) -> torch.Tensor:
    """Covariance between channels, over positions, of a half-precision map, in float32.

    Reference: ``plain_second_moment(x, "covariance")`` of :mod:`timm_gsop.layers.covariance`.

    Args:
        x: Features, (B, C, M).
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Covariance.apply(x)
    return forward(x)[0]


class _Covariance(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        cov, mean = forward(x)
        ctx.save_for_backward(x)
        ctx.mean = mean
        return cov

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor | None:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled() or not usable(x, grad):
            from timm_gsop.layers.covariance import plain_second_moment

            return gradients_of_reference(plain_second_moment, (x,), grad, "covariance")[0]
        return backward(grad, x, ctx.mean)[0]


def forward(x: torch.Tensor, norm: Norm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance (B, C, C) and mean (B, C) of (B, C, M)."""
    batch, channels, positions = x.shape
    block_c = tile(channels)
    # Measured on an H200 with 128 channels. Other cards have less than half of its shared memory.
    large = has_large_memory(x)
    block_m = (128 if channels <= 128 else 64) if large else 32
    splits = 2 if positions >= 2048 else 1
    tiles = triton.cdiv(channels, block_c)
    new: dict[str, Any] = dict(dtype=torch.float32, device=x.device)
    products = torch.empty(batch, splits, channels, channels, **new)
    sums, shift = torch.empty(batch, splits, channels, **new), torch.empty(batch, channels, **new)
    with on_device_of(x):
        _products[(batch * splits, tiles * (tiles + 1) // 2)](
            x,
            *x.stride(),
            *(norm or (x, x, x, x, 0.0)),
            products,
            sums,
            shift,
            positions,
            triton.cdiv(positions, splits),
            float(min(positions, block_m)),
            C=channels,
            SPLITS=splits,
            SINGLE=tiles == 1,
            NORM=norm is not None,
            BLOCK_C=block_c,
            BLOCK_M=block_m,
            num_warps=8,
            num_stages=3 if large else 2,
        )
    if splits == 1:
        return products.squeeze(1), sums.squeeze(1).add_(shift)
    mean = sums.sum(1).div_(positions)
    cov = products.sum(1).div_(positions).addcmul_(mean.unsqueeze(2), mean.unsqueeze(1), value=-1)
    return cov, mean.add_(shift)


def backward(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, norm: Norm | None = None, of_batch: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradient with respect to ``x``, (B, C, M), given that with respect to the covariance.

    Args:
        grad: (B, C, C), float32.
        x: What :func:`forward` took.
        mean: What it returned.
        norm: What it took.
        of_batch: Whether the statistics of ``norm`` are those of ``x``. Then what is returned is the gradient with
            respect to the normalized map, and what is left to do takes the sums.

    Returns:
        The gradient; and with ``norm`` those with respect to its bias and weight, (2, C), float32.
    """
    batch, channels, positions = x.shape
    scale = 1 / positions
    if x.dtype == torch.bfloat16:
        s, size = plus_transpose(grad, scale, x.dtype), None
    else:  # float16 has not the range
        s = plus_transpose(grad, scale)
        size = s.abs().amax(dim=(1, 2)).clamp_min(1e-30)
        s = (s / size[:, None, None]).to(x.dtype)
    block_c, block_m = tile(channels), 64
    blocks = triton.cdiv(positions, block_m)
    dx = dense_like(x)
    sums = torch.empty(batch * blocks, 2, channels, dtype=torch.float32, device=x.device) if norm else None
    with on_device_of(x):
        _gradient[(batch * blocks, triton.cdiv(channels, block_c))](
            x,
            *x.stride(),
            *(norm or (x, x, x, x, 0.0)),
            mean,
            s,
            size,
            dx,
            *dx.stride(),
            sums,
            positions,
            blocks,
            C=channels,
            NORM=norm is not None,
            OF_BATCH=of_batch,
            BLOCK_C=block_c,
            BLOCK_M=block_m,
            num_warps=4,
            num_stages=1,
        )
    return dx, None if sums is None else sums.sum(0)


@triton.jit
def _load(x_ptr, x_c, x_m, m, c, mask, scale, shift, NORM: tl.constexpr):
    """Positions × channels of the map, or of its ReLU after the normalization, rounded as the plain path rounds."""
    x = tl.load(x_ptr + (m[:, None] * x_m + c[None, :] * x_c), mask=mask, other=0.0)
    if NORM:
        y = x.to(tl.float32) * scale[None, :] + shift[None, :]
        x = tl.where((y < 0) | ~mask, 0.0, y).to(x.dtype)  # NaN is passed on
    return x.to(tl.float32)


@triton.jit
def _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, NORM: tl.constexpr):
    """Scale and shift of the normalization."""
    if NORM:
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
        scale = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32) / tl.sqrt(var + eps)
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32) - mean * scale
    else:
        scale = tl.zeros((1,), tl.float32)
        shift = scale
    return scale, shift


@triton.jit
def _large_mean(y, mask, count, HALF: tl.constexpr):
    """The mean of some positions, rounded, where it is large beside the spread; else zero.

    Subtracted from values near it, which is exact, it keeps the covariance from cancelling. Other values stay as they
    are: their products are exact. A constant map becomes zero.
    """
    mean = tl.sum(y, 0) / count
    d = tl.where(mask, y - mean[None, :], 0.0)
    return tl.where(mean * mean > 16 * (tl.sum(d * d, 0) / count), mean.to(HALF).to(tl.float32), 0.0)


@triton.jit
def _products(
    x_ptr, x_b, x_c, x_m, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, products_ptr, sums_ptr, shift_ptr,
    M, span, first, C: tl.constexpr, SPLITS: tl.constexpr, SINGLE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Products of pairs of channels, and sums, over the positions of a split. Of a single split, also what follows."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    b = (tl.program_id(0) // SPLITS).to(tl.int64)
    split = tl.program_id(0) % SPLITS
    i, j = triangle(tl.program_id(1))
    ci = i * BLOCK_C + tl.arange(0, BLOCK_C)
    cj = j * BLOCK_C + tl.arange(0, BLOCK_C)
    scale_i, shift_i = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, ci, C, NORM)
    scale_j, shift_j = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, cj, C, NORM)
    x_ptr += b * x_b
    m = tl.arange(0, BLOCK_M)  # the same positions for every split
    mask = (m[:, None] < M) & (ci[None, :] < C)
    large_i = _large_mean(_load(x_ptr, x_c, x_m, m, ci, mask, scale_i, shift_i, NORM), mask, first, HALF)
    if SINGLE:
        large_j = large_i
    else:
        mask = (m[:, None] < M) & (cj[None, :] < C)
        large_j = _large_mean(_load(x_ptr, x_c, x_m, m, cj, mask, scale_j, shift_j, NORM), mask, first, HALF)
    products = tl.zeros((BLOCK_C, BLOCK_C), tl.float32)
    sum_i = tl.zeros((BLOCK_C,), tl.float32)
    sum_j = tl.zeros((BLOCK_C,), tl.float32)
    end = tl.minimum(split * span + span, M)
    for m0 in range(split * span, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < end) & (ci[None, :] < C)
        y = _load(x_ptr, x_c, x_m, m, ci, mask, scale_i, shift_i, NORM)
        yi = tl.where(mask, y - large_i[None, :], 0.0).to(HALF)
        sum_i += tl.sum(yi.to(tl.float32), 0)
        if SINGLE:
            products = multiply(tl.trans(yi), yi, products)
        else:
            mask = (m[:, None] < end) & (cj[None, :] < C)
            y = _load(x_ptr, x_c, x_m, m, cj, mask, scale_j, shift_j, NORM)
            yj = tl.where(mask, y - large_j[None, :], 0.0).to(HALF)
            sum_j += tl.sum(yj.to(tl.float32), 0)
            products = multiply(tl.trans(yi), yj, products)
    if SINGLE:
        sum_j = sum_i
    if SPLITS == 1:
        sum_i /= M
        sum_j /= M
        products = products / M - sum_i[:, None] * sum_j[None, :]
    row = b * SPLITS + split
    products_ptr += row * C * C
    mask = (ci[:, None] < C) & (cj[None, :] < C)
    tl.store(products_ptr + ci[:, None] * C + cj[None, :], products, mask=mask)
    if i != j:
        mask = (cj[:, None] < C) & (ci[None, :] < C)
        tl.store(products_ptr + cj[:, None] * C + ci[None, :], tl.trans(products), mask=mask)
    if j == 0:
        tl.store(sums_ptr + row * C + ci, sum_i, mask=ci < C)
        tl.store(shift_ptr + b * C + ci, large_i, mask=ci < C)


@triton.jit
def _gradient(
    x_ptr, x_b, x_c, x_m, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, center_ptr, s_ptr, size_ptr,
    dx_ptr, dx_b, dx_c, dx_m, sums_ptr, M, blocks,
    C: tl.constexpr, NORM: tl.constexpr, OF_BATCH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The centred map times S, the symmetric gradient; then back through ReLU and normalization."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x_ptr += b * x_b
    s_ptr += b * C * C
    d = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k0 in range(0, C, BLOCK_C):
        k = k0 + tl.arange(0, BLOCK_C)
        mask = (m[:, None] < M) & (k[None, :] < C)
        scale, shift = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, k, C, NORM)
        y = _load(x_ptr, x_c, x_m, m, k, mask, scale, shift, NORM)
        y = tl.where(mask, y - tl.load(center_ptr + b * C + k, mask=k < C, other=0.0)[None, :], 0.0).to(HALF)
        s = tl.load(s_ptr + k[:, None] * C + c[None, :], mask=(k[:, None] < C) & (c[None, :] < C), other=0.0)
        d = multiply(y, s, d)
    if size_ptr is not None:
        d *= tl.load(size_ptr + b)
    mask = (m[:, None] < M) & (c[None, :] < C)
    if NORM:
        scale, shift = _affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps, c, C, NORM)
        x = tl.load(x_ptr + (m[:, None] * x_m + c[None, :] * x_c), mask=mask, other=0.0).to(tl.float32)
        d = tl.where((x * scale[None, :] + shift[None, :] <= 0) | ~mask, 0.0, d)
        mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
        var = tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32)
        normalized = (x - mean[None, :]) / tl.sqrt(var + eps)[None, :]
        sums_ptr += tl.program_id(0).to(tl.int64) * 2 * C
        tl.store(sums_ptr + c, tl.sum(d, 0), mask=c < C)
        tl.store(sums_ptr + C + c, tl.sum(d * normalized, 0), mask=c < C)
        if not OF_BATCH:
            d *= scale[None, :]
    tl.store(dx_ptr + b * dx_b + (m[:, None] * dx_m + c[None, :] * dx_c), d.to(HALF), mask=mask)
