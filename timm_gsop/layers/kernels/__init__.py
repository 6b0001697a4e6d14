"""What a GPU does in one pass, in Triton: a file an operator. Here is where they are used, and why not.

Each operator has a plain path beside it that gives the same answer, everywhere. Kernels are for eager runs: the
compiler fuses plain operations itself, and an operator that it cannot look into stops that. Triton comes with PyTorch
on Linux; it is imported with the first operator that is used.
"""

import os
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch.autograd import forward_ad
from torch.torch_version import TorchVersion

__all__ = ["FLOATS", "HALF", "load", "usable", "why_off"]

HALF = (torch.bfloat16, torch.float16)
FLOATS = (*HALF, torch.float32)
OLDEST_TORCH = "2.8"
LIMIT = 2**31  # of the elements between the first and the last of an image: offsets within it have 32 bits


def why_off() -> str:
    """Why no kernel is used on this machine; "" where they are."""
    if _switched_off():
        return "TIMM_GSOP_KERNELS=0"
    if not _triton_is_installed():
        return "triton is not installed"
    if _torch_is_too_old():
        return f"PyTorch before {OLDEST_TORCH}, with whose Triton nobody has tried them"
    if _interpreted():
        return ""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "no NVIDIA GPU"
    return _why_not_on(torch.cuda.current_device())


def usable(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = HALF) -> bool:
    """Whether a kernel may be used on these tensors, the first of which has one of ``dtypes``.

    Not where something looks at single operations or transforms them: the compiler, tracing, export, torch.fx,
    ``torch.func``, forward-mode differentiation, dispatch modes (counters of operations), subclasses of tensors.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if not all(type(tensor) in (torch.Tensor, torch.nn.Parameter) for tensor in tensors):
        return False
    device = tensors[0].device
    if not (device.type == "cuda" or (device.type == "cpu" and _interpreted())):
        return False
    if _switched_off() or not _triton_is_installed() or _torch_is_too_old():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return (
        forward_ad._current_level < 0
        and tensors[0].dtype in dtypes
        and all(tensor.device == device and tensor.numel() > 0 and _extent(tensor) < LIMIT for tensor in tensors)
        and not (device.type == "cuda" and _why_not_on(device.index))
    )


def load(operator: str) -> ModuleType:
    """The module of an operator, which imports Triton."""
    return import_module(f"{__name__}.{operator}")


def _extent(tensor: torch.Tensor) -> int:
    """How far the elements of one image are apart in memory, or would be, were they copied."""
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    return max(sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)), sizes.numel())


def _switched_off() -> bool:
    return os.environ.get("TIMM_GSOP_KERNELS") == "0"


def _interpreted() -> bool:
    """Whether Triton runs kernels on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _triton_is_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _torch_is_too_old() -> bool:
    return TorchVersion(torch.__version__) < OLDEST_TORCH


@cache
def _why_not_on(index: int) -> str:
    """Why a GPU runs no kernels; "" where it does. The smallest one is tried once: Triton needs a C compiler."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < (8, 0):
        return "not an NVIDIA GPU from Ampere on"  # the first that multiplies matrices of bfloat16
    try:
        load("symmetric").plus_transpose(torch.ones(1, 1, 1, device=torch.device("cuda", index)))
    except Exception as error:
        reason = f"Triton fails: {(str(error) or type(error).__name__).splitlines()[0]}"
        warnings.warn(f"timm_gsop uses no GPU kernels, and is slower. {reason}", stacklevel=3)
        return reason
    return ""
