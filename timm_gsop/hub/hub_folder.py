"""A model as a folder in the layout of the Hugging Face Hub: config.json, with names of its classes, and weights."""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.data import ImageNetInfo, create_dataset
from timm.models import PretrainedCfg, save_for_hf
from torch import nn

__all__ = [
    "NO_LICENSE",
    "HubFolder",
    "check_hub_folder",
    "check_new_folder",
    "is_ours",
    "is_staged",
    "labels_of_training",
    "read_labels",
    "save_hub_folder",
]

NO_LICENSE = "none stated"
"""What is said of weights whose authors state no licence. Nobody may publish them without asking."""
NEEDED = ("config.json", "model.safetensors")
OF_TRAINING = ("args.yaml", "summary.csv")
"""What timm's train.py leaves beside its checkpoints: the recipe, and the figures of every epoch."""
GENERATED = ("README.md", "architecture.png")
"""What publishing adds; a folder that was downloaded from the Hub has it too, and it is made anew."""
OF_THE_HUB = (".gitattributes", ".cache", ".git")
"""What the Hub and its client, or git, leave in a folder that was downloaded; it is not published."""

_logger = logging.getLogger(__name__)


class HubFolder(NamedTuple):
    """A folder that was checked.

    Attributes:
        path: The folder.
        config: Content of its config.json.
        model: The model that it holds, in evaluation.
    """

    path: Path
    config: dict[str, Any]
    model: Any

    @property
    def files(self) -> list[Path]:
        """What is published of it."""
        return [self.path / name for name in (*NEEDED, *OF_TRAINING) if (self.path / name).exists()]


def check_new_folder(folder: Path) -> None:
    """Make sure that nothing is overwritten.

    Raises:
        ValueError: If the folder has something in it already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={str(folder)!r} has something in it already; accepted: a new or empty folder.")


def is_staged(folder: Path) -> bool:
    """Whether a folder has just what publishing writes: config.json, weights and card, and nothing unknown."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {*NEEDED, "README.md"} <= names <= {*NEEDED, *OF_TRAINING, *GENERATED}


def save_hub_folder(
    model: nn.Module,
    folder: Path,
    data_config: dict[str, Any] | None = None,
    provenance: PretrainedCfg | None = None,
    labels: dict[str, Any] | None = None,
) -> None:
    """Write a model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` restores it, or write nothing.

    Models of 1 000 classes get ImageNet-1k's label names, from timm.

    Args:
        model: A model that ``timm.create_model`` made, which records its arguments.
        folder: The folder; it must not exist, or be empty.
        data_config: Preprocessing, where it is not the model's default.
        provenance: Where the weights come from, if it is known. It is kept apart from the model's own configuration,
            which timm hands on to whatever is trained later.
        labels: ``label_names`` and ``label_descriptions`` of the classes, where they are known.

    Raises:
        ValueError: If the folder has something in it already.
    """
    check_new_folder(folder)
    config: dict[str, Any] = dict(labels or {})
    if model.num_classes == 1000 and not config:
        config = _imagenet_labels()
    if provenance is not None:
        config["provenance"] = dict(
            name=f"{provenance.architecture}.{provenance.tag}",
            description=provenance.description,
            license=provenance.license,
            origin_url=provenance.origin_url,
            notes=provenance.notes,
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        complete = Path(partial) / "complete"
        save_for_hf(model, complete, model_config=config, data_config=data_config, safe_serialization=True)
        _drop_num_classes(complete / "config.json")
        complete.replace(folder)


def _drop_num_classes(path: Path) -> None:
    """Leave ``num_classes`` to the root of the file: transformers passes it itself, and would pass it twice."""
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2))


