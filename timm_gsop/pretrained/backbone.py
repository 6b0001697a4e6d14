"""The weights of a backbone that is timm's own: found as ours are, and seen to be those of the backbone."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import nn

from timm_gsop.pretrained.locate import locate_weights

__all__ = ["backbone_loading", "check_backbone_file"]

MOST_UNLOADED = 0.25
"""Part of a backbone's weights that a file may lack: an attention layer that was added to it, for one."""


def backbone_loading(backbone: str, weights: Mapping[str, Any], cache_dir: str | Path | None = None) -> dict[str, Any]:
    """Say to ``timm.create_model`` where a backbone's weights are, and download them if they are not cached.

    Args:
        backbone: Name of the network, with or without the tag of its weights.
        weights: Entries of a configuration that say where else they are; none for the name's own.
        cache_dir: Where downloads are kept, in place of the Hub's and PyTorch's own folders.

    Returns:
        Arguments of ``timm.create_model``.

    Raises:
        RuntimeError: If they are neither cached nor available, with what to do.
    """
    overlay = dict(weights)
    cfg = get_pretrained_cfg(backbone)
    if not overlay and cfg is not None and not cfg.custom_load:
        path = locate_weights(cfg, cache_dir)
        if path is not None:
            overlay = dict(source="", file=str(path))
    return dict(pretrained=True, pretrained_cfg_overlay=overlay or None, cache_dir=cache_dir)


def check_backbone_file(name: str, create: Callable[..., nn.Module], weights: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` if a file that somebody names leaves most of a backbone as it was initialized.

    timm loads what fits and logs the rest, and its networks have readers of other code's names. So this compares two
    networks of the same seed, one of them with the file.

    Args:
        name: Name of the backbone.
        create: Makes the backbone; takes more arguments of ``timm.create_model``.
        weights: Entries of a configuration that say where the weights are.
    """
    if not (weights.get("file") or weights.get("state_dict")):
        return
    states = []
    for loading in ({}, backbone_loading(name, weights)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            states.append(create(**loading).state_dict())
    fresh, loaded = states
    random = [key for key, value in fresh.items() if value.ndim > 1 and value.count_nonzero()]
    unloaded = [key for key in random if torch.equal(fresh[key], loaded[key])]
    total, missing = (sum(fresh[key].numel() for key in keys) for keys in (random, unloaded))
    if missing > MOST_UNLOADED * total:
        fitting = f"{100 * (total - missing) // total} % of its weights, and not in {unloaded[0]}"
        raise ValueError(
            f"file={weights.get('file') or 'state_dict'!r} fits backbone={name!r} in {fitting}; accepted: weights of "
            f"{name}, or of a second_order with it. Files of other authors: hub/convert.py."
        )
