"""Building a network with timm's factory, with pretrained weights from where they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, build_model_with_cfg, resolve_pretrained_cfg

from timm_gsop.pretrained.locate import locate_weights

__all__ = ["build_model"]


def build_model(
    model_cls: Callable[..., Any],
    variant: str,
    pretrained: bool,
    pretrained_cfg: PretrainedCfg | dict[str, Any] | str | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | Path | None = None,
    **kwargs: Any,
) -> Any:
    """timm's ``build_model_with_cfg``, with weights that :func:`locate_weights` finds.

    Args:
        model_cls: Class of the network.
        variant: Its registered name.
        pretrained: Whether to load weights.
        pretrained_cfg: Configuration of the weights, or its tag; None for the name's default.
        pretrained_cfg_overlay: Entries in place of those of the configuration.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.
        **kwargs: For timm's function and the network.

    Returns:
        The network, or what timm's ``features_only`` makes of it.

    Raises:
        RuntimeError: If there are no weights for it, or they cannot be had.
    """
    source = dict(pretrained_cfg_overlay or {})
    if pretrained:
        path = locate_weights(resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay), cache_dir)
        if path is not None:
            source.update(source="", file=str(path))
    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=source,
        cache_dir=cache_dir,
        **kwargs,
    )
