"""Adaptive average pooling, also where every operation must be deterministic."""

import torch
import torch.nn.functional as F

__all__ = ["adaptive_avg_pool2d"]


def adaptive_avg_pool2d(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Pool to a given size as ``torch.nn.functional.adaptive_avg_pool2d`` does, up as well as down.

    Its gradient raises a ``RuntimeError`` on a GPU under ``torch.use_deterministic_algorithms(True)``. There, two
    matrix products compute the pooling.

    Args:
        x: Features, (B, C, H, W).
        height: Height of the output.
        width: Width of the output.

    Returns:
        (B, C, height, width), in the dtype of ``x``.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if torch.are_deterministic_algorithms_enabled() and not x.is_cpu:
            return _pool_by_products(x, height, width)
    return F.adaptive_avg_pool2d(x, (height, width))


def _pool_by_products(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    rows, columns = (_window_weights(*sizes, x) for sizes in ((x.shape[2], height), (x.shape[3], width)))
    return (rows @ x @ columns.mT).to(x.dtype)


def _window_weights(length: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Means over the windows that PyTorch's adaptive pooling has, (size, length): they may overlap."""
    positions, windows = (torch.arange(n, device=like.device)[:, None] for n in (length, size))
    begin, end = windows * length // size, ((windows + 1) * length + size - 1) // size
    inside = (begin <= positions.T) & (end > positions.T)
    return (inside / (end - begin)).to(like.dtype)
