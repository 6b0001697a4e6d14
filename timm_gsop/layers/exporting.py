"""Whether a graph is made that leaves Python: converters read it, which lack some of PyTorch's operations."""

from typing import Any

import torch

__all__ = ["is_exporting", "makes_graph"]

_is_exporting = getattr(torch.compiler, "is_exporting", None)  # PyTorch 2.5 and 2.6 lack it, and export as before


def is_exporting(size: Any = 0) -> bool:
    """Whether a graph is made by ``torch.export``, with ``size`` as a number in it: a free one cannot be a constant.

    Args:
        size: A size of a tensor.

    Returns:
        False outside of ``torch.export``.
    """
    return _is_exporting is not None and _is_exporting() and isinstance(size, int)


def makes_graph() -> bool:
    """Whether ``torch.export`` or ``torch.jit.trace`` makes a graph."""
    return torch.jit.is_tracing() or is_exporting()
