"""What pretrained=True finds and how it fits our networks; tests/test_hub.py asks a Hub."""

import copy
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import PretrainedCfg, save_for_hf
from timm.models.resnet import BasicBlock

from tests.test_conversion import NARROW, assert_same_function, in_their_names, isqrt_resnet, randomize, vanilla_resnet
from timm_gsop.hub import neutral_start
from timm_gsop.models import GsopResNet
from timm_gsop.pretrained.digests import known_digest, sha256_of
from timm_gsop.pretrained.locate import locate_weights, shipped

SMALL = dict(NARROW, cov_dim=8, isqrt_dim=6)
CONVERTED = {
    "isqrt_resnet50.in1k": "mpncovresnet50-15991845.pth",
    "isqrt_resnet101.in1k": "mpncovresnet101-ade9737a.pth",
    "gsop_resnet50_net2.isqrt_in1k": "mpncovresnet50-15991845.pth",
    "gsop_resnet101_net2.isqrt_in1k": "mpncovresnet101-ade9737a.pth",
}


@pytest.fixture
def origin(tmp_path):
    """A network of fast MPN-COV, and what says where its file is."""
    model = isqrt_resnet()
    torch.save(in_their_names(model), tmp_path / "mpncovresnet50.pth")
    return model, dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "mpncovresnet50.pth"), num_classes=7))


@pytest.mark.parametrize(("name", "file"), CONVERTED.items())
def test_configurations(name, file):
    """The bare name means these weights; the origin and its digest, licence and figures. Not published: not asked."""
    cfg = timm.get_pretrained_cfg(name.partition(".")[0])
    assert cfg.tag == name.partition(".")[2]
    assert cfg.hf_hub_id is None
    assert cfg.url == f"http://jtxie.com/models/{file}"
    assert cfg.license == "mit"
    assert cfg.origin_url.startswith("https://github.com/")
    assert "data: ImageNet-1k" in cfg.notes
    assert any(re.match(r"reported: .* not measured by us", note) for note in cfg.notes)
    assert not any(note.startswith("measured") for note in cfg.notes)
    assert name in timm.list_pretrained("*gsop*") + timm.list_pretrained("isqrt*")


@pytest.mark.parametrize("name", ["isqrt_resnet50", "gsop_resnet50_net2"])
def test_conversion_on_load(name, origin):
    model, where = origin
    assert_same_function(timm.create_model(name, pretrained=True, **SMALL, **where), model)


def test_conversion_on_load_in_the_official_flavor(origin, caplog):
    model, where = origin
    kwargs = dict(SMALL, flavor="official")
    assert_same_function(
        timm.create_model("gsop_resnet50_net2", pretrained=True, isqrt_iters=5, **kwargs, **where), model
    )
    assert "The function changes" not in caplog.text
    timm.create_model("gsop_resnet50_net2", pretrained=True, **kwargs, **where)
    assert "The function changes: isqrt_iters=3, and the weights are of 5" in caplog.text


