"""Building a network with timm's factory, with pretrained weights from where they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg

from timm_gsop.models.gsop_mixin import GsopMixin
from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.fitting import check_isqrt_dim, check_options, check_same_network, fit_head
from timm_gsop.pretrained.locate import locate_weights

__all__ = ["build_model"]

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
