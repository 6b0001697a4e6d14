import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from timm_gsop import ChannelGsop, covariance_pool, newton_schulz_sqrt
from timm_gsop.layers import FLAVORS, GSOP_TYPES
from timm_gsop.viz import draw, record
from timm_gsop.viz.__main__ import main
from timm_gsop.viz.blocks import MAX_ROWS

NARROW = dict(channels=(16, 32, 64, 128), num_classes=5, cov_dim=8, isqrt_dim=6, spatial_size=3)


def create(name: str = "gsop_resnet26_net2", **kwargs) -> nn.Module:
    model = timm.create_model(name, **{**NARROW, **kwargs})
    with torch.no_grad():  # weights that differ from one half
        for module in model.modules():
            if hasattr(module, "expand_conv"):
                module.expand_conv.bias.normal_()
    return model


@pytest.fixture(params=["china.jpg", "flower.jpg"])
def photo(request, tmp_path):
    path = tmp_path / request.param
    Image.fromarray(load_sample_image(request.param)).save(path)
    return path


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_weights_are_those_that_scale(gsop_type, flavor):
    model = create(gsop_type=gsop_type, flavor=flavor).eval()
    scaled = {}

    def note(name: str):
        return lambda module, args, output: scaled.update({name: (args[0].clone(), output.clone())})

    for name, module in model.named_modules():
        if hasattr(module, "excitation"):
            block = model.get_submodule(name.removesuffix(".gsop"))  # with the shortcut, where it adds that in one pass
            (block if getattr(block, "in_one_pass", False) else module).register_forward_hook(note(name))
    records = record(model, torch.randn(1, 3, 64, 96))
    blocks = {item.name: item for item in records if item.name != "global_pool"}
    assert set(blocks) == set(scaled)
    for name, (x, y) in scaled.items():
        item = blocks[name]
        by_channel = item.channel_weights is not None
        assert by_channel == (item.position_weights is None) == isinstance(model.get_submodule(name), ChannelGsop)
        expected = x * (item.channel_weights[:, None, None] if by_channel else item.position_weights)
        expected = expected.clamp_min(0) if flavor == "official" and not by_channel else expected
        expected = expected + x if gsop_type in ("channel", "position") and flavor == "paper" else expected  # shortcut
        torch.testing.assert_close(expected, y)


def test_covariance_before_and_after():
    model = create().eval()
    x = torch.randn(1, 3, 64, 64)
    block, *_, pool = record(model, x)
    features = model.forward_features(x)
    cov = covariance_pool(model.global_pool.reduction(features))
    torch.testing.assert_close(pool.covariance, cov[0])
    torch.testing.assert_close(pool.normalized, newton_schulz_sqrt(cov)[0])
    assert pool.channel_weights is pool.position_weights is None
    torch.testing.assert_close(block.normalized, block.covariance / (1 + 1e-5) ** 0.5)  # a fresh BN in evaluation


@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_covariance_is_what_goes_through_the_excitation(gsop_type, flavor):
    model = create(gsop_type=gsop_type, flavor=flavor).eval()
    seen = {}

    def note(name: str):
        return lambda module, args, output: seen.update({name: (args[0].clone(), output.clone())})

    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # no fresh ones
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 2)
        if name.endswith((".excitation", ".cov_bn")):
            module.register_forward_hook(note(name))
    x = torch.randn(1, 3, 64, 96)
    *blocks, _ = record(model, x)
    with torch.no_grad():
        model(x)  # what the hooks keep is this run's
    for item in blocks:
        torch.testing.assert_close(item.covariance, seen[f"{item.name}.excitation"][0][0])
        torch.testing.assert_close(item.normalized, seen[f"{item.name}.excitation.cov_bn"][1][0, :, :, 0])


def test_layers_that_do_not_run():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.gsop = ChannelGsop(3, 2)

        def forward(self, x):
            return x

    with pytest.raises(ValueError, match="model=Idle called none of its layers gsop"):
        record(Idle(), torch.randn(1, 3, 8, 8))


def test_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install timm-gsop\[demo\]"):
        draw([], Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("name", "count"),
    [("isqrt_resnet26", 1), ("mpncov_resnet50", 1), ("gsop_resnet26_net1", 4), ("gsop_resnet26_net2", 4)],
)
def test_layers_are_found_in_order(name, count):
    names = [item.name for item in record(create(name), torch.randn(1, 3, 64, 64))]
    assert len(names) == count
    assert names == sorted(names, key=lambda n: (n == "global_pool", n))


