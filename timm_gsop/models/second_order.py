"""Second-order pooling on any network of timm: covariance heads and GSoP blocks on a backbone with its own weights.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization,
  CVPR 2018 - https://arxiv.org/abs/1712.01034
"""

import difflib
import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import (
    PretrainedCfg,
    create_model,
    generate_default_cfgs,
    get_model_args,
    get_pretrained_cfg,
    group_parameters,
    is_model,
    list_models,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from timm.models.resnetv2 import feature_take_indices
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.insert import insert_gsop
from timm_gsop.layers import NEUTRAL_SCALE, GsopBlock, check_gsop, start_at_half
from timm_gsop.models.backbone_features import BackboneFeatures, feature_map
from timm_gsop.models.global_pool import GlobalPoolMixin
from timm_gsop.models.gsop_network import build_model, reset_parameters
from timm_gsop.pretrained.backbone import backbone_loading, check_backbone_file

__all__ = ["SecondOrder", "backbone_notes"]  # register_model adds the entry point

_logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "resnet50"
WEIGHT_SOURCES = ("state_dict", "file", "url", "hf_hub_id", "hf_hub_filename", "source")
DATA_CONFIG = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "pool_size", "test_pool_size"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std"),
)
"""What a network inherits from the configuration of its backbone."""
HIDDEN = ("kwargs", "backbone_weights", "device", "dtype")
FOR_LOADING = ("pretrained_strict", "pretrained_model_args", "scriptable", "exportable")
"""Arguments of timm's factory."""


