"""Weights and arguments that do not belong together are named in one line, with what does."""

import pytest
import timm
import torch
from timm.models import save_for_hf

SMALL = dict(channels=(8, 16, 24, 32), num_classes=5)
OPTIONS = {
    "cov_dim": (dict(cov_dim=4), dict(cov_dim=8), "cov_dim=8 is not accepted .*; accepted: cov_dim=4, as they have it"),
    "default cov_dim": (dict(cov_dim=4), {}, "cov_dim=128 is not accepted with these weights; accepted: cov_dim=4"),
    "gsop_type": (
        dict(gsop_type="position", cov_dim=4, spatial_size=3),
        dict(cov_dim=4),
        "gsop_type='channel' is not accepted with these weights; accepted: gsop_type='position'",
    ),
    "fusion": (
        dict(gsop_type="concat"),
        dict(gsop_type="avg"),
        "gsop_type='avg' or 'max' .*accepted: gsop_type='concat'",
    ),
    "spatial_size": (
        dict(gsop_type="max", spatial_size=3),
        dict(gsop_type="max", spatial_size=4),
        "spatial_size=4 is not accepted with these weights; accepted: spatial_size=3",
    ),
    "gsop_layers": (
        dict(gsop_layers=(2, 3)),
        dict(gsop_layers=(3,)),
        "gsop_layers: the network has blocks in 3, and the weights have them in 2, 3; accepted: those of the weights",
    ),
    "flavor": (dict(flavor="official"), {}, "flavor='paper' is not accepted .*; accepted: flavor='official'"),
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("place", ["file", "folder"])
def test_the_option_of_the_weights_is_named(option, place, tmp_path):
    trained, given, message = OPTIONS[option]
    model = timm.create_model("gsop_resnet18_net1", **SMALL, **trained)
    if place == "file":
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        name, given = "gsop_resnet18_net1", dict(SMALL, **given)
        given["pretrained_cfg_overlay"] = dict(file=str(tmp_path / "weights.pth"), num_classes=5)
    else:
        save_for_hf(model, tmp_path / "folder", safe_serialization=True)
        defaults = dict(cov_dim=128, gsop_type="channel", flavor="paper")
        name, given = (
            f"local-dir:{tmp_path / 'folder'}",
            {**{k: defaults[k] for k in trained if k in defaults}, **given},
        )
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, pretrained=True, **given)


@pytest.mark.parametrize("option", ["gsop_stages", "cov_dim"])
def test_second_order_too(option, tmp_path):
    small = dict(SMALL, backbone="resnet18", isqrt_dim=4)
    model = timm.create_model("second_order", gsop_stages=(2, 3), cov_dim=4, **small)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    given = {"gsop_stages": (3,), "cov_dim": 4, **({option: 8} if option == "cov_dim" else {})}
    overlay = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth"), num_classes=5))
    with pytest.raises(ValueError, match=f"{option}.* accepted: "):
        timm.create_model("second_order", pretrained=True, **small, **given, **overlay)


@pytest.mark.parametrize(
    ("unknown", "meant"),
    [("gsop_layers", "; did you mean 'gsop_stages'?"), ("cov_dims", "; did you mean 'cov_dim'?"), ("xyzzy", "'.")],
)
@pytest.mark.parametrize("features_only", [False, True])
def test_an_unknown_argument_of_second_order(unknown, meant, features_only):
    with pytest.raises(TypeError) as raised:
        timm.create_model("second_order", backbone="resnet18", features_only=features_only, **{unknown: (1,)})
    message = str(raised.value)
    assert message.startswith(f"second_order got an unknown argument, '{unknown}'")
    assert meant in message
    assert message.endswith("and those of backbone='resnet18'.")


def test_a_part_of_a_backbone_may_be_new(tmp_path):
    """Attention that the file lacks, for one; a file for another depth is refused."""
    torch.save(timm.create_model("resnet18", channels=(8, 16, 24, 32)).state_dict(), tmp_path / "resnet18.pth")
    given = dict(SMALL, pretrained_cfg_overlay=dict(file=str(tmp_path / "resnet18.pth")), pretrained=True, isqrt_dim=4)
    model = timm.create_model("second_order", backbone="resnet18", block_args=dict(attn_layer="eca"), **given)
    assert hasattr(model.backbone.layer1[0].se, "conv")
    with pytest.raises(ValueError, match=r"fits backbone='resnet34' in .. % of its weights, and not in layer"):
        timm.create_model("second_order", backbone="resnet34", **given)