def test_layers_are_found_wherever_they_are():
    model = timm.create_model("resnet18", block_args=dict(attn_layer=ChannelGsop))
    assert len(record(model, torch.randn(1, 3, 64, 64))) == 8


def test_the_model_is_left_as_it_was():
    model = create().train()
    model.layer1.eval()
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="channels"):
        record(model, torch.randn(1, 7, 64, 64))
    record(model, torch.randn(1, 3, 64, 64))
    assert model.training
    assert not model.layer1[0].training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"image has shape \(2, 3, 64, 64\); accepted: \(1, C, H, W\)"):
        record(create(), torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="model=ResNet has neither GSoP blocks nor covariance pooling"):
        record(timm.create_model("resnet18"), torch.randn(1, 3, 64, 64))


def test_many_blocks_are_thinned_out():
    model = timm.create_model("gsop_preresnet164_net1", cov_dim=4)
    records = record(model, torch.randn(1, 3, 32, 32))
    assert len(records) == 18
    figure = draw(records, Image.new("RGB", (32, 32)))
    titles = [ax.get_title() for ax in figure.axes]
    shown = [item.name for item in records if item.name in titles]
    assert len(shown) == MAX_ROWS
    assert shown[-1] == records[-1].name


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_command_line(photo, gsop_type, tmp_path, capsys):
    out = tmp_path / "out.png"
    main(["gsop_preresnet20_net2", str(photo), str(out), "--model-kwargs", f"gsop_type={gsop_type}", "cov_dim=8"])
    picture = np.asarray(Image.open(out).convert("L"))
    assert picture.std() > 10  # something is drawn
    assert {path.name for path in tmp_path.iterdir()} == {photo.name, out.name}
    assert capsys.readouterr().out.strip() == f"wrote {out}"


def test_untrained_picture_is_reproduced(photo, tmp_path):
    for out in ("a.png", "b.png"):
        main(["gsop_preresnet20_net1", str(photo), str(tmp_path / out), "--img-size", "48"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_command_line_with_a_grey_model(photo, tmp_path):
    main(["gsop_preresnet20_net1", str(photo), str(tmp_path / "out.png"), "--model-kwargs", "in_chans=1", "cov_dim=8"])
    assert (tmp_path / "out.png").exists()


def test_command_line_with_other_images(photo, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["gsop_preresnet20_net1", str(photo), str(tmp_path / "out.png"), "--model-kwargs", "in_chans=4"])
    assert "model takes images of 4 channels; accepted: 1 or 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such_model", "{image}", "{out}"], "Unknown model"),
        (["resnet18", "{image}", "{out}"], "model=ResNet has neither GSoP blocks nor covariance pooling"),
        (["gsop_preresnet20_net1", "{text}", "{out}"], "is not an image that Pillow can read"),
        (["gsop_preresnet20_net1", "no-such-image.png", "{out}"], "no-such-image.png"),
        (["gsop_preresnet20_net1", "{image}", "no-such-folder/out.png"], "'no-such-folder/out.png' is in no folder"),
        (["gsop_preresnet20_net1", "{image}", "{out}.nonsense"], "nonsense"),
        (["gsop_preresnet20_net1", "{image}", "{out}", "--img-size", "0"], "--img-size=0 is not accepted"),
        (["gsop_preresnet20_net1", "{image}", "{out}", "--model-kwargs", "cov_dims=3"], "argument 'cov_dims'"),
        (["gsop_preresnet20_net1", "{image}", "{out}", "--model-kwargs", "cov_dim"], "it must be KEY=VALUE"),
        (["gsop_preresnet20_net1", "{image}", "{out}", "--checkpoint", "no-such.pth"], "'no-such.pth' is no file"),
        (["gsop_preresnet20_net1", "{image}", "{out}", "--checkpoint", "{weights}"], "Missing key(s) in state_dict"),
        (["preresnet20", "{image}", "{out}", "--checkpoint", "{classes}"], "has 7 classes and the model 100; accepted"),
    ],
)
def test_command_line_errors_are_one_line(arguments, message, tmp_path, capsys):
    paths = {name: tmp_path / f"{name}.png" for name in ("image", "text", "out", "weights", "classes")}
    torch.save(timm.create_model("preresnet20", num_classes=7).state_dict(), paths["classes"])
    torch.save({"other": torch.zeros(1)}, paths["weights"])
    Image.new("RGB", (32, 32)).save(paths["image"])
    paths["text"].write_text("not an image")
    before = set(tmp_path.iterdir())
    with pytest.raises(SystemExit) as stop:
        main([argument.format(**paths) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.split("error: ")[1]
    assert message in error
    assert error.count("\n") == 1
    assert set(tmp_path.iterdir()) == before
