"""What all our networks share: the arguments of blocks and head, and how a network is built, with its weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg
from torch import nn

from timm_gsop.checks import check_choice, check_stages
from timm_gsop.layers import check_gsop, create_gsop
from timm_gsop.models.global_pool import GlobalPoolMixin
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.fitting import check_isqrt_dim, check_options, check_same_network, fit_head
from timm_gsop.pretrained.locate import locate_weights

__all__ = ["GsopMixin", "SmallestImageMixin", "build_model", "check_image_size", "reset_parameters"]


class GsopMixin(GlobalPoolMixin):
    """Adds GSoP blocks and global second-order pooling to a network of timm, its next base class.

    A subclass says in :meth:`add_blocks` where the blocks of a stage go. The weights of the base network keep their
    names.

    Args:
        num_classes: Number of classes; 0 for no classifier.
        global_pool: One of timm's pools, one of ``SECOND_ORDER_POOLS``, or ``""`` for none.
        gsop_type: Kind of the blocks, one of ``GSOP_TYPES``.
        gsop_layers: Stages that have blocks, counted from 1; ``()`` for none, None for all.
        cov_dim: Channels after reduction in a block, the size of its channel covariance.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        isqrt_dim: Channels after reduction, in every second-order pool that reduces. Covariance pooling has
            isqrt_dim·(isqrt_dim+1)/2 features, ``"bilinear"`` its square.
        isqrt_iters: Newton–Schulz iterations in ``"isqrt"`` pooling; None for the flavor's own, 5 in the paper, 3 in
            the released code.
        compact_bilinear_dim: Features of ``"compact_bilinear"``, which does not reduce the channels.
        pool_kwargs: Options of ``global_pool``'s own, by the names that its layer's constructor has, for one
            ``{"num_heads": 6}`` with ``"svpn"``. ``{"rank": 256}`` gives any second-order pool a projection to so many
            features, which makes the classifier one of low rank.
        isqrt_drop: Dropout after covariance pooling; other pools ignore it.
        drop_rate: Dropout after any pooling. There is one dropout: with covariance pooling, the larger of the two
            rates applies.
        flavor: ``"paper"``, or, for ResNets, ``"official"`` for what the paper's authors released
            (``timm_gsop.layers.official``).
        device: Device of the weights.
        dtype: Precision of the weights.
        **kwargs: For the base network.

    Raises:
        ValueError: If an argument is not among the accepted ones.
        TypeError: If the base network does not know an argument.
    """

    num_stages = 4
    flavors: tuple[str, ...] = ("paper",)  # the released code has only ResNets
    _built = False

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        global_pool: str = "avg",
        gsop_type: str = "channel",
        gsop_layers: Sequence[int] | None = None,
        cov_dim: int = 128,
        spatial_size: int = 8,
        isqrt_dim: int = 256,
        isqrt_iters: int | None = None,
        compact_bilinear_dim: int = 8192,
        pool_kwargs: Mapping[str, Any] | None = None,
        isqrt_drop: float = 0.0,
        drop_rate: float = 0.0,
        flavor: str = "paper",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        gsop_layers = range(1, self.num_stages + 1) if gsop_layers is None else gsop_layers
        check_choice("flavor", flavor, self.flavors)
        check_stages("gsop_layers", gsop_layers, self.num_stages)
        check_gsop(gsop_type, cov_dim, spatial_size, flavor)
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(num_classes=0, global_pool="", drop_rate=drop_rate, **dd, **kwargs)  # type: ignore[call-arg]
        self.flavor = flavor
        self.gsop_type = gsop_type
        side = None if gsop_type == "channel" else spatial_size
        create = partial(create_gsop, gsop_type, cov_dim=cov_dim, spatial_size=side, flavor=flavor, **dd)
        for stage in sorted(gsop_layers):
            self.add_blocks(stage, create)
        self.init_global_pool(
            num_classes,
            global_pool,
            isqrt_dim,
            isqrt_iters,
            flavor,
            compact_bilinear_dim=compact_bilinear_dim,
            pool_kwargs=pool_kwargs,
            isqrt_drop=isqrt_drop,
            drop_rate=drop_rate,
            **dd,
        )
        self._built = True

    def add_blocks(self, stage: int, create: Callable[..., nn.Module]) -> None:
        """Put the GSoP blocks of a stage where they belong.

        Args:
            stage: The stage, counted from 1.
            create: Makes a GSoP layer for so many channels, its first argument.
        """
        raise NotImplementedError

    @torch.jit.ignore
    def init_weights(self, *args: Any, **kwargs: Any) -> None:
        """Initialize all weights and statistics again, as construction does.

        Args:
            *args: For :meth:`init_base`.
            **kwargs: For :meth:`init_base`.
        """
        if self._built:  # else timm's constructor calls it, before there are blocks and a head
            reset_parameters(self)
        self.init_base(*args, **kwargs)
        if self._built:
            reset_parameters(self.get_classifier())
        reset_parameters(self, package="timm_gsop.layers.")

    def init_base(self) -> None:
        """Initialize what the base network has, as its constructor does."""
        raise NotImplementedError

    def fit_weights(self, weights: Weights) -> Weights:
        """Fit weights of the base network, or that others released, to this one. Here they are left as they are.

        Args:
            weights: By the network's names, or by those of the code that made them.

        Returns:
            Weights with which the network computes what the original did. New blocks in it may get other weights.

        Raises:
            ValueError: If there are none.
        """
        return weights


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


def reset_parameters(module: Any, package: str = "") -> None:
    """Give layers the weights and statistics that their own constructors give.

    Args:
        module: The network or layer that holds them.
        package: Where the classes of the layers come from; others are left as they are.
    """
    for layer in reversed(list(module.modules())):  # children first, so that a layer can override them
        reset: Any = getattr(layer, "reset_parameters", None)
        if reset is not None and type(layer).__module__.startswith(package):
            reset()


OF_THE_WEIGHTS = ("description", "license", "notes", "origin_url")
"""Entries of a configuration that are about the weights, and wrong of what is trained from them."""
LABELS = ("label_names", "label_descriptions")


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """timm's ``build_model_with_cfg``, with weights that :func:`locate_weights` finds and :func:`fit_head` fits.

    The configuration of a created network leaves out the licence, origin and figures of its weights, because timm's
    saver would claim them for every network that is trained from it. ``timm.get_pretrained_cfg(name)`` has them. Label
    names stay as long as they are true.

    Args:
        model_cls: Class of the network.
        variant: Its registered name.
        pretrained: Whether to load weights.
        pretrained_cfg: Configuration of the weights, or its tag; None for the name's default.
        pretrained_cfg_overlay: Entries that replace the configuration's.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.
        **kwargs: For timm's function and the network.

    Returns:
        The network, or what timm's ``features_only`` makes of it.

    Raises:
        RuntimeError: If there are no weights for it, or they cannot be had.
        ValueError: If the weights are of another network, or of one with other blocks or another size of the head than
            its arguments say.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    source = dict(pretrained_cfg_overlay or {})
    if pretrained:
        path = locate_weights(cfg, cache_dir)
        if path is not None:
            source.update(source="", file=str(path))

    def fit(weights: Weights, model: Any) -> Weights:
        if isinstance(model, GsopMixin):
            weights = model.fit_weights(weights)
        if kwargs.get("pretrained_strict", True):
            check_options(weights, model)
            check_same_network(weights, model, variant)
            check_isqrt_dim(weights, model, "isqrt_dim" in kwargs)
        return fit_head(weights, model, say=not kwargs.get("features_only"))

    model = build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=source,
        pretrained_filter_fn=fit,
        cache_dir=cache_dir,
        **kwargs,
    )
    if cfg.source not in ("hf-hub", "local-dir"):  # where a model's own configuration is
        has_labels = pretrained and getattr(model, "num_classes", None) == cfg.num_classes
        tag = ("tag",) if cfg.tag == "untrained" else ()  # which would be said of what is trained
        surplus = {*OF_THE_WEIGHTS, *tag, *(() if has_labels else LABELS)} - set(pretrained_cfg_overlay or ())
        own = {key: value for key, value in model.pretrained_cfg.items() if key not in surplus}
        model.pretrained_cfg = model.default_cfg = own
    return model
