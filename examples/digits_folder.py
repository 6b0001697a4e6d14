"""Write scikit-learn's digits as folders of images, for timm's train.py: python examples/digits_folder.py FOLDER."""

import argparse
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write(folder: Path) -> None:
    """1 437 images of 8×8 pixels in ``train``, 360 in ``val``, a folder a class."""
    digits = load_digits()
    split = train_test_split(digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)
    for part, images, targets in (("train", split[0], split[2]), ("val", split[1], split[3])):
        for i, (image, target) in enumerate(zip(images, targets, strict=True)):
            path = folder / part / str(target) / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).astype("uint8")).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    if folder.exists() and any(folder.iterdir()):
        sys.exit(f"{folder} has something in it already")
    write(folder)
