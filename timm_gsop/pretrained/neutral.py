"""Blocks that start without changing what a network computes, so that trained weights can be built upon."""

from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.layers import ChannelGsop, FusedGsop, GsopBlock, PositionGsop, start_at_half
from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["neutral_start"]


@torch.no_grad()
def neutral_start(model: ResNet, weights: Weights) -> Weights:
    """Make every block that ``weights`` do not have neutral, and return weights with which the function is unchanged.

    With its last convolution zero, a block's sigmoid gives exactly one half. In the paper flavor the block makes
    ``1.5 x`` of ``x``: the convolutions that read it (the next stage's first one and its shortcut's; after the last
    stage covariance pooling's, or the classifier) are scaled by 2/3. In the official flavor the block stands in front
    of the addition: the weight and bias of the batch normalization before it are doubled. This holds in training too,
    and the sigmoid starts where it is steepest.

    Args:
        model: The network with blocks; the new ones' weights are changed.
        weights: Of the network without them, or with some, by the model's names.

    Returns:
        ``weights``, adapted, with those of the new blocks; tensors that need no change are shared.

    Raises:
        ValueError: If the model is not a GSoP ResNet, or a new block cannot be neutral: in the official flavor those
            with position-wise parts, which end in a ReLU or a batch normalization.
    """
    if not isinstance(model, ResNet):
        raise ValueError(f"model={type(model).__name__} cannot start neutral; accepted: GSoP ResNets.")
    weights = dict(weights)
    for stage in range(1, 5):
        layer: Any = model.get_submodule(f"layer{stage}")
        last = len(layer) - 1
        prefix = f"layer{stage}.{last}."
        if isinstance(layer[last], GsopBlock):
            block, readers = f"{prefix}gsop.", _readers(model, stage)
            scaled = dict.fromkeys(readers, 2 / 3)
        elif isinstance(getattr(layer[last], "se", None), ChannelGsop | PositionGsop | FusedGsop):
            block = f"{prefix}se."
            scaled = {f"{prefix}bn3.weight": 2.0, f"{prefix}bn3.bias": 2.0}
        else:
            continue
        if any(name.startswith(block) for name in weights):
            continue
        gsop = model.get_submodule(block[:-1])
        start_at_half(gsop)
        for name, factor in scaled.items():
            if name not in weights:
                raise ValueError(f"The weights have no {name}, which a neutral start of {block[:-1]} scales.")
            weights[name] = weights[name] * factor
        weights.update({f"{block}{name}": value for name, value in gsop.state_dict().items()})
    return weights


def _readers(model: Any, stage: int) -> list[str]:
    """Weights of the linear layers that read a stage's output."""
    if stage < 4:
        first = model.get_submodule(f"layer{stage + 1}.0")
        shortcut = [name for name, m in first.downsample.named_modules() if isinstance(m, nn.Conv2d)]
        return [f"layer{stage + 1}.0.conv1.weight", *(f"layer{stage + 1}.0.downsample.{n}.weight" for n in shortcut)]
    if hasattr(model.global_pool, "reduction"):
        return ["global_pool.reduction.conv.weight"]
    return ["fc.weight"] if model.num_classes > 0 else []
