"""The weights that ship: what they answer to real test images, and the results that docs/results.md shows."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from tests.fashion_mnist import sample
from timm_gsop.hub import convert, stage
from timm_gsop.pretrained.locate import SHIPPED

ROOT = Path(__file__).parents[1]
SHIP = ("gsop_preresnet20_net1", "gsop_preresnet20_net2")
# Of the 500 stored ones, which are the first of the test set; of all 10 000 the configuration tells.
TOP1 = {"gsop_preresnet20_net1": 93.2, "gsop_preresnet20_net2": 93.6}


@pytest.mark.parametrize("name", SHIP)
def test_answers_to_real_images(name):
    """The golden logits, and with them the accuracy."""
    model = timm.create_model(name, pretrained=True).eval()
    images, labels = sample()
    with torch.inference_mode():
        logits = model(images)
    golden = safetensors.torch.load_file(SHIPPED / f"{name}.fashion_mnist.golden.safetensors")["logits"]
    torch.testing.assert_close(logits, golden, rtol=1e-3, atol=1e-3)
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert 100 * accuracy == pytest.approx(TOP1[name], abs=0.21)  # one image may stand on the border


def test_works_offline_and_on_grey_images(tmp_path):
    """In a fresh process without import and network; one channel is three equal ones."""
    code = f"""
import json, timm, torch
from tests.fashion_mnist import sample
images = sample()[0][:8]
for name in {SHIP}:
    model = timm.create_model(name, pretrained=True).eval()
    grey = timm.create_model(name + ".fashion_mnist", pretrained=True, in_chans=1).eval()
    with torch.inference_mode():
        torch.testing.assert_close(grey(images[:, :1]), model(images), rtol=1e-3, atol=1e-3)
        print(json.dumps(model(images).argmax(1).tolist()))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, answers in zip(SHIP, done.stdout.splitlines(), strict=True):
        golden = safetensors.torch.load_file(SHIPPED / f"{name}.fashion_mnist.golden.safetensors")["logits"]
        assert json.loads(answers) == golden[:8].argmax(1).tolist()


@pytest.mark.parametrize("name", SHIP)
def test_configuration(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.tag == "fashion_mnist"
    assert cfg.license == "apache-2.0"
    assert len(cfg.label_names) == cfg.num_classes == 10
    assert any(note.startswith("measured: top-1 9") and "validate.py" in note for note in cfg.notes)
    assert os.path.getsize(cfg.file) <= 3e6
    assert f"{name}.fashion_mnist" in timm.list_pretrained("gsop*")


@pytest.mark.parametrize("name", SHIP)
def test_an_image_through_timms_transform(name):
    """The README's way, from a picture to a label."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images, labels = sample()
    boot = (images[0, 0] * 0.353 + 0.286).mul(255).round().to(torch.uint8).numpy()
    with torch.inference_mode():
        (answer,) = model(transform(Image.fromarray(boot).convert("RGB"))[None]).argmax(1).tolist()
    assert model.pretrained_cfg["label_names"][answer] == "Ankle boot"
    assert answer == labels[0]


def test_other_classes_and_features():
    model = timm.create_model("gsop_preresnet20_net2", pretrained=True, num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    backbone = timm.create_model("gsop_preresnet20_net2", pretrained=True, features_only=True).eval()
    whole = timm.create_model("gsop_preresnet20_net2", pretrained=True).eval()
    x = sample()[0][:2]
    torch.testing.assert_close(backbone(x)[0], whole.stem(x))


def test_a_shipped_network_can_be_published(tmp_path):
    convert("timm", "gsop_preresnet20_net2.fashion_mnist", tmp_path / "folder")
    stage(tmp_path / "folder", "timm-gsop/gsop_preresnet20_net2.fashion_mnist", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    assert "zalando-datasets/fashion_mnist" in card
    assert "**measured**: top-1 9" in card
    loaded = timm.create_model(f"local-dir:{tmp_path / 'staged'}", pretrained=True).eval()
    x = sample()[0][:4]
    torch.testing.assert_close(loaded(x), timm.create_model("gsop_preresnet20_net2", pretrained=True).eval()(x))
    assert loaded.pretrained_cfg["label_names"][0] == "T-shirt/top"


def test_the_command_that_ships(tmp_path, monkeypatch):
    """From a checkpoint of timm's train.py, trained on grey images, to the files in the package."""
    name = "gsop_preresnet20_net1.fashion_mnist"
    files = [f"{name}.safetensors", f"{name}.golden.safetensors"]
    weights = safetensors.torch.load_file(SHIPPED / files[0])
    weights["stem.conv.weight"] = weights["stem.conv.weight"].sum(1, keepdim=True)
    torch.save({"state_dict": weights}, tmp_path / "last.pth.tar")
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / "last.pth.tar"), name, "--folder", str(tmp_path)])
    runpy.run_path(str(ROOT / "hub/ship.py"), run_name="__main__")
    for file in files:
        written, shipped = (safetensors.torch.load_file(folder / file) for folder in (tmp_path, SHIPPED))
        assert written.keys() == shipped.keys()
        for key, value in shipped.items():
            torch.testing.assert_close(written[key], value, rtol=1e-3, atol=1e-3)
