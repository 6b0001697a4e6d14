"""What distributed training lacks on the CPU; importing this module adds it. train.py does by --device-modules.

PyTorch's SyncBatchNorm is for GPUs only: here its statistics come from differentiable sums over all processes. And
timm's train.py names the device to DistributedDataParallel, which takes no CPU for an answer.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional


def forward(self: torch.nn.SyncBatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Normalize (B, C, *) by mean and variance over every process's batch."""
    shape = (1, -1, *([1] * (x.ndim - 2)))
    if not (self.training and dist.is_initialized()):
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
    axes = [axis for axis in range(x.ndim) if axis != 1]
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    sums = torch.cat([wide.sum(axes), wide.square().sum(axes), wide.new_tensor([wide.numel() / wide.shape[1]])])
    total, squares, count = dist_functional.all_reduce(sums).split([wide.shape[1], wide.shape[1], 1])
    mean = total / count
    var = squares / count - mean.square()
    with torch.no_grad():
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_((var * count / (count - 1)).to(self.running_var.dtype), self.momentum)
    out = (wide - mean.view(shape)) * (var.view(shape) + self.eps).rsqrt()
    return (out * self.weight.view(shape) + self.bias.view(shape)).to(x.dtype)


class DistributedDataParallel(torch.nn.parallel.DistributedDataParallel):
    """PyTorch's, on the CPU."""

    def __init__(self, module: torch.nn.Module, device_ids: Any = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)

    def _passing_sync_batchnorm_handle(self, module: torch.nn.Module) -> None:
        """PyTorch's refuses the CPU here, and does nothing else."""


torch.nn.SyncBatchNorm.forward = forward
torch.nn.parallel.DistributedDataParallel = DistributedDataParallel
