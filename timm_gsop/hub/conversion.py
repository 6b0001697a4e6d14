"""Conversion of checkpoints to our networks, as folders that timm and the Hugging Face Hub understand."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.hub.hub_folder import check_new_folder, is_ours, read_labels, save_hub_folder
from timm_gsop.hub.source_checkpoint import NO_NAME, RELEASED, SourceCheckpoint, find_checkpoint
from timm_gsop.models.gsop_network import GsopMixin
from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["SOURCES", "convert"]

SOURCES = (*RELEASED, "timm")
REDUCTION = "global_pool.reduction.conv.weight"

_logger = logging.getLogger(__name__)


def convert(
    source: str,
    checkpoint: str,
    folder: Path,
    model_name: str | None = None,
    model_kwargs: dict[str, Any] | None = None,
    data_config: dict[str, Any] | None = None,
    label_names: Path | None = None,
) -> nn.Module:
    """Convert a checkpoint into a folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads.

    Args:
        source: What made the checkpoint: ``"gsop"``, the code that the GSoP authors released; ``"fast-mpn-cov"`` and
            ``"gcp"``, code of iSQRT-COV's authors; ``"dropcov"`` and ``"moment-probing"``, code of these heads'
            authors; ``"timm"``, timm's train.py or its saver, with one of our networks or one of its own.
        checkpoint: A file; from timm, also a folder that timm's ``save_for_hf`` wrote, or the name of a model with
            pretrained weights. If train.py's ``args.yaml`` is beside the file, it says which network the file holds and
            the preprocessing that it was trained with.
        folder: Where to write; it must not exist, or be empty. Nothing is left there if anything fails.
        model_name: The network to make, where it is not the one in the checkpoint. Blocks that the checkpoint lacks
            start neutral (see :func:`timm_gsop.hub.neutral_start`).
        model_kwargs: Arguments of the network, besides what the checkpoint shows.
        data_config: Preprocessing, where it is not the checkpoint's: ``input_size``, ``mean``, ``std``,
            ``interpolation``, ``crop_pct``.
        label_names: Names of the classes: a folder of images with a folder a class, or a text file with a name a line.
            None for those in the data folder that train.py's ``args.yaml`` names, if it is here.

    Returns:
        The network, in evaluation.

    Raises:
        ValueError: If an argument is not among the accepted ones, or the checkpoint cannot be read, recognised, or
            fitted to the network.
    """
    check_choice("source", source, SOURCES)
    check_new_folder(folder)
    given = model_kwargs or {}
    if (
        source == "timm"
        and model_name is None
        and timm.is_model(checkpoint.partition(".")[0])
        and not Path(checkpoint).exists()
    ):
        return _save_pretrained(checkpoint, folder, given, data_config, label_names)
    found = find_checkpoint(source, checkpoint, model_name, given)
    name = found.name_for(model_name)
    kwargs = {**found.arguments_for(name), **given}
    _say_if_the_stride_differs(found, name, kwargs)
    # Not the name's default weights, whose origin and licence would be said of these.
    model = timm.create_model(_without_weights(name), **kwargs).eval()
    _say_what_is_assumed(found, kwargs, model)
    _check_head(model, found.weights, checkpoint, name)
    weights = model.fit_weights(found.weights) if isinstance(model, GsopMixin) else found.weights
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"checkpoint={checkpoint!r} does not fit {name}. {error}") from error
    labels = found.labels if label_names is None else read_labels(label_names, model.num_classes)
    save_hub_folder(model, folder, found.preprocessing(model, data_config or {}), found.provenance_in(name), labels)
    return model


def _say_what_is_assumed(found: SourceCheckpoint, kwargs: dict[str, Any], model: Any) -> None:
    taken = {key: value if kwargs.get(key) is None else kwargs[key] for key, value in (found.assumed or {}).items()}
    if model.global_pool.pool_type != "isqrt":
        taken.pop("isqrt_iters", None)
    if taken:
        _logger.warning(
            "The file does not say %s. Taken: %s. --model-kwargs says otherwise.",
            " or ".join(taken),
            ", ".join(f"{key}={value}" for key, value in taken.items()),
        )


def _without_weights(name: str) -> str:
    """A network's name with the tag of no weights, if it has tags."""
    untrained = f"{name.partition('.')[0]}.untrained"
    return untrained if untrained in get_arch_pretrained_cfgs(name) else name


def _save_pretrained(
    name: str,
    folder: Path,
    given: dict[str, Any],
    data_config: dict[str, Any] | None,
    label_names: Path | None,
) -> nn.Module:
    """Save one of our networks with its pretrained weights."""
    cfg = get_pretrained_cfg(name) if is_ours(name) else None
    if cfg is None or not cfg.has_weights:
        raise ValueError(NO_NAME.format(checkpoint=name))
    model = timm.create_model(name, pretrained=True, **given).eval()
    labels = dict(label_names=cfg.label_names) if cfg.label_names and model.num_classes == cfg.num_classes else None
    if label_names is not None:
        labels = read_labels(label_names, model.num_classes)
    save_hub_folder(model, folder, data_config, cfg, labels)
    return model


def _check_head(model: Any, weights: Weights, checkpoint: str, name: str) -> None:
    has_reduction = REDUCTION in weights or "layer_reduce.weight" in weights
    if REDUCTION in model.state_dict() and not has_reduction:
        twin = name.replace("_net2", "_net1")
        fits = f"model_name={twin!r}" if twin != name and timm.is_model(twin) else "a network without it"
        raise ValueError(
            f"checkpoint={checkpoint!r} has no covariance pooling ({REDUCTION} is missing), which {name} ends with; "
            f"accepted: {fits}, or global_pool='avg' among the model's arguments. To start with an untrained one, "
            f"train {name} with timm's --pretrained."
        )


def _say_if_the_stride_differs(found: SourceCheckpoint, name: str, kwargs: dict[str, Any]) -> None:
    if found.same_arguments:
        return
    with torch.device("meta"):
        target = timm.create_model(_without_weights(name), **kwargs)
    if isinstance(target, ResNet) and found.reduction_in(target) != target.feature_info[-1]["reduction"]:
        _logger.warning(
            "The function changes: %s has a last stage of another stride than the checkpoint's network, for which its "
            "weights were not trained. last_stride=2 keeps the function; output_stride=16 gives the function "
            "of timm's network at output_stride=16.",
            name,
        )
