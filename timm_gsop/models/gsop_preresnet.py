"""GSoP-Net on the pre-activation ResNets for small images, as in the paper's experiments on CIFAR-100 (section 4.3).

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Identity Mappings in Deep Residual Networks, ECCV 2016 - https://arxiv.org/abs/1603.05027
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import BatchNormAct2d, calculate_drop_path_rates, create_attn, create_conv2d
from timm.models import generate_default_cfgs, register_model
from timm.models.resnetv2 import PreActBottleneck, ResNetStage, feature_take_indices
from torch import nn

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.layers import GsopBlock
from timm_gsop.models.gsop_network import GsopMixin, build_model, reset_parameters
from timm_gsop.pretrained.locate import shipped

__all__ = ["GsopPreActResNet"]  # register_model adds the entry points

CIFAR100_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR100_STD = (0.2675, 0.2565, 0.2761)
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.247, 0.2435, 0.2616)
CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_MNIST_LABELS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class AttentionBottleneck(PreActBottleneck):
    """timm's pre-activation bottleneck with an attention layer at the end of its residual branch.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        attn_layer: One of timm's attention layers, ``"se"`` for one.
        device: Device of the weights.
        dtype: Precision of the weights.
        **kwargs: All other arguments of timm's ``PreActBottleneck``.

    Raises:
        ValueError: If timm does not know the attention layer.
    """

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        attn_layer: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_chs, out_chs, device=device, dtype=dtype, **kwargs)
        try:
            self.attn = create_attn(attn_layer, out_chs, device=device, dtype=dtype)
        except AssertionError as error:
            raise ValueError(f"attn_layer={attn_layer!r} is not accepted; accepted: timm's, 'se' for one.") from error
        self.register_load_state_dict_pre_hook(_rename_attention)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_chs, H, W) to (B, out_chs, H / stride, W / stride)."""
        x_preact = self.norm1(x)
        shortcut = x if self.downsample is None else self.downsample(x_preact)
        residual = self.conv3(self.norm3(self.conv2(self.norm2(self.conv1(x_preact)))))
        return shortcut + self.drop_path(self.attn(residual))


def _rename_attention(_: nn.Module, weights: dict[str, torch.Tensor], prefix: str, *__: Any) -> None:
    """Read weights of before 0.2, when the layer was part of ``drop_path``."""
    old = f"{prefix}drop_path.attn."
    for name in [name for name in weights if name.startswith(old)]:
        weights[f"{prefix}attn.{name.removeprefix(old)}"] = weights.pop(name)


class PreActResNet(nn.Module):
    """Pre-activation ResNet for small images: a 3×3 stem that keeps their size, and three stages of bottlenecks.

    It is timm's ``ResNetV2`` with another stem, other widths and no pooling after the stem, which that has no arguments
    for. Global pooling and classifier come from :class:`GsopMixin`.

    Args:
        depth: Bottlenecks in each of the three stages; the network has 9·depth + 2 layers.
        num_classes: Number of classes.
        global_pool: As in timm.
        in_chans: Channels of the image.
        last_stride: Stride of the last stage, 1 or 2.
        attn_layer: One of timm's attention layers, at the end of every bottleneck's residual branch; None for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth.
        zero_init_last: Start every bottleneck as the identity.
        device: Device of the weights.
        dtype: Precision of the weights.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    stem: nn.Sequential
    stages: nn.Sequential

    def __init__(
        self,
        depth: int,
        num_classes: int = 0,
        global_pool: str = "",
        in_chans: int = 3,
        last_stride: int = 2,
        attn_layer: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        zero_init_last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive_int("depth", depth)
        check_choice("last_stride", last_stride, (1, 2))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self._zero_init_last = zero_init_last
        channels, reduction = 16, 1
        self.stem = nn.Sequential(OrderedDict(conv=create_conv2d(in_chans, channels, 3, **dd)))
        self.feature_info = [dict(num_chs=channels, reduction=reduction, module="stem.conv")]
        bottleneck: Any = PreActBottleneck
        if attn_layer is not None:
            bottleneck = partial(AttentionBottleneck, attn_layer=attn_layer)
        drop_path_rates = calculate_drop_path_rates(drop_path_rate, [depth] * 3, stagewise=True)
        self.stages = nn.Sequential()
        for width, stride, rates in zip((64, 128, 256), (1, 2, last_stride), drop_path_rates, strict=True):
            stage = ResNetStage(
                channels,
                width,
                stride,
                dilation=1,
                depth=depth,
                block_dpr=rates,
                block_fn=bottleneck,
                act_layer=nn.ReLU,
                norm_layer=BatchNormAct2d,
                conv_layer=create_conv2d,
                **dd,
            )
            name = str(len(self.stages))
            self.stages.add_module(name, stage)
            channels, reduction = width, reduction * stride
            self.feature_info.append(dict(num_chs=channels, reduction=reduction, module=f"stages.{name}"))
        self.num_features = channels
        self.norm = BatchNormAct2d(channels, **dd)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialize convolutions as timm's ``ResNetV2`` does, and attention layers as they do themselves."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PreActBottleneck) and zero_init_last:
                module.zero_init_last()
            if isinstance(module, AttentionBottleneck):
                reset_parameters(module.attn)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: stages are computed again in the backward pass."""
        for stage in self.stages:
            stage.grad_checkpointing = enable  # type: ignore[assignment]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to features (B, C, H', W')."""
        return self.norm(self.stages(self.stem(x)))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """timm's ``forward_intermediates``, for four feature levels: the stem and three stages."""
        check_choice("output_fmt", output_fmt, ("NCHW",))
        taken, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem(x)
        maps = [x]
        for stage in self.stages[:last] if stop_early else self.stages:
            x = stage(x)
            maps.append(x)
        is_whole = len(maps) > len(self.stages)
        normalized = self.norm(x) if is_whole else x
        if norm:
            maps[-1] = normalized
        intermediates = [maps[i] for i in taken]
        return intermediates if intermediates_only else (normalized, intermediates)


