"""What a conversion starts from: a released checkpoint, one of train.py's, a folder of timm's saver, or a name."""

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_data_config
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionV3
from timm.models.resnet import ResNet

from timm_gsop.hub.hub_folder import NO_LICENSE, is_ours, labels_of_training
from timm_gsop.models.gsop_resnet import default_cfgs
from timm_gsop.pretrained.backbone import backbone_loading
from timm_gsop.pretrained.checkpoint import (
    Weights,
    from_covariance_pooling,
    from_gsop,
    from_moment_probing,
    read_checkpoint,
)
from timm_gsop.pretrained.locate import is_origin

__all__ = ["NO_NAME", "RELEASED", "SourceCheckpoint", "find_checkpoint"]

PREPROCESSING = ("input_size", "img_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""train.py's arguments that say what a network was trained on."""

OF_THE_FUNCTION = ("channels", "global_pool", "isqrt_dim", "isqrt_iters", "last_stride", "output_stride", "pool_kwargs")
"""Arguments that a network with more blocks takes over from one of ours."""

IMAGENET: dict[str, Any] = dict(
    input_size=(3, 224, 224),
    interpolation="bilinear",
    crop_pct=0.875,
    mean=IMAGENET_DEFAULT_MEAN,
    std=IMAGENET_DEFAULT_STD,
)
"""How all the released code bases prepare ImageNet's images."""

NO_NAME = (
    "model_name=None with source='timm', checkpoint={checkpoint!r}; accepted: one of our networks, gsop_resnet50_net1 "
    "for one; or as checkpoint one of our networks that has pretrained weights, a folder of one, or a file of "
    "train.py's with its args.yaml beside it."
)

_logger = logging.getLogger(__name__)


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


class SourceCheckpoint(NamedTuple):
    """Weights, and what is known of them.

    Attributes:
        name: What they are called: a model's name with its tag, or the file or folder.
        weights: By timm's names.
        architecture: Registered name of their network, if it is known.
        model_kwargs: Arguments of their network.
        reduction: Stride of their network's last features, if it is known.
        data_config: Preprocessing that they were trained with, as far as it is known; None if nothing is.
        labels: ``label_names`` and ``label_descriptions``, where the folder has them.
        description: What they are, in words.
        license: Identifier of their licence.
        origin_url: Where they come from.
        provenance: What is said of a network with these weights, where it is known as a whole.
        same_arguments: Whether the arguments are those of every network for these weights.
        assumed: Arguments that no name or shape of theirs shows, with the values of the code that made them.
        notes: What else is known of them, as in a configuration.
    """

    name: str
    weights: Weights
    architecture: str | None = None
    model_kwargs: dict[str, Any] | None = None
    reduction: int | None = None
    data_config: dict[str, Any] | None = None
    labels: dict[str, Any] | None = None
    description: str = ""
    license: str | None = None
    origin_url: str | None = None
    provenance: PretrainedCfg | None = None
    same_arguments: bool = False
    assumed: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_ours(self) -> bool:
        """Whether their network is one of this package."""
        return self.architecture is not None and is_ours(self.architecture)

    def name_for(self, model_name: str | None) -> str:
        """Registered name of the network to make: the one that is wanted, or else their own."""
        name = model_name or (self.architecture if self.is_ours else None)
        if name is None:
            raise ValueError(NO_NAME.format(checkpoint=self.name))
        if not is_ours(name):
            raise ValueError(
                f"model_name={name!r} is none of timm-gsop's; accepted: its networks, such as gsop_resnet50_net1."
            )
        return name

    def arguments_for(self, model_name: str) -> dict[str, Any]:
        """Arguments of a network for these weights: those of their own, and what shows in their shapes."""
        if self.same_arguments:
            return dict(self.model_kwargs or {})
        cfg = get_pretrained_cfg(model_name)
        own = self.model_kwargs or {}
        is_same = self.architecture == model_name
        kwargs = {key: value for key, value in own.items() if is_same or (self.is_ours and key in OF_THE_FUNCTION)}
        for key, name, dim in (("num_classes", cfg.classifier, 0), ("in_chans", cfg.first_conv, 1)):
            if (weight := self.weights.get(f"{name}.weight")) is not None:
                kwargs[key] = weight.shape[dim]
        return kwargs

    def reduction_in(self, target: Any) -> int:
        """Stride of their network's last features; where it is not known, what the weights' names tell."""
        if self.reduction is not None:
            return self.reduction
        of_ours = [name for name in target.state_dict() if ".gsop." in name or ".se." in name or "global_pool." in name]
        if not any(name in self.weights for name in of_ours):
            return 32  # a ResNet of timm
        return target.feature_info[-1]["reduction"]

    def preprocessing(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The preprocessing that they were trained with; where it is not known, the default of the network's name.

        Args:
            model: The network that they were loaded into.
            given: What the user says of it, which comes first.
        """
        if self.data_config is not None:
            return {**self.data_config, **given}
        name = model.pretrained_cfg["architecture"]
        cfg = get_pretrained_cfg(name)
        known = cfg.to_dict() if cfg.tag else model.pretrained_cfg  # a second_order's is its backbone's
        config = resolve_input_data_config(model, args=given, pretrained_cfg=known)
        if not given:
            _logger.warning(
                "No args.yaml is beside %s: its preprocessing is taken to be the default of %s, %s. --input-size, "
                "--mean and --std say otherwise.",
                self.name,
                name,
                ", ".join(f"{key} {config[key]}" for key in ("input_size", "mean", "std")),
            )
        return _of_config(config)

    def provenance_in(self, model_name: str) -> PretrainedCfg | None:
        """What is said of a network that starts from these weights; nothing of one that the user trained."""
        if self.provenance is not None or (self.architecture == model_name and self.origin_url is None):
            return self.provenance
        blocks = "" if self.architecture == model_name else ", with GSoP blocks that are untrained"
        return PretrainedCfg(
            architecture=model_name,
            tag="converted",
            description=f"Built upon {self.description}{blocks}.",
            license=self.license,
            origin_url=self.origin_url,
            notes=self.notes or None,
        )


def find_checkpoint(source: str, checkpoint: str, model_name: str | None, given: dict[str, Any]) -> SourceCheckpoint:
    """Read weights.

    Args:
        source: What made them, one of ``SOURCES``.
        checkpoint: A file; from timm, also a folder, or the name of a model.
        model_name: The network that is wanted; None for the checkpoint's own.
        given: Arguments of the network, besides what the checkpoint shows.

    Raises:
        ValueError: If it is none of these, or cannot be read.
    """
    if source != "timm":
        return _from_released(source, Path(checkpoint), model_name, given)
    if Path(checkpoint).is_dir():
        return _from_folder(Path(checkpoint))
    if Path(checkpoint).is_file():
        return _from_file(Path(checkpoint))
    if timm.is_model(checkpoint.partition(".")[0]):
        return _from_name(checkpoint)
    raise ValueError(f"checkpoint={checkpoint!r} is neither a file nor a model of timm.")


def _from_released(source: str, path: Path, model_name: str | None, given: dict[str, Any]) -> SourceCheckpoint:
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
    return SourceCheckpoint(
        str(path),
        released.weights,
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


def _from_name(name: str) -> SourceCheckpoint:
    cfg = get_pretrained_cfg(name)
    model = timm.create_model(name, **({"pretrained": True} if is_ours(name) else backbone_loading(name, {})))
    if not isinstance(model, ResNet | DenseNet | InceptionV3):
        raise ValueError(
            f"checkpoint={name!r} is no ResNet, DenseNet or Inception-v3; accepted: those of timm and timm-gsop."
        )
    whole_name = f"{cfg.architecture}.{cfg.tag}"
    return SourceCheckpoint(
        whole_name,
        model.state_dict(),
        cfg.architecture,
        reduction=model.feature_info[-1]["reduction"],
        data_config=_of_config(model.pretrained_cfg),
        description=whole_name if is_ours(name) else f"timm's {whole_name}",
        license=cfg.license,
        origin_url=cfg.origin_url if is_ours(name) else f"https://huggingface.co/timm/{whole_name}",
    )


def _from_folder(folder: Path) -> SourceCheckpoint:
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except Exception as error:  # safetensors', PyTorch's, timm's: each means that the folder is no model
        reason = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"checkpoint={str(folder)!r} does not load; accepted: a folder that timm's save_for_hf wrote. "
            f"{type(error).__name__}: {reason[0]}"
        ) from error
    cfg = model.pretrained_cfg
    labels = {key: cfg[key] for key in ("label_names", "label_descriptions") if cfg.get(key)}
    provenance = json.loads((folder / "config.json").read_text()).get("provenance") or {}
    text = str(provenance.get("description") or "").removeprefix("Built upon ").removesuffix(".")
    return SourceCheckpoint(
        str(folder),
        model.state_dict(),
        cfg["architecture"],
        {key: value for key, value in model.pretrained_model_args.items() if key not in ("num_classes", "in_chans")},
        reduction=_reduction(model),
        data_config=_of_config(cfg),
        labels=labels or None,
        description=text or f"a {cfg['architecture']} of one's own, {folder.name}",
        license=provenance.get("license"),
        origin_url=provenance.get("origin_url"),
        notes=tuple(provenance.get("notes") or ()),
    )


def _from_file(path: Path) -> SourceCheckpoint:
    weights = read_checkpoint(path)
    args = _read_args(path.with_name("args.yaml"))
    model = _model_of_training(args)
    if model is None:
        return SourceCheckpoint(str(path), weights, description=f"the weights in {path.name}")
    name = model.pretrained_cfg["architecture"]
    given = {key: args[key] for key in PREPROCESSING if args.get(key) is not None}
    classifier = weights.get(f"{model.pretrained_cfg['classifier']}.weight")
    return SourceCheckpoint(
        str(path),
        weights,
        name,
        {**model.pretrained_model_args, **_arguments_of_training(args)},
        reduction=_reduction(model),
        data_config=_of_config(resolve_input_data_config(model, args=given)),
        labels=None if classifier is None else labels_of_training(args, len(classifier)),
        description=f"a {name} trained with timm's train.py, {path.name}",
    )


def _model_of_training(args: dict[str, Any]) -> Any:
    """The network that train.py made, without values; None where its arguments do not say which."""
    name = str(args.get("model", ""))
    if not (timm.is_model(name.partition(".")[0]) or name.startswith(("local-dir:", "hf-hub:"))):
        return None
    with torch.device("meta"):
        return timm.create_model(name, **_arguments_of_training(args))


def _arguments_of_training(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that train.py gave to the network, as far as they change what it computes."""
    kwargs = dict(args.get("model_kwargs") or {})
    size = args.get("input_size")
    given = dict(
        in_chans=args.get("in_chans") or (size[0] if size else None),
        global_pool=args.get("gp"),
        bn_eps=args.get("bn_eps"),
    )
    return {**{key: value for key, value in given.items() if value is not None}, **kwargs}


def _reduction(model: Any) -> int | None:
    """Stride of a network's last features, where it says."""
    infos = list(getattr(model, "feature_info", None) or ())
    return infos[-1]["reduction"] if infos else None


def _of_config(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config[key] for key in PREPROCESSING if config.get(key) is not None}


def _read_args(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(yaml.safe_load(path.read_text()))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read; accepted: what timm's train.py writes.") from error
