"""GSoP-Net on the pre-activation ResNets for small images, as in the paper's experiments on CIFAR-100 (section 4.3).

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Identity Mappings in Deep Residual Networks, ECCV 2016 - https://arxiv.org/abs/1603.05027
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, create_attn, create_conv2d
from timm.models import generate_default_cfgs, register_model
from timm.models.resnetv2 import ResNetV2
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int, check_stages
from timm_gsop.layers import GsopBlock, check_gsop, create_gsop
from timm_gsop.models.build import build_model
from timm_gsop.models.global_pool import GlobalPoolMixin, init_our_weights
from timm_gsop.models.last_stride import remove_stride
from timm_gsop.pretrained.locate import shipped

__all__ = ["GsopPreActResNet"]  # register_model adds the entry points

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)
FASHION_MNIST_LABELS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class GsopPreActResNet(GlobalPoolMixin, ResNetV2):
    """Pre-activation ResNet with three stages of bottlenecks, GSoP blocks among them (paper section 4.3).

    The bottlenecks are timm's. A block after bottleneck ``i`` of a stage is called ``gsop{i}``, so that the backbone's
    weights have the same names with and without blocks.

    Args:
        depth: Bottlenecks in each of the three stages; the network has 9·depth + 2 layers.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the image.
        global_pool: One of timm's pools, ``"isqrt"`` (iSQRT-COV), ``"mpn"`` (MPN-COV), or ``""`` for none.
        last_stride: Stride of the last stage: 2 in the vanilla networks, 1 in those with second-order pooling.
        gsop_type: Kind of the blocks, one of ``GSOP_TYPES``.
        gsop_layers: Stages 1 to 3 that have blocks; ``()`` for none.
        gsop_interval: A block follows every so many bottlenecks of a stage, counted from its end, where one stands
            always.
        gsop_last: Whether a block follows the network's last bottleneck; in Net2 iSQRT-COV pooling stands there.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        isqrt_dim: Channels after reduction in covariance pooling.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"`` pooling.
        flavor: ``"paper"``; there is no other.
        attn_layer: One of timm's attention layers, ``"se"`` for one, at the end of every bottleneck's residual branch:
            the networks that the paper compares with. None for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        zero_init_last: Start every bottleneck as the identity.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        last_stride: int = 2,
        gsop_type: str = "channel",
        gsop_layers: Sequence[int] = (1, 2, 3),
        gsop_interval: int = 3,
        gsop_last: bool = True,
        cov_dim: int = 64,
        spatial_size: int = 8,
        isqrt_dim: int = 128,
        isqrt_iters: int = 5,
        flavor: str = "paper",
        attn_layer: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("depth", depth)
        check_choice("last_stride", last_stride, (1, 2))
        check_choice("flavor", flavor, ("paper",))  # the released code has no networks for small images
        check_stages("gsop_layers", gsop_layers, num_stages=3)
        check_positive_int("gsop_interval", gsop_interval)
        check_gsop(gsop_type, cov_dim, spatial_size, flavor)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(
            layers=[depth] * 3,
            channels=(64, 128, 256),
            num_classes=0,
            in_chans=in_chans,
            global_pool="",
            stem_chs=16,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            drop_rate=drop_rate,
            drop_path_rate=drop_path_rate,
            zero_init_last=zero_init_last,
            **dd,
        )
        del self.head  # ours is pooling and classifier, as in ResNet
        if attn_layer is not None:
            self._add_attention(attn_layer, **dd)
        self._replace_stem(**dd)
        if last_stride == 1:
            remove_stride(self.stages[2].blocks[0])
        for info, reduction in zip(self.feature_info, (1, 1, 2, 2 * last_stride), strict=True):
            info["reduction"] = reduction
        for stage in sorted(gsop_layers):
            positions = [i for i in range(depth) if (depth - 1 - i) % gsop_interval == 0]
            if stage == 3 and not gsop_last:
                positions.pop()
            channels = self.feature_info[stage]["num_chs"]
            blocks = {i: GsopBlock(create_gsop(gsop_type, channels, cov_dim, spatial_size, **dd)) for i in positions}
            self.stages[stage - 1].blocks = _interleave(self.stages[stage - 1].blocks, blocks)
        self.init_global_pool(num_classes, global_pool, isqrt_dim, isqrt_iters, flavor, **dd)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialize the weights: timm's layers as timm does, ours as they do themselves."""
        super().init_weights(zero_init_last=zero_init_last)
        init_our_weights(self)

    def _replace_stem(self, **dd: Any) -> None:
        """Put a 3×3 convolution, which keeps the small image's size, in place of ResNet's 7×7 one and pooling."""
        conv = create_conv2d(self.in_chans, self.feature_info[0]["num_chs"], kernel_size=3, **dd)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNetV2
        self.stem = nn.Sequential(OrderedDict(conv=conv))

    def _add_attention(self, attn_layer: str, **dd: Any) -> None:
        for stage, info in zip(self.stages, self.feature_info[1:], strict=True):
            for bottleneck in stage.blocks:
                try:
                    attention = create_attn(attn_layer, info["num_chs"], **dd)
                except AssertionError as error:
                    raise ValueError(
                        f"attn_layer={attn_layer!r} is not accepted; accepted: timm's, 'se' for one."
                    ) from error
                # What a bottleneck does last, before it adds its shortcut, it calls drop_path.
                bottleneck.drop_path = nn.Sequential(OrderedDict(attn=attention, drop_path=bottleneck.drop_path))

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group the parameters by depth, for layer-wise learning rates; a GSoP block is a group."""
        if coarse:
            return dict(stem=r"^stem", blocks=r"^stages\.(\d+)")
        return dict(
            stem=r"^stem",
            blocks=[
                (r"^stages\.(\d+)\.blocks\.(\d+)", None),
                (r"^stages\.(\d+)\.blocks\.gsop(\d+)", (1,)),
                (r"^norm", (99999,)),
            ],
        )

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """timm's ``forward_intermediates``, for four feature levels: the stem and three stages."""
        return super().forward_intermediates(x, self._level_indices(indices), *args, **kwargs)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, *args: Any, **kwargs: Any) -> list[int]:
        """timm's ``prune_intermediate_layers``, for four feature levels: the stem and three stages."""
        return super().prune_intermediate_layers(self._level_indices(indices), *args, **kwargs)

    def _level_indices(self, indices: int | Sequence[int] | None) -> list[int]:
        """Feature levels that timm's convention means: the last n for an int, all for None, negative from the end."""
        levels = range(len(self.feature_info))
        if indices is None:
            return list(levels)
        return list(levels[-indices:]) if isinstance(indices, int) else [levels[i] for i in indices]

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Pool features (B, C, H, W) and classify them: (B, num_classes), or what the classifier would read."""
        x = self.global_pool(x)
        x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)


def _interleave(bottlenecks: nn.Sequential, blocks: Mapping[int, nn.Module]) -> nn.Sequential:
    """Put ``blocks[i]`` after bottleneck ``i``, as ``gsop{i}``; the bottlenecks keep their names."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for i, bottleneck in enumerate(bottlenecks):
        modules[str(i)] = bottleneck
        if i in blocks:
            modules[f"gsop{i}"] = blocks[i]
    return nn.Sequential(modules)


