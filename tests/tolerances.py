"""How near a result must come to float64's, for each precision (docs/guarantees.md)."""

import torch

# Of outputs, relative to the largest; of gradients, relative and in norm: where rounding moves a value across a ReLU's
# corner, a single one may be wholly different.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (5e-2, 2e-1),
}


def output_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return _ratio((actual.double() - expected.double()).abs().max(), expected.double().abs().max())


def gradient_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to the norm."""
    return _ratio((actual.double() - expected.double()).norm(), expected.double().norm())


def _ratio(difference: torch.Tensor, size: torch.Tensor) -> float:
    return difference.item() if size == 0 else (difference / size).item()
