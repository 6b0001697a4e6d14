"""What timm's gradient checkpointing promises."""

import torch
from torch import nn


def check_grad_checkpointing_changes_nothing(model: nn.Module, x: torch.Tensor, **tolerance: float) -> None:
    """Gradients of a training step are the same with checkpointing and without, dropout and all."""
    model.train()
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        model(x).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.testing.assert_close(*reversed(gradients), **tolerance)
