"""Second-order pooling on any network of timm: covariance heads and GSoP blocks on a backbone with its own weights.

Papers:
* Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006
* Towards Faster Training of Global Covariance Pooling Networks by Iterative Matrix Square Root Normalization,
  CVPR 2018 - https://arxiv.org/abs/1712.01034
"""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models import (
    PretrainedCfg,
    create_model,
    generate_default_cfgs,
    get_model_input_config,
    get_pretrained_cfg,
    is_model,
    list_models,
    load_state_dict,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from timm_gsop.attach import group_with_blocks
from timm_gsop.checks import check_choice
from timm_gsop.insert import evaluation_mode, insert_gsop
from timm_gsop.layers import check_gsop
from timm_gsop.models.build import build_model
from timm_gsop.models.global_pool import GlobalPoolMixin

__all__ = ["SecondOrder", "backbone_notes"]  # register_model adds the entry point

_logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "resnet50"
WEIGHT_SOURCES = ("state_dict", "file", "url", "hf_hub_id", "hf_hub_filename", "source")
DATA_CONFIG = (
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size", "pool_size", "test_pool_size"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std"),
)
"""What a network inherits from the configuration of its backbone."""

# A leaf in torch.fx's graphs: within a trace, shapes are no numbers that it could test.
torch.fx.wrap("tokens_to_map")


