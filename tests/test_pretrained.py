"""What pretrained=True finds and how it fits our networks; tests/test_hub.py asks a Hub."""

import hashlib
import logging
import re

import pytest
import timm
import torch
from timm.models import PretrainedCfg

from tests.test_conversion import NARROW, assert_same_function, in_their_names, isqrt_resnet
from timm_gsop.pretrained.locate import HUB_ORGANISATION, locate_weights

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
    """The bare name means these weights; the whole id on the Hub, the origin and its digest, licence and figures."""
    cfg = timm.get_pretrained_cfg(name.partition(".")[0])
    assert cfg.tag == name.partition(".")[2]
    assert cfg.hf_hub_id == f"{HUB_ORGANISATION}/{name}"
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
    with pytest.raises(RuntimeError, match="No pretrained weights exist for gsop_resnet26_net1"):
        timm.create_model("gsop_resnet26_net1", pretrained=True)


def test_a_new_network_does_not_ask_for_weights(caplog):
    with caplog.at_level(logging.INFO):
        timm.create_model("isqrt_resnet50", **SMALL)
    assert "weights" not in caplog.text