def _create_gsop_preresnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_model(GsopPreActResNet, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (16, 16),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": CIFAR100_MEAN,
        "std": CIFAR100_STD,
        "first_conv": "stem.conv",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


def _fashion_mnist(name: str, top1: str, **kwargs: Any) -> dict[str, Any]:
    """Weights that ship. They are of grey images; as timm's convention has it, they take three equal channels."""
    model = name.partition(".")[0]
    return _cfg(
        file=shipped(name),
        num_classes=10,
        input_size=(3, 28, 28),
        mean=(0.286,) * 3,
        std=(0.353,) * 3,
        label_names=FASHION_MNIST_LABELS,
        description="Trained on Fashion-MNIST by us, for six epochs on two CPU cores: an example that works offline.",
        notes=(
            "data: Fashion-MNIST",
            f"recipe: timm's train.py -c train_configs/fashion_mnist/{model}.yaml; docs/results.md has all runs",
            f"measured: top-1 {top1} % on the 10 000 test images (validate.py --dataset torch/fashion_mnist "
            f"--model {model} --pretrained --input-size 1 28 28 --mean 0.286 --std 0.353)",
        ),
        **{**kwargs, "pool_size": (14, 14)},
    )


_GSOP = dict(paper_name="Global Second-order Pooling Convolutional Networks", paper_ids="arXiv:1811.12006")
_VANILLA = dict(
    pool_size=(8, 8), paper_name="Identity Mappings in Deep Residual Networks", paper_ids="arXiv:1603.05027"
)

default_cfgs = generate_default_cfgs(
    {
        "preresnet20.untrained": _cfg(**_VANILLA),
        "preresnet56.untrained": _cfg(**_VANILLA),
        "preresnet164.untrained": _cfg(**_VANILLA),
        "gsop_preresnet20_net1.fashion_mnist": _fashion_mnist("gsop_preresnet20_net1.fashion_mnist", "92.58", **_GSOP),
        "gsop_preresnet20_net1.untrained": _cfg(**_GSOP),
        "gsop_preresnet20_net2.fashion_mnist": _fashion_mnist("gsop_preresnet20_net2.fashion_mnist", "92.17", **_GSOP),
        "gsop_preresnet20_net2.untrained": _cfg(**_GSOP),
        "gsop_preresnet56_net1.untrained": _cfg(**_GSOP),
        "gsop_preresnet56_net2.untrained": _cfg(**_GSOP),
        "gsop_preresnet164_net1.untrained": _cfg(**_GSOP),
        "gsop_preresnet164_net2.untrained": _cfg(**_GSOP),
        "isqrt_preresnet164.untrained": _cfg(**_GSOP),
    }
)

_PRERESNET20: dict[str, Any] = dict(depth=2)
_PRERESNET56: dict[str, Any] = dict(depth=6)
_PRERESNET164: dict[str, Any] = dict(depth=18)

_NO_GSOP: dict[str, Any] = dict(gsop_layers=(), global_pool="avg", last_stride=2)
_NET1: dict[str, Any] = dict(gsop_layers=(1, 2, 3), global_pool="avg", last_stride=1)
_NET2: dict[str, Any] = dict(gsop_layers=(1, 2, 3), gsop_last=False, global_pool="isqrt", last_stride=1, drop_rate=0.5)
_ISQRT_COV: dict[str, Any] = dict(gsop_layers=(), global_pool="isqrt", last_stride=1, drop_rate=0.5)


@register_model
def preresnet20(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """Pre-activation ResNet-20, without second-order pooling: the baseline."""
    model_args = dict(_PRERESNET20, **_NO_GSOP)
    return _create_gsop_preresnet("preresnet20", pretrained, **dict(model_args, **kwargs))


@register_model
def preresnet56(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """Pre-activation ResNet-56, without second-order pooling: the baseline."""
    model_args = dict(_PRERESNET56, **_NO_GSOP)
    return _create_gsop_preresnet("preresnet56", pretrained, **dict(model_args, **kwargs))


@register_model
def preresnet164(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """Pre-activation ResNet-164, without second-order pooling: the baseline."""
    model_args = dict(_PRERESNET164, **_NO_GSOP)
    return _create_gsop_preresnet("preresnet164", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet20_net1(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net1 on pre-activation ResNet-20: GSoP blocks, average pooling."""
    model_args = dict(_PRERESNET20, **_NET1)
    return _create_gsop_preresnet("gsop_preresnet20_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet20_net2(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net2 on pre-activation ResNet-20: GSoP blocks, iSQRT-COV pooling with dropout."""
    model_args = dict(_PRERESNET20, **_NET2)
    return _create_gsop_preresnet("gsop_preresnet20_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet56_net1(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net1 on pre-activation ResNet-56: GSoP blocks, average pooling."""
    model_args = dict(_PRERESNET56, **_NET1)
    return _create_gsop_preresnet("gsop_preresnet56_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet56_net2(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net2 on pre-activation ResNet-56: GSoP blocks, iSQRT-COV pooling with dropout."""
    model_args = dict(_PRERESNET56, **_NET2)
    return _create_gsop_preresnet("gsop_preresnet56_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet164_net1(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net1 on pre-activation ResNet-164: GSoP blocks, average pooling."""
    model_args = dict(_PRERESNET164, **_NET1)
    return _create_gsop_preresnet("gsop_preresnet164_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_preresnet164_net2(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """GSoP-Net2 on pre-activation ResNet-164: GSoP blocks, iSQRT-COV pooling with dropout."""
    model_args = dict(_PRERESNET164, **_NET2)
    return _create_gsop_preresnet("gsop_preresnet164_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_preresnet164(pretrained: bool = False, **kwargs: Any) -> GsopPreActResNet:
    """iSQRT-COV on pre-activation ResNet-164: no GSoP blocks, iSQRT-COV pooling with dropout."""
    model_args = dict(_PRERESNET164, **_ISQRT_COV)
    return _create_gsop_preresnet("isqrt_preresnet164", pretrained, **dict(model_args, **kwargs))