class SecondOrder(GlobalPoolMixin, nn.Module):
    """A network of timm as the backbone of second-order global pooling and, on request, of GSoP blocks.

    The backbone is what timm's ``forward_features`` computes, without the layers that only its own head uses. Its
    features may be maps, channels first or last, or tokens, of which the prefix tokens are left out; pooling reads
    them as (B, C, H, W).

    Args:
        backbone: Name of a network of timm, with or without the tag of its weights.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the image.
        level: Index into the backbone's ``feature_info``, as timm's ``out_indices``, of the features that the head
            reads; what comes after them is removed. None for all of the backbone, which may have layers after its last
            level: EfficientNet's last convolution, for one.
        global_pool: One of timm's pools, one of ``SECOND_ORDER_POOLS``, or ``""`` for none.
        gsop_stages: Indices into the backbone's ``feature_info``, as timm's ``out_indices``, of the stages that end
            with a block; ``()`` for none.
        gsop_type: Kind of the blocks, one of ``GSOP_TYPES``.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        neutral: Whether the blocks start as the identity (:func:`insert_gsop`), as pretrained weights need it. It is a
            part of the architecture: each block's output is multiplied by 2/3.
        isqrt_dim: Channels after reduction, in every second-order pool that reduces. Covariance pooling has
            isqrt_dim·(isqrt_dim+1)/2 features, ``"bilinear"`` its square.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"`` pooling.
        compact_bilinear_dim: Features of ``"compact_bilinear"``, which does not reduce the channels.
        pool_kwargs: Options of ``global_pool``'s own, by the names that its layer's constructor has, for one
            ``{"num_heads": 6}`` with ``"svpn"``. ``{"rank": 256}`` gives any second-order pool a projection to so many
            features, which makes the classifier one of low rank.
        isqrt_drop: Dropout after covariance pooling; other pools ignore it.
        drop_rate: Dropout after any pooling. There is one dropout: with covariance pooling, the larger of the two
            rates applies.
        backbone_weights: How ``timm.create_model`` loads the backbone's weights; the registered ``second_order``
            decides it. None for random ones.
        device: Device of the weights.
        dtype: Precision of the weights.
        **kwargs: For the backbone.

    Raises:
        ValueError: If an argument is not among the accepted ones, the backbone has no feature maps or tokens, or
            ``gsop_stages`` asks for blocks where there is no place for them.
        TypeError: If the backbone does not know an argument.

    Examples:
        >>> import timm
        >>> model = timm.create_model(
        ...     "second_order", backbone="resnet18", num_classes=5, gsop_stages=(3, 4), cov_dim=32, isqrt_dim=64
        ... ).eval()
        >>> model(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 5])
        >>> model.head_hidden_size  # 64 · 65 / 2
        2080
    """

    output_fmt = "NCHW"
    # TorchScript compiles only the calls that the features and the pool have.
    __constants__ = ("is_tokens", "keeps_tokens")
    __jit_unused_properties__ = ("set_input_size",)

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        num_classes: int = 1000,
        in_chans: int = 3,
        level: int | None = None,
        global_pool: str = "isqrt",
        gsop_stages: Sequence[int] = (),
        gsop_type: str = "channel",
        cov_dim: int = 128,
        spatial_size: int = 8,
        neutral: bool = True,
        isqrt_dim: int = 256,
        isqrt_iters: int | None = None,
        compact_bilinear_dim: int = 8192,
        pool_kwargs: Mapping[str, Any] | None = None,
        isqrt_drop: float = 0.0,
        drop_rate: float = 0.0,
        backbone_weights: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        _check_backbone(backbone)
        check_gsop(gsop_type, cov_dim, spatial_size, flavor="paper")
        check_choice("neutral", neutral, (True, False))
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        create = partial(create_model, backbone, num_classes=0, in_chans=in_chans, **kwargs)
        with _unknown_argument_named(backbone):
            probe = create(device="meta")
        infos = getattr(probe, "feature_info", ())
        num_levels = len(infos) if level is None else _check_level(level, backbone, infos) + 1
        _check_stages(gsop_stages, backbone, num_levels)
        features = BackboneFeatures.of(backbone, probe) if level is None else _cut(probe, num_levels - 1, backbone)

        self.backbone: Any = create(**(backbone_weights or {}), **dd)
        if gsop_stages:
            try:
                insert_gsop(self.backbone, gsop_type, gsop_stages, cov_dim, spatial_size, neutral)
            except ValueError as error:
                raise ValueError(
                    f"gsop_stages={gsop_stages!r} is not accepted with backbone={backbone!r}, where blocks have no "
                    f"place; accepted: (), because its global pooling can be second-order all the same. {error}"
                ) from error
        if level is not None:
            _cut(self.backbone, num_levels - 1, backbone)
        _remove_unused(self.backbone, features)
        # What is called is the module itself, as tools that wrap modules need it.
        self.backbone.forward = self.backbone.forward_features
        self.in_chans = in_chans
        self.level = level
        self._note_features(features)
        infos = getattr(self.backbone, "feature_info", ())
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") for info in infos[:num_levels]]
        self.init_global_pool(
            num_classes,
            global_pool,
            isqrt_dim,
            isqrt_iters,
            "paper",
            compact_bilinear_dim=compact_bilinear_dim,
            pool_kwargs=pool_kwargs,
            isqrt_drop=isqrt_drop,
            drop_rate=drop_rate,
            **dd,
        )

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Group the parameters by depth, for layer-wise learning rates, as timm groups those of the backbone.

        A block is in the group of its stage, all of the head in the last one. With ``--layer-decay 0.2
        --layer-decay-min-scale 0.2``, timm's train.py gives the head five times the learning rate of the backbone.
        """
        matcher: Any = lambda name: 0  # noqa: E731  # as one, where timm does not group them
        if hasattr(self.backbone, "group_matcher"):
            matcher = self.backbone.group_matcher(coarse=coarse)
        groups: dict[str, int] = group_parameters(self.backbone, matcher, reverse=True)
        ordered = {f"backbone.{name}": group for name, group in groups.items()}
        head = max(ordered.values()) + 1

        def match(name: str) -> int:
            return ordered.get(name, head)

        return match

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: the backbone's, and those of the pooling."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {*(f"backbone.{name}" for name in names), *super().no_weight_decay()}

    @torch.jit.ignore
    def train(self, mode: bool = True) -> "SecondOrder":
        """Set training or evaluation; frozen batch normalization of the backbone keeps its statistics in training."""
        super().train(mode)
        for module in self.backbone.modules():
            is_norm = isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm) and module.affine
            if is_norm and not module.weight.requires_grad:
                module.eval()
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Let the backbone compute activations again in the backward pass, to save memory."""
        self.backbone.set_grad_checkpointing(enable, **kwargs)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    @property
    def set_input_size(self) -> Callable[..., None]:
        """timm's ``set_input_size``, of backbones that have it: change the image's size, and the patches' or windows'.

        It takes the arguments of the backbone's. The change is recorded: saved and loaded, the network has it.
        """
        _ = self.backbone.set_input_size  # AttributeError: then the network has no such ability either
        return self._set_input_size

    def _set_input_size(self, *args: Any, **kwargs: Any) -> None:
        before = get_model_args(self.backbone)
        self.backbone.set_input_size(*args, **kwargs)
        changed = {k: v for k, v in get_model_args(self.backbone).items() if k not in before or v != before[k]}
        # What timm's own networks note about themselves; there is no public function for it.
        self._model_args = {**getattr(self, "_model_args", {}), **changed}
        if "img_size" in changed:
            self._traits = {**getattr(self, "_traits", {}), "img_size": changed["img_size"]}
        self._note_features(BackboneFeatures.of(type(self.backbone).__name__, self.backbone))

    def _note_features(self, features: BackboneFeatures) -> None:
        self.num_features = features.channels
        self.num_prefix_tokens = features.num_prefix_tokens
        self.is_tokens = features.layout == "tokens"
        self.has_class_token = self.num_prefix_tokens > 0 and getattr(self.backbone, "cls_token", None) is not None
        self.as_map = feature_map(features)

    @torch.jit.ignore
    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialize all weights and statistics again, as construction does; neutral blocks are neutral again.

        Args:
            *args: For the backbone's ``init_weights``, if it has that.
            **kwargs: Likewise.
        """
        reset_parameters(self.backbone)
        if hasattr(self.backbone, "init_weights"):
            self.backbone.init_weights(*args, **kwargs)
        reset_parameters(self.backbone, package="timm_gsop.layers.")
        reset_parameters(self.global_pool)
        reset_parameters(self.fc)
        for block in self.backbone.modules():
            if isinstance(block, GsopBlock) and block.scale == NEUTRAL_SCALE:
                start_at_half(block.gsop)

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """timm's ``forward_intermediates``: the backbone's feature maps, and what :meth:`forward_features` returns."""
        found = self.backbone.forward_intermediates(x, self._levels(indices), *args, **kwargs)
        if isinstance(found, tuple):
            features, intermediates = found
            return self._to_features(features, x), intermediates
        if isinstance(found, dict) and "image_features" in found:
            return {**found, "image_features": self._to_map(found["image_features"], x)}
        return found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's ``prune_intermediate_layers``: remove what comes after the last of some feature levels."""
        taken = self.backbone.prune_intermediate_layers(self._levels(indices), prune_norm=prune_norm, prune_head=False)
        try:
            self._note_features(BackboneFeatures.of(type(self.backbone).__name__, self.backbone))
        except ValueError:  # a pruned HRNet has several maps, and no head can read them
            self.as_map = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _levels(self, indices: int | list[int] | None) -> int | list[int] | None:
        """Indices of the backbone's levels; of one that was cut, None and negative ones mean what is left."""
        if self.level is None:
            return indices
        return feature_take_indices(len(self.feature_info), indices)[0]

    def _to_map(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        if self.is_tokens:
            return self.as_map(features, image.shape[2], image.shape[3])
        return self.as_map(features)

    def _to_features(self, features: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return features if self.keeps_tokens else self._to_map(features, image)

    def _pool(self, x: torch.Tensor) -> torch.Tensor:
        if self.keeps_tokens:
            return self.global_pool(self.as_map(x), x[:, 0])
        return self.global_pool(x)

    def _set_global_pool(self, num_classes: int, pool_type: str, **dd: Any) -> None:
        super()._set_global_pool(num_classes, pool_type, **dd)
        self.keeps_tokens = self.has_class_token and getattr(self.global_pool, "takes_token", False)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of images (B, in_chans, H, W): (B, num_features, H', W').

        A pool that takes the class token, as ``"svpn"`` and ``"moment"`` do, is given the backbone's own tokens
        (B, N, num_features) instead, if there is one among them. So a head has all that it needs:
        ``forward_head(forward_features(x))`` is ``forward(x)`` with every pool.
        """
        return self._to_features(self.backbone(x), x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (B, in_chans, H, W): (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _remove_unused(backbone: nn.Module, features: BackboneFeatures) -> None:
    """Remove layers that only the backbone's own head calls, whose weights would never have a gradient.

    Parameters that are used, but not for the image's features, such as those of class attention, are frozen.
    """
    removed: tuple[str, ...] = ()
    for path, module in list(backbone.named_modules()):
        own = {f"{path}.{name}" for name, _ in module.named_parameters()}
        has_parameters = next(module.parameters(recurse=False), None) is not None
        if path in features.not_called and has_parameters and own <= features.unused and not path.startswith(removed):
            backbone.set_submodule(path, nn.Identity())
            removed += (f"{path}.",)
    for name, p in backbone.named_parameters():
        if name in features.unused:
            p.requires_grad_(False)


def _check_backbone(name: Any) -> None:
    architecture, _, tag = name.partition(".") if isinstance(name, str) else ("", "", "")
    if architecture == "second_order":
        raise ValueError(f"backbone={name!r} is not accepted; accepted: any other network, this one cannot be nested.")
    if not architecture or any(sign in name for sign in ":/") or not is_model(architecture):
        close = difflib.get_close_matches(architecture, list_models(), n=3)
        raise ValueError(
            f"backbone={name!r} is not accepted; accepted: a name that timm.list_models() has, with or without the tag "
            f"of its weights{', ' + ' or '.join(map(repr, close)) + ' for one' if close else ''}."
        )
    if tag:
        try:
            get_pretrained_cfg(name)
        except RuntimeError as error:
            tags = [full.partition(".")[2] for full in list_models(f"{architecture}.*", include_tags=True)]
            raise ValueError(
                f"backbone={name!r} has an unknown tag; accepted: {', '.join(map(repr, tags))}."
            ) from error


def _check_level(level: Any, name: str, infos: Sequence[dict[str, Any]]) -> int:
    """The level, counted from 0."""
    known = len(infos)
    if not isinstance(level, int) or isinstance(level, bool) or not -known <= level < known:
        raise ValueError(
            f"level={level!r} is not accepted; accepted for backbone={name!r}: None, or an index of its feature "
            f"levels, of which it has {known}."
        )
    return level % known


def _cut(backbone: Any, level: int, name: str) -> BackboneFeatures:
    """Remove what comes after a feature level, so that ``forward_features`` returns that, and say what it returns."""
    refused = ValueError(
        f"level={level} is not accepted with backbone={name!r}, which cannot be cut there; accepted: None, or another "
        "level."
    )
    if not hasattr(backbone, "prune_intermediate_layers"):
        raise refused
    channels = backbone.feature_info[level]["num_chs"]
    for prune_norm in (False, True):  # a last norm stays where it fits, as in vision transformers
        backbone.prune_intermediate_layers([level], prune_norm=prune_norm, prune_head=True)
        try:
            features = BackboneFeatures.of(name, backbone)
        except (RuntimeError, ValueError):
            continue
        if features.channels == channels:
            return features
    raise refused


def _check_stages(stages: Any, name: str, num_levels: int) -> None:
    known = range(num_levels)
    is_sequence = isinstance(stages, Sequence) and not isinstance(stages, str)
    if not is_sequence or len(set(stages)) < len(stages) or not set(stages) <= set(known):
        raise ValueError(
            f"gsop_stages={stages!r} is not accepted; accepted for backbone={name!r}: a sequence of different indices "
            f"of {list(known)}, () for none."
        )


default_cfgs = generate_default_cfgs(
    {
        "second_order": dict(
            num_classes=1000,
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            first_conv="backbone.conv1",
            classifier="fc",
            paper_name="Global Second-order Pooling Convolutional Networks",
            paper_ids="arXiv:1811.12006",
        )
    }
)


@register_model
def second_order(
    pretrained: bool = False,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """Second-order pooling on any network of timm as the backbone: ``backbone=NAME``.

    ``pretrained=True`` loads the backbone's weights, and the head is new. For a saved network, ``local-dir:`` or
    ``hf-hub:``, it loads everything, and does not download the backbone's own weights. A file that
    ``pretrained_cfg_overlay`` names may hold either.
    """
    backbone = kwargs.get("backbone", DEFAULT_BACKBONE)
    _check_backbone(backbone)
    source = resolve_pretrained_cfg("second_order", pretrained_cfg, pretrained_cfg_overlay)
    build = partial(build_model, variant="second_order", cache_dir=cache_dir)
    if kwargs.get("features_only"):
        build = partial(build, feature_cfg=dict(feature_cls="getter", out_indices=_default_levels(backbone, kwargs)))
    if _is_whole_network(source):
        overlay = pretrained_cfg_overlay
        return build(
            SecondOrder, pretrained=pretrained, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, **kwargs
        )
    weights = {key: getattr(source, key) for key in WEIGHT_SOURCES if getattr(source, key)}
    overlay = {**_inherited(backbone, pretrained), **(pretrained_cfg_overlay or {}), **dict.fromkeys(weights)}
    model_cls: Callable[..., Any] = SecondOrder
    if pretrained:
        check_backbone_file(backbone, partial(create_model, backbone, num_classes=0, **_for_backbone(kwargs)), weights)
        loading = backbone_loading(backbone, weights, cache_dir)
        model_cls = partial(SecondOrder, backbone_weights=loading)
        _logger.info("The weights of the backbone %s are loaded; the head is new.", backbone)
    return build(model_cls, pretrained=False, pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=overlay, **kwargs)


def _is_whole_network(source: PretrainedCfg) -> bool:
    """Whether weights are those of a saved ``second_order``, and not of a backbone."""
    if source.state_dict or (source.file and source.source != "local-dir"):
        names = source.state_dict or load_state_dict(source.file, weights_only=True)
        return any(name.startswith("backbone.") for name in names)
    return bool(source.has_weights)


def _inherited(backbone: str, pretrained: bool) -> dict[str, Any]:
    """Entries of a network's configuration that come from its backbone's."""
    cfg = get_pretrained_cfg(backbone) or PretrainedCfg()
    first_conv = cfg.first_conv
    if first_conv is not None:
        convs = (first_conv,) if isinstance(first_conv, str) else tuple(first_conv)
        first_conv = tuple(f"backbone.{conv}" for conv in convs)
    inherited = {**{key: getattr(cfg, key) for key in DATA_CONFIG}, "first_conv": first_conv}
    if pretrained:
        inherited["notes"] = backbone_notes(backbone)
    return inherited


def backbone_notes(backbone: str) -> tuple[str, ...]:
    """Where a backbone's weights are from, and their licence: notes for a configuration, and for the model card."""
    cfg = get_pretrained_cfg(backbone) or PretrainedCfg()
    name = f"{cfg.architecture or backbone.partition('.')[0]}{f'.{cfg.tag}' if cfg.tag else ''}"
    hub_id = cfg.hf_hub_id and f"https://huggingface.co/{cfg.hf_hub_id.partition('@')[0]}"
    return (
        f"backbone: {name}",
        f"backbone licence: {cfg.license or 'not stated'}",
        f"backbone origin: {hub_id or cfg.url or cfg.origin_url or 'not stated'}",
    )


def _default_levels(backbone: str, kwargs: dict[str, Any]) -> tuple[int, ...]:
    """Feature levels that timm gives of the backbone by default."""
    with _unknown_argument_named(backbone):
        features: Any = create_model(backbone, features_only=True, device="meta", **_for_backbone(kwargs))
    levels = tuple(features.feature_info.out_indices)
    if kwargs.get("level") is None:
        return levels
    last = kwargs["level"] % len(features.feature_info)
    return tuple(level for level in levels if level <= last) or (last,)


def _for_backbone(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the entry point's arguments, those that are the backbone's."""
    ours = {*inspect.signature(SecondOrder).parameters, "features_only", "out_indices", "feature_cls", "output_fmt"}
    return {name: value for name, value in kwargs.items() if name not in {*ours, *FOR_LOADING}}


@contextmanager
def _unknown_argument_named(backbone: str) -> Iterator[None]:
    """Say of an argument that neither we nor the backbone know which one is meant."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        ours = [name for name in inspect.signature(SecondOrder).parameters if name not in HIDDEN]
        close = ["gsop_stages"] if found[1] == "gsop_layers" else difflib.get_close_matches(found[1], ours, n=1)
        raise TypeError(
            f"second_order got an unknown argument, {found[1]!r}{f'; did you mean {close[0]!r}?' if close else '.'} "
            f"Accepted: {', '.join(ours)}, and those of backbone={backbone!r}."
        ) from error
