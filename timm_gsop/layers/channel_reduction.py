"""Reduction of channels before a covariance, which costs their square; on a GPU the two in fewer passes."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from timm_gsop.layers import kernels
from timm_gsop.layers.covariance import covariance_pool

__all__ = ["ChannelReduction", "can_fuse", "fused_covariance", "output_is_hooked"]


class ChannelReduction(nn.Sequential):
    """1×1 convolution, BN and ReLU: (B, C, H, W) to (B, d, H, W) (paper section 3.1).

    Args:
        in_channels: Channels of the input, C.
        out_channels: Channels of the output, d.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, out_channels = int(in_channels), int(out_channels)  # TorchScript knows no integers of NumPy's
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.bn = nn.BatchNorm2d(out_channels, device=device, dtype=dtype)
        self.act: nn.Module = nn.ReLU(inplace=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He initialization, as in the paper's experiments (section 4)."""
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")


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
            "forward" in vars(module) or _is_hooked(module) for module in (reduction, reduction.bn, reduction.act)
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


def output_is_hooked(module: nn.Module) -> bool:
    """Whether a hook sees what ``module`` returns, or the gradient of that. One on its input alone does not count."""
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    # Those of all modules, of ``register_module_forward_hook`` and the like; torch 2.5 has no function that asks.
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether any hook is called when ``module`` is."""
    return bool(module._forward_pre_hooks) or output_is_hooked(module)
