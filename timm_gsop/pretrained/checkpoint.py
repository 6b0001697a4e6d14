"""Checkpoints: reading them safely, and, of the released code bases, what network they hold, by our names.

Sources (their names and shapes; no code of theirs):
* ``gsop``: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks
* ``fast-mpn-cov``: https://github.com/jiangtaoxie/fast-MPN-COV
* ``gcp``: https://github.com/ZhangLi-CS/GCP_Optimization
* ``dropcov``: https://github.com/mingzeG/DropCov
* ``moment-probing``: https://github.com/mingzeG/Moment-Probing
"""

import logging
import re
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import is_model, load_state_dict

from timm_gsop.layers import OfficialIsqrtCovPool2d

__all__ = [
    "Released",
    "from_covariance_pooling",
    "from_gsop",
    "from_moment_probing",
    "has_released_names",
    "plain_names",
    "read_checkpoint",
    "with_our_names",
]

Weights = dict[str, torch.Tensor]

ISQRT_ITERS = 5
"""Newton–Schulz iterations of fast MPN-COV and GCP, part of the networks that they trained."""

# Residual blocks of the four stages, and whether they are bottlenecks.
DEPTHS = {
    ((2, 2, 2, 2), False): 18,
    ((2, 2, 2, 2), True): 26,
    ((3, 4, 6, 3), False): 34,
    ((3, 4, 6, 3), True): 50,
    ((3, 4, 23, 3), True): 101,
    ((3, 8, 36, 3), True): 152,
}

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
HEAD = {
    "layer_reduce": "global_pool.reduction.conv",
    "layer_reduce_bn": "global_pool.reduction.bn",
    "eca_layer.conv": "global_pool.importance",
}
# What the training script of fast MPN-COV makes of a ResNet's modules: trained from scratch, or fine-tuned.
MAIN_PY = {
    "features.0": "conv1",
    "features.1": "bn1",
    **{f"features.{stage + 3}": f"layer{stage}" for stage in range(1, 5)},
    "features.8": "layer_reduce",
    "features.9": "layer_reduce_bn",
    "representation.conv_dr_block.0": "layer_reduce",
    "representation.conv_dr_block.1": "layer_reduce_bn",
    "classifier": "fc",
}
# MobileNetV2 by torchvision's names of 2019, and timm's: stem, last convolution and head, and the parts of a block.
MOBILENETV2 = {
    "features.0.0": "backbone.conv_stem",
    "features.0.1": "backbone.bn1",
    "features.18.0": "backbone.conv_head",
    "features.18.1": "backbone.bn2",
    "dimension_reduction.0": "global_pool.reduction.conv",
    "dimension_reduction.1": "global_pool.reduction.bn",
    "classifier.1": "fc",
}
MOBILENETV2_REPEATS = (1, 2, 3, 4, 3, 3, 1)
MOBILENETV2_FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
MOBILENETV2_BLOCK = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
# The head of moment probing, and the widths of ViTs by timm's names.
VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
MOMENT_HEAD = {
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
    "ln.weight": "norm.weight",
    "ln.bias": "norm.bias",
    "downblocks.0.0.weight": "convs.0.weight",
    "downblocks.0.2.weight": "convs.2.weight",
}
MOMENT_CLASSIFIERS = ("classifier1", "classifier2")

_logger = logging.getLogger(__name__)


