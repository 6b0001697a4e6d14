"""The commands of docs/your_images.md, in order, on 60 generated pictures and a tiny backbone.

timm's scripts need TIMM_SCRIPTS, a folder that has them; without it the rest runs.
"""

import csv
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.test_docs import commands
from tests.test_probe import COLORS, paint

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/your_images.md"
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# Instead of what would be downloaded, and of what would take long.
INSTEAD = {
    "--backbone resnet18": "--backbone test_resnet --checkpoint backbone.pth --img-size 32 --isqrt-dim 8 --epochs 60 "
    "--splits 1 --levels -2 --cache maps --heads avg isqrt",
    "--num-classes 2": "--num-classes 3 --workers 0",
    "--epochs 20 --warmup-epochs 2": "--epochs 2 --warmup-epochs 0",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("your_images")
    for seed, (part, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        paint(root / "pictures" / part, count, seed)
    torch.save(timm.create_model("test_resnet").state_dict(), root / "backbone.pth")
    for name in ("hub", "docs"):
        (root / name).symlink_to(ROOT / name)
    if SCRIPTS:
        (root / "pytorch-image-models").symlink_to(Path(SCRIPTS).absolute())
    return root


def run(folder: Path, words: list[str]) -> str:
    line = shlex.join(words)
    for shown, here in INSTEAD.items():
        line = line.replace(shown, here)
    done = subprocess.run([sys.executable, *shlex.split(line)[1:]], env=ENV, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def of_page(*scripts: str) -> list[list[str]]:
    return [words for words in commands(PAGE) if words[0] == "python" and words[1].rpartition("/")[2] in scripts]


@pytest.mark.slow
def test_probe_and_publish(folder):
    """What needs no script of timm's, with the probe's folder in place of the fine-tuned one."""
    (words,) = of_page("-m")
    out = run(folder, words)
    assert "By validation" in out
    printed = next(line for line in out.splitlines() if line.startswith("python train.py"))
    (shown,) = of_page("train.py")
    options = {word for word in shlex.split(printed) if word.startswith("--")} - {"--img-size", "--device"}
    assert options <= {word for word in shown if word.startswith("--")}
    words = next(words for words in of_page("publish.py") if "--dry-run" in words)
    run(folder, [word.replace("tuned", "probe/model") for word in words])
    card = (folder / "probe/model-upload/README.md").read_text()
    assert "top-1" in card


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS is not set")
def test_every_command(folder):
    if not (folder / "probe/model").exists():
        run(folder, of_page("-m")[0])
    found = json.loads((folder / "probe/results.json").read_text())
    out = run(folder, of_page("validate.py")[0])
    top1 = json.loads(out.rpartition("--result")[2])["top1"]
    assert top1 == pytest.approx(found["saved"]["top1"], abs=0.3)
    assert top1 > 50
    for script in ("train.py", "convert.py", "inference.py", "onnx_export.py"):
        run(folder, of_page(script)[0])
    run(folder, next(words for words in of_page("publish.py") if "--dry-run" in words))
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert {row["label"] for row in rows} <= set(COLORS)
    assert (folder / "tuned.onnx").stat().st_size > 10_000
    assert json.loads((folder / "tuned/config.json").read_text())["label_names"] == list(COLORS)
    assert "measured" in (folder / "tuned-upload/README.md").read_text()


def test_the_page_has_every_step():
    text = PAGE.read_text()
    scripts = re.findall(r"python (?:-m )?([\w./-]+)", text)
    assert {"timm_gsop.probe", *(f"pytorch-image-models/{name}.py" for name in ("train", "validate", "inference"))} <= {
        *scripts
    }
