"""What the benchmarks compare computes the same, what they measure is right, and docs show what was measured."""

import json
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import speed, update
from benchmarks.textbook import TextbookChannelGsop, TextbookCovPool2d, exact_root
from benchmarks.timing import Checkout, peak_bytes, run_of, saved_bytes, time_paired
from timm_gsop.hub.model_card import count_macs, model_macs
from timm_gsop.layers import ChannelGsop, IsqrtCovPool2d, MpnCovPool2d

ROOT = Path(__file__).parents[1]
PAIRS = {
    "block": (lambda: ChannelGsop(12, 8), lambda: TextbookChannelGsop(12, 8)),
    "head": (lambda: IsqrtCovPool2d(12, 8), lambda: TextbookCovPool2d(12, 8)),
    "eigh": (lambda: MpnCovPool2d(12, 8), lambda: TextbookCovPool2d(12, 8, root=exact_root)),
}
MATRIX = 4 * 64**2 * 2  # bytes of two float32 matrices of 64²


@pytest.mark.parametrize("pair", PAIRS)
def test_the_textbook_computes_the_same(pair):
    ours, textbook = (create().double() for create in PAIRS[pair])
    textbook.load_state_dict(ours.state_dict())
    x = torch.randn(4, 12, 7, 7, dtype=torch.float64, requires_grad=True)
    results = [module(x) for module in (ours, textbook)]
    weight = torch.randn_like(results[0])
    torch.testing.assert_close(*results)
    torch.testing.assert_close(*(torch.autograd.grad((result * weight).sum(), x) for result in results))


def test_the_head_keeps_less_than_half_of_the_textbooks_memory():
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    assert saved_bytes(IsqrtCovPool2d(16, 64), x) < 0.5 * saved_bytes(TextbookCovPool2d(16, 64), x)


def test_saved_memory_by_hand():
    x = torch.randn(2, 64, 64, requires_grad=True)
    assert saved_bytes(nn.Sigmoid(), x) == MATRIX  # its output
    assert saved_bytes(nn.Linear(64, 64), x) == 0  # its input and weight, which exist anyway


def test_peak_memory_by_hand():
    x = torch.randn(2, 64, 64)
    assert peak_bytes(lambda: x.clone()) == MATRIX
    assert peak_bytes(lambda: (x.clone(), x.clone())) == 2 * MATRIX
    assert peak_bytes(lambda: [x.clone() is None for _ in range(3)]) == MATRIX


def test_timings_are_relative_to_the_first():
    timings = time_paired({"a": lambda: sum(range(10_000)), "b": lambda: sum(range(200_000))}, rounds=5)
    assert timings["a"]["ratio"] == timings["a"]["low"] == timings["a"]["high"] == 1
    assert timings["b"]["ratio"] > 2


@pytest.mark.parametrize("training", [False, True])
def test_what_is_timed_leaves_no_gradients(training):
    module, x = nn.Linear(3, 2), torch.randn(4, 3, requires_grad=training)
    passes = []
    module.register_full_backward_hook(lambda *_: passes.append("backward"))
    module.register_forward_hook(lambda *_: passes.append("forward"))
    work = run_of(module, x, training)
    passes.clear()
    work()
    assert passes == ["forward", "backward"][: 1 + training]
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


def test_operations_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 3)).eval()
    assert model_macs(model, (3, 6, 6)) == {"": 864 + 1152, "0": 864, "1": 0, "2": 1152}
    assert count_macs(lambda: torch.ones(2, 3) @ torch.ones(3, 5))[""] == 30
    assert model_macs(IsqrtCovPool2d(4, 8), (4, 3, 3))[""] == 4 * 8 * 9 + 8 * 8 * 9 + 12 * 8**3
    assert model_macs(IsqrtCovPool2d(4, 8), (4, 2, 2))[""] == 4 * 8 * 4 + 8 * 8 * 4 + 12 * 4**3 + 2 * 8 * 4**2


