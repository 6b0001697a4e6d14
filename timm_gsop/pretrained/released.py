"""Checkpoints of the released code bases: what network they hold, and its weights by our names.

Sources (their names and shapes; no code of theirs):
* ``gsop``: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks
* ``fast-mpn-cov``: https://github.com/jiangtaoxie/fast-MPN-COV
"""

import re
from math import isqrt
from typing import Any, NamedTuple

import torch

from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["ISQRT_ITERS", "Released", "from_fast_mpn_cov", "from_gsop", "is_fast_mpn_cov", "to_lower_triangle"]

ISQRT_ITERS = 5
"""Newton–Schulz iterations of fast MPN-COV, part of the networks that it trained."""

DEPTHS = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101}

# Modules of a block in the released GSoP code, in its last bottleneck of a stage.
CHANNEL = {
    "conv_for_DR": "reduction.conv",
    "bn_for_DR": "reduction.bn",
    "row_bn": "excitation.cov_bn",
    "row_conv_group": "excitation.row_conv",
    "fc_adapt_channels": "excitation.expand_conv",
}
POSITION = {
    "conv_for_DR_spatial": "reduction.conv",
    "bn_for_DR_spatial": "reduction.bn",
    "row_bn_for_spatial": "excitation.cov_bn",
    "row_conv_group_for_spatial": "excitation.row_conv",
    "fc_adapt_channels_for_spatial": "excitation.expand_conv",
}
CONCATENATION = {"dilate_conv_for_concat1": "conv1", "dilate_conv_for_concat2": "conv2", "bn_for_concat": "bn"}
HEAD = {"layer_reduce": "global_pool.reduction.conv", "layer_reduce_bn": "global_pool.reduction.bn"}


class Released(NamedTuple):
    """A released checkpoint.

    Attributes:
        model_name: The network that it holds.
        model_kwargs: The arguments that the network needs besides.
        weights: By our names.
    """

    model_name: str
    model_kwargs: dict[str, Any]
    weights: Weights


def is_fast_mpn_cov(weights: Weights) -> bool:
    """Whether weights have the names of fast MPN-COV, and not ours."""
    return "layer_reduce.weight" in weights


def from_fast_mpn_cov(weights: Weights) -> Released:
    """Recognise a checkpoint of fast MPN-COV (iSQRT-COV): five iterations, the upper triangle, as ours.

    Raises:
        ValueError: If it is not one.
    """
    depth = _depth(weights)
    if not is_fast_mpn_cov(weights):
        raise ValueError(
            "The checkpoint has no layer_reduce; accepted: networks of fast MPN-COV with covariance pooling."
        )
    kwargs = dict(
        num_classes=_num_classes(weights), isqrt_dim=weights["layer_reduce.weight"].shape[0], isqrt_iters=ISQRT_ITERS
    )
    return Released(f"isqrt_resnet{depth}", kwargs, {_rename_head(name): value for name, value in weights.items()})


def from_gsop(weights: Weights, gsop_type: str | None = None) -> Released:
    """Recognise a checkpoint of the released GSoP code: the flavor "official".

    Depth, Net1 or Net2, kind and sizes of the blocks show in names and shapes.

    Args:
        weights: The weights, by their names there.
        gsop_type: ``"avg"`` or ``"max"``, which do not show.

    Raises:
        ValueError: If it is not such a checkpoint, or ``gsop_type`` is needed, or contradicts it.
    """
    depth = _depth(weights)
    stages = sorted(
        {int(name[5]) for name in weights if re.match(r"layer\d\.\d+\.(conv_for_DR|conv_for_DR_spatial)\.", name)}
    )
    if not stages:
        raise ValueError("The checkpoint has no GSoP blocks; accepted: networks of the released GSoP code.")
    gsop_type = _gsop_type(weights, gsop_type)
    reduction = "conv_for_DR_spatial" if gsop_type == "position" else "conv_for_DR"
    kwargs: dict[str, Any] = dict(
        flavor="official",
        gsop_type=gsop_type,
        num_classes=_num_classes(weights),
        cov_dim=_width(weights, reduction),
    )
    if gsop_type != "channel":
        kwargs["spatial_size"] = isqrt(_width(weights, "row_bn_for_spatial"))
    net = 2 if "layer_reduce.weight" in weights else 1
    if net == 2:
        kwargs["isqrt_dim"] = weights["layer_reduce.weight"].shape[0]
    if stages != [1, 2, 3, 4][: 5 - net]:
        kwargs["gsop_layers"] = tuple(stages)
    renamed = {_rename_block(name, gsop_type): value for name, value in weights.items()}
    return Released(f"gsop_resnet{depth}_net{net}", kwargs, renamed)


def to_lower_triangle(weights: Weights, size: int) -> Weights:
    """Reorder the classifier's columns from the upper triangle to the lower, both row by row."""
    rows, cols = torch.tril_indices(size, size)
    position = torch.zeros(size, size, dtype=torch.long)
    upper = torch.triu_indices(size, size)
    position[upper[0], upper[1]] = torch.arange(upper.shape[1])
    return {**weights, "fc.weight": weights["fc.weight"][:, position[cols, rows]]}


def _depth(weights: Weights) -> int:
    found = (re.match(r"layer(\d)\.(\d+)\.conv1\.weight$", name) for name in weights)
    blocks = [match.group(1) for match in found if match]
    layers = tuple(blocks.count(stage) for stage in "1234")
    if layers not in DEPTHS:
        raise ValueError(
            f"The checkpoint has {layers} residual blocks in layer1 to layer4; accepted: "
            f"{', '.join(map(str, DEPTHS))}, those of ResNet-50 and 101."
        )
    return DEPTHS[layers]


def _width(weights: Weights, module: str) -> int:
    """Channels that a module puts out."""
    return next(len(value) for name, value in weights.items() if name.split(".")[-2:] == [module, "weight"])


def _num_classes(weights: Weights) -> int:
    if "fc.weight" not in weights:
        raise ValueError("The checkpoint has no fc.weight; accepted: networks with their classifier.")
    return weights["fc.weight"].shape[0]


def _gsop_type(weights: Weights, given: str | None) -> str:
    has = {part for name in weights for part in name.split(".")}
    channel, position = "conv_for_DR" in has, "conv_for_DR_spatial" in has
    shown: tuple[str, ...]
    if "dilate_conv_for_concat1" in has:
        shown = ("concat",)
    elif channel and position:
        shown = ("avg", "max")
    else:
        shown = ("channel",) if channel else ("position",)
    if given is None and len(shown) == 1:
        return shown[0]
    if given is None or given not in shown:
        raise ValueError(f"gsop_type={given!r} does not fit the checkpoint; accepted: {', '.join(map(repr, shown))}.")
    return given


def _rename_head(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    return f"{HEAD[module]}.{parameter}" if module in HEAD else name


def _rename_block(name: str, gsop_type: str) -> str:
    *path, module, parameter = name.split(".") if name.count(".") > 1 else ("", *name.split("."))
    fused = gsop_type not in ("channel", "position")
    for names, part in ((CHANNEL, "channel."), (POSITION, "position."), (CONCATENATION, "fuse.")):
        if module in names:
            inner = part if fused else ""
            return ".".join([*path, f"se.{inner}{names[module]}", parameter])
    return _rename_head(name)
