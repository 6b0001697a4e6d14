"""Positions with weights: masks, sequences of several lengths, attention."""

from typing import Any

import torch

from timm_gsop.layers.gradients import evaluate, without_autocast
from timm_gsop.layers.precision import at_least_float32

__all__ = ["centre_weighted", "normalize_weights", "weighted_product"]


def normalize_weights(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Divide by the sum over the positions of each sample of ``x``, (B, C, M): to (B, M). All zero stays zero."""
    weights = weights.reshape(x.shape[0], x.shape[2]).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    total = weights.sum(dim=1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)


def centre_weighted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Subtract the weighted mean, given weights that :func:`normalize_weights` made."""
    x = at_least_float32(x)
    return x - (x * weights[:, None, :]).sum(dim=2, keepdim=True)


def weighted_product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """X diag(w) Xᵀ: (B, C, M) and (B, M) to (B, C, C)."""
    if torch.jit.is_scripting():
        return _weighted_product(x, weights)
    return evaluate(_WeightedProduct, _weighted_product, x, weights)


def _weighted_product(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.bmm(x * weights[:, None, :], x.transpose(1, 2))


class _WeightedProduct(torch.autograd.Function):
    """With a gradient of its own, which autocast does not reach; by no square root, which is steep at zero."""

    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return _weighted_product(x, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weights = ctx.saved_tensors
        product = torch.bmm(grad + grad.transpose(1, 2), x)
        return product * weights[:, None, :], 0.5 * (x * product).sum(dim=1)
