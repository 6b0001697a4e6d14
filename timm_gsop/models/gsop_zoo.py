"""GSoP-Net on other networks of timm: ResNeXt, DenseNet and Inception-v3 (the paper's conclusion names the last two).

Their weights have the names that they have in timm. The paper does not say where blocks would stand: they stand where a
stage ends. In DenseNet and Inception-v3 every stage keeps its stride.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017 - https://arxiv.org/abs/1611.05431
* Densely Connected Convolutional Networks, CVPR 2017 - https://arxiv.org/abs/1608.06993
* Rethinking the Inception Architecture for Computer Vision, CVPR 2016 - https://arxiv.org/abs/1512.00567
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.models import generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import Bottleneck

from timm_gsop.checks import check_choice, check_stages
from timm_gsop.insert import attach_gsop
from timm_gsop.layers import GsopBlock, check_gsop, create_gsop
from timm_gsop.models.build import build_model
from timm_gsop.models.global_pool import GlobalPoolMixin
from timm_gsop.models.gsop_resnet import GsopResNet, checkpoint_filter_fn
from timm_gsop.models.timm_weights import with_timm_weights
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.neutral import NEUTRAL_GAIN, neutral_start

__all__ = ["GsopDenseNet", "GsopInceptionV3"]  # register_model adds the entry points


class GsopDenseNet(GlobalPoolMixin, DenseNet):
    """timm's DenseNet with GSoP blocks after its dense blocks, in front of the transitions and after the last BN.

    Args:
        num_classes: Number of classes; 0 for no classifier.
        global_pool: One of timm's pools, ``"isqrt"`` (iSQRT-COV), ``"mpn"`` (MPN-COV), or ``""`` for none.
        gsop_type: Kind of the blocks, one of ``GSOP_TYPES``.
        gsop_layers: Dense blocks 1 to 4 that a GSoP block follows; ``()`` for none.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        isqrt_dim: Channels after reduction in covariance pooling.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"`` pooling.
        flavor: ``"paper"``; there is no other.
        **kwargs: All other arguments of timm's ``DenseNet``.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    classifier_name = "classifier"

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        gsop_type: str = "channel",
        gsop_layers: Sequence[int] = (1, 2, 3, 4),
        cov_dim: int = 128,
        spatial_size: int = 8,
        isqrt_dim: int = 256,
        isqrt_iters: int = 5,
        flavor: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("flavor", flavor, ("paper",))  # the released code has ResNets only
        check_gsop(gsop_type, cov_dim, spatial_size, flavor)
        check_stages("gsop_layers", gsop_layers, num_stages=4)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(num_classes=0, global_pool="", **dd, **kwargs)
        for stage in sorted(gsop_layers):
            channels = self.feature_info[stage]["num_chs"]
            block = GsopBlock(create_gsop(gsop_type, channels, cov_dim, spatial_size, **dd))
            if stage < 4:
                transition: Any = self.get_submodule(f"features.transition{stage}")
                attach_gsop(block, transition, in_front=True)
                transition.norm.eps *= NEUTRAL_GAIN**2  # so that a neutral block changes nothing, in training either
            else:
                attach_gsop(block, self.get_submodule("features.norm5"))
        self.init_global_pool(num_classes, global_pool, isqrt_dim, isqrt_iters, flavor, **dd)


class GsopInceptionV3(GlobalPoolMixin, InceptionV3):
    """timm's Inception-v3 with GSoP blocks after its last modules of each size: Mixed_5d, Mixed_6e and Mixed_7c.

    Args:
        num_classes: Number of classes; 0 for no classifier.
        global_pool: One of timm's pools, ``"isqrt"`` (iSQRT-COV), ``"mpn"`` (MPN-COV), or ``""`` for none.
        gsop_type: Kind of the blocks, one of ``GSOP_TYPES``.
        gsop_layers: Stages 1 to 3 (35×35, 17×17 and 8×8 at 299×299) that end with a block; ``()`` for none.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        isqrt_dim: Channels after reduction in covariance pooling.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"`` pooling.
        flavor: ``"paper"``; there is no other.
        drop_rate: Dropout before the classifier.
        **kwargs: Other arguments of timm's ``InceptionV3``, ``aux_logits`` excepted.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        global_pool: str = "avg",
        gsop_type: str = "channel",
        gsop_layers: Sequence[int] = (1, 2, 3),
        cov_dim: int = 128,
        spatial_size: int = 8,
        isqrt_dim: int = 256,
        isqrt_iters: int = 5,
        flavor: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("flavor", flavor, ("paper",))  # the released code has ResNets only
        check_gsop(gsop_type, cov_dim, spatial_size, flavor)
        check_stages("gsop_layers", gsop_layers, num_stages=3)
        check_choice("aux_logits", kwargs.pop("aux_logits", False), (False,))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(num_classes=0, global_pool="", **dd, **kwargs)
        for stage in sorted(gsop_layers):
            info = self.feature_info[stage + 1]  # the stem has two levels
            block = GsopBlock(create_gsop(gsop_type, info["num_chs"], cov_dim, spatial_size, **dd))
            attach_gsop(block, self.get_submodule(info["module"]))
        self.init_global_pool(num_classes, global_pool, isqrt_dim, isqrt_iters, flavor, **dd)


def filter_without_aux(weights: Weights, model: GsopDenseNet | GsopInceptionV3) -> Weights:
    """Fit timm's weights to a network: blocks that they lack start neutral, auxiliary logits are left out.

    Args:
        weights: By the network's names.
        model: The network; its new blocks' weights are changed.

    Returns:
        Weights with which the network computes what theirs did.
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


def _create_gsop_densenet(variant: str, pretrained: bool, **kwargs: Any) -> GsopDenseNet:
    feature_cfg = dict(flatten_sequential=True)  # as timm's DenseNet: its levels are inside a sequence
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
