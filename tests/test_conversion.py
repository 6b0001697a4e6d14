"""Conversion and neutral start, on narrow networks with random weights."""

import json
import os
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml
from PIL import Image
from timm.models import save_for_hf
from timm.models.resnet import Bottleneck, ResNet
from torch import nn
from torch.optim.swa_utils import update_bn

from tests.fresh_process import run_fresh
from timm_gsop.hub import convert, neutral_start, stage
from timm_gsop.layers import GSOP_TYPES
from timm_gsop.pretrained.checkpoint import from_gsop, read_checkpoint

ROOT = Path(__file__).parents[1]
NARROW = dict(channels=(16, 32, 64, 128))  # the official concatenation wants 64·2^k channels after expansion
BLOCK = {
    "reduction.conv": "conv_for_DR",
    "reduction.bn": "bn_for_DR",
    "excitation.cov_bn": "row_bn",
    "excitation.row_conv": "row_conv_group",
    "excitation.expand_conv": "fc_adapt_channels",
}
SPATIAL = {
    "reduction.conv": "conv_for_DR_spatial",
    "reduction.bn": "bn_for_DR_spatial",
    "excitation.cov_bn": "row_bn_for_spatial",
    "excitation.row_conv": "row_conv_group_for_spatial",
    "excitation.expand_conv": "fc_adapt_channels_for_spatial",
}
FUSE = {"conv1": "dilate_conv_for_concat1", "conv2": "dilate_conv_for_concat2", "bn": "bn_for_concat"}