def test_another_number_of_channels_and_classes(origin):
    model, where = origin
    adapted = timm.create_model(
        "gsop_resnet50_net2", pretrained=True, in_chans=1, num_classes=3, **SMALL, **where
    ).eval()
    torch.testing.assert_close(adapted.conv1.weight, model.conv1.weight.sum(dim=1, keepdim=True))
    x = torch.randn(2, 1, 64, 64)
    features = model.forward_features(x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(adapted.forward_features(x), features, rtol=1e-4, atol=1e-5 * features.max().item())
    assert adapted(x).shape == (2, 3)


def test_features_only(origin):
    """Every level is that of the original, but for the factor that the next convolution takes away again."""
    model, where = origin
    backbone = timm.create_model("gsop_resnet50_net2", pretrained=True, features_only=True, **SMALL, **where).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    for i, (level, factor) in enumerate(zip(backbone(x), (1, 1.5, 1.5, 1.5, 1), strict=True)):
        wanted = factor * expected[i]
        torch.testing.assert_close(level, wanted, rtol=1e-4, atol=1e-5 * wanted.max().item())


HEAD = "The weights are of a network with another head than"


def said_of_the_head(caplog) -> str:
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.getMessage().startswith(HEAD)
    return record.getMessage()


@pytest.mark.parametrize("kwargs", [dict(global_pool="avg"), dict(global_pool="catavgmax"), dict(isqrt_dim=4)])
@pytest.mark.parametrize("name", ["isqrt_resnet50", "gsop_resnet50_net2"])
def test_another_head_is_left_out_in_one_line(name, kwargs, origin, caplog):
    model, where = origin
    loaded = timm.create_model(name, pretrained=True, **{**SMALL, **kwargs}, **where).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(loaded.forward_features(x), features, rtol=1e-4, atol=1e-4 * features.max().item())
    assert loaded(x).shape == (2, 7)
    said = said_of_the_head(caplog)
    assert f"global_pool={kwargs.get('global_pool', 'isqrt')!r} here. Left out: fc.bias, fc.weight, global_pool" in said
    assert f"Untrained: fc.bias, fc.weight{'.' if 'global_pool' in kwargs else ', global_pool.'}" in said


@pytest.mark.parametrize("kwargs", [dict(global_pool="isqrt"), dict(global_pool="mpn"), dict(global_pool="catavgmax")])
def test_weights_without_covariance_pooling(kwargs, tmp_path, caplog):
    model = vanilla_resnet()
    torch.save(model.state_dict(), tmp_path / "resnet50.pth")
    overlay = dict(file=str(tmp_path / "resnet50.pth"), num_classes=7)
    given = dict(SMALL, gsop_layers=(1, 2, 3), last_stride=2, pretrained_cfg_overlay=overlay, **kwargs)
    loaded = timm.create_model("gsop_resnet50_net1", pretrained=True, **given).eval()
    x = torch.randn(2, 3, 64, 64)
    features = model.forward_features(x)
    torch.testing.assert_close(loaded.forward_features(x), features, rtol=1e-4, atol=1e-4 * features.max().item())
    assert "Left out: fc.bias, fc.weight. Untrained: fc.bias, fc.weight" in said_of_the_head(caplog)


def test_another_head_and_other_classes_than_in_a_folder(tmp_path, caplog):
    model = timm.create_model("gsop_preresnet20_net2", pretrained=True).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    given = dict(pretrained=True, num_classes=3, global_pool="avg")
    loaded = timm.create_model(f"local-dir:{tmp_path}", **given).eval()
    x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(loaded.forward_features(x), model.forward_features(x), rtol=0, atol=0)
    assert loaded(x).shape == (2, 3)
    said_of_the_head(caplog)
    caplog.clear()
    encoder = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=0).eval()
    torch.testing.assert_close(encoder(x), model.forward_head(model.forward_features(x), pre_logits=True))
    assert HEAD not in caplog.text
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True, global_pool="avg").eval()
    torch.testing.assert_close(backbone(x)[-1], model.forward_intermediates(x, intermediates_only=True)[-1])
    assert HEAD not in caplog.text  # a backbone has no head to lose


@pytest.mark.parametrize("name", ["fc.weight", "global_pool.reduction.bn.weight"])
def test_a_head_with_a_part_missing_is_still_an_error(name, tmp_path):
    weights = timm.create_model("gsop_preresnet20_net2").state_dict()
    torch.save({key: value for key, value in weights.items() if key != name}, tmp_path / "weights.pth")
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")))
    with pytest.raises(RuntimeError, match=f"Missing key.*{name}"):
        timm.create_model("gsop_preresnet20_net2", pretrained=True, **overlay)


def test_a_checkpoint_of_train_py_as_pretrained_path(tmp_path, caplog):
    """train.py's ``--pretrained --pretrained-path``: everything but the classifier, whatever the classes."""
    model = timm.create_model("gsop_preresnet20_net2.untrained", num_classes=5).eval()
    torch.save(dict(epoch=1, state_dict=model.state_dict()), tmp_path / "model_best.pth.tar")
    overlay = dict(file=str(tmp_path / "model_best.pth.tar"), num_classes=-1)
    tuned = timm.create_model("gsop_preresnet20_net2", pretrained=True, num_classes=5, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 3, 28, 28)
    features = [m.forward_head(m.forward_features(x), pre_logits=True) for m in (tuned.eval(), model)]
    torch.testing.assert_close(*features, rtol=0, atol=0)
    assert not torch.equal(tuned.fc.weight, model.fc.weight)
    assert HEAD not in caplog.text


SMALL_BASES = {
    "densenet121": dict(growth_rate=8, block_config=(2, 2, 2, 2)),
    "inception_v3": {},
    "resnext50_32x4d": dict(channels=(16, 32, 48, 64)),
}


