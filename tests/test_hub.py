"""Publishing to and loading from the Hub, end to end: its real client and timm against a server on the loopback."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.hub_server import TOKEN, HubServer
from tests.test_conversion import NARROW, in_their_names, isqrt_resnet, randomize
from timm_gsop.hub.hub_folder import save_hub_folder

ROOT = Path(__file__).parents[1]
REPO = "timm-gsop/gsop_resnet50_net2.isqrt_in1k"  # where the bare name looks
SMALL = dict(NARROW, cov_dim=8, isqrt_dim=6, num_classes=7)
BARE = dict(SMALL, pretrained_cfg_overlay=dict(num_classes=7))  # the published ones have 1 000
LOGITS = """
import sys, json, torch, timm
name, kwargs = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
model = timm.create_model(name, pretrained=True, **kwargs).eval()
torch.manual_seed(3)
with torch.inference_mode():
    print(json.dumps(model(torch.randn(2, 3, 64, 64)).double().tolist()))
"""
TRANSFORMERS = """
import sys, json, torch
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
torch.manual_seed(3)
with torch.inference_mode():
    print(json.dumps(model(torch.randn(2, 3, 64, 64)).logits.double().tolist()))
"""


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def env(hub, tmp_path) -> dict[str, str]:
    """Environment of a fresh process that knows no Hub but ours."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "TORCH_HOME": str(tmp_path / "torch"),
        "HF_HUB_DISABLE_XET": "1",  # another protocol, for the Hub's own storage
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
    }


