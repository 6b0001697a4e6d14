"""Multiply-accumulates, as PyTorch's ``FlopCounterMode`` counts them: convolutions and matrix products."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "model_macs"]

NORMS = (torch.ops.aten._native_batch_norm_legit_no_training, torch.ops.aten.native_batch_norm)
"""Without products, but taken apart by PyTorch to look for some, which takes longer than everything else."""


def count_macs(work: Callable[[], Any]) -> Counter[str]:
    """Count the multiply-accumulates of a call.

    Args:
        work: Anything to call without arguments.

    Returns:
        Multiply-accumulates by the name of the module that runs them, with those of its children; ``""`` for all.

    Examples:
        >>> a = torch.ones(2, 3)
        >>> count_macs(lambda: a @ a.T)[""]
        12
    """
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(NORMS, _nothing)) as counter:
        work()
    # It counts two operations for a multiply-accumulate, and its names begin with the class of the module called.
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    of_modules = {name.partition(".")[2]: macs for name, macs in counts.items() if "." in name}
    return Counter({"": counts["Global"], **of_modules})


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def model_macs(model: nn.Module, size: Sequence[int]) -> Counter[str]:
    """Count the multiply-accumulates of a model for one image; the meta device, where nothing is computed, will do.

    Args:
        model: The model, in evaluation.
        size: Shape of the image, (C, H, W).

    Returns:
        As :func:`count_macs`.

    Examples:
        >>> model_macs(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1)), (3, 4, 4))
        Counter({'': 512, '0': 384, '1': 128})
    """
    x = torch.zeros(1, *size, device=next(model.parameters()).device)
    # Without gradients, the square root takes two matrix products fewer than the iteration as the paper writes it.
    with torch.enable_grad():
        return count_macs(partial(model, x))
