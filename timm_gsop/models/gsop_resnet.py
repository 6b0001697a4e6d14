"""GSoP-Net on ResNet and ResNeXt: Net1, Net2, and their relatives with covariance pooling at the end only.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization,
  CVPR 2018 - https://arxiv.org/abs/1712.01034
* Is Second-order Information Helpful for Large-scale Visual Recognition?, ICCV 2017 - https://arxiv.org/abs/1703.08050
* Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017 - https://arxiv.org/abs/1611.05431
"""

from collections.abc import Callable, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import BlurPool2d
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.layers import FLAVORS, GsopBlock
from timm_gsop.models.gsop_network import GsopMixin, build_model
from timm_gsop.models.timm_weights import with_timm_weights
from timm_gsop.pretrained.checkpoint import Weights, with_our_names
from timm_gsop.pretrained.digests import published_id
from timm_gsop.pretrained.neutral import neutral_start

__all__ = ["GsopResNet"]  # register_model adds the entry points


class GsopResNet(GsopMixin, ResNet):
    """timm's ResNet with GSoP blocks after its stages, and first- or second-order global pooling (paper Table 3).

    A block is appended to its stage, so that the backbone's weights have the names that they have in timm's ResNet. In
    the official flavor it is inside the last residual block instead, as ``se``.

    Args:
        block: Residual block, timm's ``Bottleneck`` or ``BasicBlock``.
        layers: Number of residual blocks in each of the four stages.
        num_classes: Number of classes; 0 for no classifier.
        output_stride: As in timm: 16 or 8 dilates the last stages. At 32, ``last_stride`` decides.
        last_stride: Stride of the last stage, undilated: 1, as in the paper, or 2, as in other ResNets. None for 1,
            and for no choice where ``output_stride`` is 16 or 8.
        flavor: ``"paper"``, or ``"official"`` for what the paper's authors released (``timm_gsop.layers.official``).
        zero_init_last: Start every residual block as the identity; None for True in the paper flavor, False in the
            official one.
        **kwargs: The arguments of blocks and head (:class:`GsopMixin`), and all others of timm's ``ResNet``.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """

    flavors = FLAVORS

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        num_classes: int = 1000,
        output_stride: int = 32,
        last_stride: int | None = None,
        flavor: str = "paper",
        zero_init_last: bool | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice("output_stride", output_stride, (8, 16, 32))
        check_choice("last_stride", last_stride, (None, 1, 2))
        if last_stride is not None and output_stride != 32:
            raise ValueError(
                f"last_stride={last_stride!r} is not accepted with output_stride={output_stride!r}, which sets the "
                "stride of the last stage itself; accepted: last_stride=None, or output_stride=32."
            )
        # The released code starts no residual branch at zero; by position it could not leave zero, behind a ReLU.
        self._zero_init_last = flavor == "paper" if zero_init_last is None else zero_init_last
        super().__init__(
            block=block,
            layers=layers,
            num_classes=num_classes,
            output_stride=output_stride,
            flavor=flavor,
            zero_init_last=self._zero_init_last,
            **kwargs,
        )
        if output_stride == 32 and last_stride != 2:
            _remove_stride(self.layer4[0])
            self.feature_info[4]["reduction"] = self.feature_info[3]["reduction"]

    def add_blocks(self, stage: int, create: Callable[..., nn.Module]) -> None:
        """Append a block to a stage, or, in the official flavor, put it where timm's last block has its attention."""
        layer = self.get_submodule(f"layer{stage}")
        stride = 2 if stage == 1 and self.flavor == "official" and self.gsop_type != "position" else 1
        gsop = create(self.feature_info[stage]["num_chs"], stride=stride)
        if self.flavor == "paper":
            layer.append(GsopBlock(gsop))
        else:
            layer[-1].se = gsop

    def init_base(self, zero_init_last: bool | None = None) -> None:
        """Initialize timm's ResNet; ``zero_init_last`` is by default as at construction."""
        ResNet.init_weights(self, self._zero_init_last if zero_init_last is None else zero_init_last)

    def fit_weights(self, weights: Weights) -> Weights:
        """Fit weights: those of fast MPN-COV, GCP and DropCov get our names, and blocks that they lack start neutral.

        Where this network's pooling differs from theirs, a warning says so.

        Raises:
            ValueError: If a new block cannot start neutral (see :func:`neutral_start`), or if only one of weights and
                network is DropCov's.
        """
        return neutral_start(self, with_our_names(weights, self.global_pool))