def check_hub_folder(folder: Path) -> HubFolder:
    """Load a folder as its users will, run the model, and see that its parts agree.

    Args:
        folder: As :func:`save_hub_folder` or timm's ``save_for_hf`` writes it; timm's train.py's ``args.yaml`` and
            ``summary.csv`` may be there too.

    Raises:
        ValueError: Naming what is wrong: a file that is missing, or unknown, as pickles are; a network that is not
            ours; weights that do not fit it, or are not finite; label names of another number than classes.
    """
    if not folder.is_dir():
        raise ValueError(f"folder={str(folder)!r} is not a folder.")
    names = {path.name for path in folder.iterdir()}
    if missing := set(NEEDED) - names:
        raise ValueError(f"{folder} has no {', '.join(sorted(missing))}; accepted: what hub/convert.py writes.")
    if unknown := names - {*NEEDED, *OF_TRAINING, *GENERATED, *OF_THE_HUB}:
        known = ", ".join((*NEEDED, *OF_TRAINING))
        raise ValueError(f"{folder} has {', '.join(sorted(unknown))}; accepted: {known}, and no pickles.")
    try:
        config = json.loads((folder / "config.json").read_text())
        architecture, num_classes = config["architecture"], config["num_classes"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {type(error).__name__}: {error}") from error
    if not is_ours(architecture):
        raise ValueError(
            f"architecture={architecture!r} in config.json is none of timm-gsop's; accepted: its networks."
        )
    try:
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except Exception as error:  # safetensors', PyTorch's, timm's: each means that the folder is no model
        message = str(error).strip().replace("\n\t", " ").splitlines()
        raise ValueError(f"{folder} does not load: {type(error).__name__}: {' '.join(message[:2])[:500]}") from error
    if infinite := [name for name, value in model.state_dict().items() if not value.isfinite().all()]:
        raise ValueError(f"The weights are not finite: {', '.join(infinite[:5])}.")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    own = model.state_dict()
    if not_as_saved := [name for name in sorted({*own, *weights}) if not _is_same(own.get(name), weights.get(name))]:
        raise ValueError(f"{folder} does not load: model.safetensors and config.json differ in {not_as_saved[0]}.")
    with torch.inference_mode():
        logits = model(torch.randn(1, *model.pretrained_cfg["input_size"]))
    if logits.shape != (1, num_classes) or not logits.isfinite().all():
        raise ValueError(
            f"The model's output is {tuple(logits.shape)}, and config.json says num_classes={num_classes}; accepted: "
            "finite logits, one a class."
        )
    _check_labels(config, num_classes)
    return HubFolder(folder, config, model)


def _is_same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b.to(a.dtype))


def is_ours(model_name: str) -> bool:
    """Whether a name, with or without a tag, is that of a network of this package."""
    name = model_name.partition(".")[0]
    return timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith("timm_gsop.")


def _check_labels(config: dict[str, Any], num_classes: int) -> None:
    names = config.get("label_names", config.get("pretrained_cfg", {}).get("label_names"))
    if isinstance(names, dict):  # by index, as timm accepts them
        names = list(names.values())
    if names is not None and len(set(names)) != num_classes:
        found = len(set(names))
        raise ValueError(f"label_names in config.json are {found} different ones; accepted: {num_classes}, as classes.")
    if strangers := sorted(set(config.get("label_descriptions", {})) - set(names or ())):
        raise ValueError(f"label_descriptions in config.json has {strangers[0]!r}, which is not among label_names.")


def read_labels(path: Path, num_classes: int) -> dict[str, Any]:
    """Read the names of the classes, in the order of the logits.

    Args:
        path: A folder of images as timm's train.py takes it, with a folder a class (in ``train``, if there is one), or
            a text file with a name a line.
        num_classes: Number of classes of the network.

    Returns:
        ``label_names``, and for those of ImageNet-1k ``label_descriptions`` too.

    Raises:
        ValueError: If there are no names, or as many as ``num_classes`` is not.
    """
    if path.is_dir():
        names = _names_in_folder(path)
    elif path.is_file():
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        raise ValueError(f"label_names={str(path)!r} does not exist; accepted: a folder of images, or a text file.")
    if len(names) != num_classes or len(set(names)) != len(names):
        raise ValueError(
            f"label_names={str(path)!r} has {len(set(names))} different names; accepted: {num_classes}, as classes."
        )
    return _as_labels(names)


def labels_of_training(args: dict[str, Any], num_classes: int) -> dict[str, Any] | None:
    """The names of the classes in the data that train.py was given; None, with a warning, where it is not here.

    Args:
        args: train.py's arguments, as its ``args.yaml`` has them.
        num_classes: Number of classes of the network.
    """
    root, dataset = args.get("data_dir") or args.get("data"), args.get("dataset") or ""
    if not root:
        return None
    try:
        if dataset.partition("/")[0] not in ("", "torch"):
            raise ValueError(f"dataset={dataset!r} is no folder of images.")
        names = _names_in_folder(Path(root), dataset, args.get("train_split") or "train", args.get("class_map") or "")
        if len(names) != num_classes:
            raise ValueError(f"{root} has {len(names)} classes, and the network {num_classes}.")
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        _logger.warning("The names of the classes are not known; --label-names says where they are. %s", reason)
        return None
    return _as_labels(names)


def _imagenet_labels() -> dict[str, Any]:
    """Names and descriptions of ImageNet-1k's classes, from timm."""
    imagenet = ImageNetInfo("imagenet-1k")
    return dict(label_names=imagenet.label_names(), label_descriptions=imagenet.label_descriptions(as_dict=True))


def _as_labels(names: list[str]) -> dict[str, Any]:
    imagenet = _imagenet_labels()
    return imagenet if names == imagenet["label_names"] else dict(label_names=names)


def _names_in_folder(root: Path, dataset: str = "", split: str = "train", class_map: str = "") -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    found = create_dataset(dataset, root=str(root), split=split, class_map=class_map)
    if hasattr(found, "reader"):
        indices: dict[str, int] = found.reader.class_to_idx
        return sorted(indices, key=lambda name: indices[name])
    return [str(name) for name in getattr(found, "classes", ())]