@pytest.mark.parametrize(
    ("base", "kwargs"),
    [
        *((base, {}) for base in SMALL_BASES),
        ("densenet121", dict(gsop_type="concat", spatial_size=3)),
        ("inception_v3", dict(gsop_type="position", spatial_size=3, gsop_layers=(2,))),
    ],
)
def test_neutral_blocks_in_other_families(base, kwargs):
    """In training too, where variances are as small as batch normalization's eps; and in evaluation after it."""
    small = dict(SMALL_BASES[base], num_classes=5)
    vanilla = randomize(timm.create_model(base, **small)).double()
    with torch.no_grad():
        for bn in [m for m in vanilla.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            bn.weight.mul_(0.1)
    stride = dict(last_stride=2) if base.startswith("resnext") else {}
    model = timm.create_model(f"gsop_{base}_net1", cov_dim=4, **small, **{**kwargs, **stride}).double()
    model.load_state_dict(neutral_start(model, vanilla.state_dict()))
    x = torch.randn(3, 3, 80, 80, dtype=torch.float64)
    for mode in (False, True, False):
        expected = vanilla.train(mode)(x)
        scale = expected.abs().max().item()
        torch.testing.assert_close(model.train(mode)(x), expected, rtol=1e-5, atol=1e-5 * scale)


def basic_blocks(**kwargs) -> GsopResNet:
    return GsopResNet(BasicBlock, (1, 1, 1, 1), cov_dim=4, num_classes=5, **kwargs)


def test_neutral_blocks_among_basic_blocks():
    plain = randomize(basic_blocks(channels=(8, 16, 24, 32), gsop_layers=()))
    for flavor in ("paper", "official"):
        model = basic_blocks(channels=(8, 16, 24, 32), flavor=flavor, zero_init_last=False)
        model.load_state_dict(neutral_start(model, plain.state_dict()))
        assert_same_function(model, plain)


def test_no_neutral_block_in_front_of_an_identity_shortcut():
    same = dict(channels=(8, 16, 24, 24), output_stride=16)  # the last stage has neither a stride nor another width
    model = basic_blocks(**same)
    before = copy.deepcopy(model.state_dict())
    weights = basic_blocks(**same, gsop_layers=()).state_dict()
    reason = "The block after layer3 cannot start neutral: the shortcut of layer4.0 has no projection .* without 3"
    with pytest.raises(ValueError, match=reason):
        neutral_start(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert neutral_start(model, before).keys() == before.keys()  # a trained block may be there
    model = basic_blocks(**same, gsop_layers=(1, 2, 4))
    model.load_state_dict(neutral_start(model, weights))
    assert_same_function(model, basic_blocks_with(weights, **same))


def basic_blocks_with(weights, **kwargs) -> GsopResNet:
    model = basic_blocks(**kwargs, gsop_layers=())
    model.load_state_dict(weights)
    return model.eval()


TIMMS = {
    "gsop_resnet26_net1": "resnet26.bt_in1k",
    "gsop_resnet26_net2": "resnet26.bt_in1k",
    "gsop_resnet50_net1": "resnet50.a1_in1k",
    "gsop_resnet101_net1": "resnet101.a1h_in1k",
    "gsop_resnet152_net1": "resnet152.a1h_in1k",
    "gsop_resnet152_net2": "resnet152.a1h_in1k",
    "gsop_resnext50_32x4d_net1": "resnext50_32x4d.a1h_in1k",
    "gsop_resnext50_32x4d_net2": "resnext50_32x4d.a1h_in1k",
    "gsop_densenet121_net1": "densenet121.ra_in1k",
    "gsop_densenet121_net2": "densenet121.ra_in1k",
    "gsop_inception_v3_net1": "inception_v3.tv_in1k",
    "gsop_inception_v3_net2": "inception_v3.tv_in1k",
    "isqrt_resnet18": "resnet18.a1_in1k",
    "isqrt_resnet26": "resnet26.bt_in1k",
    "isqrt_resnet34": "resnet34.a1_in1k",
    "mpncov_resnet50": "resnet50.a1_in1k",
}


@pytest.mark.parametrize(("name", "origin_name"), TIMMS.items())
def test_configurations_of_timms_weights(name, origin_name):
    """The bare name means them; preprocessing, licence and origin are timm's; the tag without weights stays."""
    cfg, base = timm.get_pretrained_cfg(name), timm.get_pretrained_cfg(origin_name)
    assert cfg.tag == base.tag
    assert cfg.hf_hub_id == base.hf_hub_id == f"timm/{origin_name}"
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size", "license", "num_classes"):
        assert getattr(cfg, key) == getattr(base, key)
    assert cfg.origin_url == f"https://huggingface.co/timm/{origin_name}"
    assert origin_name in cfg.description
    assert ("covariance pooling and classifier are untrained" in cfg.description) == (not name.endswith("net1"))
    assert ("last_stride=2 gives the function of timm's network" in cfg.description) == ("res" in name)
    assert f"{name}.{cfg.tag}" in timm.list_pretrained(f"{name}.*")
    assert not timm.get_pretrained_cfg(f"{name}.untrained").has_weights


def test_every_imagenet_network_has_weights():
    ours = timm.list_models(module=["gsop_resnet", "gsop_densenet", "gsop_inception"])
    assert len(ours) >= 20
    for name in ours:
        assert timm.get_pretrained_cfg(name).has_weights


def test_the_digest_is_checked_each_time(tmp_path, monkeypatch):
    """In the cache too; a damaged file is removed, and the next try would download it."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    digest = hashlib.sha256(b"weights").hexdigest()[:8]
    cached = tmp_path / f"net-{digest}.pth"
    cfg = PretrainedCfg(architecture="net", tag="x", url=f"http://nowhere.invalid/net-{digest}.pth")
    cached.write_bytes(b"weights")
    assert locate_weights(cfg, tmp_path) == cached
    cached.write_bytes(b"others")
    with pytest.raises(RuntimeError, match=f"was damaged: its SHA-256 is .*, not {digest}"):
        locate_weights(cfg, tmp_path)
    assert not cached.exists()
    with pytest.raises(RuntimeError, match=r"of net.x are not cached and cannot be had from http://nowhere.invalid/"):
        locate_weights(cfg, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "cfg",
    [
        dict(file="somewhere.pth", hf_hub_id="a/b"),
        dict(source="local-dir", file="somewhere"),
        dict(state_dict={"a": torch.zeros(1)}, hf_hub_id="a/b"),
        dict(url="https://nowhere.invalid/without_a_digest.pth"),
        {},
    ],
)
def test_what_timm_finds_itself_is_left_to_it(cfg):
    assert locate_weights(PretrainedCfg(**cfg)) is None


def test_no_weights_is_said():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for gsop_preresnet56_net1"):
        timm.create_model("gsop_preresnet56_net1", pretrained=True)


def test_a_new_network_does_not_ask_for_weights(caplog):
    with caplog.at_level(logging.INFO):
        timm.create_model("isqrt_resnet50", **SMALL)
    assert "weights" not in caplog.text


SHIPPED = [f"gsop_preresnet20_net{n}.{tag}" for n in (1, 2) for tag in ("cifar10", "fashion_mnist")]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_what_the_package_says(name):
    """``sha256sum -c SHA256SUMS`` says the same."""
    path = Path(shipped(name))
    assert known_digest(path) == sha256_of(path)
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=path.parents[1], capture_output=True, text=True)
    assert f"shipped/{path.name}: OK" in done.stdout


@pytest.mark.parametrize("pretrained", [True, False])
def test_a_networks_own_configuration_does_not_describe_the_weights_of_its_name(pretrained, tmp_path):
    """They are true of the shipped weights, not of what is trained from them and saved."""
    model = timm.create_model("gsop_preresnet20_net1", pretrained=pretrained, num_classes=10 if not pretrained else 4)
    save_for_hf(model, tmp_path, safe_serialization=True)
    text = (tmp_path / "config.json").read_text()
    assert timm.get_pretrained_cfg("gsop_preresnet20_net1").description not in text
    for word in ("CIFAR", "airplane", "measured", "license", "apache"):
        assert word not in text
    assert '"mean": [\n      0.4914' in text  # what the network takes stays


def test_a_damaged_shipped_file_is_refused(tmp_path):
    package = Path(shipped("")).parents[2]
    shutil.copytree(package, tmp_path / "timm_gsop")
    file = tmp_path / "timm_gsop/pretrained/shipped/gsop_preresnet20_net1.cifar10.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    code = "import timm; timm.create_model('gsop_preresnet20_net1', pretrained=True)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert f"{file} was damaged: its SHA-256 is" in last
    assert last.endswith("It is part of timm-gsop: install the package again.")
    assert file.exists()
