"""Covariance of reduced channels, where a GPU has one operator for normalization, ReLU and covariance together."""

from typing import Any

import torch
from torch import nn

from timm_gsop.layers import kernels
from timm_gsop.layers.channel_reduction import ChannelReduction
from timm_gsop.layers.covariance import covariance_pool
from timm_gsop.layers.hooks import is_hooked

__all__ = ["can_fuse", "fused_covariance"]


def can_fuse(reduction: nn.Module, x: torch.Tensor) -> bool:
    """Whether :func:`fused_covariance` may take the place of ``covariance_pool(reduction(x))``.

    Only where normalization and ReLU are PyTorch's own, and nobody watches or replaces what they return. A map of one
    position is left to those who warn of it.
    """
    return (
        kernels.usable(x, dtypes=kernels.FLOATS)
        and x.ndim == 4
        and x.shape[2] * x.shape[3] > 1
        and type(reduction) is ChannelReduction
        and list(reduction._modules) == ["conv", "bn", "act"]
        and type(reduction.bn) is nn.BatchNorm2d
        and type(reduction.bn.weight) is nn.Parameter
        and type(reduction.act) is nn.ReLU
        and not any(
            "forward" in vars(module) or is_hooked(module) for module in (reduction, reduction.bn, reduction.act)
        )
    )


def fused_covariance(reduction: Any, x: torch.Tensor) -> torch.Tensor:
    """Covariance (B, d, d) of ``reduction(x)``, of which nothing is kept but the convolution's output.

    Args:
        reduction: For which :func:`can_fuse` holds.
        x: Features, (B, C, H, W).
    """
    z, bn = reduction.conv(x), reduction.bn
    of_batch = bn.training or bn.running_mean is None
    too_few = of_batch and z.numel() == z.shape[1]  # PyTorch's has an error for it
    if too_few or not kernels.usable(z, bn.weight, bn.bias):
        return covariance_pool(reduction.act(bn(z)))
    operators = kernels.load("norm_covariance")
    if not of_batch:
        return operators.norm_relu_covariance(z, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, False)
    mean, var = operators.batch_statistics(z.detach())
    _update_running_statistics(bn, mean, var, z.numel() // z.shape[1])
    return operators.norm_relu_covariance(z, bn.weight, bn.bias, mean, var, bn.eps, True)


@torch.no_grad()
def _update_running_statistics(bn: nn.BatchNorm2d, mean: torch.Tensor, var: torch.Tensor, count: int) -> None:
    """As PyTorch does: the running variance is the unbiased one, and without a momentum both are averages."""
    if not (bn.training and bn.track_running_stats):
        return
    factor = bn.momentum or 0.0
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)
        if bn.momentum is None:
            factor = 1.0 / float(bn.num_batches_tracked)
    if bn.running_mean is None or bn.running_var is None:
        return
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), factor)
    bn.running_var.lerp_((var * (count / (count - 1))).to(bn.running_var.dtype), factor)
