"""GSoP-Net on other networks of timm: ResNeXt, DenseNet and Inception-v3 (the paper's conclusion names the last two).

Their weights have timm's names. The paper does not say where the blocks are. Here each stage ends with one. In DenseNet
and Inception-v3 every stage keeps its stride.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017 - https://arxiv.org/abs/1611.05431
* Densely Connected Convolutional Networks, CVPR 2017 - https://arxiv.org/abs/1608.06993
* Rethinking the Inception Architecture for Computer Vision, CVPR 2016 - https://arxiv.org/abs/1512.00567
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.layers import trunc_normal_
from timm.models import FeatureListNet, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import Bottleneck
from torch import nn

from timm_gsop.attach import attach_gsop, keep_names
from timm_gsop.checks import check_choice
from timm_gsop.layers import GsopBlock
from timm_gsop.models.build import build_model
from timm_gsop.models.gsop_mixin import GsopMixin
from timm_gsop.models.gsop_resnet import GsopResNet, checkpoint_filter_fn
from timm_gsop.models.timm_weights import with_timm_weights
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.neutral import NEUTRAL_GAIN, neutral_start

__all__ = ["GsopDenseNet", "GsopInceptionV3"]  # register_model adds the entry points


class SmallestImageMixin:
    """For networks of timm whose maps shrink to nothing: a clear error for images that are too small."""

    smallest_image: int

    def forward_intermediates(self, x: torch.Tensor, *args: Any, stop_early: bool = False, **kwargs: Any) -> Any:
        """timm's ``forward_intermediates``."""
        if not stop_early:
            check_image_size(x, self.smallest_image)
        return super().forward_intermediates(x, *args, stop_early=stop_early, **kwargs)  # type: ignore[misc]

    def prune_intermediate_layers(self, *args: Any, **kwargs: Any) -> list[int]:
        """timm's ``prune_intermediate_layers``; what is left of the network may accept smaller images."""
        self.smallest_image = 1
        return super().prune_intermediate_layers(*args, **kwargs)  # type: ignore[misc]


def check_image_size(x: torch.Tensor, smallest: int) -> None:
    """Raise ``ValueError`` for an image, (B, C, H, W), with a side below ``smallest``; graphs do not check."""
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return
    if min(x.shape[-2:]) < smallest:
        raise ValueError(
            f"input has shape {tuple(x.shape)}, too small for this network; accepted: images of at least "
            f"{smallest}×{smallest}."
        )


torch.fx.wrap("check_image_size")  # a leaf in torch.fx's graphs: within a trace, shapes are no numbers


class GsopDenseNet(SmallestImageMixin, GsopMixin, DenseNet):
    """timm's DenseNet with GSoP blocks after its dense blocks, before the transitions and after the last BN.

    Stages are dense blocks, 1 to 4 by default.

    Args:
        block_config: Layers in each dense block.
        **kwargs: The arguments of blocks and head (:class:`GsopMixin`), and all others of timm's ``DenseNet``.

    Raises:
        ValueError: If an argument is not among the accepted ones; in ``forward``, if the image is too small.
    """

    classifier_name = "classifier"

    def __init__(self, block_config: Sequence[int] = (6, 12, 24, 16), **kwargs: Any) -> None:
        self.num_stages = len(block_config)
        self.smallest_image = 4 * 2 ** (self.num_stages - 1) - 3  # the stem halves twice, rounding up, transitions down
        super().__init__(block_config=block_config, **kwargs)

    def add_blocks(self, stage: int, create: Callable[..., nn.Module]) -> None:
        """Put a block before a stage's transition, or after the last batch normalization."""
        info = self.feature_info[stage]
        attach_gsop(GsopBlock(create(info["num_chs"])), self, info["module"])
        if stage < self.num_stages:  # so that a neutral block changes nothing, in training either
            transition: Any = self.get_submodule(f"features.transition{stage}")
            transition.norm.eps *= NEUTRAL_GAIN**2

    def init_base(self) -> None:
        """Initialize the convolutions as timm's DenseNet does; its other layers start as PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's patterns; a block, and the last BN, belong to the dense block before them."""
        matcher = super().group_matcher(coarse)
        if coarse:
            matcher["blocks"] = r"^features\.(?:denseblock|transition)(\d+)(?:_gsop)?\."
        else:
            before = (99999,)  # timm's sign for the group before
            matcher["blocks"] += [(r"^features\.denseblock(\d+)_gsop", before), (r"^features\.norm5", before)]
        return matcher

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to features (B, C, H', W')."""
        if not torch.jit.is_scripting():
            check_image_size(x, self.smallest_image)
        return self.features(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool features (B, C, H, W) and classify them: (B, num_classes), or what the classifier would read."""
        x = F.dropout(self._pool(x), p=self.head_drop_rate, training=self.training)
        return x if pre_logits else self.classifier(x)