def model_of(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomize(timm.create_model("gsop_resnet50_net2", **SMALL)).eval()


def logits_of(model: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(3)
    torch.set_num_threads(1)  # as many as in the other process: to the bit
    with torch.inference_mode():
        return model(torch.randn(2, 3, 64, 64)).double()


def publish(folder: Path, env: dict[str, str], *options: str, repo: str = REPO) -> subprocess.CompletedProcess:
    command = [sys.executable, "hub/publish.py", str(folder), "--repo", repo, *options]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def create(env: dict[str, str], name: str, script: str = LOGITS, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, name, json.dumps(kwargs)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def assert_logits(done: subprocess.CompletedProcess, expected: torch.Tensor, rtol: float = 0.0) -> None:
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def test_publish_load_cache_and_offline(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    expected = logits_of(model)

    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    assert hub.url in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert hub.repos[REPO]["main"].keys() == {"README.md", "architecture.png", "config.json", "model.safetensors"}
    assert sum("/commit/" in request for request in hub.requests) == 1

    assert_logits(create(env, f"hf-hub:{REPO}"), expected)
    assert_logits(create(env, "gsop_resnet50_net2", **BARE), expected)  # the bare name, cached by now
    hub.shutdown()
    hub.server_close()
    assert_logits(create(env, "gsop_resnet50_net2", **BARE), expected)  # the server is gone
    assert_logits(create({**env, "HF_HUB_OFFLINE": "1"}, f"hf-hub:{REPO}"), expected)

    empty = {**env, "HF_HOME": str(tmp_path / "empty")}
    for offline in ("0", "1"):
        done = create({**empty, "HF_HUB_OFFLINE": offline}, "gsop_resnet50_net2", **BARE)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert "weights of gsop_resnet50_net2.isqrt_in1k are not cached and cannot be had from the Hub" in last
        assert "Connect to the network and try again, or pass a copy" in last


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="transformers needs a newer PyTorch")
def test_transformers_loads_what_was_published(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    assert_logits(create(env, REPO, TRANSFORMERS), logits_of(model))


def test_origin_before_publishing_and_hub_after(hub, env, tmp_path):
    original = isqrt_resnet()
    torch.save(in_their_names(original), tmp_path / "origin.pth")
    content = (tmp_path / "origin.pth").read_bytes()
    name = f"/models/mpncovresnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    hub.files[name] = content
    overlay = dict(pretrained_cfg_overlay=dict(url=hub.url + name, num_classes=7))

    done = create(env, "gsop_resnet50_net2", **SMALL, **overlay)
    assert_logits(done, logits_of(original), rtol=1e-4)  # neutral blocks
    assert f"{REPO} is not on the Hub: its weights come from their origin" in done.stderr
    assert f"GET {name}" in hub.requests

    hub.requests.clear()
    done = create({**env, "HF_HUB_OFFLINE": "1"}, "gsop_resnet50_net2", **SMALL, **overlay)
    assert_logits(done, logits_of(original), rtol=1e-4)  # of the cached origin
    assert hub.requests == []

    model = model_of(seed=1)
    save_hub_folder(model, tmp_path / "folder")
    assert publish(tmp_path / "folder", env).returncode == 0
    assert_logits(create(env, "gsop_resnet50_net2", **SMALL, **overlay), logits_of(model))
    assert f"GET {name}" not in hub.requests


def test_a_damaged_origin_is_refused(hub, env):
    hub.files["/models/mpncovresnet50-15991845.pth"] = b"something else"
    overlay = dict(pretrained_cfg_overlay=dict(url=f"{hub.url}/models/mpncovresnet50-15991845.pth"))
    done = create(env, "gsop_resnet50_net2", **SMALL, **overlay)
    assert done.returncode != 0
    assert "invalid hash value" in done.stderr.strip().splitlines()[-1]
    assert not list(Path(env["TORCH_HOME"]).rglob("*.pth"))


def test_a_damaged_download_is_refused_and_a_cut_one_goes_on(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    assert publish(tmp_path / "folder", env).returncode == 0
    hub.faults = [("GET /cdn/", "corrupt", 1)]
    done = create(env, "gsop_resnet50_net2", **BARE)
    assert done.returncode != 0
    assert "was damaged: its SHA-256 is" in done.stderr.strip().splitlines()[-1]
    hub.faults = [("GET /cdn/", "cut", 1)]
    assert_logits(create(env, "gsop_resnet50_net2", **BARE), logits_of(model))


@pytest.mark.parametrize("fault", [500, "cut"])
def test_a_hub_that_does_not_answer(hub, env, fault):
    hub.faults = [("HEAD /timm-gsop/", fault, 99)]
    done = create(env, "gsop_resnet50_net2", **BARE)
    assert done.returncode != 0
    assert "are not cached and cannot be had from the Hub" in done.stderr.strip().splitlines()[-1]


def test_an_interrupted_upload_is_run_again(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    hub.faults = [("POST .*/commit/", "cut", 1)]
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 1
    assert hub.repos[REPO] == {"main": {}}  # nothing half-published
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"error: {REPO} was not published. ")

    hub.requests.clear()
    hub.faults = [("POST .*/preupload/", 500, 1)]  # which its client tries again by itself
    assert publish(tmp_path / "folder", env).returncode == 0
    assert not any(request.startswith("PUT") for request in hub.requests)  # large files were there already
    assert_logits(create(env, f"hf-hub:{REPO}"), logits_of(model))


@pytest.mark.parametrize(
    ("faults", "token", "message"),
    [
        ([], "", "There is no token for the Hub: run `hf auth login`."),
        ([], "hf_wrong", "401"),
        ([("POST /api/repos/create", 403, 9)], TOKEN, "403"),
        ([("POST .*/preupload/", 404, 9)], TOKEN, "404"),
        ([("POST .*/commit/", 409, 9)], TOKEN, "409"),
        ([("POST .*/commit/", 507, 9)], TOKEN, "507"),
    ],
)
def test_every_refusal_is_one_line(hub, env, tmp_path, faults, token, message):
    save_hub_folder(model_of(), tmp_path / "folder")
    hub.faults = faults
    done = publish(tmp_path / "folder", {**env, "HF_TOKEN": token, "HF_TOKEN_PATH": str(tmp_path / "none")})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    error = done.stderr.strip().splitlines()[-1]  # after the client's progress bars
    assert error.startswith("error: ")
    assert message in error
    assert "hf_" not in error
    assert not any(hub.repos.get(REPO, {}).get("main", {}))


def test_pull_request_branch_and_privacy(hub, env, tmp_path):
    save_hub_folder(model_of(), tmp_path / "folder")
    done = publish(tmp_path / "folder", env, "--private", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/discussions/1")
    assert hub.private[REPO]
    assert hub.repos[REPO]["main"] == {}
    assert "model.safetensors" in hub.repos[REPO]["refs/pr/1"]
    done = publish(tmp_path / "folder", env, "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repos[REPO]["v2"]
    assert_logits(create(env, f"hf-hub:{REPO}@v2"), logits_of(model_of()))
