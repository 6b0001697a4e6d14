"""Exported networks where only a runtime is installed, int8 beside float32, and the command that measures both."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.samples import fashion_mnist
from tests.versions import skip_before_torch_2_6

pytestmark = skip_before_torch_2_6(reason="PyTorch's exporters are older than these ways to ask")

BARE = """
import importlib.util, json, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
assert not [name for name in ("torch", "timm", "timm_gsop") if importlib.util.find_spec(name)]
import onnxruntime
answers = {}
for path in sys.argv[3:]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (x,) = session.get_inputs()
    answers[path] = session.run(None, {x.name: np.load(sys.argv[2])})[0]
np.savez(sys.argv[2] + ".answers", **answers)
print(json.dumps(sorted(answers)))
"""
NETWORKS = {
    "net1": ("gsop_preresnet20_net1.fashion_mnist", dict(pretrained=True)),
    "net2": ("gsop_preresnet20_net2.fashion_mnist", dict(pretrained=True)),
    "second_order": ("second_order", dict(backbone="test_resnet", num_classes=10, isqrt_dim=24)),
    "low rank": (
        "second_order",
        dict(backbone="test_vit", img_size=28, patch_size=7, num_classes=10, pool_kwargs=dict(rank=4)),
    ),
}
FEW = ("second_order",)  # net2 is in the test of int8


def create(name: str) -> nn.Module:
    model_name, kwargs = NETWORKS[name]
    return timm.create_model(model_name, **kwargs).eval()


def export(model: nn.Module, path: Path) -> Path:
    batch = torch.export.Dim("batch")
    example = torch.randn(2, 3, 28, 28)
    torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False).save(path)
    return path


def answers_of_bare_process(x: torch.Tensor, *paths: Path) -> list[torch.Tensor]:
    """Logits, computed by a Python that has NumPy and ONNX Runtime and nothing else."""
    folder = paths[0].parent
    installed = folder / "installed"
    installed.mkdir()
    for package in ("numpy", "onnxruntime"):
        for found in Path(importlib.util.find_spec(package).origin).parents[1].glob(f"{package}*"):
            (installed / found.name).symlink_to(found)
    np.save(folder / "images.npy", x.numpy())
    program = f"import sys; sys.path.insert(0, {str(installed)!r})\n{BARE}"
    arguments = [str(installed), str(folder / "images.npy"), *map(str, paths)]
    command = [sys.executable, "-I", "-S", "-c", program, *arguments]  # without site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == sorted(map(str, paths))
    found = np.load(folder / "images.npy.answers.npz")
    return [torch.from_numpy(found[str(path)]) for path in paths]


@pytest.mark.parametrize("names", [FEW, pytest.param([n for n in NETWORKS if n not in FEW], marks=pytest.mark.slow)])
def test_files_run_where_only_the_runtime_is(names, tmp_path):
    """Any batch; the logits are PyTorch's to 1e-5 of the largest."""
    images, _ = fashion_mnist()
    models = {name: create(name) for name in names}
    paths = [export(model, tmp_path / f"{name}.onnx") for name, model in models.items()]
    found = answers_of_bare_process(images[:7], *paths)
    for logits, model in zip(found, models.values(), strict=True):
        with torch.no_grad():
            expected = model(images[:7])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["net2", pytest.param("net1", marks=pytest.mark.slow)])
def test_static_int8_answers_as_float32_does(name, tmp_path):
    """As docs/deploy.md does it: half of the stored test images set the ranges, the other half are classified."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    from benchmarks.serving import Ranges

    images, labels = fashion_mnist()
    half = len(labels) // 2
    path = export(create(name), tmp_path / "float32.onnx")
    ranges = Ranges("x", [part.numpy() for part in images[:half].split(50)])
    options = dict(op_types_to_quantize=["Conv", "Gemm"], per_channel=True)
    quantization.quantize_static(path, tmp_path / "int8.onnx", ranges, **options)
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * path.stat().st_size
    float32, int8 = (a.argmax(1) for a in answers_of_bare_process(images[half:], path, tmp_path / "int8.onnx"))
    assert (int8 == float32).float().mean() >= 0.97
    assert (int8 == labels[half:]).float().mean() > (float32 == labels[half:]).float().mean() - 0.02


@pytest.mark.slow
def test_the_command_that_measures(tmp_path, monkeypatch):
    """On a small scale, with all parts."""
    from benchmarks import serving
    from docs.measured import proportion_table, requests_table, runtimes_table

    folder = tmp_path / "images"
    for split in ("train", "validation"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for i in range(100 if split == "validation" else 26):
                from PIL import Image

                Image.new("RGB", (32, 32), (25 * label, 2 * i, 90)).save(folder / split / str(label) / f"{i}.png")
    small = dict(BACKBONES=("test_resnet",), IMAGE=64, LARGE=("resnet50",), REQUESTS=4, SAMPLE_SECONDS=0.001)
    small["HEADS"] = {name: serving.HEADS[name] for name in ("isqrt, 32", "svpn")}
    for name, value in small.items():
        monkeypatch.setattr(serving, name, value)
    arguments = ["serving", "--rounds", "2", "--cifar10", str(folder), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    threads = torch.get_num_threads()
    serving.main()
    torch.set_num_threads(threads)
    proportion, runtimes, requests = (json.loads((tmp_path / f"{part}.json").read_text()) for part in serving.PARTS)
    assert proportion["rows"][0]["wrong"] == {"eager": [], "onnxruntime": [], "openvino": []}
    assert "| `test_resnet` | isqrt, 32 | 528 |" in proportion_table(proportion)
    assert "ONNX Runtime, int8" in runtimes_table(runtimes)
    assert all(row["invariance"] < 1e-5 for row in requests["rows"])
    assert "without its batch" in requests_table(requests)
