"""What the kernels and their launchers share."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

__all__ = ["dense_like", "has_large_memory", "multiply", "on_device_of", "tile", "triangle"]

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def has_large_memory(x: torch.Tensor) -> bool:
    """Whether the GPU has the 227 KB of shared memory that the sizes were measured with: Hopper, large Blackwell."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def dense_like(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An empty tensor (B, C, M), channels last if those of ``x`` are."""
    batch, channels, positions = x.shape
    if x.stride(1) == 1 and channels > 1:
        return torch.empty(batch, positions, channels, dtype=dtype or x.dtype, device=x.device).transpose(1, 2)
    return torch.empty(batch, channels, positions, dtype=dtype or x.dtype, device=x.device)


def tile(size: int, most: int = 128) -> int:
    """A power of two that covers ``size``, from 16, the smallest that products take, to ``most``."""
    return min(most, max(16, triton.next_power_of_2(size)))


@triton.jit
def multiply(a, b, c):
    """C + A B, in float32."""
    if INTERPRETED:  # Triton's interpreter multiplies the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c)
    else:
        return tl.dot(a, b, c)


@triton.jit
def triangle(p):
    """Row and column of element p of a lower triangle, row by row."""
    i = (tl.sqrt(8.0 * p.to(tl.float32) + 1.0) * 0.5 - 0.5).to(tl.int32)
    i = tl.where((i + 1) * (i + 2) // 2 <= p, i + 1, i)
    i = tl.where(i * (i + 1) // 2 > p, i - 1, i)
    return i, p - i * (i + 1) // 2
