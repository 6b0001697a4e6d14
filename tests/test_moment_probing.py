"""Conversion of moment probing's checkpoints: files made with the released names and shapes."""

import argparse
import json

import pytest
import timm
import torch

from tests import head_oracles
from timm_gsop.hub.conversion import convert
from timm_gsop.hub.hub_folder import check_hub_folder
from timm_gsop.hub.model_card import model_card

CLASSES, HIDDEN = 7, 32


def released(width: int, classes: int = CLASSES) -> dict[str, torch.Tensor]:
    """A ViT by timm's names, with the head's."""
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, embed_dim=width)
    features = 3 * 1**2  # of the matrices of 8×8
    shapes = {
        "proj.weight": (HIDDEN, width),
        "proj.bias": (HIDDEN,),
        "ln.weight": (HIDDEN // 4,),
        "ln.bias": (HIDDEN // 4,),
        "downblocks.0.0.weight": (3, 3, 3, 3),
        "downblocks.0.2.weight": (3, 3, 3, 3),
        "classifier1.weight": (classes, width),
        "classifier1.bias": (classes,),
        "classifier2.weight": (classes, features),
        "classifier2.bias": (classes,),
    }
    return {**backbone.state_dict(), **{f"head.{name}": torch.randn(shape) for name, shape in shapes.items()}}


def test_it_computes_what_the_released_network_does(tmp_path):
    """From a training checkpoint; the width of the backbone shows which one it is."""
    weights = released(192)
    checkpoint = dict(epoch=3, arch="vit", state_dict=weights, args=argparse.Namespace(lr=1e-4))
    torch.save(checkpoint, tmp_path / "mp.pth.tar")
    model = convert("moment-probing", str(tmp_path / "mp.pth.tar"), tmp_path / "folder", model_kwargs=dict(depth=2))
    x = torch.randn(2, 3, 224, 224)
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2).eval()
    backbone.load_state_dict({name: value for name, value in weights.items() if not name.startswith("head.")})
    head = {name.removeprefix("head."): value.double() for name, value in weights.items() if name.startswith("head.")}
    names = dict(
        zip(("convs.0.weight", "convs.2.weight"), ("downblocks.0.0.weight", "downblocks.0.2.weight"), strict=True)
    )
    names |= {"proj.bias": "proj.bias", "norm.weight": "ln.weight", "norm.bias": "ln.bias"}
    ours = {
        "proj.weight": head["proj.weight"][:, :, None, None],
        **{name: head[value] for name, value in names.items()},
    }
    with torch.no_grad():
        tokens = backbone.forward_features(x).double()
        second = head_oracles.moment(tokens[:, 1:].transpose(1, 2), ours)
        first_logits = tokens[:, 0] @ head["classifier1.weight"].T + head["classifier1.bias"]
        second_logits = second @ head["classifier2.weight"].T + head["classifier2.bias"]
        torch.testing.assert_close(model(x).double(), (first_logits + second_logits) / 2, rtol=1e-4, atol=1e-4)
        loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    config = json.loads((tmp_path / "folder/config.json").read_text())
    assert config["model_args"]["backbone"] == "vit_tiny_patch16_224"
    assert config["model_args"]["pool_kwargs"] == {"hidden_dim": HIDDEN}
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    card = model_card(check_hub_folder(tmp_path / "folder"), "me/mp")
    assert "https://github.com/mingzeG/Moment-Probing" in card
    assert "**Head**: `moment` (hidden_dim=32)" in card


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("head.ln.weight"), "no head.ln.weight; accepted: a ViT with the head of moment probing"),
        (lambda w: w.pop("cls_token"), "no cls_token"),
        (lambda w: w.update({"blocks.0.psrp.weight": torch.ones(1)}), "PSRP modules, those of MP+"),
        (lambda w: None, "ViT of width 48, with patches of 16 and images of 224, which timm does not have; .*backbone"),
    ],
)
def test_what_it_is_not_is_said(change, message, tmp_path):
    weights = released(48)
    change(weights)
    torch.save(weights, tmp_path / "mp.pth")
    with pytest.raises(ValueError, match=message):
        convert("moment-probing", str(tmp_path / "mp.pth"), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
