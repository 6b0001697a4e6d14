"""Publishing to and loading from the Hub, end to end: its real client and timm against a server on the loopback."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from tests.fresh_process import run_fresh
from tests.hub_server import TOKEN, HubServer
from tests.test_conversion import NARROW, in_their_names, isqrt_resnet, randomize, vanilla_resnet
from tests.test_other_families import SMALL_BASES
from tests.versions import skip_before_torch_2_6
from timm_gsop.hub.hub_folder import save_hub_folder

ROOT = Path(__file__).parents[1]
REPO = "timm-gsop/gsop_resnet50_net2.isqrt_in1k"  # where the bare name looks, once it is published
ON_THE_HUB = {".gitattributes", "README.md", "architecture.png", "config.json", "model.safetensors"}
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
        "PYTHONPATH": str(ROOT),
    }


def model_of(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return randomize(timm.create_model("gsop_resnet50_net2", **SMALL)).eval()


def logits_of(model: Callable[[torch.Tensor], torch.Tensor], size: int = 64) -> torch.Tensor:
    torch.manual_seed(3)
    torch.set_num_threads(1)  # as many as in the other process: to the bit
    with torch.inference_mode():
        return model(torch.randn(2, 3, size, size)).double()


def publish(folder: Path, env: dict[str, str], *options: str, repo: str = REPO) -> subprocess.CompletedProcess:
    return run_fresh("hub/publish.py", str(folder), "--repo", repo, *options, env=env, cwd=ROOT)


def release(env: dict[str, str], published: str, tmp_path: Path) -> dict[str, str]:
    """An environment with the package as its next release has it: with the line that publish.py printed."""
    (line,) = re.findall(r"^[0-9a-f]{64}  \S+/model\.safetensors$", published, re.MULTILINE)
    package = tmp_path / "release"
    shutil.copytree(ROOT / "timm_gsop", package / "timm_gsop", dirs_exist_ok=True)
    with (package / "timm_gsop/pretrained/SHA256SUMS").open("a") as sums:
        sums.write(f"{line}\n")
    return {**env, "PYTHONPATH": str(package)}


def create(env: dict[str, str], name: str, script: str = LOGITS, **kwargs) -> subprocess.CompletedProcess:
    return run_fresh("-c", script, name, json.dumps(kwargs), env=env)


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
    assert hub.repos[REPO]["main"].keys() == ON_THE_HUB
    assert sum("/commit/" in request for request in hub.requests) == 1
    env = release(env, done.stdout, tmp_path)

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


@skip_before_torch_2_6(reason="transformers needs a newer PyTorch")
def test_transformers_loads_what_was_published(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    assert_logits(create(env, REPO, TRANSFORMERS), logits_of(model))


def origin_of(hub, tmp_path) -> tuple[torch.nn.Module, str, dict]:
    """A network of iSQRT-COV, the address of its file, and what says so."""
    original = isqrt_resnet()
    torch.save(in_their_names(original), tmp_path / "origin.pth")
    content = (tmp_path / "origin.pth").read_bytes()
    name = f"/models/mpncovresnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    hub.files[name] = content
    return original, name, dict(SMALL, pretrained_cfg_overlay=dict(url=hub.url + name, num_classes=7))


def test_origin_before_publishing_and_hub_after(hub, env, tmp_path):
    original, name, given = origin_of(hub, tmp_path)
    done = create(env, "gsop_resnet50_net2", **given)
    assert_logits(done, logits_of(original), rtol=1e-4)  # neutral blocks
    assert hub.requests == [f"GET {name}"]

    hub.requests.clear()
    done = create({**env, "HF_HUB_OFFLINE": "1"}, "gsop_resnet50_net2", **given)
    assert_logits(done, logits_of(original), rtol=1e-4)  # of the cached origin
    assert hub.requests == []

    model = model_of(seed=1)
    save_hub_folder(model, tmp_path / "folder")
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    released = release(env, done.stdout, tmp_path)
    assert_logits(create(released, "gsop_resnet50_net2", **given), logits_of(model))
    assert f"GET {name}" not in hub.requests

    repos, hub.repos = hub.repos, {}  # the repository goes, with what was cached of it
    shutil.rmtree(env["HF_HOME"])
    done = create(released, "gsop_resnet50_net2", **given)
    assert_logits(done, logits_of(original), rtol=1e-4)
    assert "is not on the Hub: its weights come from their origin" in done.stderr
    hub.repos = repos


def test_nobody_else_serves_weights_under_a_name_of_ours(hub, env, tmp_path):
    """Before a name is published its repository is not asked; after it, other content there is not taken."""
    original, _, given = origin_of(hub, tmp_path)
    save_hub_folder(model_of(seed=2), tmp_path / "folder")
    done = publish(tmp_path / "folder", env)  # by someone who was first to claim the name
    assert done.returncode == 0, done.stderr
    hub.requests.clear()
    assert_logits(create(env, "gsop_resnet50_net2", **given), logits_of(original), rtol=1e-4)
    assert not any(REPO in request for request in hub.requests)

    digest = hub.repos[REPO]["main"]["model.safetensors"]
    others = release(env, done.stdout.replace(digest, digest[::-1]), tmp_path)
    done = create(others, "gsop_resnet50_net2", **given)
    assert done.returncode != 0
    assert f"its SHA-256 is {digest}, not {digest[::-1]}" in done.stderr.strip().splitlines()[-1]


def test_a_damaged_origin_is_refused(hub, env):
    hub.files["/models/mpncovresnet50-15991845.pth"] = b"something else"
    overlay = dict(pretrained_cfg_overlay=dict(url=f"{hub.url}/models/mpncovresnet50-15991845.pth"))
    done = create(env, "gsop_resnet50_net2", **SMALL, **overlay)
    assert done.returncode != 0
    assert "it sent another file, or a damaged one: its SHA-256 is" in done.stderr.strip().splitlines()[-1]
    assert not list(Path(env["TORCH_HOME"]).rglob("*.pth"))


QUOTA = "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"
VIRUS_SCAN = "<!DOCTYPE html><html><body>Google Drive can't scan this file for viruses.</body></html>"


def places(hub: HubServer, original: torch.nn.Module, tmp_path: Path) -> tuple[str, str, bytes, str]:
    """Addresses of the Drive copy and of the http server, the file, and a program's start that knows both."""
    torch.save(in_their_names(original), tmp_path / "origin.pth")
    content = (tmp_path / "origin.pth").read_bytes()
    file = f"mpncovresnet50-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    drive, server = "/download?id=ID&export=download&confirm=t", f"/models/{file}"
    program = f"""
from timm_gsop.pretrained import sources
class Source(sources.Source):
    addresses = ({hub.url + drive!r}, {hub.url + server!r})
row = sources.SOURCES[0]._replace(file={file!r}, url={hub.url + server!r})
sources.SOURCES = (Source(*row), *sources.SOURCES[1:])
"""
    return drive, server, content, program