class GsopInceptionV3(SmallestImageMixin, GsopMixin, InceptionV3):
    """timm's Inception-v3 with GSoP blocks after its last modules of each size: Mixed_5d, Mixed_6e and Mixed_7c.

    Its three stages have maps of 35×35, 17×17 and 8×8 for an image of 299×299.

    Args:
        **kwargs: The arguments of blocks and head (:class:`GsopMixin`), and all others of timm's ``InceptionV3``,
            ``aux_logits`` excepted.

    Raises:
        ValueError: If an argument is not among the accepted ones; in ``forward``, if the image is smaller than 75×75.
    """

    num_stages = 3
    smallest_image = 75

    def __init__(self, **kwargs: Any) -> None:
        check_choice("aux_logits", kwargs.pop("aux_logits", False), (False,))
        super().__init__(**kwargs)

    def add_blocks(self, stage: int, create: Callable[..., nn.Module]) -> None:
        """Attach a block to the last module of a stage."""
        info = self.feature_info[stage + 1]  # the stem has two levels
        attach_gsop(GsopBlock(create(info["num_chs"])), self, info["module"])

    def init_base(self) -> None:
        """Initialize the convolutions as timm's Inception-v3 does; its other layers start as PyTorch's."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                trunc_normal_(module.weight, std=0.1)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """timm's groups; the pooling's weights belong to the head."""
        group = super().group_matcher(coarse)
        return lambda name: float("inf") if name.startswith("global_pool.") else group(name)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to features (B, C, H', W')."""
        if not torch.jit.is_scripting():
            check_image_size(x, self.smallest_image)
        return self.forward_postaux(self.forward_preaux(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def filter_without_aux(weights: Weights, model: GsopDenseNet | GsopInceptionV3) -> Weights:
    """Fit timm's weights to a network: blocks that they lack start neutral, auxiliary logits are left out.

    Args:
        weights: By the network's names.
        model: The network; its new blocks' weights are changed.

    Returns:
        Weights with which the network computes what the original network did.
    """
    return neutral_start(model, {name: value for name, value in weights.items() if not name.startswith("AuxLogits.")})


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "license": "apache-2.0",
        "paper_name": "Global Second-order Pooling Convolutional Networks",
        "paper_ids": "arXiv:1811.12006",
        **kwargs,
    }


_RESNEXT = dict(pool_size=(14, 14), first_conv="conv1", classifier="fc")
_DENSENET = dict(first_conv="features.conv0", classifier="classifier")
_INCEPTION = dict(
    input_size=(3, 299, 299),
    pool_size=(8, 8),
    mean=IMAGENET_INCEPTION_MEAN,
    std=IMAGENET_INCEPTION_STD,
    first_conv="Conv2d_1a_3x3.conv",
    classifier="fc",
)

default_cfgs = generate_default_cfgs(
    {
        **with_timm_weights("gsop_resnext50_32x4d_net1", "resnext50_32x4d.a1h_in1k", _cfg(**_RESNEXT)),
        "gsop_resnext50_32x4d_net1.untrained": _cfg(**_RESNEXT),
        **with_timm_weights("gsop_resnext50_32x4d_net2", "resnext50_32x4d.a1h_in1k", _cfg(**_RESNEXT), new_head=True),
        "gsop_resnext50_32x4d_net2.untrained": _cfg(**_RESNEXT),
        **with_timm_weights("gsop_densenet121_net1", "densenet121.ra_in1k", _cfg(**_DENSENET), same_function=True),
        "gsop_densenet121_net1.untrained": _cfg(**_DENSENET),
        **with_timm_weights(
            "gsop_densenet121_net2", "densenet121.ra_in1k", _cfg(**_DENSENET), new_head=True, same_function=True
        ),
        "gsop_densenet121_net2.untrained": _cfg(**_DENSENET),
        **with_timm_weights("gsop_inception_v3_net1", "inception_v3.tv_in1k", _cfg(**_INCEPTION), same_function=True),
        "gsop_inception_v3_net1.untrained": _cfg(**_INCEPTION),
        **with_timm_weights(
            "gsop_inception_v3_net2", "inception_v3.tv_in1k", _cfg(**_INCEPTION), new_head=True, same_function=True
        ),
        "gsop_inception_v3_net2.untrained": _cfg(**_INCEPTION),
    }
)

_RESNEXT50: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)