def randomize(model: nn.Module) -> nn.Module:
    """Give the batch normalizations random weights and statistics; everything else is random already."""
    with torch.no_grad():
        for bn in [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
            for tensor in (bn.weight, bn.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (bn.bias, bn.running_mean):
                tensor.normal_(std=0.1)
    return model


def image(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def in_their_names(model: nn.Module, gsop_type: str = "channel") -> dict[str, torch.Tensor]:
    """Our weights, as the released code bases would save them (addresses in ``timm_gsop/pretrained/checkpoint.py``)."""
    theirs = {}
    for name, value in model.state_dict().items():
        name = name.replace("global_pool.reduction.conv", "layer_reduce").replace(
            "global_pool.reduction.bn", "layer_reduce_bn"
        )
        for part, names in (("channel.", BLOCK), ("position.", SPATIAL), ("fuse.", FUSE)):
            for ours, their in names.items():
                name = name.replace(f"se.{part}{ours}.", f"{their}.")
        for ours, their in (SPATIAL if gsop_type == "position" else BLOCK).items():
            name = name.replace(f"se.{ours}.", f"{their}.")
        theirs[name] = value
    return theirs


def released_gsop(gsop_type: str = "channel", net: int = 1, depth: int = 50, **kwargs) -> nn.Module:
    small = dict(NARROW, flavor="official", gsop_type=gsop_type, cov_dim=8, isqrt_dim=6, num_classes=7)
    return randomize(timm.create_model(f"gsop_resnet{depth}_net{net}", **{**small, **kwargs})).eval()


def vanilla_resnet(**kwargs) -> nn.Module:
    return randomize(ResNet(Bottleneck, (3, 4, 6, 3), **{**NARROW, "num_classes": 7, **kwargs})).eval()


def isqrt_resnet(**kwargs) -> nn.Module:
    return randomize(
        timm.create_model("isqrt_resnet50", **{**NARROW, "isqrt_dim": 6, "num_classes": 7, **kwargs})
    ).eval()


def assert_same_function(ours: nn.Module, theirs: nn.Module) -> None:
    x = image()
    for mode in (False, True):
        torch.manual_seed(0)
        expected = theirs.train(mode)(x)
        torch.manual_seed(0)
        torch.testing.assert_close(ours.train(mode)(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        ours.eval()
        theirs.eval()


@pytest.mark.parametrize("net", [1, 2])
@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_convert_gsop(gsop_type, net, tmp_path):
    """Everything but avg and max shows in names and shapes; the file's other entries and ``module.`` do not disturb."""
    original = released_gsop(gsop_type, net)
    weights = {f"module.{name}": value for name, value in in_their_names(original, gsop_type).items()}
    assert not any(".se." in name for name in weights)
    assert ("module.layer1.2.conv_for_DR.weight" in weights) == (gsop_type != "position")
    saved = dict(epoch=3, arch="resnet50", state_dict=weights, best_prec1=torch.tensor(1.0), optimizer={"state": {}})
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    kwargs = dict(NARROW, gsop_type=gsop_type) if gsop_type in ("avg", "max") else NARROW
    convert("gsop", str(tmp_path / "checkpoint.pth.tar"), tmp_path / "out", model_kwargs=kwargs)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert loaded.pretrained_cfg["architecture"] == f"gsop_resnet50_net{net}"
    x = image()
    torch.testing.assert_close(loaded(x), original(x), rtol=0, atol=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    "kwargs", [dict(depth=101), dict(cov_dim=5), dict(gsop_layers=(2,)), dict(gsop_type="position", spatial_size=6)]
)
def test_gsop_shows_its_architecture(kwargs):
    original = released_gsop(**kwargs)
    released = from_gsop(in_their_names(original, kwargs.get("gsop_type", "channel")))
    assert released.model_name == f"gsop_resnet{kwargs.get('depth', 50)}_net1"
    twin = timm.create_model(released.model_name, **NARROW, **released.model_kwargs)
    twin.load_state_dict(released.weights)
    x = image()
    torch.testing.assert_close(twin.eval()(x), original(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model_name", "kwargs"),
    [
        (None, {}),
        ("gsop_resnet50_net2", {}),
        ("gsop_resnet50_net2", dict(gsop_type="position", spatial_size=3)),
        ("gsop_resnet50_net2", dict(gsop_type="concat", spatial_size=3)),
        ("gsop_resnet50_net2", dict(flavor="official")),
        ("gsop_resnet50_net2", dict(gsop_layers=(1, 4))),
    ],
)
def test_convert_fast_mpn_cov(model_name, kwargs, tmp_path):
    """As it is, or with neutral blocks; the official flavor reads the triangle in another order."""
    original = isqrt_resnet()
    torch.save(in_their_names(original), tmp_path / "checkpoint.pth")
    folder = tmp_path / "out"
    convert("fast-mpn-cov", str(tmp_path / "checkpoint.pth"), folder, model_name, dict(NARROW, **kwargs))
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert loaded.pretrained_cfg["architecture"] == (model_name or "isqrt_resnet50")
    assert_same_function(loaded, original)


@pytest.mark.parametrize("flavor", ["paper", "official"])
@pytest.mark.parametrize("stride", [dict(last_stride=2), dict(output_stride=16), dict(output_stride=8)])
def test_convert_timm_keeps_the_function_of_timms_network(flavor, stride, tmp_path):
    original = vanilla_resnet(output_stride=stride.get("output_stride", 32))
    safetensors.torch.save_file(original.state_dict(), tmp_path / "resnet50.safetensors")
    kwargs = dict(NARROW, flavor=flavor, **stride)
    convert("timm", str(tmp_path / "resnet50.safetensors"), tmp_path / "out", "gsop_resnet50_net1", kwargs)
    assert_same_function(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), original)


def test_a_changed_stride_is_said(tmp_path, caplog):
    torch.save(vanilla_resnet().state_dict(), tmp_path / "resnet50.pth")
    convert("timm", str(tmp_path / "resnet50.pth"), tmp_path / "a", "gsop_resnet50_net1", NARROW)
    assert "The function changes: gsop_resnet50_net1 has a last stage of another stride" in caplog.text
    caplog.clear()
    convert("timm", str(tmp_path / "resnet50.pth"), tmp_path / "b", "gsop_resnet50_net1", dict(NARROW, last_stride=2))
    assert "The function changes" not in caplog.text


def trained(tmp_path: Path, name: str, model: nn.Module, **args) -> Path:
    """A run's folder, as train.py leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    torch.save(dict(epoch=3, arch=name, state_dict=model.state_dict(), metric=71.0), run / "model_best.pth.tar")
    if args:
        nothing = dict.fromkeys(
            ("input_size", "img_size", "mean", "std", "interpolation", "crop_pct", "in_chans", "gp")
        )
        (run / "args.yaml").write_text(yaml.safe_dump({**nothing, "model": name, "model_kwargs": {}, **args}))
    return run / "model_best.pth.tar"


def test_a_checkpoint_of_train_py_keeps_its_network_and_preprocessing(tmp_path, caplog):
    """They are in args.yaml beside it; nothing is said, for nothing changes."""
    kwargs = dict(channels=[16, 32, 64, 128], cov_dim=8, isqrt_dim=6)
    model = timm.create_model("gsop_resnet26_net2", num_classes=7, in_chans=1, global_pool="mpn", **kwargs)
    args = dict(input_size=[1, 48, 40], mean=[0.25], std=[0.5], crop_pct=1.0, model_kwargs=kwargs, gp="mpn")
    path = trained(tmp_path, "gsop_resnet26_net2", randomize(model).eval(), **args)
    convert("timm", str(path), tmp_path / "out")
    assert not caplog.text
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 1, 48, 40)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    config = timm.data.resolve_model_data_config(loaded)
    expected = dict(input_size=(1, 48, 40), mean=(0.25,), std=(0.5,), crop_pct=1.0)
    assert {
        key: tuple(config[key]) if isinstance(expected[key], tuple) else config[key] for key in expected
    } == expected
    # What train.py took from the configuration of the name.
    assert config["interpolation"] == timm.get_pretrained_cfg("gsop_resnet26_net2").interpolation
    text = (tmp_path / "out/config.json").read_text()
    assert "provenance" not in text
    assert "license" not in text


BACKBONES = {
    "resnet18": dict(channels=[8, 16, 24, 32], gsop_stages=[4], cov_dim=8),
    "vit_tiny_patch16_224": dict(img_size=32, embed_dim=24, depth=2, num_heads=3),
}


def folder_of_images(path: Path, names: str) -> Path:
    for name in names:
        (path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(path / "train" / name / "0.png")
    return path


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_second_order_that_train_py_trained(backbone, tmp_path, caplog):
    """With what is in args.yaml, and the names of its data's classes, to the model card."""
    kwargs = dict(BACKBONES[backbone], backbone=backbone, isqrt_dim=6)
    model = randomize(timm.create_model("second_order", num_classes=3, in_chans=1, **kwargs)).eval()
    data = folder_of_images(tmp_path / "data", "cab")
    shape = dict(input_size=[1, 32, 32], mean=[0.5], std=[0.5])
    args = dict(model_kwargs=kwargs, **shape, data_dir=str(data), pretrained=True)
    path = trained(tmp_path, "second_order", model, **args)
    convert("timm", str(path), tmp_path / "out")
    assert not caplog.text
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    # What validate.py takes is what train.py took: of the backbone, without its size for tests.
    config = timm.data.resolve_data_config(model=loaded, use_test_size=True)
    assert tuple(config["input_size"]) == (1, 32, 32)
    for key in ("interpolation", "crop_pct"):
        assert config[key] == getattr(timm.get_pretrained_cfg(backbone), key)
    assert loaded.pretrained_cfg["label_names"] == ["a", "b", "c"]
    shutil.copy(tmp_path / "run/args.yaml", tmp_path / "out")
    stage(tmp_path / "out", "me/mine", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    assert "**Classes**: 3: a, b, c\n" in card
    assert "`pretrained: True`" in card


@pytest.mark.parametrize("model", ["gsop_preresnet20_net1", "second_order"])
def test_names_of_classes(model, tmp_path, caplog):
    kwargs = dict(BACKBONES["resnet18"], backbone="resnet18") if model == "second_order" else {}
    network = timm.create_model(model, num_classes=3, **kwargs)
    args = dict(model_kwargs=kwargs, data_dir=str(tmp_path / "moved"))
    path = str(trained(tmp_path, model, network, **args))
    convert("timm", path, tmp_path / "nameless")
    assert "The names of the classes are not known; --label-names says where they are" in caplog.text
    (tmp_path / "names.txt").write_text("cat\nant\nbee\n")
    given = {"names.txt": ["cat", "ant", "bee"], "data": ["a", "b", "c"], "data/train": ["a", "b", "c"]}
    folder_of_images(tmp_path / "data", "abc")
    for i, (place, names) in enumerate(given.items()):
        convert("timm", path, tmp_path / f"out{i}", label_names=tmp_path / place)
        config = json.loads((tmp_path / f"out{i}/config.json").read_text())
        assert config["label_names"] == names
        assert config["pretrained_cfg"].get("tag") != "untrained"
    folder_of_images(tmp_path / "two", "ab")
    for place, message in (("two", "has 2 different names; accepted: 3"), ("nothing", "does not exist; accepted")):
        with pytest.raises(ValueError, match=message):
            convert("timm", path, tmp_path / "none", label_names=tmp_path / place)


def test_what_started_from_a_folder_converts(tmp_path):
    """train.py --model local-dir:FOLDER --pretrained, as fine-tuning does."""
    model = timm.create_model("gsop_preresnet20_net2", num_classes=3, cov_dim=8, isqrt_dim=6).eval()
    save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    path = trained(tmp_path, f"local-dir:{tmp_path / 'folder'}", model, img_size=32)
    convert("timm", str(path), tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_a_checkpoint_without_args_yaml(tmp_path, caplog):
    model = timm.create_model("gsop_preresnet20_net1", num_classes=3, in_chans=1).eval()
    path = str(trained(tmp_path, "gsop_preresnet20_net1", model))
    with pytest.raises(ValueError, match=r"model_name=None .* or a file of train.py's with its args.yaml beside it"):
        convert("timm", path, tmp_path / "out")
    convert("timm", path, tmp_path / "a", "gsop_preresnet20_net1")
    said = (
        r"No args.yaml is beside .*: its preprocessing is taken to be the default of gsop_preresnet20_net1, input_size"
    )
    assert re.search(said, caplog.text)
    caplog.clear()
    given = dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.25,))
    convert("timm", path, tmp_path / "b", "gsop_preresnet20_net1", data_config=given)
    assert not caplog.text
    loaded = timm.create_model(f"local-dir:{tmp_path / 'b'}", pretrained=True).eval()
    config = timm.data.resolve_model_data_config(loaded)
    assert {key: tuple(config[key]) for key in given} == given
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["isqrt_resnet50", "gsop_resnet50_net1"])
def test_a_network_of_ours_has_no_other_stride(name, tmp_path, caplog):
    model = timm.create_model(name, num_classes=7, cov_dim=8, isqrt_dim=6, **NARROW).eval()
    kwargs = dict(NARROW, cov_dim=8, isqrt_dim=6)
    convert("timm", str(trained(tmp_path, name, model)), tmp_path / "out", name, kwargs)
    assert "The function changes" not in caplog.text
    x = image()
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_a_resnet_that_train_py_trained_gets_blocks(tmp_path, caplog):
    """args.yaml is of another network than the one to make."""
    kwargs = dict(channels=[16, 32, 64, 128], output_stride=16)
    args = dict(model_kwargs=kwargs, img_size=96)
    path = trained(tmp_path, "resnet50", vanilla_resnet(output_stride=16), **args)
    convert("timm", str(path), tmp_path / "out", "gsop_resnet50_net1", dict(kwargs, cov_dim=8))
    assert not caplog.text
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, 96, 96)
    provenance = json.loads((tmp_path / "out/config.json").read_text())["provenance"]
    assert "Built upon a resnet50 trained with timm's train.py, model_best.pth.tar" in provenance["description"]


@pytest.mark.parametrize("name", ["gsop_resnet50_net1", "resnet50"])
def test_a_folder_of_timms_saver(name, tmp_path):
    """A pickle in it is left behind; labels and preprocessing stay."""
    kwargs = dict(cov_dim=8, last_stride=2) if name != "resnet50" else {}
    model = randomize(timm.create_model(name, num_classes=7, **NARROW, **kwargs)).eval()
    labels, data = dict(label_names=list("abcdefg")), dict(input_size=(3, 64, 64), mean=(0.1, 0.2, 0.3))
    save_for_hf(model, tmp_path / "saved", model_config=labels, data_config=data, safe_serialization="both")
    given = dict(NARROW, cov_dim=8, last_stride=2) if name == "resnet50" else None
    convert("timm", str(tmp_path / "saved"), tmp_path / "out", "gsop_resnet50_net1" if given else None, given)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert_same_function(loaded, model)
    assert loaded.pretrained_cfg["label_names"] == list("abcdefg")
    assert timm.data.resolve_model_data_config(loaded)["mean"] == [0.1, 0.2, 0.3]
    with pytest.raises(ValueError, match="does not load; accepted: a folder that timm's save_for_hf wrote"):
        convert("timm", str(tmp_path), tmp_path / "none", "gsop_resnet50_net1")


def test_a_resnet_lacks_covariance_pooling(tmp_path):
    torch.save(vanilla_resnet().state_dict(), tmp_path / "resnet50.pth")
    message = (
        r"has no covariance pooling \(global_pool.reduction.conv.weight is missing\), which gsop_resnet50_net2 ends "
        "with; accepted: model_name='gsop_resnet50_net1', or global_pool='avg'"
    )
    with pytest.raises(ValueError, match=message):
        convert("timm", str(tmp_path / "resnet50.pth"), tmp_path / "a", "gsop_resnet50_net2", NARROW)
    given = dict(NARROW, global_pool="avg", last_stride=2)
    convert("timm", str(tmp_path / "resnet50.pth"), tmp_path / "b", "gsop_resnet50_net2", given)
    with pytest.raises(ValueError, match="model_name='resnet50' is none of timm-gsop's"):
        convert("timm", str(tmp_path / "resnet50.pth"), tmp_path / "c", "resnet50")


def test_convert_densenet(tmp_path):
    small = dict(growth_rate=8, block_config=(2, 2, 2, 2))
    original = randomize(timm.create_model("densenet121", num_classes=5, **small)).eval()
    torch.save(original.state_dict(), tmp_path / "densenet.pth")
    convert("timm", str(tmp_path / "densenet.pth"), tmp_path / "out", "gsop_densenet121_net1", dict(small, cov_dim=4))
    assert_same_function(timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True), original)


@pytest.mark.parametrize("avg_down", [False, True])
@pytest.mark.parametrize("pool", ["avg", "max", "catavgmax"])
def test_neutral_start_with_other_shortcuts_and_pools(avg_down, pool):
    kwargs = dict(avg_down=avg_down, global_pool=pool)
    original = vanilla_resnet(**kwargs)
    model = timm.create_model("gsop_resnet50_net1", last_stride=2, num_classes=7, cov_dim=8, **NARROW, **kwargs)
    model.load_state_dict(neutral_start(model, original.state_dict()))
    assert_same_function(model, original)


def test_only_new_blocks_start_neutral():
    source = timm.create_model("gsop_resnet50_net1", gsop_layers=(2,), cov_dim=8, num_classes=7, **NARROW)
    randomize(source).eval()
    model = timm.create_model("gsop_resnet50_net1", cov_dim=8, num_classes=7, **NARROW)
    weights = neutral_start(model, source.state_dict())
    model.load_state_dict(weights)
    assert_same_function(model, source)
    name = "layer2.4.gsop.excitation.expand_conv.weight"
    assert torch.equal(model.state_dict()[name], source.state_dict()[name])


@pytest.mark.parametrize("kwargs", [{}, dict(flavor="official"), dict(gsop_type="position"), dict(gsop_type="avg")])
def test_gradients_reach_every_block(kwargs):
    """At the first step the zero convolution's; after it, all."""
    model = timm.create_model("gsop_resnet50_net1", cov_dim=8, spatial_size=3, num_classes=7, **NARROW, **kwargs)
    model.load_state_dict(neutral_start(model, vanilla_resnet().state_dict()))
    blocks = {name: p for name, p in model.named_parameters() if ".gsop." in name or ".se." in name}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, target = image(), torch.tensor([1, 2])
    for step in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(x), target).backward()
        reached = {name for name, p in blocks.items() if p.grad.count_nonzero() > 0}
        expected = {name for name in blocks if "expand_conv" in name or step == 1}
        # A bias that a batch normalization takes away again has no gradient but rounding.
        assert {name for name in expected - reached if not name.endswith("conv.bias")} == set()
        optimizer.step()


def test_a_few_steps_on_digits_improve_on_the_source():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:256], dtype=torch.float32)[:, None].div(8).sub(1)
    x = nn.functional.interpolate(x, size=(32, 32)).expand(-1, 3, -1, -1)
    y = torch.tensor(digits.target[:256])
    kwargs = dict(channels=(8, 16, 24, 32), num_classes=10, last_stride=2)
    source = timm.create_model("gsop_resnet26_net1", gsop_layers=(), **kwargs)

    def train(model: nn.Module, epochs: int) -> float:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(epochs):
            for i in range(0, 256, 64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model.train()(x[i : i + 64]), y[i : i + 64]).backward()
                optimizer.step()
        update_bn([x], model)  # the running statistics are still far behind after so few steps
        with torch.no_grad():
            return nn.functional.cross_entropy(model.eval()(x), y).item()

    before = train(source, epochs=4)
    model = timm.create_model("gsop_resnet26_net1", cov_dim=8, **kwargs)
    model.load_state_dict(neutral_start(model, source.state_dict()))
    with torch.no_grad():
        assert nn.functional.cross_entropy(model.eval()(x), y).item() == pytest.approx(before, rel=1e-4)
    assert train(model, epochs=4) < before