@pytest.mark.parametrize("drive", ["file", QUOTA, VIRUS_SCAN, "cut", "corrupt", 503])
def test_a_released_file_is_asked_for_in_more_than_one_place(drive, hub, env, tmp_path):
    """Https first; whatever does not match the digest is refused, and the next place is tried."""
    original = isqrt_resnet()
    first, second, content, program = places(hub, original, tmp_path)
    hub.files = {first: QUOTA if drive == QUOTA else VIRUS_SCAN if drive == VIRUS_SCAN else content, second: content}
    hub.faults = [("GET /download", drive, 1)] if drive in ("cut", "corrupt", 503) else []
    given = dict(SMALL, pretrained_cfg_overlay=dict(url=hub.url + second, num_classes=7))
    done = create(env, "isqrt_resnet50", program + LOGITS, **{k: v for k, v in given.items() if k != "cov_dim"})
    assert_logits(done, logits_of(original))
    assert hub.requests == ["GET /download", *([] if drive == "file" else [f"GET {second}"])]
    assert [path.name for path in (Path(env["TORCH_HOME"]) / "hub/checkpoints").iterdir()] == [Path(second).name]


def test_what_to_do_by_hand_when_no_place_gives_the_file(hub, env, tmp_path):
    original = isqrt_resnet()
    first, second, _, program = places(hub, original, tmp_path)
    hub.files = {first: QUOTA, second: b"something else"}
    given = dict(SMALL, pretrained_cfg_overlay=dict(url=hub.url + second, num_classes=7))
    done = create(env, "gsop_resnet50_net2", program + LOGITS, **given)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for part in (
        f"of gsop_resnet50_net2.isqrt_in1k are not cached and cannot be had from {hub.url}{first}, {hub.url}{second}",
        "fetch the file in a browser (https://drive.google.com/file/d/19TWen7p9UDyM0Ueu9Gb22NtouR109C6j/view)",
        "pretrained_cfg_overlay=dict(file='PATH') from Python, --pretrained --pretrained-path PATH for train.py",
        "python hub/convert.py --from fast-mpn-cov PATH FOLDER",
        "it answered with a web page instead of the file: the quota of downloads is used up",
        f"it sent another file, or a damaged one: its SHA-256 is {hashlib.sha256(b'something else').hexdigest()}",
    ):
        assert part in last
    assert not [path for path in Path(env["TORCH_HOME"]).rglob("*") if path.is_file()]
    hub.requests.clear()
    done = create({**env, "HF_HUB_OFFLINE": "1"}, "gsop_resnet50_net2", program + LOGITS, **given)
    assert "HF_HUB_OFFLINE is set" in done.stderr.strip().splitlines()[-1]
    assert hub.requests == []


