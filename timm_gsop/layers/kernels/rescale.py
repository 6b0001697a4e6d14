"""Scaling of channels with the shortcut, and both gradients, in one pass each."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd import Function

from timm_gsop.layers.gradients import gradients_of_reference
from timm_gsop.layers.kernels import FLOATS, usable
from timm_gsop.layers.kernels.launch import dense_like, on_device_of

__all__ = ["scale_channels"]


def scale_channels(x: torch.Tensor, weights: torch.Tensor, shortcut: float, scale: float) -> torch.Tensor:
    """Return ``scale · (shortcut · x + x · weights)``. The factor is computed in float32.

    Reference: :func:`timm_gsop.layers.gsop.plain_rescale`.

    Args:
        x: Features, (B, C, H, W).
        weights: (B, C, 1, 1).
        shortcut: How much of ``x`` is added to what is scaled.
        scale: Factor on the whole.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        return _Rescale.apply(x, weights, shortcut, scale)
    return _forward(x, weights, shortcut, scale)


class _Rescale(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weights: torch.Tensor, shortcut: float, scale: float) -> torch.Tensor:
        ctx.save_for_backward(x, weights)
        ctx.factors = shortcut, scale
        return _forward(x, weights, shortcut, scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        if torch.is_grad_enabled() or not usable(grad, x, weights, dtypes=FLOATS):
            from timm_gsop.layers.gsop import plain_rescale

            return *gradients_of_reference(plain_rescale, (x, weights), grad, *ctx.factors), None, None
        return *_backward(grad, x, weights, *ctx.factors), None, None


def _plan(x: torch.Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid and sizes for (B, C, M): at most four programs share the positions of an image."""
    batch, channels, positions = x.shape
    channels_last = x.stride(1) == 1
    block_c = min(128 if channels_last else 16, triton.next_power_of_2(channels))
    block_m = 4096 // block_c
    span = block_m * triton.cdiv(triton.cdiv(positions, 4), block_m)
    splits = triton.cdiv(positions, span)
    sizes = dict(C=channels, M=positions, span=span, splits=splits, BLOCK_C=block_c, BLOCK_M=block_m)
    return (batch * splits, triton.cdiv(channels, block_c)), sizes


def _forward(x: torch.Tensor, weights: torch.Tensor, shortcut: float, scale: float) -> torch.Tensor:
    flat = x.flatten(2)
    grid, sizes = _plan(flat)
    y = dense_like(flat, torch.promote_types(x.dtype, weights.dtype))
    w = weights.flatten(1)
    with on_device_of(x):
        _scale[grid](
            flat, *flat.stride(), w, *w.stride(), y, *y.stride(), float(shortcut), float(scale), num_warps=8, **sizes
        )
    return y.unflatten(2, x.shape[2:])


def _backward(
    grad: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, shortcut: float, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    flat, g, w = x.flatten(2), grad.flatten(2), weights.flatten(1)  # views: of an expanded gradient too
    grid, sizes = _plan(flat)
    dx = dense_like(flat)
    dw = torch.empty(x.shape[0], sizes["splits"], x.shape[1], dtype=torch.float32, device=x.device)
    with on_device_of(x):
        _gradients[grid](
            g,
            *g.stride(),
            flat,
            *flat.stride(),
            w,
            *w.stride(),
            dx,
            *dx.stride(),
            dw,
            float(shortcut),
            float(scale),
            num_warps=8,
            **sizes,
        )
    return dx.unflatten(2, x.shape[2:]), dw.sum(1).to(weights.dtype).view(weights.shape)


@triton.jit
def _scale(
    x_ptr, x_b, x_c, x_m, w_ptr, w_b, w_c, y_ptr, y_b, y_c, y_m, shortcut, scale,
    C, M, span, splits, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // splits).to(tl.int64)
    start = (tl.program_id(0) % splits) * span
    end = tl.minimum(start + span, M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + b * w_b + c * w_c, mask=c < C, other=0.0).to(tl.float32)
    factor = (scale * (shortcut + w))[None, :]
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < end) & (c[None, :] < C)
        x = tl.load(x_ptr + b * x_b + (m[:, None] * x_m + c[None, :] * x_c), mask=mask, other=0.0).to(tl.float32)
        y = (x * factor).to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + b * y_b + (m[:, None] * y_m + c[None, :] * y_c), y, mask=mask)


@triton.jit
def _gradients(
    g_ptr, g_b, g_c, g_m, x_ptr, x_b, x_c, x_m, w_ptr, w_b, w_c, dx_ptr, dx_b, dx_c, dx_m, dw_ptr, shortcut, scale,
    C, M, span, splits, BLOCK_C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    start = split * span
    end = tl.minimum(start + span, M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    w = tl.load(w_ptr + b * w_b + c * w_c, mask=c < C, other=0.0).to(tl.float32)
    factor = (scale * (shortcut + w))[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for m0 in range(start, end, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        mask = (m[:, None] < end) & (c[None, :] < C)
        g = tl.load(g_ptr + b * g_b + (m[:, None] * g_m + c[None, :] * g_c), mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + b * x_b + (m[:, None] * x_m + c[None, :] * x_c), mask=mask, other=0.0).to(tl.float32)
        dx = (g * factor).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + b * dx_b + (m[:, None] * dx_m + c[None, :] * dx_c), dx, mask=mask)
        products += g * x
    tl.store(dw_ptr + (b * splits + split) * C + c, scale * tl.sum(products, 0), mask=c < C)
