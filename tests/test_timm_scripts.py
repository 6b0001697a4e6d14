"""timm's own train.py and validate.py, unmodified, with our recipes: TIMM_SCRIPTS=DIR says where they are.

They are in timm's repository, not in its wheel. Without them there is nothing to test here.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.samples import FASHION_MNIST, fashion_mnist
from timm_gsop.hub import convert, stage
from timm_gsop.viz.curves import read_summary

ROOT = Path(__file__).parents[1]
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS is not set")]
NET2 = "digits/gsop_preresnet20_net2"
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    subprocess.run([sys.executable, ROOT / "examples/digits_folder.py", folder], check=True)
    return folder


def command(config: str, data: Path, output: Path, *options: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    config_file = str(ROOT / f"train_configs/{config}.yaml")
    given = ["-c", config_file, "--data-dir", str(data), "--output", str(output), "--experiment", "run"]
    small = ["--device", "cpu", "--epochs", "2", "--warmup-epochs", "0", "--workers", "1", "--log-interval", "1"]
    return [*launch, str(Path(SCRIPTS) / "train.py"), *given, *small, *options]


def train(*args, **kwargs) -> subprocess.CompletedProcess:
    done = subprocess.run(command(*args, **kwargs), env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def summary(output: Path) -> list[dict[str, str]]:
    with (output / "run/summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("model", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_train_and_validate(model, digits, tmp_path):
    """validate.py knows the network without an import, and measures what train.py did."""
    train(NET2, digits, tmp_path, "--model", model)
    rows = summary(tmp_path)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    validate = [sys.executable, str(Path(SCRIPTS) / "validate.py"), "--model", model, "--device", "cpu"]
    shape = [
        "--input-size",
        "1",
        "28",
        "28",
        "--mean",
        "0.5",
        "--std",
        "0.5",
        "--crop-pct",
        "1.0",
        "--num-classes",
        "10",
    ]
    given = ["--data-dir", str(digits), "--split", "val", "--checkpoint", str(tmp_path / "run/last.pth.tar")]
    done = subprocess.run(
        [*validate, *shape, *given, "--interpolation", "bilinear"], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("--result")[2])
    assert found["top1"] == pytest.approx(float(rows[1]["eval_top1"]), abs=0.3)


def test_resume_after_a_kill(digits, tmp_path):
    """It goes on after the last complete epoch, and no checkpoint is half written."""
    process = subprocess.Popen(
        command(NET2, digits, tmp_path, "--epochs", "3"),
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if re.match(r"Train: 1 \[ *2\d/", line):  # in the middle of the second epoch
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    time.sleep(1)  # its workers notice
    assert [row["epoch"] for row in summary(tmp_path)] == ["0"]
    saved = torch.load(tmp_path / "run/last.pth.tar", weights_only=False)
    assert saved["epoch"] == 0
    resume = ("--epochs", "3", "--resume", str(tmp_path / "run/last.pth.tar"))
    done = train(NET2, digits, tmp_path, *resume)
    assert "Train: 0 [" not in done.stdout + done.stderr
    assert "Train: 1 [   0/" in done.stdout + done.stderr
    assert read_summary(tmp_path / "run/summary.csv")["epoch"] == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        ("--model-ema", "--model-ema-decay", "0.9"),
        ("--grad-checkpointing",),
        ("--grad-accum-steps", "2"),
        ("--amp", "--amp-dtype", "bfloat16"),
    ],
    ids=lambda options: options[0],
)
def test_options(options, digits, tmp_path):
    train(NET2, digits, tmp_path, "--epochs", "1", *options)
    (row,) = summary(tmp_path)
    assert float(row["eval_top1"]) > 12  # ten classes
    if "--model-ema" in options:
        assert "state_dict_ema" in torch.load(tmp_path / "run/last.pth.tar", weights_only=False)


@pytest.mark.parametrize("model", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_autocast_and_compiler_together(model, digits, tmp_path):
    options = ("--epochs", "1", "--amp", "--amp-dtype", "bfloat16", "--torchcompile")
    train(NET2, digits, tmp_path, "--model", model, *options)
    (row,) = summary(tmp_path)
    assert float(row["eval_top1"]) > 12  # ten classes


@pytest.mark.parametrize("options", [(), ("--sync-bn",)])
def test_two_processes(options, digits, tmp_path):
    """tests/cpu_distributed.py brings what the CPU lacks."""
    modules = ("--device-modules", "timm_gsop", "tests.cpu_distributed")
    done = train(NET2, digits, tmp_path, *modules, *options, processes=2)
    assert "Training in distributed mode with multiple processes" in done.stdout + done.stderr
    assert ("Synchronized BatchNorm" in done.stdout + done.stderr) == bool(options)
    first, second = (float(row["train_loss"]) for row in summary(tmp_path))
    assert second < first


def test_webdataset(digits, tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    info: dict[str, dict] = {}
    for split in ("train", "validation"):
        images = sorted((digits / split.replace("validation", "val")).rglob("*.png"))
        parts = {f"digits-{split}-{i}.tar": images[i::2] for i in range(2)}
        for name, members in parts.items():
            with tarfile.open(shards / name, "w") as archive:
                for path in members:
                    key = f"{path.parent.name}_{path.stem}"
                    for suffix, content in (("png", path.read_bytes()), ("cls", path.parent.name.encode())):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        info[split] = dict(filenames=list(parts), shard_lengths=[len(members) for members in parts.values()])
        info[split]["name"] = split
        info[split]["num_samples"] = len(images)
    (shards / "_info.json").write_text(json.dumps(dict(splits=info)))
    train(NET2, shards, tmp_path / "out", "--dataset", "wds/digits", "--epochs", "1")
    assert float(summary(tmp_path / "out")[0]["eval_top1"]) > 12


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "cifar10"
    done = subprocess.run([sys.executable, ROOT / "examples/cifar10_folder.py", folder], capture_output=True, text=True)
    if done.returncode and " failed: " in done.stderr:
        pytest.skip(f"CIFAR-10 cannot be fetched: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.xdist_group("cifar10")
@pytest.mark.parametrize("name", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_what_ships_reaches_the_figure_that_its_configuration_states(name, cifar10):
    """On all of CIFAR-10's test images, with the preprocessing of the configuration."""
    given = ["--model", name, "--pretrained", "--data-dir", cifar10, "--device", "cpu", "-b", "250", "-j", "0"]
    line = [sys.executable, Path(SCRIPTS) / "validate.py", *given]
    done = subprocess.run(list(map(str, line)), env=ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    notes = " ".join(timm.get_pretrained_cfg(name).notes)
    (stated,) = map(float, re.findall(r"measured: top-1 (\S+) %", notes))
    assert json.loads(done.stdout.rpartition("--result")[2])["top1"] == pytest.approx(stated, abs=0.05)


@pytest.mark.parametrize("name", ["gsop_preresnet20_net1.fashion_mnist", "gsop_preresnet20_net2.fashion_mnist"])
def test_onnx_export_and_validate(name, tmp_path):
    """timm's exporter and onnxruntime, on stored test images: the accuracy is the network's."""
    stored = np.load(FASHION_MNIST)
    for i, (image, label) in enumerate(zip(stored["images"], stored["labels"], strict=True)):
        folder = tmp_path / f"images/{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(folder / f"{i}.png")
    file = tmp_path / "network.onnx"
    export = ["onnx_export.py", file, "--model", name, "--num-classes", "10", "--img-size", "28", "--dynamo"]
    data = ["--mean", *["0.286"] * 3, "--std", *["0.353"] * 3, "--crop-pct", "1.0", "--img-size", "28"]
    validate = ["onnx_validate.py", tmp_path / "images", "--onnx-input", file, *data, "-b", "1", "-j", "1"]
    for script, *options in (export, validate):
        line = [sys.executable, str(Path(SCRIPTS) / script), *map(str, options)]
        done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = float(re.findall(r"\* Prec@1 ([\d.]+)", done.stdout)[-1])
    model = timm.create_model(name, pretrained=True).eval()
    images, labels = fashion_mnist()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(100 * right, abs=0.41)  # two images: rounding of pixels


def test_from_a_run_to_fine_tuning_to_a_folder_to_a_card(digits, tmp_path):
    """hub/README.md's way, from model_best.pth.tar onwards; the folder keeps what args.yaml says."""
    train(NET2, digits, tmp_path / "first", "--epochs", "1")
    best = str(tmp_path / "first/run/model_best.pth.tar")
    few = tmp_path / "few"
    for split in ("train", "val"):
        for name in "012":
            shutil.copytree(digits / split / name, few / split / name)
    tuned = ("--pretrained", "--pretrained-path", best, "--num-classes", "3", "--epochs", "1")
    done = train(NET2, few, tmp_path / "tuned", *tuned)
    assert "Missing keys (fc.weight, fc.bias)" in done.stdout + done.stderr
    model = convert("timm", str(tmp_path / "tuned/run/model_best.pth.tar"), tmp_path / "folder")
    assert model.num_classes == 3
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(loaded)
    args = yaml.safe_load((tmp_path / "tuned/run/args.yaml").read_text())
    assert [list(config["input_size"]), list(config["mean"])] == [args["input_size"], args["mean"]]
    text = (tmp_path / "folder/config.json").read_text()
    assert "Fashion" not in text
    assert "T-shirt" not in text
    for name in ("args.yaml", "summary.csv"):
        shutil.copy(tmp_path / "tuned/run" / name, tmp_path / "folder")
    stage(tmp_path / "folder", "me/mine", tmp_path / "staged", license="apache-2.0")
    card = (tmp_path / "staged/README.md").read_text()
    assert "**measured**: top-1" in card
    assert "neutral" not in card


BACKBONES = {
    "cnn": ["backbone=resnet18", "channels=[8,16,24,32]", "gsop_stages=[3]", "cov_dim=8"],
    "vit": ["backbone=vit_tiny_patch16_224", "img_size=32", "patch_size=8", "embed_dim=24", "depth=2", "num_heads=3"],
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_second_order_from_training_to_a_card(backbone, digits, tmp_path):
    """model_best.pth.tar to a folder, which validate.py measures as train.py did, to what would be published."""
    given = ["--data-dir", digits, "--device", "cpu", "--model", "second_order"]
    train_py = ["train.py", *given, "--output", tmp_path, "--experiment", "run", "--epochs", "1", "-b", "32", "-j", "1"]
    kwargs = ["--model-kwargs", *BACKBONES[backbone], "isqrt_dim=8", "--num-classes", "10", "--input-size", "3 32 32"]
    lines = {
        "train": [*train_py, "--lr", "0.05", *" ".join(kwargs).split()],
        "convert": ["--from", "timm", tmp_path / "run/model_best.pth.tar", tmp_path / "folder"],
        "validate": ["validate.py", *given[:-1], f"local-dir:{tmp_path / 'folder'}", "--pretrained", "--split", "val"],
        "publish": [tmp_path / "folder", "--repo", "me/mine", "--dry-run"],
    }
    found = {}
    for name, (first, *rest) in lines.items():
        script = Path(SCRIPTS) / str(first) if name in ("train", "validate") else ROOT / f"hub/{name}.py"
        options = rest if name in ("train", "validate") else [first, *rest]
        line = [sys.executable, *map(str, (script, *options))]
        done = subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found[name] = done.stdout
    measured = json.loads(found["validate"].rpartition("--result")[2])["top1"]
    assert measured == pytest.approx(float(summary(tmp_path)[0]["eval_top1"]), abs=0.01)
    card = (tmp_path / "folder-upload/README.md").read_text()
    assert "**Classes**: 10: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9\n" in card