def test_the_whole_digest_is_recorded_and_then_demanded(hub, env, tmp_path):
    """hub/digest.py FILE, after somebody's first download: another file with the same eight digits is refused."""
    original = isqrt_resnet()
    _, second, content, _ = places(hub, original, tmp_path)
    file = tmp_path / Path(second).name
    file.write_bytes(content)
    package = tmp_path / "release"
    shutil.copytree(ROOT / "timm_gsop", package / "timm_gsop")
    released = {**env, "PYTHONPATH": str(package)}
    done = run_fresh("hub/digest.py", file, env=released, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    sums = package / "timm_gsop/pretrained/SHA256SUMS"
    line = f"{hashlib.sha256(content).hexdigest()}  origin/{file.name}"
    assert line in sums.read_text().splitlines()
    hub.files[second] = content
    given = {"isqrt_dim": 6, **NARROW, "num_classes": 7}
    given["pretrained_cfg_overlay"] = dict(url=hub.url + second, num_classes=7)
    assert_logits(create(released, "isqrt_resnet50", **given), logits_of(original))
    sums.write_text(
        sums.read_text().replace(line, line[:8] + line[8:64][::-1] + line[64:])
    )  # as a forger's file has it
    shutil.rmtree(env["TORCH_HOME"])
    done = create(released, "isqrt_resnet50", **given)
    assert done.returncode != 0
    assert "it sent another file" in done.stderr.strip().splitlines()[-1]
    file.write_bytes(b"another")
    done = run_fresh("hub/digest.py", file, env=released, cwd=ROOT)
    assert done.returncode == 1
    assert re.match("error: .* is damaged or another file: its SHA-256 is", done.stderr)


def test_a_backbone_without_network_says_what_to_do(env):
    for program in (
        ["-c", "import timm; timm.create_model('second_order', backbone='resnet18', pretrained=True)"],
        ["hub/convert.py", "--from", "timm", "resnet18.a1_in1k", "/tmp/nowhere", "--model", "gsop_resnet18_net1"],
    ):
        done = run_fresh(*program, env={**env, "HF_HUB_OFFLINE": "1"}, cwd=ROOT)
        assert done.returncode != 0
        last = done.stderr.strip().splitlines()[-1]
        assert "of resnet18.a1_in1k are not cached and cannot be had from the Hub as timm/resnet18.a1_in1k" in last
        assert "--pretrained --pretrained-path PATH for train.py. With HF_HUB_OFFLINE=1 nothing is tried" in last


def test_a_damaged_download_is_refused_and_a_cut_one_goes_on(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    env = release(env, done.stdout, tmp_path)
    hub.faults = [("GET /cdn/", "corrupt", 1)]
    done = create(env, "gsop_resnet50_net2", **BARE)
    assert done.returncode != 0
    assert "was damaged: its SHA-256 is" in done.stderr.strip().splitlines()[-1]
    hub.faults = [("GET /cdn/", "cut", 1)]
    assert_logits(create(env, "gsop_resnet50_net2", **BARE), logits_of(model))


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hub", "origin"])
def test_processes_that_download_or_find_a_damaged_file_together(place, hub, env, tmp_path):
    """As torchrun's: each of them ends well."""
    model, _, given = origin_of(hub, tmp_path)
    if place == "hub":
        model = model_of()
        save_hub_folder(model, tmp_path / "folder")
        done = publish(tmp_path / "folder", env)
        assert done.returncode == 0, done.stderr
        env = release(env, done.stdout, tmp_path)
    command = [sys.executable, "-c", LOGITS, "gsop_resnet50_net2", json.dumps(given)]
    for _ in ("nothing is cached", "what is cached is damaged"):
        together = [
            subprocess.Popen(command, cwd="/", env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        for process in together:
            stdout, stderr = process.communicate(timeout=300)
            done = subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
            assert_logits(done, logits_of(model), rtol=1e-4)
        cached = [
            *(path for path in Path(env["HF_HOME"]).rglob("blobs/*") if path.stat().st_size > 100_000),
            *Path(env["TORCH_HOME"]).rglob("*.pth"),
        ]
        assert len(cached) == 1
        cached[0].write_bytes(b"damaged")


@pytest.mark.slow
def test_a_gated_repository_says_so(hub, env, tmp_path):
    save_hub_folder(model_of(), tmp_path / "folder")
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 0, done.stderr
    hub.gated.add(REPO)
    done = create(release(env, done.stdout, tmp_path), "gsop_resnet50_net2", **BARE)
    assert done.returncode != 0
    assert f"The repository is gated: accept its conditions at https://huggingface.co/{REPO}" in done.stderr


TIMMS = {
    "gsop_resnet50_net1": ("resnet50.a1_in1k", vanilla_resnet, dict(NARROW, last_stride=2)),
    "gsop_densenet121_net2": ("densenet121.ra_in1k", "densenet121", SMALL_BASES["densenet121"]),
    "gsop_inception_v3_net1": ("inception_v3.tv_in1k", "inception_v3", SMALL_BASES["inception_v3"]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gsop_resnet50_net1" else pytest.mark.slow) for name in TIMMS]
)
def test_timms_own_weights(name, hub, env, tmp_path):
    """From its repository, with what timm's weights of Inception-v3 have besides; a new head is said."""
    origin, make, small = TIMMS[name]
    options = dict(aux_logits=True) if "inception" in origin else {}
    if isinstance(make, str):
        original = randomize(timm.create_model(make, num_classes=7, **small, **options)).eval()
    else:
        original = make()
    safetensors.torch.save_file(original.state_dict(), tmp_path / "model.safetensors")
    hub.repos[f"timm/{origin}"] = {"main": hub.new_branch()}
    hub.private[f"timm/{origin}"] = False
    hub.repos[f"timm/{origin}"]["main"]["model.safetensors"] = hub.keep((tmp_path / "model.safetensors").read_bytes())
    given = dict(small, cov_dim=4, num_classes=7, pretrained_cfg_overlay=dict(num_classes=7))
    script = LOGITS.replace("64, 64", "80, 80")
    if name.endswith("net1"):
        original.aux_logits = False
        done = create(env, name, script, **given)
        assert_logits(done, logits_of(original, 80), rtol=1e-4)
        assert "another head" not in done.stderr
    else:
        script = LOGITS.replace("model(torch.randn(2, 3, 64, 64))", "model.forward_features(torch.randn(2, 3, 80, 80))")
        done = create(env, name, script, **given, isqrt_dim=6)
        assert_logits(done, logits_of(original.forward_features, 80), rtol=1e-4)
        (line,) = [line for line in done.stderr.splitlines() if "another head" in line]
        assert "Untrained: classifier.bias, classifier.weight, global_pool.reduction" in line
    offline = create({**env, "HF_HUB_OFFLINE": "1"}, name, script, **given)
    assert offline.returncode == 0, offline.stderr  # cached
    done = create({**env, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}, name, **given)
    assert f"are not cached and cannot be had from the Hub as timm/{origin}" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("fault", [pytest.param(500, marks=pytest.mark.slow), "cut"])
def test_a_hub_that_does_not_answer(hub, env, tmp_path, fault):
    hub.faults = [("HEAD /timm-gsop/", fault, 99)]
    env = release(env, f"{'0' * 64}  {REPO}/model.safetensors", tmp_path)
    done = create(env, "gsop_resnet50_net2", **BARE)
    assert done.returncode != 0
    assert "are not cached and cannot be had from the Hub" in done.stderr.strip().splitlines()[-1]


def test_an_interrupted_upload_is_run_again(hub, env, tmp_path):
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    hub.faults = [("POST .*/commit/", "cut", 1)]
    done = publish(tmp_path / "folder", env)
    assert done.returncode == 1
    assert hub.repos[REPO]["main"].keys() == {".gitattributes"}  # nothing half-published
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
        pytest.param([("POST .*/preupload/", 404, 9)], TOKEN, "404", marks=pytest.mark.slow),
        pytest.param([("POST .*/commit/", 409, 9)], TOKEN, "409", marks=pytest.mark.slow),
        pytest.param([("POST .*/commit/", 507, 9)], TOKEN, "507", marks=pytest.mark.slow),
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
    assert hub.repos.get(REPO, {}).get("main", {}).keys() <= {".gitattributes"}


def test_pull_request_branch_and_privacy(hub, env, tmp_path):
    save_hub_folder(model_of(), tmp_path / "folder")
    done = publish(tmp_path / "folder", env, "--private", "--create-pr")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("/discussions/1")
    assert hub.private[REPO]
    assert hub.repos[REPO]["main"].keys() == {".gitattributes"}
    assert "model.safetensors" in hub.repos[REPO]["refs/pr/1"]
    done = publish(tmp_path / "folder", env, "--revision", "v2")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repos[REPO]["v2"]
    assert_logits(create(env, f"hf-hub:{REPO}@v2"), logits_of(model_of()))


@pytest.mark.slow
def test_what_the_hubs_client_downloaded_is_published_again(hub, env, tmp_path):
    """With ``.gitattributes`` and the client's ``.cache``, which stay where they are."""
    model = model_of()
    save_hub_folder(model, tmp_path / "folder")
    assert publish(tmp_path / "folder", env).returncode == 0
    download = "import sys; from huggingface_hub import snapshot_download as d; d(sys.argv[1], local_dir=sys.argv[2])"
    command = [sys.executable, "-c", download, REPO, str(tmp_path / "local")]
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
    assert {path.name for path in (tmp_path / "local").iterdir()} == {*ON_THE_HUB, ".cache"}
    done = publish(tmp_path / "local", env, repo="me/mine")
    assert done.returncode == 0, done.stderr
    assert hub.repos["me/mine"]["main"].keys() == ON_THE_HUB
    assert_logits(create(env, "hf-hub:me/mine"), logits_of(model))