def test_another_checkout(tmp_path):
    """Its package is the one that runs."""
    (tmp_path / "timm_gsop").mkdir()
    code = (
        "from torch.nn import Linear\nclass Twice(Linear):\n    def forward(self, x): return super().forward(x.clone())"
    )
    (tmp_path / "timm_gsop/__init__.py").write_text(code)
    other = Checkout(tmp_path)
    assert other.ask("Twice", [64, 64], [64, 64], False, False, "cpu") >= 2 * MATRIX / 2
    assert other.ask(3) == 0


def test_a_folder_without_the_package_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no timm_gsop; accepted"):
        Checkout(tmp_path)


def test_the_command_that_measures(tmp_path, monkeypatch, capsys):
    """On a small scale."""
    for name, value in dict(STAGES=((16, 4), (24, 2)), HEAD=(16, 4), COV_DIM=8, HEAD_DIM=8).items():
        monkeypatch.setattr(speed, name, value)
    file = tmp_path / "pieces.json"
    monkeypatch.setattr(sys, "argv", ["speed", "pieces", "--batch", "2", "--rounds", "2", "--json", str(file)])
    speed.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["part"] for row in rows] == ["four blocks", "four blocks", "head", "excitation"]
    assert all(timing["seconds"] > 0 for row in rows for timing in row["alternatives"].values())
    assert "square root" in capsys.readouterr().out


def test_one_command_measures_all_of_a_gpu(tmp_path, monkeypatch, capsys):
    """On a small scale, and here without one. Compiled networks are left out."""
    few = {"gsop_resnet50_net1": ("gsop_preresnet20_net1.untrained", dict(depth=1, cov_dim=4))}
    small = dict(STAGES=((16, 4),), HEAD=(16, 4), COV_DIM=8, HEAD_DIM=8, IMAGE=32, BATCHES_GPU=(8, 4), SIDE=64)
    small.update(COPIED=2**10, TWIN=("preresnet20.untrained", dict(depth=1)), WAYS={"inference": few, "training": few})
    for name, value in small.items():
        monkeypatch.setattr(speed, name, value)
    monkeypatch.setenv("TIMM_GSOP_KERNELS", "1")  # restored at the end
    file = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["speed", "gpu", "--device", "cpu", "--rounds", "2", "--json", str(file)])
    speed.main()
    rows = json.loads(file.read_text())["rows"]
    assert [(row.get("way"), row.get("kind"), row["batch"]) for row in rows] == [
        *((way, None, batch) for batch in (8, 4) for way in ("inference", "training")),
        *((None, kind, 2) for kind in ("block", "block", "head", "head")),
    ]
    for row in rows:
        name = "gsop_resnet50_net1" if "way" in row else "ours"
        assert {name, f"{name}{speed.WITHOUT}"} <= set(row["alternatives"])


@pytest.mark.parametrize(("setting", "expected"), [("on", "1"), ("off", "0"), ("both", "1")])
def test_kernels_are_set_while_a_work_runs(setting, expected, monkeypatch):
    monkeypatch.setenv("TIMM_GSOP_KERNELS", "")
    seen = []
    works = speed.with_and_without({"a": lambda: seen.append(os.environ["TIMM_GSOP_KERNELS"])}, ["a"], setting)
    for work in works.values():
        work()
    assert seen == [expected, "0"][: len(works)]
    assert len(works) == 1 + (setting == "both")


def test_the_pages_say_what_was_measured():
    for page, texts in runpy.run_path(str(ROOT / "docs/measured.py"))["contents"]().items():
        text = (ROOT / page).read_text()
        assert update(text, texts) == text
        assert all(content in text for content in texts.values())


def test_exponent_by_hand():
    exponent = runpy.run_path(str(ROOT / "docs/measured.py"))["exponent"]
    assert exponent([1, 2, 4], [7.0, 3.0, 24.0]) == pytest.approx(3)
