"""Covariance of a map after batch normalization and ReLU: nothing is kept but the map before."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd import Function
from torch.nn import functional as F

from timm_gsop.layers.gradients import gradients_of_reference
from timm_gsop.layers.kernels import usable
from timm_gsop.layers.kernels.covariance import Norm, backward, forward
from timm_gsop.layers.kernels.launch import on_device_of

__all__ = ["batch_statistics", "norm_relu_covariance"]


def reference(
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    of_batch: bool,
) -> torch.Tensor:
    """The same in plain operations. The statistics of the batch are computed again, and differentiated."""
    from timm_gsop.layers.covariance import plain_second_moment

    running_mean, running_var = (None, None) if of_batch else (mean, var)
    y = F.relu(F.batch_norm(z, running_mean, running_var, weight, bias, of_batch, 0.0, eps))
    return plain_second_moment(y.flatten(2), "covariance")


def norm_relu_covariance(
    z: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    of_batch: bool,
) -> torch.Tensor:
    """Covariance (B, C, C), in float32, of the rectified and normalized half-precision map ``z``.

    Reference: :func:`reference`.

    Args:
        z: (B, C, H, W).
        weight: Weight of the normalization, (C,).
        bias: Bias of the normalization, (C,).
        mean: (C,).
        var: (C,), biased.
        eps: Epsilon of the normalization.
        of_batch: Whether ``mean`` and ``var`` are those of ``z``, and depend on it.
    """
    arguments = (z, weight, bias, mean, var, eps, of_batch)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (z, weight, bias)):
        return _NormReluCovariance.apply(*arguments)
    return forward(z.flatten(2), Norm(mean, var, weight, bias, eps))[0]


class _NormReluCovariance(Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        var: torch.Tensor,
        eps: float,
        of_batch: bool,
    ) -> torch.Tensor:
        cov, ctx.center = forward(z.flatten(2), Norm(mean, var, weight, bias, eps))
        ctx.save_for_backward(z, weight, bias, mean, var)
        ctx.options = eps, of_batch
        return cov

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        z, weight, bias, mean, var = ctx.saved_tensors
        eps, of_batch = ctx.options
        none = (None,) * 4
        if torch.is_grad_enabled() or not usable(z, grad, weight, bias):
            inputs, others = (z, weight, bias), (mean, var, eps, of_batch)
            return *gradients_of_reference(reference, inputs, grad, *others), *none
        flat = z.flatten(2)
        dz, sums = backward(grad, flat, ctx.center, Norm(mean, var, weight, bias, eps), of_batch)
        assert sums is not None  # there is a normalization
        if of_batch:
            _through_statistics(dz, flat, weight, mean, var, sums, eps)
        return dz.unflatten(2, z.shape[2:]), sums[1].to(weight.dtype), sums[0].to(bias.dtype), *none


def batch_statistics(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, (C,) in float32, over batch and positions, in one pass.

    Reference: ``z.float().var_mean((0, 2, 3), correction=0)``.

    Args:
        z: (B, C, H, W).
    """
    z = z.flatten(2)
    batch, channels, positions = z.shape
    block_c = min(128, triton.next_power_of_2(channels))
    block_m = 4096 // block_c
    splits = triton.cdiv(positions, 2048)
    parts = torch.empty(batch * splits, 3, channels, dtype=torch.float32, device=z.device)
    mean, var = torch.empty(2, channels, dtype=torch.float32, device=z.device)
    with on_device_of(z):
        _statistics[(batch * splits, triton.cdiv(channels, block_c))](
            z,
            *z.stride(),
            parts,
            channels,
            positions,
            triton.cdiv(positions, splits),
            splits,
            BLOCK_C=block_c,
            BLOCK_M=block_m,
            num_warps=8,
        )
        _combine[(triton.cdiv(channels, 16),)](
            parts, mean, var, channels, batch * splits, float(batch * positions), BLOCK_C=16, BLOCK_P=64, num_warps=4
        )
    return mean, var