def read_checkpoint(path: Path) -> Weights:
    """Read the weights in a file: safetensors, or what ``torch.save`` wrote, with nothing in it but data.

    Args:
        path: The file. Training checkpoints are accepted too: their weights, without a ``module.`` prefix.

    Returns:
        The weights by name, on the CPU.

    Raises:
        ValueError: If there is no such file, or it is truncated, or holds more than data (a pickle that would run code
            is refused, not run), or no weights.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint={str(path)!r} is not a file.")
    try:
        weights = load_state_dict(str(path), use_ema=False, weights_only=True)
    except Exception as error:  # zipfile's, pickle's and safetensors' own: all mean that this is no checkpoint for us
        raise ValueError(
            f"checkpoint={str(path)!r} cannot be read; accepted: safetensors, or a PyTorch file of nothing but data, "
            f"whole. {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    if not weights or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(
            f"checkpoint={str(path)!r} holds no weights; accepted: tensors by name, at the top or under 'state_dict'."
        )
    return dict(weights)


class Released(NamedTuple):
    """A released checkpoint.

    Attributes:
        model_name: The network that it holds.
        model_kwargs: The arguments that the network needs besides.
        weights: By our names; a ResNet's with covariance pooling by their own, for :func:`with_our_names`.
        assumed: Arguments that no name or shape shows, and their values in the code that made it.
    """

    model_name: str
    model_kwargs: dict[str, Any]
    weights: Weights
    assumed: dict[str, Any] | None = None


def plain_names(weights: Weights) -> Weights:
    """Weights by the names of the networks themselves, whatever saved them.

    ``module.`` in the middle of a name is left out, and the names that fast MPN-COV's training script gives to the
    parts of a ResNet become those of its two released files.
    """
    weights = {name.replace(".module.", "."): value for name, value in weights.items()}
    if "features.4.0.conv1.weight" not in weights:
        return weights
    return {_renamed(name, MAIN_PY): value for name, value in weights.items()}


def has_released_names(weights: Weights) -> bool:
    """Whether weights are a ResNet's with covariance pooling by the released code's names, and not by ours."""
    return "layer_reduce.weight" in plain_names(weights)


def _is_dropcov(weights: Weights) -> bool:
    """Whether weights by the released code's names are DropCov's; the covariance of the others has a square root."""
    return "eca_layer.conv.weight" in plain_names(weights)


def _to_our_names(weights: Weights) -> Weights:
    """A ResNet's weights with covariance pooling, from the released code's names to ours."""
    return {_rename_head(name): value for name, value in plain_names(weights).items()}


def with_our_names(weights: Weights, pool: Any) -> Weights:
    """A ResNet's weights by our names, for a network with a global pooling.

    What is after the covariance is not in the released code's names, but for DropCov's: where the pooling differs from
    theirs, a warning says so.

    Args:
        weights: By our names, or by the names of fast MPN-COV, GCP or DropCov.
        pool: The network's pooling.

    Raises:
        ValueError: If only one of weights and network is DropCov's.
    """
    if not has_released_names(weights):
        return weights
    dropcov = _is_dropcov(weights)
    pool_type = getattr(pool, "pool_type", "")
    if dropcov and pool_type in ("isqrt", "mpn"):
        raise ValueError(
            f"global_pool={pool_type!r} is not accepted with these weights, which are DropCov's and have no square "
            "root; accepted: global_pool='dropcov' or 'cov'."
        )
    if pool_type == "dropcov" and not dropcov:
        raise ValueError(
            "global_pool='dropcov' is not accepted with these weights, which have no eca_layer: they are iSQRT-COV's; "
            "accepted: global_pool='isqrt'."
        )
    weights = _to_our_names(weights)
    if pool_type == "cov" and dropcov:
        del weights["global_pool.importance.weight"]  # of training only
    elif pool_type == "cov":
        _logger.warning("The function changes: global_pool='cov', and the weights are of 'isqrt'.")
    elif pool_type == "mpn":
        _logger.warning(
            "The function changes unless the weights were trained with the exact root: they look as iSQRT's."
        )
    elif pool_type == "isqrt" and pool.num_iters != ISQRT_ITERS:
        _logger.warning("The function changes: isqrt_iters=%d, and the weights are of %d.", pool.num_iters, ISQRT_ITERS)
    if isinstance(pool, OfficialIsqrtCovPool2d) and "fc.weight" in weights:
        weights = _to_lower_triangle(weights, len(weights["global_pool.reduction.conv.weight"]))
    return weights


def from_covariance_pooling(weights: Weights, dropcov: bool = False) -> Released:
    """Recognise a checkpoint of fast MPN-COV, GCP or DropCov: all have the upper triangle, row by row, as ours.

    Args:
        weights: The weights, by their names there.
        dropcov: Whether they are said to be DropCov's: a covariance without a square root.

    Raises:
        ValueError: If it is not one that we have a network for, or ``dropcov`` contradicts it.
    """
    weights = plain_names(weights)
    if "conv5.0.weight" in weights:
        raise ValueError("The checkpoint is of ShuffleNetV2, which timm does not have; accepted: ResNets, MobileNetV2.")
    if "classifier.6.weight" in weights:
        raise ValueError(
            "The checkpoint is of VGG-16-BN, whose classifier of three layers after the covariance no network of timm "
            "or of this package has; accepted: ResNets, MobileNetV2."
        )
    if "dimension_reduction.0.weight" in weights:
        return _from_mobilenetv2(weights)
    depth = _depth(weights)
    if not has_released_names(weights):
        raise ValueError("The checkpoint has no layer_reduce; accepted: networks with covariance pooling.")
    if _is_dropcov(weights) and not dropcov:
        raise ValueError(
            "The checkpoint has eca_layer: it is DropCov's, a covariance without a square root; accepted: "
            "source='dropcov'."
        )
    if dropcov and not _is_dropcov(weights):
        raise ValueError(
            "The checkpoint has no eca_layer: it is not DropCov's, and its covariance has a square root; accepted: "
            "source='gcp' or 'fast-mpn-cov'."
        )
    kwargs: dict[str, Any] = dict(num_classes=_num_classes(weights), isqrt_dim=len(weights["layer_reduce.weight"]))
    kwargs |= dict(global_pool="dropcov") if dropcov else dict(isqrt_iters=ISQRT_ITERS)
    assumed: dict[str, Any] = dict(last_stride=1) if dropcov else dict(last_stride=1, isqrt_iters=ISQRT_ITERS)
    return Released(f"isqrt_resnet{depth}", kwargs, weights, assumed)


def _from_mobilenetv2(weights: Weights) -> Released:
    prefixes = dict(MOBILENETV2)
    sites = [(stage, i) for stage, count in enumerate(MOBILENETV2_REPEATS) for i in range(count)]
    for number, (stage, i) in enumerate(sites, start=1):
        parts = MOBILENETV2_FIRST if number == 1 else MOBILENETV2_BLOCK
        prefixes |= {f"features.{number}.conv.{n}": f"backbone.blocks.{stage}.{i}.{part}" for n, part in parts.items()}
    kwargs = dict(
        backbone="mobilenetv2_100",
        num_classes=_num_classes(weights, "classifier.1.weight"),
        isqrt_dim=len(weights["dimension_reduction.0.weight"]),
        isqrt_iters=ISQRT_ITERS,
        pool_kwargs=dict(act_layer="relu6"),
    )
    renamed = {_renamed(name, prefixes): value for name, value in weights.items()}
    assumed = {name: kwargs[name] for name in ("isqrt_iters", "pool_kwargs")}
    return Released("second_order", kwargs, renamed, assumed)


def _renamed(name: str, prefixes: dict[str, str]) -> str:
    """A name whose modules, as many of its first as are in a table, are called as the table says."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if (prefix := ".".join(parts[:count])) in prefixes:
            return ".".join([prefixes[prefix], *parts[count:]])
    return name


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


