"""Reading checkpoints, safely, and loading them, exactly."""

from pathlib import Path

import torch
from timm.models import load_state_dict
from torch import nn

__all__ = ["differences", "load_exactly", "read_checkpoint"]

Weights = dict[str, torch.Tensor]


def read_checkpoint(path: Path) -> Weights:
    """Read the weights in a file: safetensors, or what ``torch.save`` wrote, with nothing in it but data.

    Args:
        path: The file. Training checkpoints are accepted too: their weights, without a ``module.`` prefix.

    Returns:
        The weights by name, on the CPU.

    Raises:
        ValueError: If there is no such file, or it is truncated, or holds more than data (a pickle that would run code
            is refused, not run), or no weights.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file.")
    try:
        weights = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # zipfile's, pickle's and safetensors' own: all mean that this is no checkpoint for us
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read; accepted: safetensors, or a PyTorch file of nothing but data, "
            f"whole. {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"checkpoint={str(path)!r} holds no weights; accepted: tensors by name, at the top or under 'state_dict'."
        )
    return dict(weights)


def load_exactly(model: nn.Module, weights: Weights) -> None:
    """Load weights into a model, and require every name and shape to fit.

    Counts of batches, which files from before PyTorch 0.4.1 lack, start at zero.

    Raises:
        ValueError: Naming what is missing, surplus, or of another shape.
    """
    own = model.state_dict()
    weights = {**{name: value * 0 for name, value in own.items() if name.endswith("num_batches_tracked")}, **weights}
    if found := differences(own, weights):
        raise ValueError(f"The checkpoint does not fit {type(model).__name__}. {found}.")
    model.load_state_dict(weights)


def differences(own: Weights, weights: Weights) -> str:
    """What is missing, surplus, or of another shape in weights for a network; "" if nothing is.

    Args:
        own: The network's.
        weights: Those to be loaded.
    """
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "surplus": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(value.shape)}"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
