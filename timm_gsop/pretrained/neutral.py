"""Blocks that start without changing what a network computes, so that training can continue from trained weights."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import SelectAdaptivePool2d
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.layers import ChannelGsop, FusedGsop, GsopBlock, PositionGsop, start_at_half
from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["NEUTRAL_GAIN", "neutral_start"]

NEUTRAL_GAIN = 1.5
"""What a neutral block makes of its input in the paper flavor: x + x / 2."""


class _Scaling(NamedTuple):
    """One tensor of the weights and what it is multiplied by; of convolutions, the inputs that are meant."""

    name: str
    factor: float
    inputs: slice = slice(None)


class _Site(NamedTuple):
    """A block, the prefix of its weights, and what makes up for it when it is neutral, asked only then."""

    gsop: nn.Module
    block: str
    scalings: Callable[[], list[_Scaling]]


@torch.no_grad()
def neutral_start(model: nn.Module, weights: Weights) -> Weights:
    """Make every block that ``weights`` do not have neutral, and return weights with which the function is unchanged.

    With its last convolution zero, a block's sigmoid gives exactly one half. In the paper flavor the block returns
    ``1.5 x``. The layers after it compensate: the convolutions that read the block's output are scaled by 2/3
    (the next stage's, covariance pooling's, or the classifier); in DenseNet, a batch normalization reads it, whose
    statistics are scaled. In the official flavor the block is in front of the addition: the weight and bias of the
    batch normalization before it are doubled. This holds in training too, and the sigmoid starts where it is steepest.

    Args:
        model: The network with blocks; the new ones' weights are changed.
        weights: Weights of the network without blocks, or with some of them, by the model's names. They may lack a
            classifier or a covariance pooling, which then needs no scaling.

    Returns:
        ``weights``, adapted, with those of the new blocks; tensors that need no change are shared.

    Raises:
        ValueError: If the model is not a GSoP ResNet, DenseNet or Inception-v3, or a new block cannot be neutral: in
            the official flavor those with position-wise parts, which end in a ReLU or a batch normalization; after a
            stage whose output goes through an identity shortcut.

    Example:
        >>> import timm
        >>> small = dict(channels=(8, 16, 24, 32), num_classes=10)
        >>> base = timm.create_model("resnet26", **small).eval()
        >>> model = timm.create_model("gsop_resnet26_net1", last_stride=2, cov_dim=8, **small).eval()
        >>> model.load_state_dict(neutral_start(model, base.state_dict()))
        <All keys matched successfully>
        >>> x = torch.randn(2, 3, 64, 64)
        >>> torch.allclose(model(x), base(x), rtol=1e-4, atol=1e-5)
        True
    """
    weights = dict(weights)
    new = [site for site in _sites(model) if not any(name.startswith(site.block) for name in weights)]
    scalings = [site.scalings() for site in new]  # before anything changes
    for site, made_up_by in zip(new, scalings, strict=True):
        start_at_half(site.gsop)
        for name, factor, inputs in made_up_by:
            if name in weights:
                value = weights[name].clone()
                (value if value.ndim == 1 else value[:, inputs]).mul_(factor)
                weights[name] = value
            elif name not in _head_readers(model):
                raise ValueError(f"The weights have no {name}, which a neutral start of {site.block[:-1]} scales.")
        weights.update({f"{site.block}{name}": value for name, value in site.gsop.state_dict().items()})
    return weights


def _sites(model: nn.Module) -> Iterator[_Site]:
    if isinstance(model, ResNet):
        return _sites_in_resnet(model)
    if isinstance(model, DenseNet):
        return _sites_in_densenet(model)
    if isinstance(model, InceptionV3):
        return _sites_in_inception(model)
    raise ValueError(
        f"model={type(model).__name__} cannot start neutral; accepted: GSoP ResNets, DenseNets and Inception-v3."
    )


def _sites_in_resnet(model: Any) -> Iterator[_Site]:
    for stage in range(1, 5):
        layer = model.get_submodule(f"layer{stage}")
        prefix = f"layer{stage}.{len(layer) - 1}."
        if isinstance(layer[-1], GsopBlock):
            yield _Site(layer[-1].gsop, f"{prefix}gsop.", partial(_read_in_resnet, model, stage))
        elif isinstance(getattr(layer[-1], "se", None), ChannelGsop | PositionGsop | FusedGsop):
            bn = f"{prefix}{'bn3' if hasattr(layer[-1], 'bn3') else 'bn2'}"
            yield _Site(layer[-1].se, f"{prefix}se.", partial(_doubled, bn))


def _doubled(bn: str) -> list[_Scaling]:
    return [_Scaling(f"{bn}.{name}", 2.0) for name in ("weight", "bias")]


def _read_in_resnet(model: Any, stage: int) -> list[_Scaling]:
    if stage == 4:
        return _read_by_head(model)
    following = f"layer{stage + 1}.0"
    downsample = model.get_submodule(following).downsample
    if downsample is None:
        raise ValueError(
            f"The block after layer{stage} cannot start neutral: the shortcut of {following} has no projection and "
            f"passes the block's output on as it is, so no weights can make up for it; accepted: gsop_layers without "
            f"{stage}, or stages of different width."
        )
    projection = [name for name, module in downsample.named_modules() if isinstance(module, nn.Conv2d)]
    return _read_by([f"{following}.conv1.weight", *(f"{following}.downsample.{name}.weight" for name in projection)])


def _sites_in_densenet(model: Any) -> Iterator[_Site]:
    for block in model.features:
        if isinstance(block, GsopBlock):
            names: Any = block.names
            _, saved = names
            reader, _, _ = saved.partition(".")
            is_last = reader == "norm5"
            scalings = partial(_read_by_head, model) if is_last else partial(_normalized_by, f"features.{reader}.norm")
            yield _Site(block.gsop, f"features.{saved}.gsop.", scalings)


def _normalized_by(bn: str) -> list[_Scaling]:
    # GsopDenseNet's eps there is larger by the gain's square, so the normalized values are the same.
    return [_Scaling(f"{bn}.running_mean", NEUTRAL_GAIN), _Scaling(f"{bn}.running_var", NEUTRAL_GAIN**2)]


# Inception-v3: for each module that a block follows, the convolutions that read the block's output. The next module
# reads all of it. The module after that reads the channels that the next module's max-pooling passes on.
_INCEPTION = {
    "Mixed_5d": (
        ("Mixed_6a", ("branch3x3", "branch3x3dbl_1")),
        ("Mixed_6b", ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")),
    ),
    "Mixed_6e": (
        ("Mixed_7a", ("branch3x3_1", "branch7x7x3_1")),
        ("Mixed_7b", ("branch1x1", "branch3x3_1", "branch3x3dbl_1", "branch_pool")),
    ),
}


def _sites_in_inception(model: Any) -> Iterator[_Site]:
    for info in model.feature_info[2:]:
        block = getattr(model.get_submodule(info["module"]), "gsop", None)
        if block is not None:
            yield _Site(block.gsop, f"{info['module']}.gsop.gsop.", partial(_read_in_inception, model, **info))


def _read_in_inception(model: Any, module: str, num_chs: int, **_: Any) -> list[_Scaling]:
    if module not in _INCEPTION:
        return _read_by_head(model)
    (following, direct), (later, behind) = _INCEPTION[module]
    return [
        *_read_by([f"{following}.{branch}.conv.weight" for branch in direct]),
        *_read_by([f"{later}.{branch}.conv.weight" for branch in behind], slice(-num_chs, None)),  # concatenated last
    ]


def _read_by_head(model: Any) -> list[_Scaling]:
    return _read_by(_head_readers(model))


def _head_readers(model: Any) -> list[str]:
    """Weights of the linear layers that read the last feature map, averaged or not."""
    for head in ("global_pool", "global_pool.head"):  # the latter with a projection after it
        if f"{head}.reduction" in dict(model.named_modules()):
            return [f"{head}.reduction.conv.weight"]
    if isinstance(model.global_pool, SelectAdaptivePool2d) and model.num_classes > 0:
        return [f"{model.classifier_name}.weight"]
    return []


def _read_by(names: list[str], inputs: slice = slice(None)) -> list[_Scaling]:
    return [_Scaling(name, 1 / NEUTRAL_GAIN, inputs) for name in names]
