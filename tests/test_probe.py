"""The probe, on generated pictures and tiny backbones with random weights."""

import csv
import itertools
import json
import os
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import norm

from tests.fresh_process import run_fresh
from timm_gsop.probe import HEADS, comparison, run
from timm_gsop.probe.__main__ import main
from timm_gsop.probe.heads import MAX_TRIALS, Inputs, Options, create_head, inputs_of, search, train_head
from timm_gsop.probe.images import read_images
from timm_gsop.probe.maps import cached_maps
from timm_gsop.probe.network import Extractor, create_network
from timm_gsop.probe.splits import Split, draw_splits, take_some
from timm_gsop.probe.statistics import paired_difference

ROOT = Path(__file__).parents[1]
COLORS = ("blue", "green", "red")
TINY = dict(backbone="test_resnet", img_size=32, pretrained=False)
FAST = dict(heads=("avg", "isqrt"), levels=(None,), isqrt_dim=8, splits=2, epochs=2, progress=False)


def paint(folder: Path, count: int, seed: int = 0) -> Path:
    """So many pictures of each class: noise, stronger and brighter in one colour."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate(COLORS):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(80, 120, (24, 24, 3))
            pixels[..., 2 - channel] = generator.integers(40, 256, (24, 24))
            Image.fromarray(pixels.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """With a training, a validation and a test part: 60 pictures."""
    root = tmp_path_factory.mktemp("pictures")
    for seed, (part, count) in enumerate({"train": 12, "val": 4, "test": 4}.items()):
        paint(root / part, count, seed)
    return root


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "backbone.pth")
    return tmp_path / "backbone.pth"


def test_every_head_on_every_level(pictures, cache, tmp_path):
    """The table has what the paired comparison says, in the order of timm's results."""
    table = run(
        pictures,
        **{**TINY, **FAST, "heads": HEADS, "levels": (None, -2), "epochs": 1},
        cache=cache,
        output=tmp_path / "output",
    )
    assert [(row.level, row.head) for row in table.rows] == list(itertools.product(("final", "3"), HEADS))
    with (tmp_path / "output/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timms = ["model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"]
    assert list(rows[0])[:9] == timms
    assert [float(row["top1"]) for row in rows] == pytest.approx([row.top1 for row in table.rows], abs=1e-3)
    found = json.loads((tmp_path / "output/results.json").read_text())
    assert found["conclusion"] == table.conclusion
    assert found["images"] == dict.fromkeys(COLORS, 20)
    assert Image.open(tmp_path / "output/differences.png").size[0] > 500
    assert str(table).endswith(table.conclusion)
    of = {(row.level, row.head): row for row in table.rows}
    for level in ("final", "3"):
        sizes = [of[level, head].head_params for head in HEADS if head != "mlp"]
        assert of[level, "mlp"].head_params == pytest.approx(max(sizes), rel=0.05)
    reference = of["final", "avg"]
    for row in table.rows:
        assert row.difference == pytest.approx(row.top1 - reference.top1)
        assert row.low <= row.difference <= row.high
        assert row.top1 == pytest.approx(np.mean(row.each))


@pytest.mark.parametrize(
    ("backbone", "levels"),
    [
        ("test_resnet", (None, -1, -2)),
        ("test_efficientnet", (None, -1, -2)),
        ("test_vit", (None, -1, 0)),
        ("swin_tiny_patch4_window7_224", (None, -2)),
    ],
)
def test_maps_are_those_of_the_network_with_that_level(backbone, levels):
    """So a head that was trained on them sees the same in the network that is saved."""
    narrow = dict(embed_dim=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)) if backbone.startswith("swin") else {}
    extractor = Extractor(backbone, levels, pretrained=False, options=narrow)
    x = torch.randn(2, *extractor.data_config["input_size"])
    weights = extractor.network.state_dict()
    for level, name, found in zip(extractor.levels, extractor.names, extractor(x), strict=True):
        network = create_network(backbone, level, pretrained=False, **narrow)
        network.load_state_dict({key: weights[key] for key in network.state_dict()})
        with torch.inference_mode():
            torch.testing.assert_close(found, network.forward_features(x))
        assert found.shape[1:] == extractor.shapes[extractor.names.index(name)]


