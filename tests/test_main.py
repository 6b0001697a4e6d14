import json
import os
import re
import socket
import subprocess
import sys

import pytest
import timm
import torch

import timm_gsop
from timm_gsop.__main__ import main

SHIPPED = "gsop_preresnet20_net1"
ON_THE_HUB = "gsop_resnet50_net1"


@pytest.fixture(autouse=True)
def nothing_connects(monkeypatch, tmp_path):
    """The caches are empty, and whatever asks for a connection fails."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"connects: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


def printed(capsys, *arguments: str) -> str:
    main(arguments)
    return capsys.readouterr().out


def test_versions_and_every_model(capsys):
    found = json.loads(printed(capsys, "--json"))
    assert (found["timm_gsop"], found["torch"], found["timm"]) == (
        timm_gsop.__version__,
        torch.__version__,
        timm.__version__,
    )
    assert found["device"].startswith(("cpu", "cuda", "mps"))
    assert set(found["models"]) >= {*timm.list_models("*gsop_*"), *timm.list_models("isqrt_*"), "preresnet20"}
    assert "resnet50" not in found["models"]
    with_weights = {f"{name}.{item['tag']}" for name, items in found["models"].items() for item in items}
    assert with_weights == {name for name in timm.list_pretrained() if name.split(".")[0] in found["models"]}


def test_states_of_weights(capsys, tmp_path):
    def states() -> dict[str, str]:
        models = json.loads(printed(capsys, "--json"))["models"]
        return {name: items[0]["state"] if items else "none" for name, items in models.items()}

    before = states()
    assert before[SHIPPED] == "ships"
    assert before[ON_THE_HUB] == "on the Hub"
    assert before["isqrt_resnet50"] == "at its origin"
    assert before["gsop_preresnet56_net1"] == "none"
    cfg = timm.get_pretrained_cfg(ON_THE_HUB)
    repository = tmp_path / f"hub/models--{cfg.hf_hub_id.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model.safetensors").touch()
    origin = tmp_path / "torch/hub/checkpoints" / timm.get_pretrained_cfg("isqrt_resnet50").url.rpartition("/")[2]
    origin.parent.mkdir(parents=True)
    origin.touch()
    after = states()
    changed = {name for name in after if after[name] != before[name]}
    assert changed >= {ON_THE_HUB, "isqrt_resnet50"}
    assert {after[name] for name in changed} == {"cached"}


def test_text_has_a_line_for_each_model(capsys):
    lines = printed(capsys).splitlines()
    assert lines[0].startswith(f"timm-gsop {timm_gsop.__version__}, timm {timm.__version__}, torch ")
    assert any(line.split()[:2] == [f"{SHIPPED}.cifar10", "ships"] for line in lines)
    assert any(line.split() == ["gsop_preresnet56_net1", "none"] for line in lines)
    (line,) = (line for line in lines if line.startswith("gsop_resnet50_net1."))
    assert re.split("  +", line)[1:] == ["on the Hub", "neutral blocks", "timm/resnet50.a1_in1k"]
    (line,) = (line for line in lines if line.startswith("gsop_resnet152_net2."))
    assert "  neutral blocks, new head  " in line
    (line,) = (line for line in lines if line.startswith("mpncov_resnet50."))
    assert "  new head  " in line


def test_kernels_say_what_turned_them_off(monkeypatch, capsys):
    monkeypatch.setenv("TIMM_GSOP_KERNELS", "0")
    assert "GPU kernels: off (TIMM_GSOP_KERNELS=0)" in printed(capsys)
    monkeypatch.delenv("TIMM_GSOP_KERNELS")
    found = json.loads(printed(capsys, "--json"))["kernels"]
    assert found["active"] == (not found["reason"])
    assert torch.cuda.is_available() or not found["active"]


@pytest.mark.parametrize("variable", ["TIMM_GSOP_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_autoload_says_what_turned_it_off(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "0")
    assert f"autoload: off ({variable}=0)" in printed(capsys)


def test_autoload_says_what_a_new_process_does(capsys):
    """What is said of autoload is what happens where only timm is imported."""
    code = "import timm, sys; sys.exit('gsop_resnet50_net1' not in timm.list_models())"
    registered = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), check=False).returncode == 0
    assert json.loads(printed(capsys, "--json"))["autoload"]["active"] == registered