def _remove_stride(block: nn.Module) -> None:
    """Make a residual block of timm keep the size of its input, undilated: all strides and pools in it go.

    More positions make a better estimate of the covariance (paper section 4.1).

    Args:
        block: First block of a stage, of timm's ``ResNet``; changed in place.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, (nn.AvgPool2d, BlurPool2d)):  # in the shortcut (avg_down), and for anti-aliasing
            block.set_submodule(name, nn.Identity())
    if hasattr(block, "stride"):
        block.stride = 1  # type: ignore[assignment]


def _create_gsop_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    return build_model(GsopResNet, variant, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (14, 14),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


_GSOP = dict(paper_name="Global Second-order Pooling Convolutional Networks", paper_ids="arXiv:1811.12006")
_ISQRT = dict(
    paper_name="Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root "
    "Normalization",
    paper_ids="arXiv:1712.01034",
)
_MPN = dict(
    paper_name="Is Second-order Information Helpful for Large-scale Visual Recognition?", paper_ids="arXiv:1703.08050"
)

_RESNEXT = dict(interpolation="bicubic")

# What the authors of iSQRT-COV published: depth, and the head of the file's SHA-256; top-1 and top-5 error.
_ISQRT_FILES = {50: "mpncovresnet50-15991845.pth", 101: "mpncovresnet101-ade9737a.pth"}
_ISQRT_ERRORS = {50: "21.71 / 6.13", 101: "20.99 / 5.56"}


def _isqrt_in1k(name: str, **kwargs: Any) -> dict[str, Any]:
    """Weights of iSQRT-COV; in a GSoP-Net2 the blocks start neutral."""
    depth = 101 if "101" in name else 50
    neutral = name.startswith("gsop")
    return _cfg(
        hf_hub_id=published_id(name),
        url=f"http://jtxie.com/models/{_ISQRT_FILES[depth]}",
        origin_url="https://github.com/jiangtaoxie/fast-MPN-COV",
        description=f"iSQRT-COV, ResNet-{depth}, trained on ImageNet-1k by its authors"
        + ("; three GSoP blocks in it that are untrained and leave its function as it is." if neutral else "."),
        notes=(
            "data: ImageNet-1k",
            *(("untrained: neutral blocks",) if neutral else ()),
            f"reported: top-1 / top-5 error {_ISQRT_ERRORS[depth]} %, by the authors of iSQRT-COV for their network "
            "(https://github.com/jiangtaoxie/fast-MPN-COV); not measured by us",
        ),
        **{**kwargs, "license": "mit"},
    )


default_cfgs = generate_default_cfgs(
    {
        **with_timm_weights("gsop_resnet18_net1", "resnet18.a1_in1k", _cfg(**_GSOP)),
        "gsop_resnet18_net1.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet18_net2", "resnet18.a1_in1k", _cfg(**_GSOP), new_head=True),
        "gsop_resnet18_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet26_net1", "resnet26.bt_in1k", _cfg(**_GSOP)),
        "gsop_resnet26_net1.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet26_net2", "resnet26.bt_in1k", _cfg(**_GSOP), new_head=True),
        "gsop_resnet26_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet34_net1", "resnet34.a1_in1k", _cfg(**_GSOP)),
        "gsop_resnet34_net1.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet34_net2", "resnet34.a1_in1k", _cfg(**_GSOP), new_head=True),
        "gsop_resnet34_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet50_net1", "resnet50.a1_in1k", _cfg(**_GSOP)),
        "gsop_resnet50_net1.untrained": _cfg(**_GSOP),
        "gsop_resnet50_net2.isqrt_in1k": _isqrt_in1k("gsop_resnet50_net2.isqrt_in1k", **_GSOP),
        "gsop_resnet50_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet101_net1", "resnet101.a1h_in1k", _cfg(**_GSOP)),
        "gsop_resnet101_net1.untrained": _cfg(**_GSOP),
        "gsop_resnet101_net2.isqrt_in1k": _isqrt_in1k("gsop_resnet101_net2.isqrt_in1k", **_GSOP),
        "gsop_resnet101_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet152_net1", "resnet152.a1h_in1k", _cfg(**_GSOP)),
        "gsop_resnet152_net1.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnet152_net2", "resnet152.a1h_in1k", _cfg(**_GSOP), new_head=True),
        "gsop_resnet152_net2.untrained": _cfg(**_GSOP),
        **with_timm_weights("gsop_resnext50_32x4d_net1", "resnext50_32x4d.a1h_in1k", _cfg(**_GSOP, **_RESNEXT)),
        "gsop_resnext50_32x4d_net1.untrained": _cfg(**_GSOP, **_RESNEXT),
        **with_timm_weights(
            "gsop_resnext50_32x4d_net2", "resnext50_32x4d.a1h_in1k", _cfg(**_GSOP, **_RESNEXT), new_head=True
        ),
        "gsop_resnext50_32x4d_net2.untrained": _cfg(**_GSOP, **_RESNEXT),
        **with_timm_weights("isqrt_resnet18", "resnet18.a1_in1k", _cfg(**_ISQRT), new_head=True),
        "isqrt_resnet18.untrained": _cfg(**_ISQRT),
        **with_timm_weights("isqrt_resnet26", "resnet26.bt_in1k", _cfg(**_ISQRT), new_head=True),
        "isqrt_resnet26.untrained": _cfg(**_ISQRT),
        **with_timm_weights("isqrt_resnet34", "resnet34.a1_in1k", _cfg(**_ISQRT), new_head=True),
        "isqrt_resnet34.untrained": _cfg(**_ISQRT),
        "isqrt_resnet50.in1k": _isqrt_in1k("isqrt_resnet50.in1k", **_ISQRT),
        "isqrt_resnet50.untrained": _cfg(**_ISQRT),
        "isqrt_resnet101.in1k": _isqrt_in1k("isqrt_resnet101.in1k", **_ISQRT),
        "isqrt_resnet101.untrained": _cfg(**_ISQRT),
        **with_timm_weights("mpncov_resnet50", "resnet50.a1_in1k", _cfg(**_MPN), new_head=True),
        "mpncov_resnet50.untrained": _cfg(**_MPN),
    }
)

_RESNET18: dict[str, Any] = dict(block=BasicBlock, layers=(2, 2, 2, 2))
_RESNET26: dict[str, Any] = dict(block=Bottleneck, layers=(2, 2, 2, 2))
_RESNET34: dict[str, Any] = dict(block=BasicBlock, layers=(3, 4, 6, 3))
_RESNET50: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3))
_RESNET101: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 23, 3))
_RESNET152: dict[str, Any] = dict(block=Bottleneck, layers=(3, 8, 36, 3))
_RESNEXT50: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)

# How the paper's two networks, and those with covariance pooling at the end only, differ (paper sections 3 and 4.1).
_NET1: dict[str, Any] = dict(gsop_layers=(1, 2, 3, 4), global_pool="avg")
_NET2: dict[str, Any] = dict(gsop_layers=(1, 2, 3), global_pool="isqrt")
_ISQRT_COV: dict[str, Any] = dict(gsop_layers=(), global_pool="isqrt")
_MPN_COV: dict[str, Any] = dict(gsop_layers=(), global_pool="mpn")


@register_model
def gsop_resnet18_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-18: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET18, **_NET1)
    return _create_gsop_resnet("gsop_resnet18_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet18_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-18: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET18, **_NET2)
    return _create_gsop_resnet("gsop_resnet18_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet26_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-26: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET26, **_NET1)
    return _create_gsop_resnet("gsop_resnet26_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet26_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-26: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET26, **_NET2)
    return _create_gsop_resnet("gsop_resnet26_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet34_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-34: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET34, **_NET1)
    return _create_gsop_resnet("gsop_resnet34_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet34_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-34: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET34, **_NET2)
    return _create_gsop_resnet("gsop_resnet34_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet50_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-50: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET50, **_NET1)
    return _create_gsop_resnet("gsop_resnet50_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet50_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-50: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET50, **_NET2)
    return _create_gsop_resnet("gsop_resnet50_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet101_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-101: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET101, **_NET1)
    return _create_gsop_resnet("gsop_resnet101_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet101_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-101: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET101, **_NET2)
    return _create_gsop_resnet("gsop_resnet101_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet152_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNet-152: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNET152, **_NET1)
    return _create_gsop_resnet("gsop_resnet152_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnet152_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNet-152: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNET152, **_NET2)
    return _create_gsop_resnet("gsop_resnet152_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnext50_32x4d_net1(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net1 on ResNeXt-50 32x4d: GSoP blocks after all stages, average pooling."""
    model_args = dict(_RESNEXT50, **_NET1)
    return _create_gsop_resnet("gsop_resnext50_32x4d_net1", pretrained, **dict(model_args, **kwargs))