@pytest.mark.parametrize(
    ("backbone", "levels", "left_out"),
    [("test_efficientnet", (-1,), "256×1×1"), ("test_efficientnet", (None, -1), ""), ("test_resnet", (-1,), "")],
)
def test_it_says_that_the_maps_of_the_backbones_own_head_are_left_out(backbone, levels, left_out, pictures, cache):
    """EfficientNet has a convolution after its last feature level, ResNet has none."""
    options = {**TINY, **FAST, "backbone": backbone, "levels": levels, "heads": (), "splits": 1, "epochs": 1}
    table = run(pictures, **options, cache=cache)
    expected = f"level final, {left_out}, which the backbone's own head reads. --levels final 4 compares it too."
    assert table.note == (f"Not compared: {expected}" if left_out else "")
    assert str(table).endswith(table.note or table.conclusion)


def extract(pictures: Path, cache: Path, **kwargs) -> list[np.ndarray]:
    torch.manual_seed(0)  # of the backbone's weights
    extractor = kwargs.pop("extractor", None) or Extractor("test_resnet", (None, -2), pretrained=False, img_size=32)
    return cached_maps(read_images(pictures), extractor, cache, progress=False, **kwargs)


def test_maps_are_computed_once_and_interrupted_ones_go_on(pictures, cache, tmp_path, monkeypatch):
    whole = extract(pictures, cache)
    assert [maps.dtype for maps in whole] == [np.float16] * 2
    calls = []
    call = Extractor.__call__
    monkeypatch.setattr(Extractor, "__call__", lambda self, x: calls.append(len(x)) or call(self, x))
    again = extract(pictures, cache)
    assert calls == [1]  # for the shapes
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)

    def stop(self, x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return call(self, x)

    calls.clear()
    monkeypatch.setattr(Extractor, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(pictures, tmp_path / "other", batch_size=16)
    assert not list((tmp_path / "other").glob("*.npy"))
    calls.clear()
    monkeypatch.setattr(Extractor, "__call__", lambda self, x: calls.append(len(x)) or call(self, x))
    for a, b in zip(whole, extract(pictures, tmp_path / "other", batch_size=16), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)
    assert calls == [1, 16, 12]
    assert not list((tmp_path / "other").glob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of a file's size, in place of a full disk")
def test_a_disk_that_fills_up_leaves_no_half_file(pictures, cache):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            extract(pictures, cache, batch_size=16)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(cache.rglob("*.npy"))
    whole = extract(pictures, cache.with_name("other"), batch_size=16)
    for a, b in zip(whole, extract(pictures, cache, batch_size=16), strict=True):  # with what was there
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3)


def test_another_list_size_or_weights_have_maps_of_their_own(tmp_path, cache):
    folder = paint(tmp_path / "pictures", 2)
    extract(folder, cache)
    paint(folder, 2, seed=5)
    extract(folder, cache)
    other = Extractor("test_resnet", (None, -2), pretrained=False, img_size=48)
    extract(folder, cache, extractor=other)
    torch.manual_seed(7)
    extract(folder, cache, extractor=Extractor("test_resnet", (None, -2), pretrained=False, img_size=32))
    assert len(list(cache.glob("*.npy"))) == 2 * 4


def test_space_is_checked_before(pictures, cache, monkeypatch):
    with pytest.raises(ValueError, match=r"more than the limit of 0.00 GiB"):
        extract(pictures, cache, limit=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(OSError, match="The maps need"):
        extract(pictures, cache)
    assert {path.name for path in cache.iterdir()} <= {".lock"}


def test_images_that_cannot_be_read_are_named_and_counted(tmp_path, cache, capsys):
    folder = paint(tmp_path / "pictures", 12)
    (folder / "red/0.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((24, 24), np.uint16)).save(folder / "red/1.png")
    frames = [Image.new("RGB", (24, 24), color) for color in COLORS]
    frames[0].save(folder / "red/2.gif", save_all=True, append_images=frames[1:])
    (folder / "red/2.gif").rename(folder / "red/2.png")
    whole = (folder / "blue/3.png").read_bytes()
    (folder / "blue/3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"4 of 36 images cannot be used: .*blue/3.png: .*red/0.png: .*16.*3 frames"):
        run(folder, **TINY, **FAST, cache=cache)
    table = run(folder, **TINY, **FAST, cache=cache, skip_unreadable=True)
    assert "4 of 36 images cannot be used" in capsys.readouterr().out
    assert table.about["train"] + table.about["validation"] + table.about["test"] == 32


def test_photographs_with_a_preview_are_no_animation(tmp_path):
    folder = paint(tmp_path / "pictures", 2)
    frames = [Image.new("RGB", (24, 24), color) for color in COLORS[:2]]
    frames[0].save(folder / "red/photo.jpg", format="MPO", save_all=True, append_images=frames[1:])
    images = read_images(folder)
    assert {images.problem(i) for i in range(len(images))} == {""}


def test_splits(tmp_path, pictures):
    """The test images never change; where nothing is given, validation images do; all parts have all classes."""
    given = draw_splits(read_images(pictures), 2, 0)
    assert [[len(part) for part in (s.train, s.validation, s.test)] for s in given] == [[36, 12, 12]] * 2
    images = read_images(paint(tmp_path / "all", 20))
    splits = draw_splits(images, 3, 0)
    assert all(np.array_equal(split.test, splits[0].test) for split in splits)
    assert len({tuple(split.validation) for split in splits}) == 3
    for split in splits:
        parts = (split.train, split.validation, split.test)
        assert sorted(np.concatenate(parts)) == list(range(60))
        assert all(set(images.targets[part]) == {0, 1, 2} for part in parts)
    fewer = take_some(read_images(pictures), 30, 6, 0)
    assert [int((fewer.parts == part).sum()) for part in ("test",)] == [6]
    assert len(fewer) == 36


def test_validation_folder_tests_where_there_is_no_other(tmp_path):
    for part in ("train", "validation"):
        paint(tmp_path / part, 5, seed=len(part))
    images = read_images(tmp_path)
    (split,) = draw_splits(images, 1, 0)
    assert set(images.parts[split.test]) == {"validation"}
    assert set(images.parts[split.validation]) == {"train"}


def test_torchvisions_data_sets(tmp_path, cache):
    """By timm's name: the second part, which timm calls validation, tests."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        images = np.array([0x803, count, 28, 28], ">i4").tobytes() + pixels.tobytes()
        labels = np.array([0x801, count], ">i4").tobytes() + (np.arange(count) % 10).astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    table = run(tmp_path, **TINY, **FAST, dataset="torch/mnist", train_images=30, cache=cache)
    assert [table.about[part] for part in ("train", "validation", "test")] == [20, 10, 20]
    assert "7 - seven" in table.about["images"]
    with pytest.raises(ValueError, match=r"dataset='torch/cifar10' in .* cannot be read: Dataset not found"):
        run(tmp_path, **TINY, **FAST, dataset="torch/cifar10", cache=cache)


def no_classes(folder: Path) -> None:
    paint(folder, 1)
    for path in list(folder.rglob("*.png")):
        path.rename(folder / f"{path.parent.name}.png")


def one_class(folder: Path) -> None:
    paint(folder, 4)
    for name in COLORS[:2]:
        (folder / name).rename(folder.with_name(name))


def other_classes(folder: Path) -> None:
    paint(folder / "train", 4)
    (paint(folder / "test", 4) / "red").rename(folder / "test/violet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "is not a folder"),
        (lambda folder: folder.mkdir(), "Found 0 images"),
        (no_classes, "no class folders"),
        (one_class, "has one class, 'red'"),
        (other_classes, "has the class 'violet' in its test part"),
        (lambda folder: paint(folder, 3), "class 'blue' has 3 images for training; accepted: at least 4"),
    ],
)
def test_data_that_cannot_be_probed(make, message, tmp_path, cache):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "data", **TINY, **FAST, cache=cache)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(heads=("isqrt", "sqrt")), "heads='sqrt' is not accepted"),
        (
            dict(levels=(7,)),
            r"levels=\(7,\) is not accepted for backbone='test_resnet'; accepted: integers from -5 to 4",
        ),
        (dict(splits=0), "splits=0 is not accepted"),
        (dict(save="mlp", output="x"), "save='mlp' is not accepted; accepted: 'best', 'avg', 'isqrt'"),
        (dict(save="isqrt"), "save needs output"),
        (dict(backbone="resnet"), "backbone='resnet' is not accepted"),
        (dict(checkpoint="nowhere.pth"), "checkpoint='nowhere.pth' is not a file"),
        (dict(train_images=2), "train_images=2 is not accepted; accepted: from 3"),
        (dict(dataset="wds/digits"), "dataset='wds/digits'"),
    ],
)
def test_arguments_that_are_not_accepted(arguments, message, pictures, cache):
    with pytest.raises(ValueError, match=message):
        run(pictures, **{**TINY, **FAST, **arguments}, cache=cache)


def test_search_ends_inside_of_what_it_tried():
    """At the peak of a smooth score, wherever that is; the test images' logits are never looked at."""

    class Score:
        logits = property(lambda self: pytest.fail("test images decide nothing"))

        def __init__(self, options):
            self.validation = -(abs(np.log(options.lr / 0.009)) + abs(np.log10(options.weight_decay / 1e-2)))

    tried = []
    options, _ = search(lambda options: tried.append(options) or Score(options))
    assert options == Options(pytest.approx(0.009), pytest.approx(1e-2))
    assert min(o.lr for o in tried) < options.lr < max(o.lr for o in tried)
    assert min(o.weight_decay for o in tried) < options.weight_decay < max(o.weight_decay for o in tried)
    assert len(tried) == len(set(tried)) <= MAX_TRIALS


def test_search_of_a_score_that_grows_for_ever_ends():
    tried = []
    options, best = search(lambda options: tried.append(options) or SimpleNamespace(validation=options.lr))
    assert len(tried) == MAX_TRIALS
    assert best.validation == options.lr == max(o.lr for o in tried)


def test_interval_is_that_of_the_normal_distribution():
    """For many images and one seed: the mean of the differences ± 1.96 standard errors."""
    generator = np.random.default_rng(0)
    a, b = generator.random((1, 4000)) < 0.8, generator.random((1, 4000)) < 0.7
    difference = paired_difference(a, b)
    values = 100 * (a.astype(float) - b)
    error = values.std() / np.sqrt(values.size)
    assert difference.mean == pytest.approx(values.mean())
    quantiles = norm.ppf([0.025, 0.975], values.mean(), error)
    assert (difference.low, difference.high) == pytest.approx(quantiles, abs=0.15 * error)
    assert not difference.is_none
    assert paired_difference(a, a) == (0, 0, 0)


def test_interval_has_the_spread_of_seeds():
    """Seeds that differ widen it: two heads that are equal on every image but by seed are not told apart."""
    steady = paired_difference(np.ones((4, 500)), np.zeros((4, 500)))
    assert (steady.low, steady.high) == pytest.approx((100, 100))
    odd, even = np.array([[1], [0], [1], [0]]), np.array([[0], [1], [0], [1]])
    shaky = paired_difference(odd * np.ones(500), even * np.ones(500))
    assert shaky.is_none
    assert shaky.high - shaky.low > 50


def test_pooling_without_parameters_runs_once():
    network = create_network("test_resnet", None, pretrained=False)
    maps = np.random.default_rng(0).random((5, network.num_features, 3, 3)).astype(np.float16)
    for name in ("avg", "mlp", "compact_bilinear"):
        inputs = inputs_of(create_head(network, name, 3, 0), maps, torch.device("cpu"))
        assert inputs.pooled
    assert not inputs_of(create_head(network, "isqrt", 3, 0), maps, torch.device("cpu")).pooled


def test_saved_network_is_the_backbone_with_the_head(pictures, cache, tmp_path, checkpoint):
    """It says of the test images what the probe said of their maps, and takes everything that timm's loader does."""
    given = {**TINY, **FAST, "levels": (-2,), "checkpoint": checkpoint, "pretrained": True}
    table = run(pictures, **given, cache=cache, output=tmp_path / "output", save="isqrt")
    folder = tmp_path / "output/model"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    assert not any(name.startswith("backbone.layer4") for name in model.state_dict())
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = read_images(pictures / "test")
    x = torch.stack([transform(images.open(i)) for i in range(len(images))])
    with torch.inference_mode():
        right = (model(x).argmax(1).numpy() == images.targets).mean()
    assert 100 * right == pytest.approx(table.about["saved"]["top1"], abs=100 / len(images))
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == list(COLORS)
    card = (folder / "README.md").read_text()
    assert f"top-1 {table.about['saved']['top1']:.2f} % on 12 test images" in card
    with pytest.raises(ValueError, match="has something in it already"):
        run(pictures, **given, cache=cache, output=tmp_path / "output", save="isqrt")


def test_command_line(pictures, tmp_path, capsys, checkpoint):
    options = "--backbone test_resnet --levels -1 --heads isqrt --img-size 32 --isqrt-dim 8 --splits 1 --epochs 1"
    where = ["--checkpoint", checkpoint, "--cache", tmp_path / "cache", "--output", tmp_path / "output"]
    main([str(word) for word in (pictures, *options.split(), *where, "--save", "best", "--fine-tune")])
    out = capsys.readouterr().out
    assert "By validation" in out
    assert f"python train.py --data-dir {pictures} --model local-dir:{tmp_path / 'output/model'} --pretrained" in out
    with pytest.raises(SystemExit, match=r"error: .*has something in it already"):
        main([str(word) for word in (pictures, *options.split(), *where, "--save", "best")])


def test_heads_that_read_a_class_token_are_left_out(pictures, cache, capsys):
    arguments = {**FAST, "heads": ("isqrt", "moment"), "splits": 1, "epochs": 1}
    table = run(pictures, "test_vit", pretrained=False, **arguments, cache=cache)
    assert [row.head for row in table.rows] == ["avg", "isqrt"]
    assert "Left out for test_vit, whose class token they would read: moment" in capsys.readouterr().out


def test_no_weights_offline_is_one_line(pictures, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = run_fresh("-m", "timm_gsop.probe", pictures, "--backbone", "test_resnet", env=env, cwd=tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: The weights of test_resnet could not be loaded")
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere heads are trained one after the other")
def test_processes_give_what_one_gives(pictures, tmp_path, monkeypatch):
    alone = run(pictures, **TINY, **FAST, cache=tmp_path / "alone")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.manual_seed(0)
    together = run(pictures, **TINY, **FAST, cache=tmp_path / "together")
    times = dict(train_seconds=0, infer_seconds=0)
    for a, b in zip(alone.rows, together.rows, strict=True):
        assert {**a.as_dict(), **times} == {**b.as_dict(), **times}


AFTER_GRADIENTS = """
import torch
from timm_gsop.probe.processes import in_processes

class Nested(torch.autograd.Function):  # so deep that PyTorch starts threads
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Nested.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).backward()
        return grad, None

def gradient(index):
    x = torch.ones(1, requires_grad=True)
    (index * x).backward()
    return x.grad.item()

print(list(in_processes(gradient, 3, 2)))
Nested.apply(torch.ones(1, requires_grad=True), 100).backward()
print(list(in_processes(gradient, 3, 2)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere heads are trained one after the other")
def test_after_gradients_in_the_same_process():
    """In a notebook on a machine with a GPU, say: PyTorch computes no more gradients in forks then."""
    done = run_fresh("-c", AFTER_GRADIENTS, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    first, reason, second = done.stdout.splitlines()
    assert first == second == "[0.0, 1.0, 2.0]"
    assert reason.endswith("heads are trained one after the other.")


def test_a_trained_head_is_trained_once(pictures, cache, checkpoint, tmp_path, monkeypatch):
    """A second run gives the same table and the same network, and trains what the first one did not."""
    arguments = {**TINY, **FAST, "pretrained": True, "checkpoint": checkpoint, "cache": cache}
    first = run(pictures, **arguments, output=tmp_path / "first", save="isqrt")
    trained = []

    def count(head, *args):
        trained.append(type(head.global_pool).__name__)
        return train_head(head, *args)

    monkeypatch.setattr(comparison, "train_head", count)
    second = run(pictures, **arguments, output=tmp_path / "second", save="isqrt")
    assert not trained
    assert first.rows == second.rows
    networks = [load_file(tmp_path / name / "model/model.safetensors") for name in ("first", "second")]
    assert networks[0].keys() == networks[1].keys()
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())
    run(pictures, **{**arguments, "heads": ("isqrt", "cov")})
    assert set(trained) == {"CovPool2d"}
    run(pictures, **{**arguments, "heads": ("isqrt",), "isqrt_dim": 8})
    run(pictures, **{**arguments, "heads": ("isqrt",), "seed": 1})
    assert {"IsqrtCovPool2d", "SelectAdaptivePool2d"} <= set(trained)


def test_inputs_on_a_gpu_are_those_in_memory():
    maps = np.random.default_rng(0).standard_normal((6, 3, 2, 2)).astype(np.float16)
    indices = np.array([4, 0, 4])
    device = torch.device("cpu")
    on_gpu = Inputs(torch.from_numpy(maps), pooled=False).batch(indices, device)
    assert torch.equal(on_gpu, Inputs(maps, pooled=False).batch(indices, device))


@pytest.mark.parametrize(("images", "epochs", "steps"), [(64, 2, 2), (32 * 250, 1, 250), (32 * 600, 1, 250)])
def test_batches_grow_where_there_are_many_images(images, epochs, steps, monkeypatch):
    updates = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_, **__: updates.append(1))
    head = torch.nn.Sequential(OrderedDict(global_pool=torch.nn.Identity(), fc=torch.nn.Linear(1, 2)))
    split = Split(np.arange(images), np.arange(2), np.arange(2))
    inputs = Inputs(np.zeros((images, 1), np.float32), pooled=True)
    train_head(head, inputs, np.arange(images) % 2, split, Options(1e-3, 0.1), 0, torch.device("cpu"), epochs)
    assert len(updates) == epochs * steps
