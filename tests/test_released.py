"""Checkpoints of the released code bases: the right network with equal logits, or one clear error."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.released_networks import CovMobileNetV2, CovResNet, of_main_py, other_networks
from tests.test_conversion import randomize
from timm_gsop.hub import convert, stage

Weights = dict[str, torch.Tensor]


def network(kind: str, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    made = CovMobileNetV2(**kwargs) if kind == "mobilenetv2" else CovResNet(int(kind), **kwargs)
    return randomize(made).eval()


def saved(weights: Weights, path: Path, wrapping: str = "bare") -> str:
    """A file as the released ones are, or as the training scripts write them."""
    if wrapping == "PyTorch 0.4":
        weights = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    if wrapping == "wrapped":
        weights = {f"module.{name}": value for name, value in weights.items()}
        saved = dict(epoch=3, arch="x", state_dict=weights, best_acc1=torch.tensor(1.0), optimizer={"state": {}})
        torch.save(saved, path, _use_new_zipfile_serialization=False)
    else:
        torch.save(weights, path)
    return str(path)


@torch.no_grad()
def assert_equal_logits(folder: Path, original: nn.Module) -> None:
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 96, 96)
    expected = original(x)
    torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("source", "kind", "tensors", "dim", "wrapping"),
    [
        ("gcp", "18", 128, 6, "wrapped"),
        pytest.param("gcp", "34", 224, 6, "wrapped", marks=pytest.mark.slow),
        ("gcp", "50", 326, 3, "wrapped"),
        pytest.param("gcp", "101", 632, 6, "wrapped", marks=pytest.mark.slow),
        ("gcp", "mobilenetv2", 320, 6, "wrapped"),
        pytest.param("gcp", "mobilenetv2", 320, 3, "PyTorch 0.4", marks=pytest.mark.slow),
        ("fast-mpn-cov", "50", 326, 6, "bare"),
        ("fast-mpn-cov", "18", 128, 6, "PyTorch 0.4"),
    ],
)
def test_isqrt_cov(source, kind, tensors, dim, wrapping, tmp_path, caplog):
    """Width of the head and number of classes come from the file; what no name shows is said."""
    original = network(kind, dim=dim)
    assert len(original.state_dict()) == tensors  # as many as in the released files
    convert(source, saved(original.state_dict(), tmp_path / "file.pth.tar", wrapping), tmp_path / "out")
    assert_equal_logits(tmp_path / "out", original)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architecture"] == ("second_order" if kind == "mobilenetv2" else f"isqrt_resnet{kind}")
    assert (config["pretrained_cfg"]["interpolation"], config["pretrained_cfg"]["crop_pct"]) == ("bilinear", 0.875)
    taken = (
        "isqrt_iters=5, pool_kwargs={'act_layer': 'relu6'}" if kind == "mobilenetv2" else "last_stride=1, isqrt_iters=5"
    )
    assert f"Taken: {taken}. --model-kwargs says otherwise." in caplog.text


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_of_the_training_script(fine_tuned, tmp_path):
    """With arch=resnet50 its last stage has stride 2, which an option says."""
    original = network("18", last_stride=2)
    file = saved(of_main_py(original.state_dict(), fine_tuned), tmp_path / "model_best.pth.tar")
    convert("fast-mpn-cov", file, tmp_path / "out", model_kwargs=dict(last_stride=2))
    assert_equal_logits(tmp_path / "out", original)


def test_differentiable_svd(tmp_path, caplog):
    """The exact root, and a last stage of stride 2, by the names of fast MPN-COV's training script."""
    original = network("50", last_stride=2, num_iters=-1)
    file = saved(of_main_py(original.state_dict()), tmp_path / "pade_resnet50.pth.tar")
    convert("fast-mpn-cov", file, tmp_path / "out", "mpncov_resnet50", dict(last_stride=2))
    assert_equal_logits(tmp_path / "out", original)
    assert "The file does not say last_stride. Taken: last_stride=2." in caplog.text
    assert "The function changes unless the weights were trained with the exact root" in caplog.text


@pytest.mark.parametrize("pool", ["dropcov", "cov"])
def test_dropcov(pool, tmp_path):
    """Without a square root; ``"cov"`` is the same in evaluation."""
    original = network("34", dropcov=True)
    file = saved(original.state_dict(), tmp_path / "file.pth.tar", "wrapped")
    kwargs = {} if pool == "dropcov" else dict(global_pool="cov")
    model = convert("dropcov", file, tmp_path / "out", model_kwargs=kwargs)
    assert model.global_pool.pool_type == pool
    assert_equal_logits(tmp_path / "out", original)