def _create_gsop_resnext(variant: str, pretrained: bool, **kwargs: Any) -> GsopResNet:
    return build_model(GsopResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def gsop_resnext50_32x4d_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNeXt-50 32x4d: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNEXT50, gsop_layers=(1, 2, 3, 4), global_pool="avg")
    return _create_gsop_resnext("gsop_resnext50_32x4d_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnext50_32x4d_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNeXt-50 32x4d: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNEXT50, gsop_layers=(1, 2, 3), global_pool="isqrt")
    return _create_gsop_resnext("gsop_resnext50_32x4d_net2", pretrained, **dict(model_args, **kwargs))


class _FeatureListNet(FeatureListNet):
    """timm's, with the lasting names of the blocks in it."""

    def __init__(self, model: GsopDenseNet, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        keep_names(self)


def _create_gsop_densenet(variant: str, pretrained: bool, **kwargs: Any) -> GsopDenseNet:
    # As timm's DenseNet: its levels are inside a sequence.
    feature_cfg = dict(feature_cls=_FeatureListNet, flatten_sequential=True)
    return build_model(
        GsopDenseNet, variant, pretrained, pretrained_filter_fn=filter_without_aux, feature_cfg=feature_cfg, **kwargs
    )


@register_model
def gsop_densenet121_net1(pretrained: bool = False, **kwargs: Any) -> GsopDenseNet:
    """GSoP-Net1 on DenseNet-121: GSoP blocks after all dense blocks, average pooling."""
    model_args = dict(gsop_layers=(1, 2, 3, 4), global_pool="avg")
    return _create_gsop_densenet("gsop_densenet121_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_densenet121_net2(pretrained: bool = False, **kwargs: Any) -> GsopDenseNet:
    """GSoP-Net2 on DenseNet-121: GSoP blocks after the first three dense blocks, iSQRT-COV pooling."""
    model_args = dict(gsop_layers=(1, 2, 3), global_pool="isqrt")
    return _create_gsop_densenet("gsop_densenet121_net2", pretrained, **dict(model_args, **kwargs))


def _create_gsop_inception_v3(variant: str, pretrained: bool, **kwargs: Any) -> GsopInceptionV3:
    return build_model(GsopInceptionV3, variant, pretrained, pretrained_filter_fn=filter_without_aux, **kwargs)


@register_model
def gsop_inception_v3_net1(pretrained: bool = False, **kwargs: Any) -> GsopInceptionV3:
    """GSoP-Net1 on Inception-v3: GSoP blocks after all three stages, average pooling."""
    model_args = dict(gsop_layers=(1, 2, 3), global_pool="avg")
    return _create_gsop_inception_v3("gsop_inception_v3_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_inception_v3_net2(pretrained: bool = False, **kwargs: Any) -> GsopInceptionV3:
    """GSoP-Net2 on Inception-v3: GSoP blocks after the first two stages, iSQRT-COV pooling."""
    model_args = dict(gsop_layers=(1, 2), global_pool="isqrt")
    return _create_gsop_inception_v3("gsop_inception_v3_net2", pretrained, **dict(model_args, **kwargs))