@register_model
def gsop_resnext50_32x4d_net2(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """GSoP-Net2 on ResNeXt-50 32x4d: GSoP blocks after the first three stages, iSQRT-COV pooling."""
    model_args = dict(_RESNEXT50, **_NET2)
    return _create_gsop_resnet("gsop_resnext50_32x4d_net2", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_resnet18(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """iSQRT-COV on ResNet-18: covariance pooling with the Newton–Schulz square root, no GSoP blocks."""
    model_args = dict(_RESNET18, **_ISQRT_COV)
    return _create_gsop_resnet("isqrt_resnet18", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_resnet26(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """iSQRT-COV on ResNet-26: covariance pooling with the Newton–Schulz square root, no GSoP blocks."""
    model_args = dict(_RESNET26, **_ISQRT_COV)
    return _create_gsop_resnet("isqrt_resnet26", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_resnet34(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """iSQRT-COV on ResNet-34: covariance pooling with the Newton–Schulz square root, no GSoP blocks."""
    model_args = dict(_RESNET34, **_ISQRT_COV)
    return _create_gsop_resnet("isqrt_resnet34", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_resnet50(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """iSQRT-COV on ResNet-50: covariance pooling with the Newton–Schulz square root, no GSoP blocks."""
    model_args = dict(_RESNET50, **_ISQRT_COV)
    return _create_gsop_resnet("isqrt_resnet50", pretrained, **dict(model_args, **kwargs))


@register_model
def isqrt_resnet101(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """iSQRT-COV on ResNet-101: covariance pooling with the Newton–Schulz square root, no GSoP blocks."""
    model_args = dict(_RESNET101, **_ISQRT_COV)
    return _create_gsop_resnet("isqrt_resnet101", pretrained, **dict(model_args, **kwargs))


@register_model
def mpncov_resnet50(pretrained: bool = False, **kwargs: Any) -> GsopResNet:
    """MPN-COV on ResNet-50: covariance pooling with the square root by eigen-decomposition, no GSoP blocks."""
    model_args = dict(_RESNET50, **_MPN_COV)
    return _create_gsop_resnet("mpncov_resnet50", pretrained, **dict(model_args, **kwargs))
