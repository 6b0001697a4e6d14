"""What is saved loads to the bit, of every kind of network: weights, options and preprocessing."""

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.networks import BACKBONES, QUICK_BACKBONES, REGISTERED, create, image, parametrize
from timm_gsop.hub.hub_folder import save_hub_folder

RECORDED = (*REGISTERED, *(f"second_order of {name}" for name in BACKBONES))


def take_a_step(model: nn.Module, x: torch.Tensor) -> None:
    """No block is neutral any more, and no statistic as it was made."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    nn.functional.cross_entropy(model(x), torch.arange(len(x))).backward()
    optimizer.step()
    model.eval()


def load(folder: Path, model: nn.Module, x: torch.Tensor) -> nn.Module:
    """What is loaded answers as the model does."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    return loaded


@parametrize(*RECORDED, slow=tuple(f"second_order of {name}" for name in BACKBONES if name not in QUICK_BACKBONES))
def test_trained_and_saved(name, tmp_path):
    """As timm saves it; and as we do, after its head and classes were changed. A step reaches every parameter."""
    model = create(name)
    x = image(model)
    take_a_step(model, x)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    timm.models.save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    load(tmp_path / "timm", model, x)
    assert timm.create_model(f"local-dir:{tmp_path / 'timm'}", num_classes=7)(x).shape == (2, 7)
    model.reset_classifier(3, "mpn")
    save_hub_folder(model, tmp_path / "ours")
    loaded = load(tmp_path / "ours", model, x)
    configs = [json.loads(json.dumps(timm.data.resolve_model_data_config(m))) for m in (model, loaded)]
    assert configs[0] == configs[1]


@parametrize("net2", "preresnet", "densenet", "second_order of resnet18")
def test_other_channels_are_saved(name, tmp_path):
    model = create(name, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = load(tmp_path, model, image(model)[:, :1])
    assert timm.data.resolve_model_data_config(loaded)["input_size"][0] == 1


@parametrize("blocks in convnext_atto", "blocks in densenet121", "blocks in regnetx_002")
def test_inserted_blocks_are_saved_with_the_networks_weights(name, tmp_path):
    """Insert with the same arguments, then load. The factor of neutral ones belongs to the block."""
    model = create(name, neutral=True)
    x = image(model)
    take_a_step(model, x)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    twin = create(name, neutral=True)
    twin.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True))
    torch.testing.assert_close(twin.eval()(x), model(x), rtol=0, atol=0)


def test_a_configuration_is_plain_json(tmp_path):
    timm.models.save_for_hf(create("second_order of convnext_atto"), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "second_order"
    assert config["model_args"]["backbone"] == "convnext_atto"
    assert config["model_args"]["gsop_stages"] == [0, 3]


@pytest.mark.parametrize(
    ("backbone", "change"),
    [
        ("vit_tiny_patch16_224", dict(img_size=(96, 160))),
        ("vit_tiny_patch16_224", dict(img_size=(96, 64), patch_size=(8, 8))),
        ("swin_tiny_patch4_window7_224", dict(img_size=(192, 96))),
        ("swin_tiny_patch4_window7_224", dict(img_size=(128, 128), window_size=(4, 4))),
    ],
)
def test_another_input_size_is_saved_and_loaded(backbone, change, tmp_path):
    model = create(f"second_order of {backbone}").eval()
    model.set_input_size(**change)
    x = torch.randn(2, 3, *change["img_size"])
    stride = 32 if backbone.startswith("swin") else change.get("patch_size", (16, 16))[0]
    assert model.forward_features(x).shape[2:] == tuple(side // stride for side in change["img_size"])
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = load(tmp_path, model, x)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, *change["img_size"])
    assert not hasattr(create("second_order of resnet18"), "set_input_size")