class SecondOrder(GlobalPoolMixin, nn.Module):
    """A network of timm as the backbone of second-order global pooling and, on request, of GSoP blocks.

    The backbone is what timm's ``forward_features`` computes, without the layers that only its own head uses. Its
    features may be maps, channels first or last, or tokens, of which the prefix tokens are left out; pooling reads
    them as (B, C, H, W).

    Args:
        backbone: Name of a network of timm, with or without the tag of its weights.
        num_classes: Number of classes; 0 for no classifier.
        in_chans: Channels of the image.
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
            ``{"num_heads": 6}`` with ``"svpn"``.
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

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        num_classes: int = 1000,
        in_chans: int = 3,
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
        probe = create(device="meta")
        _check_stages(gsop_stages, backbone, probe)
        features = _Features.of(backbone, probe)

        self.backbone: Any = create(**(backbone_weights or {}), **dd)
        _remove_unused(self.backbone, features)
        if gsop_stages:
            try:
                insert_gsop(self.backbone, gsop_type, gsop_stages, cov_dim, spatial_size, neutral)
            except ValueError as error:
                raise ValueError(
                    f"gsop_stages={gsop_stages!r} is not accepted with backbone={backbone!r}, where blocks have no "
                    f"place; accepted: (), because its global pooling can be second-order all the same. {error}"
                ) from error
        self.in_chans = in_chans
        self.layout = features.layout
        self.num_prefix_tokens = features.num_prefix_tokens
        self.grid_size = features.grid_size
        self.num_features = features.channels
        infos: Any = getattr(self.backbone, "feature_info", ())
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") for info in infos]
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
        matcher = getattr(self.backbone, "group_matcher", None)
        grouped = group_with_blocks(self.backbone, coarse, matcher)
        names = [name for name, _ in self.backbone.named_parameters()]
        ordered = {f"backbone.{name}": grouped(name) for name in names}
        head = max(ordered.values()) + 1

        def match(name: str) -> int:
            return ordered.get(name, head)

        return match

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the backbone's parameters without weight decay."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        """Let the backbone compute activations again in the backward pass, to save memory."""
        self.backbone.set_grad_checkpointing(enable, **kwargs)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.fc

    def forward_intermediates(
        self, x: torch.Tensor, indices: int | list[int] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """timm's ``forward_intermediates``: the backbone's feature maps, and what :meth:`forward_features` returns."""
        found = self.backbone.forward_intermediates(x, indices, *args, **kwargs)
        if isinstance(found, tuple):
            features, intermediates = found
            return self._to_map(features), intermediates
        return found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's ``prune_intermediate_layers``: remove what comes after the last of some feature levels."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm=prune_norm, prune_head=False)
        features, size = _blank_features(self.backbone)
        if isinstance(features, torch.Tensor):  # a pruned HRNet has several, and no head can read them
            self.num_features = features.shape[1 if self.layout == "NCHW" else -1]
            if self.layout == "tokens":
                self.grid_size = _grid_size(features.shape[1] - self.num_prefix_tokens, size)
        if prune_head:
            self.reset_classifier(0, "")
        return taken

    def _to_map(self, x: torch.Tensor) -> torch.Tensor:
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.layout == "tokens":
            return tokens_to_map(x, self.num_prefix_tokens, self.grid_size[0], self.grid_size[1])
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Feature maps of images (B, in_chans, H, W): (B, num_features, H', W')."""
        return self._to_map(self.backbone.forward_features(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (B, in_chans, H, W): (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def tokens_to_map(x: torch.Tensor, num_prefix_tokens: int, height: int, width: int) -> torch.Tensor:
    """Arrange tokens as a map: (B, N, C) to (B, C, H, W), or to (B, C, M, 1) if M, the number of tokens, is not H·W.

    Args:
        x: Tokens.
        num_prefix_tokens: How many of the first ones do not belong to the image: class and register tokens.
        height: Rows of the map, H.
        width: Columns of the map, W.

    Examples:
        >>> tokens_to_map(torch.randn(2, 1 + 12, 8), 1, 3, 4).shape
        torch.Size([2, 8, 3, 4])
    """
    x = x[:, num_prefix_tokens:].transpose(1, 2)
    # In a trace sizes are tensors, which a condition would record as constants.
    if (torch.jit.is_scripting() or not torch.jit.is_tracing()) and x.shape[2] != height * width:
        return x.unsqueeze(3)
    return x.reshape(x.shape[0], x.shape[1], height, width)


class _Features(NamedTuple):
    """What a network's ``forward_features`` returns, and what it does not need for that.

    Attributes:
        layout: ``"NCHW"``, ``"NHWC"`` or ``"tokens"``.
        channels: Their channels.
        grid_size: Of tokens: rows and columns.
        num_prefix_tokens: Of tokens: how many do not belong to the image.
        not_called: Names of modules that are not called.
        unused: Names of parameters on which they do not depend.
    """

    layout: str
    channels: int
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    not_called: set[str]
    unused: set[str]

    @classmethod
    def of(cls, name: str, model: Any) -> "_Features":
        """Find out by running a model once, on a blank image."""
        called: set[str] = set()
        names = {module: path for path, module in model.named_modules()}
        hooks = [m.register_forward_pre_hook(lambda m, _: called.add(names[m])) for m in names]
        try:
            with torch.enable_grad():
                features, size = _blank_features(model)
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"backbone={name!r} has features of {found}; accepted: networks whose forward_features returns "
                "(B, C, H, W), (B, H, W, C) or tokens (B, N, C)."
            )
        layout, prefix, grid = "NCHW", 0, (1, 1)
        if features.ndim == 3:
            layout = "tokens"
            prefix = _num_prefix_tokens(model, features.shape[1])
            grid = _grid_size(features.shape[1] - prefix, size)
            used = _parameters_behind(features[:, prefix:])
        else:
            layout = "NHWC" if getattr(model, "output_fmt", "NCHW") == "NHWC" else "NCHW"
            used = _parameters_behind(features)
        return cls(
            layout,
            features.shape[1 if layout == "NCHW" else -1],
            grid,
            prefix,
            set(names.values()) - called,
            {path for path, p in model.named_parameters() if p.requires_grad and id(p) not in used},
        )


def _blank_features(model: Any) -> tuple[Any, tuple[int, int]]:
    """What ``forward_features`` returns for a blank image, and the height and width of that."""
    size = get_model_input_config(model)["input_size"]
    image = torch.zeros(1, *size, **get_device_dtype(model))
    with evaluation_mode(model):
        return model.forward_features(image), tuple(size[1:])


def _num_prefix_tokens(model: Any, num_tokens: int) -> int:
    """How many tokens come before those of the image: class and register tokens."""
    if hasattr(model, "num_prefix_tokens"):
        return int(model.num_prefix_tokens)
    num_patches = getattr(getattr(model, "patch_embed", None), "num_patches", num_tokens)
    if num_patches <= num_tokens:
        return int(num_tokens - num_patches)
    return int(getattr(model, "cls_token", None) is not None)


def _grid_size(num_tokens: int, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the image's tokens; one column where they make no grid."""
    height, width = image_size
    patch = round((height * width / num_tokens) ** 0.5)
    grid = (height // patch, width // patch)
    return grid if grid[0] * grid[1] == num_tokens else (num_tokens, 1)


def _parameters_behind(x: torch.Tensor) -> set[int]:
    """Identities of the parameters from which a tensor was computed."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [child for child, _ in node.next_functions]
    return found


def _remove_unused(backbone: nn.Module, features: _Features) -> None:
    """Remove layers that only the backbone's own head calls, whose weights would never have a gradient.

    Parameters that are used, but not for the image's features, are frozen: those of class attention, for one.
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


def _check_stages(stages: Any, name: str, backbone: nn.Module) -> None:
    known = range(len(getattr(backbone, "feature_info", ())))
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
        loading = dict(pretrained=True, pretrained_cfg_overlay=weights or None, cache_dir=cache_dir)
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
    """What the configuration of a network has from that of its backbone."""
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
    ours = {*inspect.signature(SecondOrder).parameters, "features_only", "out_indices", "feature_cls", "output_fmt"}
    for_backbone = {name: value for name, value in kwargs.items() if name not in ours}
    features: Any = create_model(backbone, features_only=True, device="meta", **for_backbone)
    return tuple(features.feature_info.out_indices)
