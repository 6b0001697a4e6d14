"""The paper's random subset of ImageNet's classes: python -m timm_gsop.data.subset [DATA] -o OUT.

Writes ``classes.txt``, which ``train.py --class-map`` and ``validate.py --class-map`` read: they then see the images of
these classes only, numbered by the lines of the file. With DATA also ``files.txt``, the images themselves.
"""

import argparse
import random
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from timm.data import ImageNetInfo, get_img_extensions

from timm_gsop.checks import check_positive_int

__all__ = ["draw_classes", "list_images"]


def draw_classes(classes: Sequence[str], num_classes: int = 250, seed: int = 0) -> list[str]:
    """Draw classes at random, the same ones for the same seed, whatever the order of ``classes``.

    The paper draws 250 of ImageNet-1k's (section 4.1) and does not say which.

    Args:
        classes: Names to draw from.
        num_classes: How many to draw.
        seed: Seed of the draw.

    Returns:
        The names, sorted.

    Raises:
        ValueError: If ``num_classes`` is less than one or more than there are.
    """
    check_positive_int("num_classes", num_classes)
    names = sorted(set(classes))
    if num_classes > len(names):
        raise ValueError(f"num_classes={num_classes} is not accepted; accepted: up to {len(names)}, all there are.")
    return sorted(random.Random(seed).sample(names, num_classes))


def list_images(data: Path) -> list[str]:
    """List the images of a data set; the folder that an image is in names its class.

    Args:
        data: A folder or a tar. Tars in a tar count as folders, as in ImageNet's own ``ILSVRC2012_img_train.tar``.

    Returns:
        Paths below ``data``, sorted; for example ``"train/n01440764/n01440764_10026.JPEG"``.

    Raises:
        ValueError: If there is no such folder or tar, or no image in it.
    """
    if data.is_dir():
        images = [path.relative_to(data).as_posix() for path in data.rglob("*") if _is_image(path.name)]
    elif data.is_file() and tarfile.is_tarfile(data):
        with tarfile.open(data) as archive:
            images = _in_tar(archive)
    else:
        raise ValueError(f"data={str(data)!r} is neither a folder nor a tar.")
    if not images:
        raise ValueError(f"data={str(data)!r} has no images.")
    return sorted(images)


def _in_tar(archive: tarfile.TarFile) -> list[str]:
    images = []
    for member in archive:
        if member.isfile() and member.name.endswith(".tar"):
            with tarfile.open(fileobj=archive.extractfile(member)) as inner:
                images += [f"{member.name.removesuffix('.tar')}/{name}" for name in _in_tar(inner)]
        elif member.isfile() and _is_image(member.name):
            images.append(member.name)
    return images


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in get_img_extensions()


def _class_of(image: str) -> str:
    return PurePosixPath(image).parent.name


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m timm_gsop.data.subset", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="folder or tar; without it, ImageNet-1k's synsets from timm")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for classes.txt and files.txt")
    parser.add_argument("--num-classes", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        images = list_images(args.data) if args.data else []
        names = {_class_of(image) for image in images} if args.data else ImageNetInfo("imagenet-1k").label_names()
        classes = draw_classes(sorted(names), args.num_classes, args.seed)
        files = {"classes.txt": classes}
        if args.data:
            drawn = set(classes)
            files["files.txt"] = [image for image in images if _class_of(image) in drawn]
        args.out.mkdir(parents=True, exist_ok=True)
        for name, lines in files.items():
            _write(args.out / name, lines)
    except (OSError, ValueError, tarfile.TarError) as error:
        parser.error(str(error))
    print(f"wrote {', '.join(str(args.out / name) for name in files)}: {len(classes)} classes, seed {args.seed}")


def _write(path: Path, lines: Sequence[str]) -> None:
    """Write a file whole, or not at all. No line is empty: timm would take it for a class."""
    with tempfile.TemporaryDirectory(dir=path.parent) as partial:
        (Path(partial) / path.name).write_text("\n".join(lines), encoding="utf-8")
        (Path(partial) / path.name).replace(path)


if __name__ == "__main__":
    main()