@pytest.mark.parametrize("gsop_type", ["position", "avg", "max", "concat"])
def test_what_cannot_start_neutral_is_named(gsop_type):
    model = timm.create_model("gsop_resnet50_net1", flavor="official", gsop_type=gsop_type, num_classes=7, **NARROW)
    with pytest.raises(ValueError, match="flavor='official' with position-wise blocks cannot start neutral"):
        neutral_start(model, vanilla_resnet().state_dict())
    with pytest.raises(ValueError, match="model=GsopPreActResNet cannot start neutral; accepted: GSoP ResNets"):
        neutral_start(timm.create_model("gsop_preresnet20_net1"), {})


def test_config_has_label_names_and_loads_with_num_classes_once(tmp_path):
    torch.save(in_their_names(isqrt_resnet(num_classes=1000)), tmp_path / "checkpoint.pth")
    convert("fast-mpn-cov", str(tmp_path / "checkpoint.pth"), tmp_path / "out", model_kwargs=NARROW)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["label_names"][0] == "n01440764"
    assert config["label_descriptions"]["n01440764"].startswith("tench")
    assert config["num_classes"] == 1000
    assert "num_classes" not in config["model_args"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil-was-here",)


def bad_checkpoint(kind: str, path: Path) -> str:
    weights = in_their_names(released_gsop())
    if kind == "malicious":
        torch.save({"state_dict": weights, "extra": Evil()}, path)
    elif kind == "truncated":
        torch.save(weights, path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "no weights":
        torch.save({"epoch": torch.tensor(3), "state_dict": {"a": 1}}, path)
    elif kind == "not a checkpoint":
        path.write_text("hello")
    elif kind == "missing":
        weights.pop("layer2.0.bn1.weight")
    elif kind == "surplus":
        weights["layer2.0.extra.weight"] = torch.zeros(1)
    elif kind == "shape":
        weights["layer2.0.bn1.weight"] = torch.zeros(3)
    elif kind == "no blocks":
        weights = vanilla_resnet().state_dict()
    elif kind == "depth":
        weights = {name: value for name, value in weights.items() if not name.startswith("layer3.5.")}
    elif kind == "no classifier":
        weights = {name: value for name, value in weights.items() if not name.startswith("fc.")}
    if kind not in ("malicious", "truncated", "no weights", "not a checkpoint", "no file"):
        torch.save(weights, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("malicious", "cannot be read; accepted: safetensors, or a PyTorch file of nothing but data"),
        ("truncated", "cannot be read; accepted: .* whole"),
        ("no weights", "holds no weights"),
        ("not a checkpoint", "cannot be read"),
        ("no file", "is not a file"),
        ("missing", r"does not fit gsop_resnet50_net1. (.|\n)*Missing key.*layer2.0.bn1.weight"),
        ("surplus", "Unexpected key.*layer2.0.extra.weight"),
        ("shape", r"size mismatch for layer2.0.bn1.weight.*\[3\].*\[32\]"),
        ("no blocks", "has no GSoP blocks"),
        ("depth", r"has \(3, 4, 5, 3\) residual blocks .* \(3, 4, 6, 3\) of ResNet-50"),
        ("no classifier", "has no fc.weight"),
    ],
)
def test_a_bad_checkpoint_is_named_and_leaves_nothing(kind, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = bad_checkpoint(kind, tmp_path / "checkpoint.pth")
    before = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert("gsop", path, tmp_path / "out", model_kwargs=NARROW)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("given", [None, "channel"])
def test_avg_and_max_do_not_show(given):
    with pytest.raises(ValueError, match=f"gsop_type={given!r} does not fit the checkpoint; accepted: 'avg', 'max'"):
        from_gsop(in_their_names(released_gsop("avg")), given)


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(
        ValueError, match="source='keras' is not accepted; accepted: 'gsop', 'fast-mpn-cov', 'gcp', 'dropcov'"
    ):
        convert("keras", "x.pth", tmp_path / "out")
    with pytest.raises(ValueError, match="model_name=None with source='timm'"):
        convert("timm", "resnet50.a1_in1k", tmp_path / "out")
    with pytest.raises(ValueError, match="checkpoint='nonsense' is neither a file nor a model of timm"):
        convert("timm", "nonsense", tmp_path / "out", "gsop_resnet50_net1")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    torch.save(in_their_names(isqrt_resnet()), tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="has something in it already; accepted: a new or empty folder"):
        convert("fast-mpn-cov", str(tmp_path / "checkpoint.pth"), tmp_path / "full", model_kwargs=NARROW)


def test_old_files_without_counts_of_batches(tmp_path):
    model = isqrt_resnet()
    weights = {name: value for name, value in model.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(weights, tmp_path / "old.pth")
    twin = isqrt_resnet()
    twin.load_state_dict(read_checkpoint(tmp_path / "old.pth"))
    x = image()
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


def test_command_line(tmp_path):
    torch.save(in_their_names(isqrt_resnet()), tmp_path / "checkpoint.pth")
    command = [
        "hub/convert.py",
        "--from",
        "fast-mpn-cov",
        tmp_path / "checkpoint.pth",
        tmp_path / "out",
    ]
    kwargs = ["--model", "gsop_resnet50_net2", "--model-kwargs", "channels=(16,32,64,128)", "cov_dim=8"]
    done = run_fresh(*command, *kwargs, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    assert timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)(image()).shape == (2, 7)
    again = run_fresh(*command, *kwargs, cwd=ROOT)
    assert again.returncode == 1
    assert re.match(r"error: folder=.* has something in it already", again.stderr.splitlines()[-1])
    assert not zipfile.is_zipfile(tmp_path / "out/model.safetensors")  # no pickle
