"""No down-sampling in the last stage: more positions make a better estimate of the covariance (paper section 4.1)."""

from timm.layers import BlurPool2d
from torch import nn

__all__ = ["remove_stride"]


def remove_stride(block: nn.Module) -> None:
    """Make a residual block of timm keep the size of its input, undilated: all strides and pools in it go.

    Args:
        block: First block of a stage, of timm's ``ResNet`` or ``ResNetV2``; changed in place.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, BlurPool2d)):  # in the shortcut (avg_down), and for anti-aliasing
            block.set_submodule(name, nn.Identity())
    if hasattr(block, "stride"):
        block.stride = 1  # type: ignore[assignment]
