"""Conversion of checkpoints to our networks, as folders that timm and the Hugging Face Hub understand."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg, get_pretrained_cfg
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.hub.hub_folder import check_new_folder, is_ours, save_hub_folder
from timm_gsop.models import GsopResNet
from timm_gsop.models.gsop_resnet import checkpoint_filter_fn, default_cfgs
from timm_gsop.pretrained.checkpoint import load_exactly, read_checkpoint
from timm_gsop.pretrained.locate import is_origin
from timm_gsop.pretrained.released import Released, from_fast_mpn_cov, from_gsop

__all__ = ["SOURCES", "convert"]

SOURCES = ("gsop", "fast-mpn-cov", "timm")

_logger = logging.getLogger(__name__)


def convert(
    source: str,
    checkpoint: str,
    folder: Path,
    model_name: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
) -> nn.Module:
    """Convert a checkpoint into a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Args:
        source: What made the checkpoint: ``"gsop"``, the code that the GSoP authors released; ``"fast-mpn-cov"``, that
            of iSQRT-COV; ``"timm"``, a ResNet of timm.
        checkpoint: A file; from timm, also the name of a model with pretrained weights.
        folder: Where to write; it must not exist, or be empty. Nothing is left there if anything fails.
        model_name: The network to make, where it is not the one in the checkpoint: a GSoP ResNet, whose additional
            blocks start neutral (see :func:`timm_gsop.hub.neutral_start`). From timm, only one of our own networks
            is saved without it, with its pretrained weights.
        model_kwargs: Arguments of the network, besides what the checkpoint shows.

    Returns:
        The network, in evaluation.

    Raises:
        ValueError: If an argument is not among the accepted ones, or the checkpoint cannot be read, recognised, or
            fitted to the network.
    """
    check_choice("source", source, SOURCES)
    check_new_folder(folder)
    given = model_kwargs or {}
    if source == "timm" and model_name is None:
        return _save_ours(checkpoint, folder, given)
    if source == "timm":
        released, about = _from_timm(checkpoint, str(model_name), given)
    else:
        released, about = _from_file(source, Path(checkpoint), model_name, given)
    # Not the name's default weights, whose origin and licence would be said of these.
    name = f"{model_name or released.model_name}.untrained"
    model = timm.create_model(name, **{**released.model_kwargs, **given}).eval()
    weights = checkpoint_filter_fn(released.weights, model) if isinstance(model, GsopResNet) else released.weights
    load_exactly(model, weights)
    save_hub_folder(model, folder, **about)
    return model


def _save_ours(name: str, folder: Path, given: dict[str, Any]) -> nn.Module:
    """Save one of our networks with its pretrained weights."""
    cfg = get_pretrained_cfg(name) if is_ours(name) else None
    if cfg is None or not cfg.has_weights:
        raise ValueError(
            f"model_name=None with source='timm', checkpoint={name!r}; accepted: a GSoP ResNet, gsop_resnet50_net1 for "
            "one, or as checkpoint one of our networks that has pretrained weights."
        )
    model = timm.create_model(name, pretrained=True, **given).eval()
    save_hub_folder(model, folder, provenance=cfg)
    return model


def _from_file(
    source: str, path: Path, model_name: str | None, given: dict[str, Any]
) -> tuple[Released, dict[str, Any]]:
    weights = read_checkpoint(path)
    if source == "gsop":
        return from_gsop(weights, given.get("gsop_type")), {}
    released = from_fast_mpn_cov(weights)._replace(weights=weights)  # by their names: the filter renames
    name = model_name or released.model_name
    cfgs = default_cfgs[name].cfgs.values() if name in default_cfgs and not given else ()
    known = (cfg for cfg in cfgs if is_origin(path, cfg.url))
    return released, dict(provenance=next(known, None))


def _from_timm(checkpoint: str, model_name: str, given: dict[str, Any]) -> tuple[Released, dict[str, Any]]:
    stride = 32
    about: dict[str, Any] = {}
    if Path(checkpoint).is_file():
        weights = read_checkpoint(Path(checkpoint))
    elif timm.is_model(checkpoint.partition(".")[0]):
        origin = timm.create_model(checkpoint, pretrained=True)
        if not isinstance(origin, ResNet):
            raise ValueError(f"checkpoint={checkpoint!r} is no ResNet; accepted: ResNets of timm.")
        weights = origin.state_dict()
        stride = origin.feature_info[-1]["reduction"]
        about = dict(data_config=resolve_data_config(model=origin), provenance=_built_upon(origin, model_name))
    else:
        raise ValueError(f"checkpoint={checkpoint!r} is neither a file nor a model of timm.")
    with torch.device("meta"):
        target = timm.create_model(model_name, **given)
    if target.feature_info[-1]["reduction"] != stride:
        _logger.warning(
            "The function changes: %s has a last stage of another stride than the checkpoint's network, for which its "
            "weights were not trained. last_stride=2 keeps the function; with output_stride=16 it is that of timm's "
            "own network at output_stride=16.",
            model_name,
        )
    kwargs = dict(num_classes=weights["fc.weight"].shape[0]) if "fc.weight" in weights else {}
    return Released(model_name, kwargs, weights), about


def _built_upon(origin: ResNet, model_name: str) -> PretrainedCfg:
    cfg = origin.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg['tag']}"
    return PretrainedCfg(
        architecture=model_name,
        tag=cfg["tag"],
        description=f"timm's {name}, with GSoP blocks that are untrained.",
        license=cfg.get("license"),
        origin_url=f"https://huggingface.co/timm/{name}",
    )
