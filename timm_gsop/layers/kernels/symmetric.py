"""A matrix plus its transpose: two tiles are read and two written, none with a stride."""

import torch
import triton
import triton.language as tl

from timm_gsop.layers.kernels.launch import on_device_of, triangle

__all__ = ["plus_transpose"]


def plus_transpose(mat: torch.Tensor, scale: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return ``scale · (A + Aᵀ)``.

    Reference: ``scale * (mat + mat.transpose(1, 2))``. The sum is taken in float32.

    Args:
        mat: Matrices, (B, C, C).
        scale: Factor.
        dtype: Dtype of the result; None for the dtype of ``mat``.
    """
    batch, size, _ = mat.shape
    out = torch.empty(mat.shape, dtype=dtype or mat.dtype, device=mat.device)
    side = 64 if size >= 64 else 16
    tiles = triton.cdiv(size, side)
    pairs = tiles * (tiles + 1) // 2
    with on_device_of(mat):
        _plus_transpose[(batch * pairs,)](
            mat, *mat.stride(), out, float(scale), size, pairs, SIDE=side, num_warps=8 if side == 64 else 4
        )
    return out


@triton.jit
def _plus_transpose(a_ptr, a_b, a_r, a_c, out_ptr, scale, size, pairs, SIDE: tl.constexpr):
    b = (tl.program_id(0) // pairs).to(tl.int64)
    i, j = triangle(tl.program_id(0) % pairs)
    r = i * SIDE + tl.arange(0, SIDE)
    c = j * SIDE + tl.arange(0, SIDE)
    lower = (r[:, None] < size) & (c[None, :] < size)
    upper = (c[:, None] < size) & (r[None, :] < size)
    a_ptr += b * a_b
    out_ptr += b * size * size
    x = tl.load(a_ptr + r[:, None] * a_r + c[None, :] * a_c, mask=lower, other=0.0).to(tl.float32)
    y = tl.load(a_ptr + c[:, None] * a_r + r[None, :] * a_c, mask=upper, other=0.0).to(tl.float32)
    total = ((x + tl.trans(y)) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r[:, None] * size + c[None, :], total, mask=lower)
    tl.store(out_ptr + c[:, None] * size + r[None, :], tl.trans(total), mask=upper)
