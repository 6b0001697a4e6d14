"""Names of the classes that a network was trained on, from the folder of images or a list."""

import logging
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, create_dataset

__all__ = ["imagenet_labels", "labels_of_training", "read_labels"]

_logger = logging.getLogger(__name__)


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


def imagenet_labels() -> dict[str, Any]:
    """Names and descriptions of ImageNet-1k's classes, from timm."""
    imagenet = ImageNetInfo("imagenet-1k")
    return dict(label_names=imagenet.label_names(), label_descriptions=imagenet.label_descriptions(as_dict=True))


def _as_labels(names: list[str]) -> dict[str, Any]:
    imagenet = imagenet_labels()
    return imagenet if names == imagenet["label_names"] else dict(label_names=names)


def _names_in_folder(root: Path, dataset: str = "", split: str = "train", class_map: str = "") -> list[str]:
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder.")
    found = create_dataset(dataset, root=str(root), split=split, class_map=class_map)
    if hasattr(found, "reader"):
        indices: dict[str, int] = found.reader.class_to_idx
        return sorted(indices, key=lambda name: indices[name])
    return [str(name) for name in getattr(found, "classes", ())]
