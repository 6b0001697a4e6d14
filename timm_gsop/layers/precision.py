"""The precision in which second-order statistics are computed: at least float32, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["at_least_float32", "autocast_disabled"]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or as it is where it is float32 or float64 already."""
    if x.dtype == torch.float32 or x.dtype == torch.float64:
        return x
    return x.float()


def autocast_disabled(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast leaves tensors of ``device`` alone."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.compiler.assume_constant_result  # the compiler of torch 2.5 cannot look into PyTorch's function
def _has_autocast(device_type: str) -> bool:
    """Whether a device has autocast; the meta device, for one, has not."""
    return torch.amp.is_autocast_available(device_type)