class GsopPreActResNet(GsopMixin, PreActResNet):
    """Pre-activation ResNet with three stages of bottlenecks, GSoP blocks among them (paper section 4.3).

    The bottlenecks are timm's. A block after bottleneck ``i`` of a stage is called ``gsop{i}``, so that the backbone's
    weights have the same names with and without blocks.

    Args:
        depth: Bottlenecks in each of the three stages; the network has 9·depth + 2 layers.
        num_classes: Number of classes; 0 for no classifier.
        gsop_interval: A block follows every so many bottlenecks of a stage, counted from its end. The last bottleneck
            of a stage always has one.
        gsop_last: Whether a block follows the network's last bottleneck. In Net2, iSQRT-COV pooling takes its place.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        isqrt_dim: Channels after reduction in covariance pooling.
        isqrt_drop: Dropout after covariance pooling, one half as in the paper; other pools ignore it.
        zero_init_last: Start every bottleneck as the identity.
        **kwargs: The arguments of blocks and head (:class:`GsopMixin`); ``in_chans``, ``last_stride`` (2 in the vanilla
            networks, 1 in those with second-order pooling), ``drop_path_rate``, and ``attn_layer``, one of timm's
            attention layers, ``"se"`` for one, at the end of every bottleneck's residual branch: the networks that the
            paper compares with.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    num_stages = 3

    def __init__(
        self,
        depth: int,
        num_classes: int = 100,
        gsop_interval: int = 3,
        gsop_last: bool = True,
        cov_dim: int = 64,
        isqrt_dim: int = 128,
        isqrt_drop: float = 0.5,
        **kwargs: Any,
    ) -> None:
        check_positive_int("gsop_interval", gsop_interval)
        self.gsop_interval = gsop_interval
        self.gsop_last = gsop_last
        super().__init__(
            depth=depth,
            num_classes=num_classes,
            cov_dim=cov_dim,
            isqrt_dim=isqrt_dim,
            isqrt_drop=isqrt_drop,
            **kwargs,
        )

    def add_blocks(self, stage: int, create: Callable[..., nn.Module]) -> None:
        """Put blocks between the bottlenecks of a stage, which keep their names."""
        bottlenecks: Any = self.stages[stage - 1].blocks
        depth, channels = len(bottlenecks), self.feature_info[stage]["num_chs"]
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for i, bottleneck in enumerate(bottlenecks):
            modules[str(i)] = bottleneck
            is_last = stage == 3 and i == depth - 1
            if (depth - 1 - i) % self.gsop_interval == 0 and (self.gsop_last or not is_last):
                modules[f"gsop{i}"] = GsopBlock(create(channels))
        self.stages[stage - 1].blocks = nn.Sequential(modules)

    def init_base(self, zero_init_last: bool | None = None) -> None:
        """Initialize the backbone; ``zero_init_last`` is by default as at construction."""
        PreActResNet.init_weights(self, self._zero_init_last if zero_init_last is None else zero_init_last)

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

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's ``prune_intermediate_layers``, for four feature levels: the stem and three stages."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        is_cut = last < len(self.stages)
        if prune_norm or is_cut:
            self.norm = nn.Identity()
        self.stages = self.stages[:last]
        if is_cut:
            self.num_features = self.feature_info[last]["num_chs"]
        if prune_head or is_cut:
            self.reset_classifier(0, "")
        return taken

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


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


def _cifar10(name: str, top1: str, recipe: str, **kwargs: Any) -> dict[str, Any]:
    """Weights that ship, of small photos, 32×32 pixels."""
    return _cfg(
        file=shipped(name),
        num_classes=10,
        mean=CIFAR10_MEAN,
        std=CIFAR10_STD,
        label_names=CIFAR10_LABELS,
        description="Trained on CIFAR-10 by us, for 20 epochs on a GPU: an example that works offline.",
        notes=(
            "data: CIFAR-10",
            f"recipe: timm's train.py -c train_configs/cifar10/{recipe}.yaml --seed 0 --epochs 20 "
            "--decay-milestones 12 17 --color-jitter-prob 0 --device cuda; docs/results.md has all runs",
            f"measured: top-1 {top1} % on the 10 000 test images (validate.py --dataset torch/cifar10 "
            f"--model {name} --pretrained)",
        ),
        **kwargs,
    )


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
            f"--model {name} --pretrained --input-size 1 28 28 --mean 0.286 --std 0.353)",
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
        "gsop_preresnet20_net1.cifar10": _cifar10(
            "gsop_preresnet20_net1.cifar10", "89.43", "gsop_preresnet20_net1", **_GSOP
        ),
        "gsop_preresnet20_net1.fashion_mnist": _fashion_mnist("gsop_preresnet20_net1.fashion_mnist", "92.58", **_GSOP),
        "gsop_preresnet20_net1.untrained": _cfg(**_GSOP),
        "gsop_preresnet20_net2.cifar10": _cifar10(
            "gsop_preresnet20_net2.cifar10", "90.13", "gsop_preresnet20_net2_nodrop", **_GSOP
        ),
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
_NET2: dict[str, Any] = dict(gsop_layers=(1, 2, 3), gsop_last=False, global_pool="isqrt", last_stride=1)
_ISQRT_COV: dict[str, Any] = dict(gsop_layers=(), global_pool="isqrt", last_stride=1)


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
