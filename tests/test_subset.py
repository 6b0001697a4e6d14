import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo, create_dataset

from tests.fresh_process import run_fresh
from timm_gsop.data.subset import draw_classes, list_images, main

ROOT = Path(__file__).parents[1]

SYNSETS = ImageNetInfo("imagenet-1k").label_names()
FIRST = ["n01443537", "n01537544", "n01560419"]


def folder_of(path: Path) -> Path:
    """Two images of each of five classes, for training and validation."""
    for part in ("train", "val"):
        for name in "abcde":
            for i in range(2):
                image = path / part / name / f"{name}_{i}.png"
                image.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8)).save(image)
    (path / "train/a/readme.txt").touch()
    return path


@given(st.lists(st.text(min_size=1), min_size=3, unique=True), st.integers(0, 10), st.randoms())
def test_the_seed_alone_decides(names, seed, random):
    shuffled = list(names)
    random.shuffle(shuffled)
    drawn = draw_classes(names, 3, seed)
    assert drawn == draw_classes(shuffled, 3, seed) == sorted(drawn)
    assert len(set(drawn)) == 3
    assert set(drawn) <= set(names)


def test_of_imagenet():
    """Also what seed 0 draws, which must never change: results go by it."""
    drawn = draw_classes(SYNSETS)
    assert len(drawn) == 250
    assert drawn[:3] == FIRST
    assert drawn != draw_classes(SYNSETS, seed=1)


@pytest.mark.parametrize("layout", ["folder", "tar", "tar of tars"])
def test_timm_reads_it(layout, tmp_path):
    data = folder_of(tmp_path / "data")
    if layout == "tar":
        with tarfile.open(tmp_path / "train.tar", "w") as archive:
            archive.add(data / "train", "train")
        data = tmp_path / "train.tar"
    elif layout == "tar of tars":
        with tarfile.open(tmp_path / "train.tar", "w") as outer:
            for name in "abcde":
                with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
                    for image in sorted((data / "train" / name).glob("*.png")):
                        archive.add(image, image.name)
                outer.add(tmp_path / f"{name}.tar", f"{name}.tar")
        data = tmp_path / "train.tar"
    main([str(data), "-o", str(tmp_path / "subset"), "--num-classes", "2", "--seed", "3"])
    classes = (tmp_path / "subset/classes.txt").read_text().splitlines()
    files = (tmp_path / "subset/files.txt").read_text().splitlines()
    split = "train" if layout == "folder" else ""
    dataset = create_dataset("", str(data), split=split, class_map=str(tmp_path / "subset/classes.txt"))
    assert len(dataset) == 4
    assert sorted(dataset[i][1] for i in range(4)) == [0, 0, 1, 1]
    assert {Path(name).parent.name for name in files} == set(classes)
    assert len(files) == (8 if layout == "folder" else 4)


def test_of_the_synsets_alone(tmp_path):
    done = run_fresh("-m", "timm_gsop.data.subset", "-o", tmp_path, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "classes.txt").read_text().splitlines() == draw_classes(SYNSETS)
    assert {path.name for path in tmp_path.iterdir()} == {"classes.txt"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "data='nowhere' is neither a folder nor a tar"),
        (["empty"], "has no images"),
        (["data", "--num-classes", "6"], "num_classes=6 is not accepted; accepted: up to 5"),
        (["data", "--num-classes", "0"], "num_classes=0"),
    ],
)
def test_bad_arguments_are_named(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([*given, "-o", "out"])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_list_images_of_a_folder(tmp_path):
    assert list_images(folder_of(tmp_path))[:3] == ["train/a/a_0.png", "train/a/a_1.png", "train/b/b_0.png"]
