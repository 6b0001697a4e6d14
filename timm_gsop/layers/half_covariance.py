"""Covariance of a half-precision map by half-precision products, accumulated in float32: no float32 copy is made.

The product of two bfloat16 or float16 numbers is exact in float32, so XX' / M - mm' loses only what the sum rounds.
Where the mean m is large beside the spread that would be too much, so the mean, rounded to half precision, is
subtracted first. The difference of two numbers of about one size is exact too.
"""

import torch
from torch.torch_version import TorchVersion

__all__ = ["half_covariance", "half_covariance_gradient", "has_exact_products"]

_BMM_HAS_OUT_DTYPE = TorchVersion(torch.__version__) >= "2.8"


def has_exact_products(x: torch.Tensor) -> bool:
    """Whether PyTorch multiplies half-precision matrices of the device of ``x`` to float32. It cannot derive that."""
    return (
        _BMM_HAS_OUT_DTYPE
        and x.is_cuda
        and torch.version.cuda is not None
        and (x.dtype == torch.bfloat16 or x.dtype == torch.float16)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()  # converters do not know it
        and not torch.compiler.is_exporting()
        and not torch._C._are_functorch_transforms_active()
    )


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
    # Channels last: so is the gradient then. The compiler decides about layouts itself.
    if not torch.compiler.is_compiling() and x.stride(1) == 1:
        product = _product(x.transpose(1, 2), grad).transpose(1, 2)
    else:
        product = _product(grad, x)
    product = product - of_mean
    return (product if size is None else product * size).to(x.dtype)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.bmm(a, b, out_dtype=torch.float32)
