"""GSoP-Net on DenseNet, which the paper's conclusion names.

The weights have timm's names. The paper does not say where the blocks are. Here each stage ends with one, and keeps its
stride.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Densely Connected Convolutional Networks, CVPR 2017 - https://arxiv.org/abs/1608.06993
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import FeatureListNet, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from torch import nn

from timm_gsop.attach import attach_gsop, keep_names
from timm_gsop.layers import GsopBlock
from timm_gsop.models.gsop_network import GsopMixin, SmallestImageMixin, build_model, check_image_size
from timm_gsop.models.timm_weights import with_timm_weights
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.neutral import NEUTRAL_GAIN, neutral_start

__all__ = ["GsopDenseNet"]  # register_model adds the entry points

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

    def fit_weights(self, weights: Weights) -> Weights:
        """Fit timm's weights: blocks that they lack start neutral."""
        return neutral_start(self, weights)


class _FeatureListNet(FeatureListNet):
    """timm's, with the lasting names of the blocks in it."""

    def __init__(self, model: GsopDenseNet, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        keep_names(self)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "features.conv0",
        "classifier": "classifier",
        "license": "apache-2.0",
        "paper_name": "Global Second-order Pooling Convolutional Networks",
        "paper_ids": "arXiv:1811.12006",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **with_timm_weights("gsop_densenet121_net1", "densenet121.ra_in1k", _cfg(), same_function=True),
        "gsop_densenet121_net1.untrained": _cfg(),
        **with_timm_weights("gsop_densenet121_net2", "densenet121.ra_in1k", _cfg(), new_head=True, same_function=True),
        "gsop_densenet121_net2.untrained": _cfg(),
    }
)


def _create_gsop_densenet(variant: str, pretrained: bool, **kwargs: Any) -> GsopDenseNet:
    # As timm's DenseNet: its levels are inside a sequence.
    feature_cfg = dict(feature_cls=_FeatureListNet, flatten_sequential=True)
    return build_model(GsopDenseNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


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
