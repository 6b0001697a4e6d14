"""GSoP-Net on Inception-v3, which the paper's conclusion names.

The weights have timm's names. The paper does not say where the blocks are. Here each stage ends with one, and keeps its
stride.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Rethinking the Inception Architecture for Computer Vision, CVPR 2016 - https://arxiv.org/abs/1512.00567
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from timm.models.inception_v3 import InceptionV3
from torch import nn

from timm_gsop.attach import attach_gsop
from timm_gsop.checks import check_choice
from timm_gsop.layers import GsopBlock
from timm_gsop.models.gsop_network import GsopMixin, SmallestImageMixin, build_model, check_image_size
from timm_gsop.models.timm_weights import with_timm_weights
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.neutral import neutral_start

__all__ = ["GsopInceptionV3"]  # register_model adds the entry points

torch.fx.wrap("check_image_size")  # a leaf in torch.fx's graphs: within a trace, shapes are no numbers


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

    def fit_weights(self, weights: Weights) -> Weights:
        """Fit timm's weights: blocks that they lack start neutral, auxiliary logits are left out."""
        return neutral_start(
            self, {name: value for name, value in weights.items() if not name.startswith("AuxLogits.")}
        )


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 299, 299),
        "pool_size": (8, 8),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_INCEPTION_MEAN,
        "std": IMAGENET_INCEPTION_STD,
        "first_conv": "Conv2d_1a_3x3.conv",
        "classifier": "fc",
        "license": "apache-2.0",
        "paper_name": "Global Second-order Pooling Convolutional Networks",
        "paper_ids": "arXiv:1811.12006",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **with_timm_weights("gsop_inception_v3_net1", "inception_v3.tv_in1k", _cfg(), same_function=True),
        "gsop_inception_v3_net1.untrained": _cfg(),
        **with_timm_weights(
            "gsop_inception_v3_net2", "inception_v3.tv_in1k", _cfg(), new_head=True, same_function=True
        ),
        "gsop_inception_v3_net2.untrained": _cfg(),
    }
)


def _create_gsop_inception_v3(variant: str, pretrained: bool, **kwargs: Any) -> GsopInceptionV3:
    return build_model(GsopInceptionV3, variant, pretrained, **kwargs)


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