def from_moment_probing(weights: Weights, backbone: str | None = None) -> Released:
    """Recognise a ViT with the head of moment probing, by names and shapes.

    The mean of its two classifiers, of the class token and of the second moments, becomes one classifier.

    Args:
        weights: The weights, by their names there.
        backbone: Name of the backbone in timm; None for the ViT that width, patches and tokens show.

    Raises:
        ValueError: If it is not such a checkpoint.
    """
    needed = [*(f"head.{name}" for name in MOMENT_HEAD), "patch_embed.proj.weight", "pos_embed", "cls_token"]
    needed += [f"head.{name}.{part}" for name in MOMENT_CLASSIFIERS for part in ("weight", "bias")]
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(
            f"The checkpoint has no {missing[0]}; accepted: a ViT with the head of moment probing. Heads of networks "
            "with feature maps are not."
        )
    if any("psrp" in name.lower() for name in weights):
        raise ValueError("The checkpoint has PSRP modules, those of MP+; accepted: moment probing without them.")
    if backbone is None:
        backbone = _vit(weights)
    renamed = {f"backbone.{name}": value for name, value in weights.items() if not name.startswith("head.")}
    for theirs, ours in MOMENT_HEAD.items():
        value = weights[f"head.{theirs}"]
        renamed[f"global_pool.{ours}"] = value[:, :, None, None] if theirs == "proj.weight" else value
    renamed["fc.weight"] = torch.cat([weights[f"head.{name}.weight"] for name in MOMENT_CLASSIFIERS], dim=1)
    renamed["fc.bias"] = sum(weights[f"head.{name}.bias"] for name in MOMENT_CLASSIFIERS) / 2  # type: ignore[assignment]
    kwargs = dict(
        backbone=backbone,
        global_pool="moment",
        num_classes=len(renamed["fc.bias"]),
        pool_kwargs=dict(hidden_dim=len(weights["head.proj.bias"])),
    )
    return Released(model_name="second_order", model_kwargs=kwargs, weights=renamed)


def _vit(weights: Weights) -> str:
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    size = patch * isqrt(weights["pos_embed"].shape[1] - 1)
    name = f"vit_{VIT_WIDTHS.get(width, 'unknown')}_patch{patch}_{size}"
    if not is_model(name):
        raise ValueError(
            f"The checkpoint has a ViT of width {width}, with patches of {patch} and images of {size}, which timm does "
            "not have; accepted: its name in timm, as the argument backbone."
        )
    return name


def _to_lower_triangle(weights: Weights, size: int) -> Weights:
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
    is_bottleneck = "layer1.0.conv3.weight" in weights
    accepted = {known: depth for (known, bottleneck), depth in DEPTHS.items() if bottleneck == is_bottleneck}
    if layers not in accepted:
        raise ValueError(
            f"The checkpoint has {layers} residual blocks in layer1 to layer4; accepted: "
            f"{', '.join(f'{known} of ResNet-{depth}' for known, depth in accepted.items())}."
        )
    return accepted[layers]


def _width(weights: Weights, module: str) -> int:
    """Channels that a module puts out."""
    return next(len(value) for name, value in weights.items() if name.split(".")[-2:] == [module, "weight"])


def _num_classes(weights: Weights, classifier: str = "fc.weight") -> int:
    if classifier not in weights:
        raise ValueError(f"The checkpoint has no {classifier}; accepted: networks with their classifier.")
    return len(weights[classifier])


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
