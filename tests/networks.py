"""Every kind of network of the package, small, for the tests that all of them pass (test_saving.py, test_tracing.py).

Ours, timm's backbones in ``second_order``, and timm's networks with inserted blocks.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_gsop import insert_gsop
from timm_gsop.layers import FLAVORS, GSOP_TYPES

SMALL = dict(num_classes=5, cov_dim=8, isqrt_dim=6)
# Every branch takes part: timm's zero_init_last starts with those of bottlenecks turned off. The official
# concatenation wants 64·2^k channels.
NARROW = dict(SMALL, channels=(16, 32, 64, 128), layers=(1, 1, 1, 1), spatial_size=3, zero_init_last=False)
DENSENET = dict(SMALL, growth_rate=8, block_config=(2, 2, 2, 2))
PRERESNET = dict(SMALL, depth=1)

# One of each family and net of our own, and every kind of block in both flavors.
REGISTERED: dict[str, tuple[str, dict[str, Any]]] = {
    "net1": ("gsop_resnet26_net1", NARROW),
    "net2": ("gsop_resnet26_net2", NARROW),
    "basic blocks": ("gsop_resnet18_net2", NARROW),
    "isqrt": ("isqrt_resnet26", NARROW),
    "mpn": ("mpncov_resnet50", NARROW),
    "resnext": ("gsop_resnext50_32x4d_net2", dict(NARROW, cardinality=2)),
    "preresnet": ("gsop_preresnet20_net2.untrained", dict(PRERESNET, isqrt_drop=0.0)),
    "preresnet net1": ("gsop_preresnet20_net1.untrained", PRERESNET),
    "preresnet plain": ("preresnet20", PRERESNET),
    "densenet": ("gsop_densenet121_net2", DENSENET),
    "densenet net1": ("gsop_densenet121_net1", DENSENET),
    "inception": ("gsop_inception_v3_net2", SMALL),
    **{
        f"{gsop_type} {flavor}": ("gsop_resnet26_net2", dict(NARROW, gsop_type=gsop_type, flavor=flavor))
        for gsop_type in GSOP_TYPES
        for flavor in FLAVORS
    },
}

# Narrow or shallow versions of what users have, where that is possible, and the stages that get blocks.
BACKBONES: dict[str, dict[str, Any]] = {
    "resnet18": dict(channels=(16, 16, 24, 32), gsop_stages=(2, 4)),
    "convnext_atto": dict(depths=(1, 1, 1, 1), gsop_stages=(0, 3)),
    "mobilenetv3_small_050": dict(gsop_stages=(1, 4)),
    "vit_tiny_patch16_224": dict(depth=3),
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "densenet121": dict(growth_rate=8, block_config=(2, 2, 2, 2), gsop_stages=(1, 4)),
    "regnetx_002": dict(gsop_stages=(2, 4)),
    "efficientnet_b0": dict(gsop_stages=(2, 4)),
    "deit_tiny_distilled_patch16_224": dict(depth=3),
    "coatnet_pico_rw_224": dict(gsop_stages=(1, 4)),
    "maxvit_pico_rw_256": dict(gsop_stages=(1, 4)),
    "hrnet_w18_small": dict(gsop_stages=(1, 4)),
    "vgg11_bn": dict(gsop_stages=(3, 5)),
}
# A ResNet, channels last, gates of the backbone's own, tokens, and tokens on a grid.
QUICK_BACKBONES = (
    *("resnet18", "convnext_atto", "mobilenetv3_small_050"),
    *("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"),
)

# A small network of each of 22 families of timm, and where the blocks stand that are inserted.
FAMILIES = {
    "convnext_atto": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "cspresnet50": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "densenet121": ["features.transition1", "features.transition2", "features.transition3", "features.norm5"],
    "dla34": ["level2.root.relu", "level3.tree2.root.relu", "level4.tree2.root.relu", "level5.root.relu"],
    "edgenext_xx_small": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "efficientnet_b0": ["blocks.1", "blocks.2", "blocks.4", "blocks.6"],
    "ese_vovnet19b_dw": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "fastvit_t8": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "ghostnet_050": ["blocks.1", "blocks.3", "blocks.5", "blocks.7"],
    "hgnetv2_b0": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "hrnet_w18_small": ["incre_modules.0", "incre_modules.1", "incre_modules.2", "incre_modules.3"],
    "inception_v3": ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"],
    "mobilenetv3_small_050": ["blocks.0", "blocks.1", "blocks.3", "blocks.5"],
    "mobilevit_xxs": ["stages.1", "stages.2", "stages.3", "final_conv"],
    "poolformer_s12": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "regnetx_002": ["s1.b1", "s2.b1", "s3.b4", "s4.b7"],  # a stage calls each of its children, the last is its output
    "repvgg_a0": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "resnetv2_18": ["stages.0", "stages.1", "stages.2", "stages.3"],
    "rexnet_100": ["features.2", "features.4", "features.10", "features.15"],
    "vgg11_bn": ["features.13", "features.20", "features.27", "features.28"],
    "xception41": ["blocks.1.stack.act3", "blocks.2.stack.act3", "blocks.11.stack.act3", "blocks.12"],
}
# One of each kind of place: a stage, what a stage calls last, a ReLU, a norm, an average of branches.
QUICK_FAMILIES = ("convnext_atto", "densenet121", "dla34", "regnetx_002", "mobilevit_xxs", "xception41")


def _registered(name: str, **kwargs: Any) -> nn.Module:
    model_name, options = REGISTERED[name]
    return timm.create_model(model_name, **{**options, **kwargs})


def second_order(backbone: str, **kwargs: Any) -> nn.Module:
    return timm.create_model("second_order", **{"backbone": backbone, **SMALL, **BACKBONES[backbone], **kwargs})


def inserted(family: str, neutral: bool = False, **kwargs: Any) -> nn.Module:
    return insert_gsop(timm.create_model(family, num_classes=5, **kwargs), cov_dim=4, neutral=neutral)


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{name: partial(_registered, name) for name in REGISTERED},
    **{f"second_order of {name}": partial(second_order, name) for name in BACKBONES},
    **{f"blocks in {name}": partial(inserted, name) for name in FAMILIES},
}
"""Each takes the arguments of ``timm.create_model``."""


def create(name: str, **kwargs: Any) -> nn.Module:
    return NETWORKS[name](**kwargs)


def parametrize(*names: str, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Run a test for these networks; for some, it is a slow one."""
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    """As small as the network takes it, and as many channels."""
    config = timm.models.get_model_input_config(model)
    channels, *size = config["input_size"]
    smallest = 96 if "Inception" in type(model).__name__ else 64
    if not config["fixed_input_size"]:
        size = [min(side, smallest) for side in size]
    return torch.randn(batch, channels, *size)
