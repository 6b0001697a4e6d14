"""Conversion of checkpoints to our networks, as folders that timm and the Hugging Face Hub understand."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import ResNet
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.hub.base import Base, find_base
from timm_gsop.hub.hub_folder import NO_LICENSE, check_new_folder, is_ours, save_hub_folder
from timm_gsop.hub.labels import read_labels
from timm_gsop.models import GsopResNet
from timm_gsop.models.gsop_resnet import checkpoint_filter_fn, default_cfgs
from timm_gsop.models.gsop_zoo import filter_without_aux
from timm_gsop.pretrained.checkpoint import Weights, load_exactly, read_checkpoint
from timm_gsop.pretrained.locate import is_origin
from timm_gsop.pretrained.moment_probing import from_moment_probing
from timm_gsop.pretrained.released import from_covariance_pooling, from_gsop, has_released_names, plain_names

__all__ = ["SOURCES", "convert"]


class _Code(NamedTuple):
    """Code that others released, which made a checkpoint."""

    description: str
    repository: str
    license: str | None = None


RELEASED = {
    "gsop": _Code(
        "the code that the authors of GSoP-Net released",
        "https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks",
    ),
    "fast-mpn-cov": _Code("fast MPN-COV (iSQRT-COV)", "https://github.com/jiangtaoxie/fast-MPN-COV"),
    "gcp": _Code("GCP_Optimization (iSQRT-COV)", "https://github.com/ZhangLi-CS/GCP_Optimization", NO_LICENSE),
    "dropcov": _Code(
        "DropCov (covariance pooling without a square root)", "https://github.com/mingzeG/DropCov", NO_LICENSE
    ),
    "moment-probing": _Code("moment probing", "https://github.com/mingzeG/Moment-Probing", NO_LICENSE),
}
SOURCES = (*RELEASED, "timm")
_NO_NAME = (
    "model_name=None with source='timm', checkpoint={checkpoint!r}; accepted: one of our networks, gsop_resnet50_net1 "
    "for one; or as checkpoint one of our networks that has pretrained weights, a folder of one, or a file of "
    "train.py's with its args.yaml beside it."
)
REDUCTION = "global_pool.reduction.conv.weight"
IMAGENET: dict[str, Any] = dict(
    input_size=(3, 224, 224),
    interpolation="bilinear",
    crop_pct=0.875,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
"""How all the released code bases prepare ImageNet's images."""

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
    base = find_base(checkpoint) if source == "timm" else _released_base(source, Path(checkpoint), model_name, given)
    name = _name_for(base, checkpoint, model_name)
    kwargs = {**base.arguments_for(name), **given}
    _say_if_the_stride_differs(base, name, kwargs)
    # Not the name's default weights, whose origin and licence would be said of these.
    model = timm.create_model(_without_weights(name), **kwargs).eval()
    _say_what_is_assumed(base, kwargs, model)
    _check_head(model, base.weights, checkpoint, name)
    load_exactly(model, _fit(base.weights, model))
    labels = base.labels if label_names is None else read_labels(label_names, model.num_classes)
    save_hub_folder(model, folder, base.preprocessing(model, data_config or {}), base.provenance_in(name), labels)
    return model


def _say_what_is_assumed(base: Base, kwargs: dict[str, Any], model: Any) -> None:
    taken = {key: value if kwargs.get(key) is None else kwargs[key] for key, value in (base.assumed or {}).items()}
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


def _name_for(base: Base, checkpoint: str, model_name: str | None) -> str:
    name = model_name or (base.architecture if base.is_ours else None)
    if name is None:
        raise ValueError(_NO_NAME.format(checkpoint=checkpoint))
    if not is_ours(name):
        raise ValueError(
            f"model_name={name!r} is none of timm-gsop's; accepted: its networks, such as gsop_resnet50_net1."
        )
    return name


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
        raise ValueError(_NO_NAME.format(checkpoint=name))
    model = timm.create_model(name, pretrained=True, **given).eval()
    labels = dict(label_names=cfg.label_names) if cfg.label_names and model.num_classes == cfg.num_classes else None
    if label_names is not None:
        labels = read_labels(label_names, model.num_classes)
    save_hub_folder(model, folder, data_config, cfg, labels)
    return model


def _released_base(source: str, path: Path, model_name: str | None, given: dict[str, Any]) -> Base:
    """A checkpoint of the released code bases. Names of ResNets with covariance pooling stay: their filter renames."""
    weights = read_checkpoint(path)
    if source == "gsop":
        released = from_gsop(weights, given.get("gsop_type"))
    elif source == "moment-probing":
        released = from_moment_probing(weights, given.get("backbone"))
    else:
        released = from_covariance_pooling(weights, dropcov=source == "dropcov")
    name = model_name or released.model_name
    cfgs = default_cfgs[name].cfgs.values() if name in default_cfgs and not given else ()
    cfg = next((cfg for cfg in cfgs if is_origin(path, cfg.url)), None)
    code = RELEASED[source]
    return Base(
        str(path),
        plain_names(weights) if has_released_names(weights) and source != "gsop" else released.weights,
        released.model_name,
        released.model_kwargs,
        data_config=_of_backbone(released.model_kwargs["backbone"]) if source == "moment-probing" else IMAGENET,
        description=f"a checkpoint of {code.description}, {path.name}",
        license=code.license,
        origin_url=code.repository,
        provenance=cfg,
        same_arguments=True,
        assumed=released.assumed,
    )


def _of_backbone(name: str) -> dict[str, Any]:
    """Preprocessing of timm's own weights for a backbone, from which moment probing starts."""
    cfg = get_arch_pretrained_cfgs(name).get(f"{name}.augreg_in21k") or get_pretrained_cfg(name)
    return {key: getattr(cfg, key) for key in IMAGENET}


def _fit(weights: Weights, model: nn.Module) -> Weights:
    if isinstance(model, GsopResNet):
        return checkpoint_filter_fn(weights, model)
    if isinstance(model, DenseNet | InceptionV3):
        return filter_without_aux(weights, model)
    return weights


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


def _say_if_the_stride_differs(base: Base, name: str, kwargs: dict[str, Any]) -> None:
    if base.same_arguments:
        return
    with torch.device("meta"):
        target = timm.create_model(_without_weights(name), **kwargs)
    if isinstance(target, ResNet) and base.reduction_in(target) != target.feature_info[-1]["reduction"]:
        _logger.warning(
            "The function changes: %s has a last stage of another stride than the checkpoint's network, for which its "
            "weights were not trained. last_stride=2 keeps the function; output_stride=16 gives the function "
            "of timm's network at output_stride=16.",
            name,
        )
