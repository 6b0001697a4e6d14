"""The demo without its page: strangers' pictures, networks, the Space's files. test_space_browser.py has the page."""

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.models import save_for_hf

from timm_gsop.viz import record

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "hub/space"
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
PHOTO = Image.fromarray(load_sample_image("flower.jpg")).resize((60, 40))

sys.path.insert(0, str(SPACE))
import images  # noqa: E402
import networks  # noqa: E402

sys.path.remove(str(SPACE))


def encoded(image: Image.Image, form: str = "PNG", **kwargs) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **kwargs)
    return content.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_pictures_are_read(form, tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(encoded(PHOTO, form))
    image, note = images.read_image(file)
    assert (image.mode, image.size, note) == ("RGB", PHOTO.size, "")
    assert np.abs(np.asarray(image, float) - np.asarray(PHOTO, float)).mean() < 10  # GIF has 256 colours


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.parametrize("form", FORMATS)
def test_damaged_pictures_are_read_or_refused(form):
    """Cut anywhere, or with bytes changed: a picture or a message, never another exception."""
    content, generator = encoded(PHOTO, form), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(content[: generator.integers(len(content))] if generator.random() < 0.5 else content)
        for place in generator.integers(len(damaged), size=5) if damaged else ():
            damaged[place] = generator.integers(256)
        try:
            images.read_image(bytes(damaged))
        except images.BadImageError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not a picture"),
        (encoded(PHOTO)[:2000], "is damaged"),
        (encoded(Image.new("RGB", (1, 1))), "1×1 pixels. Each side must have at least 8"),
        (encoded(Image.new("1", (8_000, 8_000))), "8000×8000 pixels. At most 40 million"),
        (encoded(Image.new("1", (30_000, 30_000))), "too many pixels. At most 40 million"),
        (encoded(Image.new("L", (8, 81))), "at most 10 times the short one"),
        (b"\0" * (11 * 2**20), "has 11 MB. At most 10 MB"),
        (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_what_is_refused_gets_a_reason(content, message):
    with pytest.raises(images.BadImageError, match=message):
        images.read_image(content)


def test_other_kinds_are_converted_and_it_is_said():
    ramp = np.linspace(0, 65535, 256).reshape(16, 16)
    grey, note = images.read_image(encoded(Image.fromarray(ramp.astype(np.uint16))))
    np.testing.assert_allclose(np.asarray(grey)[:, :, 0], ramp / 257, atol=0.51)
    assert "8 bits" in note
    real, _ = images.read_image(encoded(Image.fromarray((ramp / 65535).astype(np.float32)), "TIFF"))
    np.testing.assert_array_equal(real, grey)
    assert "CMYK" in images.read_image(encoded(PHOTO.convert("CMYK"), "JPEG"))[1]
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    first, note = images.read_image(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert first.getpixel((4, 4)) == (255, 0, 0)
    assert "several frames" in note
    clear, note = images.read_image(encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))))
    assert clear.getpixel((4, 4)) == (255, 255, 255)
    assert "on white" in note


def test_pictures_are_turned_as_the_camera_was():
    turned = Image.Exif()
    turned[0x0112] = 6
    image, _ = images.read_image(encoded(PHOTO, "JPEG", exif=turned.tobytes()))
    assert image.size == PHOTO.size[::-1]


def test_every_network_with_weights_can_be_chosen():
    names = [name for _, name in networks.choices(["local-dir:mine"])]
    assert names[0] == "local-dir:mine"
    assert names[1].startswith("gsop_preresnet20_net1")  # works at once, offline
    ours = {name for name in timm.list_pretrained() if "gsop" in name or "isqrt" in name or "mpncov" in name}
    assert set(names[1:]) == ours


@pytest.mark.parametrize(("tag", "files", "size"), [("cifar10", "*.png", 32), ("fashion_mnist", "clothing/*.png", 28)])
@pytest.mark.parametrize("name", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_networks_that_ship_name_the_examples(name, tag, files, size):
    network = networks.load(f"{name}.{tag}")
    examples = list((SPACE / "examples").glob(files))
    assert examples
    for file in examples:
        crop, x = network.prepare(Image.open(file))
        classes = networks.classify(network.model, x, network.labels)
        assert max(classes, key=classes.get).lower().replace(" ", "-") == file.stem
        assert list(classes.values()) == sorted(classes.values(), reverse=True)
        assert crop.size == (size, size)
        for trained, neutral in zip(record(network.model, x), record(network.neutral, x), strict=True):
            if trained.channel_weights is not None:
                assert trained.channel_weights.std() > 0.05
                torch.testing.assert_close(neutral.channel_weights, torch.full_like(trained.channel_weights, 0.5))


@pytest.mark.parametrize("gsop_type", ["position", "concat"])
def test_networks_of_ones_own(gsop_type, tmp_path):
    narrow = dict(channels=(8, 8, 8, 8), num_classes=3, cov_dim=4)
    model = timm.create_model("gsop_resnet26_net2", gsop_type=gsop_type, **narrow)
    save_for_hf(model, tmp_path, safe_serialization=True)
    network = networks.load(f"local-dir:{tmp_path}")
    _, x = network.prepare(PHOTO)
    classes = networks.classify(network.model, x, network.labels)
    assert sum(classes.values()) == pytest.approx(1)
    assert any(item.position_weights is not None for item in record(network.neutral, x))


def test_a_network_without_weights_gets_a_message():
    with pytest.raises(networks.BadNetworkError, match="preresnet56 could not be loaded"):
        networks.load("preresnet56")


def test_the_space_describes_itself():
    _, front, text = (SPACE / "README.md").read_text().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio"
    assert (SPACE / card["app_file"]).is_file()
    assert card["license"] == "apache-2.0"
    assert "--repo-type space" in text
    project = (ROOT / "pyproject.toml").read_text()
    assert f'"gradio>={re.match("[0-9]+", card["sdk_version"])[0]}' in project
