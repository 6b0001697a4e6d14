"""The weights that ship: what they answer to real images, alone and published, and the command that ships them."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from tests.samples import cat, fashion_mnist
from timm_gsop.hub import convert, stage
from timm_gsop.pretrained.locate import SHIPPED

ROOT = Path(__file__).parents[1]
NETWORKS = ("gsop_preresnet20_net1", "gsop_preresnet20_net2")
SHIP = [f"{name}.{tag}" for name in NETWORKS for tag in ("cifar10", "fashion_mnist")]
COMMAND = runpy.run_path(str(ROOT / "hub/ship.py"))
MEASURED = {
    "gsop_preresnet20_net1.cifar10": "89.43",
    "gsop_preresnet20_net2.cifar10": "90.13",
    "gsop_preresnet20_net1.fashion_mnist": "92.58",
    "gsop_preresnet20_net2.fashion_mnist": "92.17",
}
LABEL = {"cifar10": "cat", "fashion_mnist": "Ankle boot"}
# Of Fashion-MNIST's first 500 test images; of all 10 000 the configuration tells, and of CIFAR-10's.
TOP1 = {"gsop_preresnet20_net1": 93.2, "gsop_preresnet20_net2": 93.6}


def golden(name: str) -> torch.Tensor:
    return safetensors.torch.load_file(SHIPPED / f"{name}.golden.safetensors")["logits"]


def images_of(name: str) -> torch.Tensor:
    """What the golden logits answer, normalized as the network's configuration says."""
    cfg = timm.get_pretrained_cfg(name)
    images = COMMAND["read_sample"](COMMAND["SAMPLES"][cfg.tag], cfg.input_size[-1])
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.mean, cfg.std))
    return (images - mean) / std


@pytest.mark.parametrize("name", SHIP)
def test_golden_answers(name):
    model, images = timm.create_model(name, pretrained=True).eval(), images_of(name)
    assert len(images) >= 16
    with torch.inference_mode():
        torch.testing.assert_close(model(images), golden(name), rtol=1e-3, atol=1e-3)


def test_tiles_of_the_photo_are_its_pixels():
    tile = images_of("gsop_preresnet20_net1.cifar10")[5]  # second row, second column
    pixels = torch.from_numpy(np.array(cat().crop((32, 32, 64, 64)))).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)))
    torch.testing.assert_close(tile, (pixels - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_accuracy_on_clothing(name):
    model = timm.create_model(f"{name}.fashion_mnist", pretrained=True).eval()
    images, labels = fashion_mnist()
    with torch.inference_mode():
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
    assert 100 * accuracy == pytest.approx(TOP1[name], abs=0.21)  # one image may stand on the border


def test_works_offline_and_on_grey_images(tmp_path):
    """In a fresh process without import and network; one channel is three equal ones."""
    code = f"""
import json, timm, torch
from tests.samples import fashion_mnist
images = fashion_mnist()[0][:8]
for name in {SHIP}:
    model = timm.create_model(name, pretrained=True).eval()
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    with torch.inference_mode():
        torch.testing.assert_close(grey(images[:, :1]), model(images), rtol=1e-3, atol=1e-3)
        print(json.dumps(model(images).argmax(1).tolist()))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, answers in zip(SHIP, done.stdout.splitlines(), strict=True):
        if name.endswith("fashion_mnist"):
            assert json.loads(answers) == golden(name)[:8].argmax(1).tolist()


@pytest.mark.parametrize("name", SHIP)
def test_configuration(name):
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.license == "apache-2.0"
    assert len(cfg.label_names) == cfg.num_classes == 10
    assert any(note.startswith(f"measured: top-1 {MEASURED[name]} %") and "validate.py" in note for note in cfg.notes)
    assert os.path.getsize(cfg.file) <= 2e6
    assert name in timm.list_pretrained("gsop*")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_bare_name_is_for_photos(name):
    assert timm.get_pretrained_cfg(name).tag == "cifar10"


@pytest.mark.parametrize("name", SHIP)
def test_an_image_through_timms_transform(name):
    """The README's way, from a picture to a label."""
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    tag = name.partition(".")[2]
    boot = Image.open(ROOT / "hub/space/examples/clothing/ankle-boot.png").convert("RGB")
    picture = {"cifar10": cat(), "fashion_mnist": boot}[tag]
    with torch.inference_mode():
        (answer,) = model(transform(picture)[None]).argmax(1).tolist()
    assert model.pretrained_cfg["label_names"][answer] == LABEL[tag]


@pytest.mark.parametrize("tag", LABEL)
def test_other_classes_and_features(tag):
    name = f"gsop_preresnet20_net2.{tag}"
    model = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    backbone = timm.create_model(name, pretrained=True, features_only=True).eval()
    whole = timm.create_model(name, pretrained=True).eval()
    x = images_of(name)[:2]
    torch.testing.assert_close(backbone(x)[0], whole.stem(x))


@pytest.mark.parametrize("tag", LABEL)
def test_a_shipped_network_can_be_published(tag, tmp_path):
    name = f"gsop_preresnet20_net2.{tag}"
    convert("timm", name, tmp_path / "folder")
    stage(tmp_path / "folder", f"timm-gsop/{name}", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    assert {"cifar10": "uoft-cs/cifar10", "fashion_mnist": "zalando-datasets/fashion_mnist"}[tag] in card
    assert f"**measured**: top-1 {MEASURED[name]} %" in card
    loaded = timm.create_model(f"local-dir:{tmp_path / 'staged'}", pretrained=True).eval()
    x = images_of(name)[:4]
    torch.testing.assert_close(loaded(x), timm.create_model(name, pretrained=True).eval()(x))
    assert loaded.pretrained_cfg["label_names"] == list(timm.get_pretrained_cfg(name).label_names)


@pytest.mark.parametrize("tag", LABEL)
def test_the_command_that_ships(tag, tmp_path, monkeypatch):
    """From a checkpoint of timm's train.py, for clothing trained on grey images, to the files in the package."""
    name = f"gsop_preresnet20_net1.{tag}"
    files = [f"{name}.safetensors", f"{name}.golden.safetensors"]
    weights = safetensors.torch.load_file(SHIPPED / files[0])
    if tag == "fashion_mnist":
        weights["stem.conv.weight"] = weights["stem.conv.weight"].sum(1, keepdim=True)
    torch.save({"state_dict": weights}, tmp_path / "last.pth.tar")
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / "last.pth.tar"), name, "--folder", str(tmp_path)])
    runpy.run_path(str(ROOT / "hub/ship.py"), run_name="__main__")
    for file in files:
        written, shipped = (safetensors.torch.load_file(folder / file) for folder in (tmp_path, SHIPPED))
        assert written.keys() == shipped.keys()
        for key, value in shipped.items():
            torch.testing.assert_close(written[key], value, rtol=1e-3, atol=1e-3)


def test_a_tag_without_stored_images_needs_a_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ship", str(tmp_path / "last.pth.tar"), "gsop_preresnet20_net1.untrained"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "hub/ship.py"), run_name="__main__")
    assert "no stored images for the tag 'untrained'" in capsys.readouterr().err