def _through_statistics(
    d: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    sums: torch.Tensor,
    eps: float,
) -> None:
    """From the gradient with respect to the normalized map to that with respect to the map, in place."""
    batch, channels, positions = z.shape
    block_c = min(128, triton.next_power_of_2(channels))
    block_m = 4096 // block_c
    blocks = triton.cdiv(positions, block_m)
    with on_device_of(z):
        _normalization_gradient[(batch * blocks, triton.cdiv(channels, block_c))](
            d,
            *d.stride(),
            z,
            *z.stride(),
            weight,
            mean,
            var,
            sums,
            eps,
            float(batch * positions),
            channels,
            positions,
            blocks,
            BLOCK_C=block_c,
            BLOCK_M=block_m,
            num_warps=8,
        )


@triton.jit
def _statistics(z_ptr, z_b, z_c, z_m, parts_ptr, C, M, span, splits, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr):
    """Count, mean and sum of squared differences from it, of the positions of a split. Its first one is the shift."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    start = tl.program_id(0) % splits * span
    end = tl.minimum(start + span, M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    z_ptr += b * z_b
    shift = tl.load(z_ptr + (start * z_m + c * z_c), mask=c < C, other=0.0).to(tl.float32)
    first = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < end) & (c[None, :] < C)
        z = tl.load(z_ptr + (m[:, None] * z_m + c[None, :] * z_c), mask=mask, other=0.0).to(tl.float32)
        d = tl.where(mask, z - shift[None, :], 0.0)
        first += d
        second += d * d
    count = (end - start).to(tl.float32)
    total = tl.sum(first, 0)
    parts_ptr += tl.program_id(0).to(tl.int64) * 3 * C
    tl.store(parts_ptr + c, tl.zeros((BLOCK_C,), tl.float32) + count, mask=c < C)
    tl.store(parts_ptr + C + c, shift + total / count, mask=c < C)
    tl.store(parts_ptr + 2 * C + c, tl.sum(second, 0) - total * total / count, mask=c < C)


@triton.jit
def _combine(parts_ptr, mean_ptr, var_ptr, C, parts, N, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Chan's formula: mean and variance of the whole, from those of its parts."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < parts) & (c[None, :] < C)
        part_ptr = parts_ptr + p[:, None].to(tl.int64) * 3 * C + c[None, :]
        count = tl.load(part_ptr, mask=mask, other=0.0)
        mean += tl.sum(count * tl.load(part_ptr + C, mask=mask, other=0.0), 0)
    mean /= N
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for p0 in range(0, parts, BLOCK_P):
        p = p0 + tl.arange(0, BLOCK_P)
        mask = (p[:, None] < parts) & (c[None, :] < C)
        part_ptr = parts_ptr + p[:, None].to(tl.int64) * 3 * C + c[None, :]
        count = tl.load(part_ptr, mask=mask, other=0.0)
        d = tl.where(mask, tl.load(part_ptr + C, mask=mask, other=0.0) - mean[None, :], 0.0)
        squares += tl.sum(tl.load(part_ptr + 2 * C, mask=mask, other=0.0) + count * d * d, 0)
    tl.store(mean_ptr + c, mean, mask=c < C)
    tl.store(var_ptr + c, squares / N, mask=c < C)


@triton.jit
def _normalization_gradient(
    d_ptr, d_b, d_c, d_m, z_ptr, z_b, z_c, z_m, weight_ptr, mean_ptr, var_ptr, sums_ptr, eps, N, C, M, blocks,
    BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (m[:, None] < M) & (c[None, :] < C)
    d_ptr += b * d_b + (m[:, None] * d_m + c[None, :] * d_c)
    d = tl.load(d_ptr, mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + b * z_b + (m[:, None] * z_m + c[None, :] * z_c), mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + c, mask=c < C, other=1.0).to(tl.float32) + eps)
    normalized = (z - mean[None, :]) * rstd[None, :]
    first = tl.load(sums_ptr + c, mask=c < C, other=0.0)[None, :]
    second = tl.load(sums_ptr + C + c, mask=c < C, other=0.0)[None, :]
    dz = (weight * rstd)[None, :] * (d - (first + normalized * second) / N)
    tl.store(d_ptr, dz.to(d_ptr.dtype.element_ty), mask=mask)
