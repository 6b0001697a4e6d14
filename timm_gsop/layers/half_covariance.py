"""Covariance of a half-precision map by half-precision products, accumulated in float32: no float32 copy is made.

The product of two bfloat16 or float16 numbers is exact in float32, so XX' / M - mm' loses only what the sum rounds.
Where the mean m is large beside the spread that would be too much, so the mean, rounded to half precision, is
subtracted first. The difference of two numbers of about one size is exact too.
"""

import torch
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

from timm_gsop.layers.exporting import is_exporting

__all__ = ["half_covariance", "half_covariance_gradient", "has_exact_products"]

_BMM_HAS_OUT_DTYPE = TorchVersion(torch.__version__) >= "2.8"


def has_exact_products(x: torch.Tensor) -> bool:
    """Whether PyTorch multiplies half-precision matrices of the device of ``x`` to float32, and may do so here.

    It can neither derive nor batch that, and converters of traces and exported graphs, and some versions of PyTorch's
    counter of operations, do not know it.
    """
    if not (_BMM_HAS_OUT_DTYPE and _is_on_nvidias_gpu(x) and x.dtype in (torch.bfloat16, torch.float16)):
        return False
    if torch.compiler.is_compiling():  # which takes the gradient that we give it, and no second one
        return not is_exporting()
    return not (
        (torch.is_grad_enabled() and x.requires_grad)
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


def _is_on_nvidias_gpu(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.cuda is not None


def half_covariance(x: torch.Tensor) -> torch.Tensor:
    """Covariance between channels of a half-precision map, (B, C, M) to (B, C, C) in float32."""
    mean = x.mean(dim=2, keepdim=True, dtype=torch.float32)
    rounded = mean.to(x.dtype)
    rest = mean - rounded
    near = x - rounded
    return _product(near, near.transpose(1, 2)) / x.shape[2] - rest * rest.transpose(1, 2)


def half_covariance_gradient(x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """Gradient of :func:`half_covariance`, given the symmetric part of that with respect to it, times 2 / M.

    The mean is multiplied by the same rounded matrix as the map, so that it cancels. In float16 the matrix is divided
    by its largest element, for the range.
    """
    size = None
    if x.dtype == torch.float16:
        size = grad.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-30)
        grad = grad / size
    grad = grad.to(x.dtype)
    mean = x.mean(dim=2, keepdim=True, dtype=torch.float32)
    of_mean = (grad.float() * mean.transpose(1, 2)).sum(dim=2, keepdim=True)  # not a product, which TF32 would round
    # The gradient of a channels-last map is channels last too. The compiler chooses layouts itself.
    if not torch.compiler.is_compiling() and x.stride(1) == 1:
        product = _product(x.transpose(1, 2), grad).transpose(1, 2)
    else:
        product = _product(grad, x)
    product = product - of_mean
    return (product if size is None else product * size).to(x.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b, out_dtype=torch.float32)
