"""First contact with released weights, end to end, against a server on the loopback."""

import hashlib
import io
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from tests.fresh_process import run_fresh
from tests.hub_server import HubServer
from tests.test_conversion import NARROW, in_their_names, isqrt_resnet
from timm_gsop.hub.contact import make_contact
from timm_gsop.pretrained.sources import SOURCES, Source

ROOT = Path(__file__).parents[1]
SCRIPTS = os.environ.get("TIMM_SCRIPTS")
# As timm's validate.py writes its result.
STAND_IN = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for option in ("--model", "--data-dir", "--device"):
    parser.add_argument(option, required=True)
parser.add_argument("--pretrained", action="store_true", required=True)
args = parser.parse_args()
config = json.loads(pathlib.Path(args.model.removeprefix("local-dir:"), "config.json").read_text())
images = len(list(pathlib.Path(args.data_dir).rglob("*.png")))
print("--result\\n" + json.dumps({"top1_err": float(config["num_classes"]), "top5_err": float(images)}))
"""


@pytest.fixture
def hub(tmp_path):
    (tmp_path / "hub").mkdir()
    with HubServer(tmp_path / "hub") as server:
        yield server


def local_sources(hub: HubServer) -> tuple[Source, ...]:
    """The sources, their files narrow and on the loopback: Drive gives a page, then the file; the last has another."""
    file = io.BytesIO()
    torch.save(in_their_names(isqrt_resnet()), file)
    content = file.getvalue()
    head = hashlib.sha256(content).hexdigest()[:8]

    class Local(Source):
        addresses = property(lambda self: (f"{hub.url}/drive/{self.drive_id}", f"{hub.url}/http/{self.file}"))

    first = SOURCES[0]._replace(file=f"mpncovresnet50-{head}.pth", model_kwargs=dict(NARROW))
    second = SOURCES[1]._replace(model_kwargs=dict(NARROW))
    last = SOURCES[2]._replace(model_kwargs=dict(NARROW))
    hub.files = {
        f"/drive/{first.drive_id}": "<html>Quota exceeded</html>",
        f"/http/{first.file}": content,
        f"/drive/{second.drive_id}": b"not what its digest says",
        f"/drive/{last.drive_id}": content,
    }
    return tuple(Local(*source) for source in (first, second, last))


@pytest.mark.parametrize(
    "validate",
    [
        "stand-in",
        pytest.param("timm's", marks=[pytest.mark.slow, pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS")]),
    ],
)
def test_from_download_to_report(validate, hub, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sources = local_sources(hub)
    script = tmp_path / "validate.py" if validate == "stand-in" else Path(SCRIPTS) / "validate.py"
    if validate == "stand-in":
        script.write_text(STAND_IN)
    for name in "abcdefg":
        (tmp_path / "imagenet/val" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "imagenet/val" / name / "0.png")
    out = tmp_path / "out"
    first, second, last = make_contact(out, tmp_path / "imagenet", script, sources)
    assert first["loaded"]
    assert first["address"].endswith(sources[0].file)  # Drive's page is refused
    assert first["sha256"].startswith(sources[0].file.partition("-")[2].partition(".")[0])
    if validate == "stand-in":
        assert (first["top1_err"], first["top5_err"]) == (7.0, 7.0)
    else:
        assert first["top1_err"] == pytest.approx(100 * 6 / 7, abs=0.01)  # the same image seven times
    assert not second["loaded"]
    assert "it sent another file, or a damaged one" in second["error"]
    assert "HTTP Error 404" in second["error"]
    assert last["loaded"]
    assert timm.create_model(f"local-dir:{out}/isqrt_resnet50-{sources[0].file[:-4]}", pretrained=True).num_classes == 7
    report = (out / "report.md").read_text()
    assert (
        f"| `{sources[0].file}` | `isqrt_resnet50` | on {first['loaded']}, SHA-256 {first['sha256'][:8]}…, " in report
    )
    assert "% by timm's validate.py |" in report
    assert f"| `{sources[1].file}` | `isqrt_resnet101` | no: " in report
    assert f"{first['sha256']}  origin/{sources[0].file}" in report
    assert json.loads((out / "report.json").read_text()) == [first, second, last]

    hub.requests.clear()
    make_contact(out, sources=sources[:1])
    assert hub.requests == []  # what is there is not downloaded again


def test_command_line(tmp_path):
    """Without network each source says why not."""
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    done = run_fresh("hub/first_contact.py", tmp_path / "out", env=env, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout.count("| no: https://drive.usercontent.google.com/download?id=") == len(SOURCES)
    assert "http://jtxie.com/models/mpncovresnet50-15991845.pth: " in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md"}
    done = run_fresh("hub/first_contact.py", tmp_path / "out", "--imagenet", tmp_path, env=env, cwd=ROOT)
    assert done.returncode == 2
    assert "needs this folder, and timm's validate.py in --timm-scripts DIR" in done.stderr
