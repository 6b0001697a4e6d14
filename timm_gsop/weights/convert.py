"""Conversion of checkpoints to our networks, as folders that timm and the Hugging Face Hub understand."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.layers.checks import check_choice
from timm_gsop.models import GsopResNet
from timm_gsop.models.gsop_resnet import checkpoint_filter_fn
from timm_gsop.pretrained.checkpoint import Weights, load_exactly, read_checkpoint
from timm_gsop.pretrained.released import Released, from_fast_mpn_cov, from_gsop
from timm_gsop.weights.hub_folder import save_hub_folder

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
            blocks start neutral (see :func:`timm_gsop.pretrained.neutral_start`). From timm, it is needed.
        model_kwargs: Arguments of the network, besides what the checkpoint shows.

    Returns:
        The network, in evaluation.

    Raises:
        ValueError: If an argument is not among the accepted ones, or the checkpoint cannot be read, recognised, or
            fitted to the network.
    """
    check_choice("source", source, SOURCES)
    given = model_kwargs or {}
    released, data_config = _read(source, checkpoint, model_name, given)
    model = timm.create_model(model_name or released.model_name, **{**released.model_kwargs, **given}).eval()
    weights = checkpoint_filter_fn(released.weights, model) if isinstance(model, GsopResNet) else released.weights
    load_exactly(model, weights)
    save_hub_folder(model, folder, data_config)
    return model


def _read(
    source: str, checkpoint: str, model_name: str | None, given: dict[str, Any]
) -> tuple[Released, dict[str, Any] | None]:
    if source == "timm":
        if model_name is None:
            raise ValueError("model_name=None with source='timm'; accepted: a GSoP ResNet, gsop_resnet50_net1 for one.")
        weights, data_config = _from_timm(checkpoint, model_name, given)
        kwargs = dict(num_classes=weights["fc.weight"].shape[0]) if "fc.weight" in weights else {}
        return Released(model_name, kwargs, weights), data_config
    weights = read_checkpoint(Path(checkpoint))
    if source == "gsop":
        return from_gsop(weights, given.get("gsop_type")), None
    return from_fast_mpn_cov(weights)._replace(weights=weights), None  # by their names: the filter renames


def _from_timm(checkpoint: str, model_name: str, given: dict[str, Any]) -> tuple[Weights, dict[str, Any] | None]:
    stride = 32
    data_config = None
    if Path(checkpoint).is_file():
        weights = read_checkpoint(Path(checkpoint))
    elif timm.is_model(checkpoint.partition(".")[0]):
        origin = timm.create_model(checkpoint, pretrained=True)
        if not isinstance(origin, ResNet):
            raise ValueError(f"checkpoint={checkpoint!r} is no ResNet; accepted: ResNets of timm.")
        weights, data_config = origin.state_dict(), resolve_data_config(model=origin)
        stride = origin.feature_info[-1]["reduction"]
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
    return weights, data_config