def test_isqrt_and_dropcov_are_not_mixed_up(tmp_path, caplog):
    isqrt = saved(network("18").state_dict(), tmp_path / "isqrt.pth")
    dropcov = saved(network("18", dropcov=True).state_dict(), tmp_path / "dropcov.pth")
    for source in ("gcp", "fast-mpn-cov"):
        with pytest.raises(ValueError, match=r"has eca_layer: it is DropCov's.* accepted: source='dropcov'"):
            convert(source, dropcov, tmp_path / "out")
    with pytest.raises(ValueError, match="has no eca_layer: it is not DropCov's"):
        convert("dropcov", isqrt, tmp_path / "out")

    def load(file: str, **kwargs) -> nn.Module:
        given = dict(isqrt_dim=6, num_classes=7, pretrained_cfg_overlay=dict(file=file, num_classes=7), **kwargs)
        return timm.create_model("isqrt_resnet18", pretrained=True, **given)

    for pool in ("isqrt", "mpn"):
        with pytest.raises(ValueError, match=rf"global_pool='{pool}' is not accepted with these weights, .* DropCov's"):
            load(dropcov, global_pool=pool)
    with pytest.raises(ValueError, match=r"global_pool='dropcov' is not accepted with these weights, .* no eca_layer"):
        load(isqrt, global_pool="dropcov")
    assert load(dropcov, global_pool="dropcov").global_pool.pool_type == "dropcov"
    assert not caplog.text
    load(isqrt, global_pool="cov")
    assert "The function changes: global_pool='cov', and the weights are of 'isqrt'" in caplog.text


@pytest.mark.parametrize(("depth", "dim"), [("18", 6), ("34", 3)])
def test_net2_from_a_converted_network(depth, dim, tmp_path):
    """At once, or from its folder: the same classifier, blocks neutral; saved and loaded as any other."""
    original = network(depth, dim=dim)
    file = saved(original.state_dict(), tmp_path / "ResNet.pth.tar", "wrapped")
    name = f"gsop_resnet{depth}_net2"
    convert("gcp", file, tmp_path / "isqrt")
    convert("gcp", file, tmp_path / "at once", name)
    convert("timm", str(tmp_path / "isqrt"), tmp_path / "from folder", name)
    for folder in ("at once", "from folder"):
        assert_equal_logits(tmp_path / folder, original)
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["architecture"] == name
        said = "Built upon a checkpoint of GCP_Optimization (iSQRT-COV), ResNet.pth.tar, with GSoP blocks that are "
        assert config["provenance"]["description"] == f"{said}untrained."
        assert config["provenance"]["license"] == "none stated"


def test_weights_without_a_licence_need_permission_to_be_published(tmp_path):
    file = saved(network("18", dropcov=True).state_dict(), tmp_path / "ResNet18_DropCov.pth.tar")
    convert("dropcov", file, tmp_path / "out")
    for given in (dict(), dict(license="mit"), dict(permission=" ")):
        with pytest.raises(ValueError, match=r"whose authors state no licence.* --i-have-permission TEXT"):
            stage(tmp_path / "out", "me/mine", tmp_path / "staged", **given)
    assert not (tmp_path / "staged").exists()
    stage(tmp_path / "out", "me/mine", tmp_path / "staged", permission="Q. Wang, by mail, 2026-11-27")
    card = (tmp_path / "staged/README.md").read_text()
    assert "**Licence**: none stated by the authors of the weights" in card
    assert "**Permission to publish**: Q. Wang, by mail, 2026-11-27" in card
    assert "a checkpoint of DropCov (covariance pooling without a square root), ResNet18_DropCov.pth.tar" in card
    assert "<https://github.com/mingzeG/DropCov>" in card
    assert "\nlicense:" not in card


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shufflenet", "is of ShuffleNetV2, which timm does not have; accepted: ResNets, MobileNetV2"),
        ("vgg16_bn", "is of VGG-16-BN, whose classifier of three layers after the covariance no network"),
    ],
)
def test_networks_without_a_place_are_named(name, message, tmp_path):
    file = saved(other_networks(name), tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        convert("gcp", file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("model", "file", "kwargs", "message"),
    [
        ("isqrt_resnet18", "isqrt 18", {}, "isqrt_dim=256, the default, is not accepted .*; accepted: isqrt_dim=6"),
        ("isqrt_resnet50", "isqrt 18", {}, "are of another network than isqrt_resnet50, of whose 264 tensors"),
        ("isqrt_resnet34", "isqrt 18", {}, "are of another network than isqrt_resnet34"),
        ("isqrt_resnet18", "shufflenet", {}, "are of another network than isqrt_resnet18.* they fit 0"),
        ("second_order", "shufflenet", dict(backbone="resnet18"), "fits backbone='resnet18' in 0 % of its weights"),
        ("second_order", "isqrt 18", dict(backbone="vit_tiny_patch16_224"), "fits backbone='vit_tiny_patch16_224'"),
    ],
)
def test_a_file_of_another_network_is_refused(model, file, kwargs, message, tmp_path):
    weights = network("18").state_dict() if file == "isqrt 18" else other_networks(file)
    overlay = dict(file=saved(weights, tmp_path / "file.pth"), num_classes=7)
    with pytest.raises(ValueError, match=message):
        timm.create_model(model, pretrained=True, num_classes=7, pretrained_cfg_overlay=overlay, **kwargs)
