"""Images of a data set as timm reads them: class folders or ``torch/…`` and ``hfds/…``, in parts, none replaced."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset

__all__ = ["Images", "Pictures", "read_images"]

FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""Names of the folders of a part, as timm knows them."""
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
"""Pillow's modes of more than 8 bits a pixel, which its conversion to RGB clips."""


@dataclass(frozen=True)
class Images:
    """The images of a data set, whatever part they are in.

    Attributes:
        datasets: timm's or torchvision's data sets.
        places: (N, 2): which data set an image is in, and at which index.
        targets: (N,): index of the class.
        parts: (N,): ``"train"``, ``"validation"`` or ``"test"``; ``""`` in a data set without parts.
        names: What to call each image in messages.
        stamps: By which a change is noticed: size and time of each image's file, or the data set's fingerprint.
        class_names: Names of the classes.
    """

    datasets: tuple[Any, ...]
    places: np.ndarray
    targets: np.ndarray
    parts: np.ndarray
    names: tuple[str, ...]
    stamps: tuple[str, ...]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, indices: np.ndarray) -> "Images":
        """Some of the images, in the order of their indices."""
        indices = np.sort(indices)
        return replace(
            self,
            places=self.places[indices],
            targets=self.targets[indices],
            parts=self.parts[indices],
            names=tuple(self.names[i] for i in indices),
            stamps=tuple(self.stamps[i] for i in indices),
        )

    def open(self, index: int) -> Image.Image:
        """Open an image, as RGB.

        Raises:
            ValueError: If it is animated or has more than 8 bits a pixel, of which a network would see a part.
            OSError: If it cannot be read.
        """
        number, place = map(int, self.places[index])
        dataset = self.datasets[number]
        if not hasattr(dataset, "reader"):  # torchvision's
            return _as_rgb(dataset[place][0])
        with dataset.reader[place][0] as file, Image.open(file) as picture:
            return _as_rgb(picture)

    def problem(self, index: int) -> str:
        """Why an image cannot be used; ``""`` if it can."""
        try:
            self.open(index)
        except Exception as error:  # Pillow's decoders raise almost anything
            return " ".join(str(error).split()) or type(error).__name__
        return ""

    @property
    def digest(self) -> str:
        """SHA-256 of the list of images."""
        lines = [f"{name} {stamp}" for name, stamp in zip(self.names, self.stamps, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Pictures(torch.utils.data.Dataset):
    """Images from an index on, through a transform; None in place of one that cannot be read."""

    def __init__(self, images: Images, start: int, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.images, self.start, self.transform = images, start, transform

    def __len__(self) -> int:
        return len(self.images) - self.start

    def __getitem__(self, index: int) -> torch.Tensor | None:
        try:
            picture = self.images.open(self.start + index)
        except Exception:  # Pillow's decoders raise almost anything; Images.problem says what
            return None
        return self.transform(picture)


def read_images(data_dir: str | Path, dataset: str = "", download: bool = False) -> Images:
    """Find the images of a data set, its parts and its classes.

    Args:
        data_dir: A folder of class folders, or of the folders train, validation (or val) and test, each with class
            folders; for other data sets, where they are kept.
        dataset: Data set as timm's ``--dataset`` names it; ``""`` for folders.
        download: Whether torchvision may download the data set.

    Raises:
        ValueError: If there are no class folders, one class alone, or a class that the training part does not have.
    """
    root = Path(data_dir)
    if not dataset and not root.is_dir():
        raise ValueError(f"data_dir={str(data_dir)!r} is not a folder.")
    found = {part: _create(root, dataset, part, download) for part in FOLDERS} if _has_parts(root, dataset) else {}
    found = {part: part_set for part, part_set in found.items() if part_set is not None}
    if not found:
        found = {"": _create(root, dataset, "", download)}
    names_of = {part: _class_names(part_set) for part, part_set in found.items()}
    class_names = names_of["train" if "train" in found else ""]
    if class_names == ("",):
        raise ValueError(f"data_dir={str(root)!r} has images but no class folders; accepted: a folder a class.")
    if len(class_names) < 2:
        raise ValueError(f"data_dir={str(root)!r} has one class, {class_names[0]!r}; accepted: at least two.")
    places, targets, parts = [], [], []
    names: list[str] = []
    stamps: list[str] = []
    for number, (part, part_set) in enumerate(found.items()):
        if unknown := set(names_of[part]) - set(class_names):
            raise ValueError(
                f"data_dir={str(root)!r} has the class {min(unknown)!r} in its {part} part, and not in its training "
                f"part; accepted: the same classes, {', '.join(class_names[:10])}."
            )
        own_targets = _targets(part_set)
        places += [(number, i) for i in range(len(own_targets))]
        targets += [class_names.index(names_of[part][target]) for target in own_targets]
        parts += [part] * len(own_targets)
        reader: Any = getattr(part_set, "reader", None)
        files = [Path(path) for path, _ in getattr(reader, "samples", ())]
        whole = str(getattr(getattr(reader, "dataset", None), "_fingerprint", ""))  # Hugging Face's, of its content
        names += (
            map(str, files) if files else [f"{dataset} {root.resolve()} {part} {i}" for i in range(len(own_targets))]
        )
        stamps += [f"{s.st_size} {s.st_mtime_ns}" for s in (f.stat() for f in files)] or [whole] * len(own_targets)
    arrays = (np.array(places), np.array(targets), np.array(parts))
    return Images(tuple(found.values()), *arrays, tuple(names), tuple(stamps), class_names)


def _as_rgb(picture: Any) -> Image.Image:
    # A camera's MPO is one photograph, with a preview beside it.
    if getattr(picture, "is_animated", False) and picture.format != "MPO":
        raise ValueError(f"has {picture.n_frames} frames")
    if picture.mode in DEEP_MODES:
        raise ValueError(f"has more than 8 bits a pixel (mode {picture.mode})")
    return picture.convert("RGB")


def _has_parts(root: Path, dataset: str) -> bool:
    return bool(dataset) or any((root / name).is_dir() for name in FOLDERS["train"])


def _create(root: Path, dataset: str, part: str, download: bool) -> Any:
    """timm's data set of a part, None where there is no such part."""
    if not dataset:
        folder = next((root / name for name in FOLDERS[part] if (root / name).is_dir()), None) if part else root
        if folder is None:
            return None
        try:
            return create_dataset("", root=str(folder), search_split=False)
        except RuntimeError as error:
            raise ValueError(f"data_dir={str(root)!r} is not accepted: {error}.") from error
    if dataset.startswith("torch/") and part == "test":
        return None  # they have two parts, and timm calls the second one validation
    try:
        found = create_dataset(dataset, root=str(root), split=part, download=download)
    except Exception as error:  # of several libraries
        if part != "train":
            return None
        raise ValueError(f"dataset={dataset!r} in {str(root)!r} cannot be read: {error}") from error
    if isinstance(found, IterableDataset):
        raise ValueError(
            f"dataset={dataset!r} is a stream, whose images have no index; accepted: folders, torch/… and hfds/…."
        )
    return found


def _class_names(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    index = getattr(reader, "class_to_idx", None)
    if index:
        return tuple(sorted(index, key=index.__getitem__))
    names = getattr(dataset, "classes", None)
    return tuple(map(str, names if names else range(int(max(_targets(dataset))) + 1)))


def _targets(dataset: Any) -> list[int]:
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "samples"):
        return [int(target) for _, target in reader.samples]
    if hasattr(reader, "iter_targets"):
        return [int(target) for target in reader.iter_targets()]
    if getattr(dataset, "targets", None) is not None:
        return [int(target) for target in dataset.targets]
    return [int(dataset[i][1]) for i in range(len(dataset))]
