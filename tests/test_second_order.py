"""``second_order``: timm's networks with our heads and blocks."""

import copy
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from tests import test_hub, test_timm_scripts
from tests.checkpointing import check_grad_checkpointing_changes_nothing
from tests.hub_server import HubServer
from tests.test_timm_suite import _load_timm_tests
from tests.versions import skip_before_torch_2_6
from timm_gsop import GsopBlock
from timm_gsop.hub.hub_folder import check_hub_folder, save_hub_folder
from timm_gsop.hub.model_card import model_card
from timm_gsop.models import SecondOrder
from timm_gsop.models.backbone_features import tokens_to_map

ROOT = Path(__file__).parents[1]
HEAD = dict(isqrt_dim=8, cov_dim=8)
# Narrow or shallow versions of what users have, where that is possible, and the stages that get blocks.
BACKBONES = {
    "resnet18": dict(channels=(16, 16, 24, 32), gsop_stages=(2, 4)),
    "convnext_atto": dict(depths=(1, 1, 1, 1), gsop_stages=(0, 3)),
    "mobilenetv3_small_050": dict(gsop_stages=(1, 4)),
    "vit_tiny_patch16_224": dict(depth=3),
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2)),
    "densenet121": dict(growth_rate=8, block_config=(2, 2, 2, 2), gsop_stages=(1, 4)),
    "regnetx_002": dict(gsop_stages=(2, 4)),
    "efficientnet_b0": dict(gsop_stages=(2, 4)),
    "deit_tiny_distilled_patch16_224": dict(depth=3),
    "coatnet_pico_rw_224": dict(gsop_stages=(1, 4)),
    "maxvit_pico_rw_256": dict(gsop_stages=(1, 4)),
    "hrnet_w18_small": dict(gsop_stages=(1, 4)),
    "vgg11_bn": dict(gsop_stages=(3, 5)),
}
FAST = ("resnet18", "convnext_atto", "mobilenetv3_small_050", "vit_tiny_patch16_224")
FIXED_SIZE = ("swin_tiny_patch4_window7_224", "coatnet_pico_rw_224", "maxvit_pico_rw_256")
TOKENS = ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224")
NOT_SCRIPTABLE = ("hrnet_w18_small", "densenet121")  # nor are they without us: timm leaves them out
every_backbone = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in BACKBONES]
)
a_few = pytest.mark.parametrize("name", FAST)


def create(name: str, **kwargs) -> SecondOrder:
    return timm.create_model(
        "second_order", **{"backbone": name, "num_classes": 5, **HEAD, **BACKBONES[name], **kwargs}
    )


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    config = timm.models.get_model_input_config(model)
    size = config["input_size"] if config["fixed_input_size"] else (config["input_size"][0], 64, 64)
    return torch.randn(batch, *size)


def blocks(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, GsopBlock)]


# ---- timm's own suite


@functools.cache
def timm_tests() -> dict:
    """timm's tests, which create a backbone's ``second_order`` where they ask for the backbone."""
    tests = vars(_load_timm_tests())

    def create_second_order(name: str, **kwargs) -> nn.Module:
        # Where timm has tokens it takes the pooled features for as many as the channels.
        pool = dict(global_pool="avg") if name in TOKENS else {}
        return create(name, **{"num_classes": 1000, **pool, **kwargs})

    tests["create_model"] = create_second_order
    return tests


def _suite() -> list:
    cases = []
    for name in BACKBONES:
        in_every = ["test_model_forward", "test_model_backward", "test_model_forward_fx", "test_model_backward_fx"]
        cases += [(test, name) for test in in_every]
        cases += [("test_model_default_cfgs_non_std" if name in TOKENS else "test_model_default_cfgs", name)]
        intermediates = ["test_model_forward_intermediates", "test_model_forward_intermediates_features"]
        cases += [(test, name) for test in [*intermediates, "test_prune_intermediate_layers_contract"]]
        cases += [] if name in TOKENS else [("test_model_forward_features", name)]
        scripts = ["test_model_forward_torchscript", "test_model_forward_fx_torchscript"]
        cases += [] if name in NOT_SCRIPTABLE else [(test, name) for test in scripts]
        if name not in (*TOKENS, *FIXED_SIZE, "hrnet_w18_small"):  # these two have small images; HRNet's is a list
            cases += [("test_head_hidden_size", name), ("test_reset_classifier_keeps_pool", name)]
    return [pytest.param(*case, marks=[] if case[1] in FAST[:2] else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize(("test", "name"), _suite())
def test_timm(test, name):
    function = timm_tests()[test]
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    arguments = {mark.args[0]: mark.args[1][0] for mark in marks if mark.args[0] != "model_name"}
    arguments.pop("model_name, model_kwargs", None)
    if "model_name, model_kwargs" in [mark.args[0] for mark in marks]:
        arguments["model_kwargs"] = {}
    if "default_cfgs" in test:
        arguments["cfg_device"] = "meta"
    function(name, **arguments)


# ---- what is ours


@every_backbone
def test_features_head_and_gradients(name):
    model = create(name).train()
    x = image(model)
    features = model.forward_features(x)
    assert features.ndim == 4
    assert features.shape[:2] == (2, model.num_features)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size) == (2, 36)
    logits = model(x)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert len(blocks(model)) == len(BACKBONES[name].get("gsop_stages", ()))


@every_backbone
def test_the_backbone_computes_what_timms_does(name):
    """With its weights, and with neutral blocks: to the bit, in whichever layout its features are."""
    model = create(name).eval()
    options = {key: value for key, value in BACKBONES[name].items() if key != "gsop_stages"}
    backbone = timm.create_model(name, num_classes=0, **options).eval()
    missing, unexpected = backbone.load_state_dict(model.backbone.state_dict(), strict=False)
    assert all(".gsop." in key for key in unexpected)
    assert not set(missing) & set(model.backbone.state_dict())
    x = image(model)
    with torch.no_grad():
        found, expected = model.forward_features(x), backbone.forward_features(x)
    if expected.ndim == 3:
        expected = expected[:, backbone.num_prefix_tokens :].transpose(1, 2).reshape(found.shape)
    elif name.startswith("swin"):
        expected = expected.permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_tokens_that_make_no_grid_are_a_column():
    x = torch.randn(2, 11, 4)
    assert tokens_to_map(x, 1, 3, 3).shape == (2, 4, 10, 1)
    torch.testing.assert_close(tokens_to_map(x, 2, 3, 3)[1, 2, 1, 0], x[1, 2 + 3, 2])


@every_backbone
@pytest.mark.parametrize("save", ["timm", "ours"])
def test_saved_and_loaded_to_the_bit(name, save, tmp_path):
    model = create(name, compact_bilinear_dim=32).train()
    x = image(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(x), torch.arange(2)).backward()
    optimizer.step()  # no block is neutral any more
    model.reset_classifier(3, "isqrt" if save == "ours" else "compact_bilinear")
    folder = tmp_path / "folder"
    if save == "timm":
        timm.models.save_for_hf(model.eval(), folder, safe_serialization=True)
    else:
        save_hub_folder(model.eval(), folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    configs = [json.loads(json.dumps(timm.data.resolve_model_data_config(m))) for m in (model, loaded)]
    assert configs[0] == configs[1]
    assert timm.create_model(f"local-dir:{folder}", num_classes=7)(x).shape == (2, 7)


@a_few
def test_data_configuration_is_the_backbones(name):
    model, backbone = create(name), timm.create_model(name)
    found, expected = (timm.data.resolve_model_data_config(m) for m in (model, backbone))
    assert found == expected
    first_conv = model.pretrained_cfg["first_conv"]
    assert isinstance(model.get_submodule(first_conv[0]), nn.Conv2d)


@a_few
def test_head_learns_five_times_as_fast_by_layer_decay(name):
    """Two rates: that of the head, its reduction included, and that of the backbone with its blocks."""
    model = create(name)
    options = dict(opt="sgd", lr=1.0, layer_decay=0.2, layer_decay_min_scale=0.2)
    scales = {}
    for group in create_optimizer_v2(model, **options).param_groups:
        scales.update({id(p): group["lr_scale"] for p in group["params"]})
    found = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert {name.partition(".")[0] for name, scale in found.items() if scale == 1} == {"global_pool", "fc"}
    assert {scale for name, scale in found.items() if name.startswith("backbone.")} == {0.2}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_blocks_are_in_the_group_of_their_stage(name):
    model = create(name)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    for block in blocks(model):
        stage = block.removesuffix(".gsop")
        own = {group for param, group in groups.items() if param.startswith(f"{block}.")}
        others = {group for param, group in groups.items() if param.startswith(stage) and ".gsop." not in param}
        assert own == {max(others)}
    head = {group for param, group in groups.items() if not param.startswith("backbone.")}
    assert head == {max(groups.values())}


@a_few
def test_grad_checkpointing_changes_nothing(name):
    model = create(name)
    check_grad_checkpointing_changes_nothing(model, image(model), rtol=1e-3, atol=1e-4)


@a_few
def test_no_weight_decay_names_parameters_of_the_backbone(name):
    model, backbone = create(name), timm.create_model(name)
    expected = backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()
    assert model.no_weight_decay() == {f"backbone.{parameter}" for parameter in expected}


def test_features_only_has_the_levels_of_the_backbone():
    """By default timm's own choice, ViT's last three for one; channels first always."""
    for name in ("convnext_atto", "vit_tiny_patch16_224"):
        options = {key: value for key, value in BACKBONES[name].items() if key != "gsop_stages"}
        features = timm.create_model("second_order", features_only=True, backbone=name, **options).eval()
        expected = timm.create_model(name, features_only=True, **options)
        assert features.feature_info.channels() == expected.feature_info.channels()
        assert features.feature_info.reduction() == expected.feature_info.reduction()
        maps = features(image(features))
        assert [m.shape[1] for m in maps] == expected.feature_info.channels()
    features = timm.create_model("second_order", features_only=True, backbone="resnet18", out_indices=(1, 3))
    assert [m.shape[1] for m in features(torch.randn(1, 3, 64, 64))] == [64, 256]


@pytest.mark.parametrize("pool", ["avg", "catavgmax", "isqrt"])
@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_first_and_second_order_pools(name, pool):
    model = create(name, global_pool=pool).eval()
    features = model.forward_features(image(model))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(3)
    assert model.forward_head(features).shape == (2, 3)


def write_weights(name: str, path, **kwargs) -> nn.Module:
    torch.manual_seed(1)
    options = {key: value for key, value in BACKBONES[name].items() if key != "gsop_stages"}
    backbone = timm.create_model(name, **options, **kwargs).eval()
    torch.save(backbone.state_dict(), path)
    return backbone


@a_few
def test_pretrained_loads_the_backbone_and_a_new_head(name, tmp_path):
    """Weights of a file in place of the Hub's; blocks are neutral, so that the features are the backbone's."""
    backbone = write_weights(name, tmp_path / "backbone.pth")
    overlay = dict(file=str(tmp_path / "backbone.pth"))
    torch.manual_seed(2)
    model = create(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = image(model)
    with torch.no_grad():
        found, expected = model.forward_features(x), backbone.forward_features(x)
        if expected.ndim == 3:
            expected = expected[:, 1:].transpose(1, 2).reshape(found.shape)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    notes = dict(note.split(": ", 1) for note in model.pretrained_cfg["notes"])
    assert notes["backbone"].startswith(name)
    assert notes["backbone licence"] == "apache-2.0"
    assert notes["backbone origin"].startswith("https://huggingface.co/timm/")
    assert model.pretrained_cfg.get("file") is None

    torch.save(model.state_dict(), tmp_path / "whole.pth")  # a file of the whole network is told from a backbone's
    whole = create(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "whole.pth"), num_classes=5))
    with torch.no_grad():
        torch.testing.assert_close(whole.eval()(x), model(x), rtol=0, atol=0)


def test_other_channels_are_saved(tmp_path):
    model = create("resnet18", in_chans=1).eval()
    x = torch.randn(2, 1, 64, 64)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (1, 224, 224)


def test_pretrained_with_other_channels(tmp_path):
    backbone = write_weights("resnet18", tmp_path / "backbone.pth")
    overlay = dict(file=str(tmp_path / "backbone.pth"))
    model = create("resnet18", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    expected = backbone.conv1.weight.sum(dim=1, keepdim=True)
    torch.testing.assert_close(model.backbone.conv1.weight, expected)


def test_the_same_architecture_with_and_without_pretrained_weights(tmp_path):
    """validate.py creates without them what train.py created with them."""
    write_weights("resnet18", tmp_path / "backbone.pth")
    overlay = dict(file=str(tmp_path / "backbone.pth"))
    trained = create("resnet18", pretrained=True, pretrained_cfg_overlay=overlay).train()
    x = image(trained)
    trained(x).sum().backward()
    torch.optim.SGD(trained.parameters(), lr=0.1).step()
    again = create("resnet18").eval()
    again.load_state_dict(trained.state_dict())
    torch.testing.assert_close(again(x), trained.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "resnet18" else [pytest.mark.slow]) for name in FAST]
)
def test_autocast_and_compile_together(name):
    torch.compiler.reset()
    model = create(name).train()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    x = image(model, batch=4)
    losses = []
    for network in (model, compiled):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(network(x), torch.arange(4))
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
    assert all(p.grad.isfinite().all() for p in compiled.parameters())


def test_it_is_registered():
    assert timm.list_models("second_order") == ["second_order"]
    assert timm.get_pretrained_cfg("second_order").has_weights in (None, "", False)
    assert isinstance(timm.create_model("second_order", device="meta").backbone, timm.models.ResNet)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(backbone="resnet1"), "backbone='resnet1' is not accepted; .*'resnet18'"),
        (dict(backbone="resnet18.nobody"), "backbone='resnet18.nobody' has an unknown tag; accepted: .*'a1_in1k'"),
        (dict(backbone="hf-hub:timm/resnet18.a1_in1k"), "is not accepted; accepted: a name"),
        (dict(backbone="second_order"), "backbone='second_order' is not accepted; .*cannot be nested"),
        (dict(backbone="crossvit_9_240"), "backbone='crossvit_9_240' has features of list; accepted: "),
        (
            dict(backbone="vit_tiny_patch16_224", gsop_stages=(1,)),
            r"gsop_stages=\(1,\) .*have no place; accepted: \(\)",
        ),
        (dict(backbone="swin_tiny_patch4_window7_224", gsop_stages=(1,)), "have no place"),
        (dict(backbone="resnet18", gsop_stages=(5,)), r"gsop_stages=\(5,\) .* of \[0, 1, 2, 3, 4\]"),
        (dict(backbone="resnet18", gsop_stages=3), "gsop_stages=3 is not accepted"),
        (dict(backbone="resnet18", global_pool="sum"), "global_pool='sum'"),
        (dict(backbone="resnet18", gsop_type="spatial"), "gsop_type='spatial'"),
        (dict(backbone="resnet18", isqrt_dim=0), "isqrt_dim=0"),
        (dict(backbone="resnet18", neutral="yes"), "neutral='yes'"),
    ],
)
def test_bad_arguments_are_named_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        timm.create_model("second_order", **options)
    assert "\n" not in str(error.value)


def test_the_backbones_own_arguments_are_passed_on():
    model = timm.create_model("second_order", backbone="resnet18", output_stride=16, isqrt_dim=8)
    assert model.forward_features(torch.randn(1, 3, 64, 64)).shape[2:] == (4, 4)
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("second_order", backbone="resnet18", not_an_argument=1)


def test_a_configuration_is_plain_json(tmp_path):
    timm.models.save_for_hf(create("convnext_atto"), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "second_order"
    assert config["model_args"]["backbone"] == "convnext_atto"
    assert config["model_args"]["gsop_stages"] == [0, 3]


# ---- sizes and levels


def token_backbone(**kwargs) -> SecondOrder:
    return create("vit_tiny_patch16_224", **kwargs).eval()


@pytest.mark.parametrize("size", [(112, 448), (224, 224), (64, 32)])
def test_tokens_take_the_grid_of_the_image_at_hand(size):
    model = token_backbone(dynamic_img_size=True)
    x = torch.randn(1, 3, *size)
    features = model.forward_features(x)
    assert features.shape[2:] == (size[0] // 16, size[1] // 16)
    (expected,) = model.backbone.forward_intermediates(x, 1, norm=True, intermediates_only=True)
    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vit_tiny_patch16_224", dict(img_size=(96, 160))),
        ("vit_tiny_patch16_224", dict(img_size=(96, 64), patch_size=(8, 8))),
        ("swin_tiny_patch4_window7_224", dict(img_size=(192, 96))),
        ("swin_tiny_patch4_window7_224", dict(img_size=(128, 128), window_size=(4, 4))),
    ],
)
def test_another_input_size_is_saved_and_loaded(name, change, tmp_path):
    model = create(name).eval()
    model.set_input_size(**change)
    x = torch.randn(2, 3, *change["img_size"])
    stride = 32 if name.startswith("swin") else change.get("patch_size", (16, 16))[0]
    assert model.forward_features(x).shape[2:] == tuple(side // stride for side in change["img_size"])
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert timm.data.resolve_model_data_config(loaded)["input_size"] == (3, *change["img_size"])
    assert not hasattr(create("resnet18"), "set_input_size")


def test_intermediates_as_a_dictionary():
    model = token_backbone()
    x = image(model)
    found = model.forward_intermediates(x, output_dict=True)
    torch.testing.assert_close(found["image_features"], model.forward_features(x))
    assert [m.shape for m in found["image_intermediates"]] == [(2, 192, 14, 14)] * 3


def reference(model: SecondOrder, name: str, level: int, x: torch.Tensor) -> torch.Tensor:
    """The level of timm's network with the same weights, with its last norm where that fits."""
    options = {key: value for key, value in BACKBONES[name].items() if key != "gsop_stages"}
    whole = timm.create_model(name, num_classes=0, **options).eval()
    whole.load_state_dict(model.backbone.state_dict(), strict=False)
    (features,) = whole.forward_intermediates(x, [level], intermediates_only=True, norm=name in TOKENS)
    return features


@pytest.mark.parametrize(
    ("name", "level"),
    [("resnet18", 3), ("resnet18", -1), ("vit_tiny_patch16_224", 1), ("swin_tiny_patch4_window7_224", 2)]
    + [pytest.param(name, -2, marks=pytest.mark.slow) for name in BACKBONES if name not in (*FAST, "hrnet_w18_small")]
    + [("mobilenetv3_small_050", 3), ("efficientnet_b0", -1), ("densenet121", 3), ("convnext_atto", 0)],
)
def test_the_head_reads_a_level_and_the_rest_is_gone(name, level, tmp_path):
    whole = create(name, gsop_stages=())
    model = create(name, level=level, gsop_stages=()).eval()
    x = image(model)
    levels = len(whole.feature_info)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), reference(model, name, level % levels, x), rtol=0, atol=0)
    assert set(model.backbone.state_dict()) <= set(whole.backbone.state_dict())
    if level % levels < levels - 1:
        assert len(list(model.backbone.modules())) < len(list(whole.backbone.modules()))
    assert [m.shape[1] for m in model.forward_intermediates(x, intermediates_only=True)] == [
        info["num_chs"] for info in model.feature_info
    ]
    assert len(model.feature_info) == level % levels + 1
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_blocks_and_features_of_a_level():
    model = create("resnet18", level=2, gsop_stages=(1, 2))
    assert len(blocks(model)) == 2
    with pytest.raises(ValueError, match=r"gsop_stages=\(2, 4\) .* of \[0, 1, 2\]"):
        create("resnet18", level=2)
    features = timm.create_model("second_order", backbone="resnet18", level=2, features_only=True)
    assert features.feature_info.channels() == [64, 64, 128]


@pytest.mark.parametrize("level", [5, -6, "layer2", True])
def test_a_bad_level_is_named(level):
    with pytest.raises(ValueError, match=f"level={level!r} is not accepted; .*of which it has 5"):
        create("resnet18", level=level)


def test_a_backbone_that_cannot_be_cut_is_named():
    with pytest.raises(ValueError, match="level=2 is not accepted with backbone='hrnet_w18_small'"):
        create("hrnet_w18_small", level=2, gsop_stages=())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_weights_are_initialized_again(name):
    model = create(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            value.fill_(7)
    model.init_weights()
    for key, value in model.state_dict().items():
        if "running" in key or "expand_conv.weight" in key:
            torch.testing.assert_close(value, before[key])
        elif value.is_floating_point():
            assert not (value == 7).any(), key
        if value.is_floating_point() and value.numel() > 1000:
            assert value.std().item() == pytest.approx(before[key].std().item(), rel=0.1, abs=1e-3), key


# ---- warnings


@pytest.mark.parametrize("options", [dict(gsop_stages=()), dict(gsop_stages=(4,), global_pool="avg")])
def test_a_map_of_one_position_is_said_in_the_first_pass(options):
    model = create("resnet18", **options).train()
    with pytest.warns(UserWarning, match="reads a map of 1×1, .* Use larger images, a smaller output_stride") as found:
        model(torch.randn(2, 3, 32, 32))
    assert len(found) == 1
    x = torch.randn(2, 3, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x)
        small = torch.randn(2, 3, 32, 32)
        torch.compile(model.eval(), backend="eager", fullgraph=True)(small)
        torch.export.export(model, (small,))


# ---- the Hub

env, hub = test_hub.env, test_hub.hub  # fixtures


def serve_backbone(hub: HubServer, name: str, folder: Path) -> nn.Module:
    """The loopback Hub gets timm's repository of a backbone's weights."""
    backbone = write_weights(name, folder / "backbone.pth")
    timm.models.save_for_hf(backbone, folder / "backbone", safe_serialization=True)
    files = {path.name: hub.keep(path.read_bytes()) for path in (folder / "backbone").iterdir()}
    repo = timm.get_pretrained_cfg(name).hf_hub_id
    hub.repos[repo], hub.private[repo] = {"main": files}, False
    return backbone


@skip_before_torch_2_6(reason="transformers needs a newer PyTorch")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224", *TOKENS[:1]])
def test_from_the_hub_to_the_hub(name, hub, env, tmp_path):
    """The backbone's weights are read from timm's repository; the whole network's from its own, and nothing else."""
    serve_backbone(hub, name, tmp_path)
    options = {**HEAD, **BACKBONES[name], "backbone": name, "num_classes": 5}
    script = """
import json, pathlib, sys, timm, torch
from timm_gsop.hub.hub_folder import save_hub_folder
torch.set_num_threads(1)
model = timm.create_model("second_order", pretrained=True, **json.loads(sys.argv[1])).train()
x = torch.randn(2, *model.pretrained_cfg["input_size"])
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
torch.nn.functional.cross_entropy(model(x), torch.arange(2)).backward()
optimizer.step()
save_hub_folder(model.eval(), pathlib.Path(sys.argv[2]))
with torch.no_grad():
    torch.save(dict(x=x, logits=model(x)), sys.argv[3])
"""
    folder, golden = tmp_path / "folder", tmp_path / "golden.pt"
    command = [sys.executable, "-c", script, json.dumps(options), str(folder), str(golden)]
    script_env = {**env, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=script_env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    repo = timm.get_pretrained_cfg(name).hf_hub_id
    assert any(f"/{repo}/" in request for request in hub.requests)

    done = test_hub.publish(folder, env, "--license", "apache-2.0", repo="me/birds")
    assert done.returncode == 0, done.stderr
    card = (hub.folder / hub.repos["me/birds"]["main"]["README.md"]).read_text()
    tag, licence = (timm.get_pretrained_cfg_value(name, key) for key in ("tag", "license"))
    assert f"**Backbone**: timm's `{name}.{tag}`, whose pretrained weights training started from" in card
    assert f"(licence: {licence}; origin: https://huggingface.co/timm/{name}.{tag})" in card

    hub.requests.clear()
    again = """
import sys, timm, torch
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
golden = torch.load(sys.argv[1], weights_only=True)
with torch.no_grad():
    for load in (
        lambda: timm.create_model("hf-hub:me/birds", pretrained=True).eval(),
        lambda: timm.create_model("local-dir:" + sys.argv[2], pretrained=True).eval(),
        lambda: AutoModelForImageClassification.from_pretrained("me/birds").eval(),
    ):
        logits = load()(golden["x"])
        logits = getattr(logits, "logits", logits)
        torch.testing.assert_close(logits, golden["logits"], rtol=0, atol=0)
"""
    fresh = {**script_env, "HF_HOME": str(tmp_path / "fresh")}
    command = [sys.executable, "-c", again, str(golden), str(folder)]
    done = subprocess.run(command, env=fresh, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not any("/timm/" in request for request in hub.requests)  # the backbone's weights


def test_the_card_of_a_backbone_without_a_record(tmp_path):
    model = create("resnet18")
    save_hub_folder(model, tmp_path / "folder")
    card = model_card(check_hub_folder(tmp_path / "folder"), "me/birds")
    assert "timm's `resnet18`; it is not recorded whether training started from pretrained weights" in card
    (tmp_path / "folder/args.yaml").write_text("pretrained: true\n")
    card = model_card(check_hub_folder(tmp_path / "folder"), "me/birds")
    assert "timm's `resnet18.a1_in1k`, whose pretrained weights training started from (licence: apache-2.0" in card


# ---- timm's train.py and validate.py; without TIMM_SCRIPTS=DIR, the folder that has them, there is nothing to test

SCRIPTS = os.environ.get("TIMM_SCRIPTS")
with_scripts = pytest.mark.skipif(not SCRIPTS, reason="TIMM_SCRIPTS is not set")
digits = test_timm_scripts.digits  # a fixture
MODEL = ["--model", "second_order", "--num-classes", "10", "--img-size", "48", "--device", "cpu", "--workers", "1"]
KWARGS = [
    "--model-kwargs",
    *("backbone=resnet18", "channels=(16,16,24,32)", "output_stride=8", "gsop_stages=(2,3)", "cov_dim=16"),
    "isqrt_dim=16",
]


def run_script(script: str, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launch, str(Path(SCRIPTS) / script), *MODEL, *options, *KWARGS]
    done = subprocess.run(command, env=test_timm_scripts.ENV, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train(data: Path, output: Path, *options: str, **kwargs) -> list[dict[str, str]]:
    given = ["--data-dir", str(data), "--output", str(output), "--experiment", "run"]
    recipe = ["--no-aug", "-b", "32", "--opt", "sgd", "--lr", "0.1", "--warmup-epochs", "0", "--log-interval", "1"]
    run_script("train.py", *given, *recipe, *options, **kwargs)
    return test_timm_scripts.summary(output)


@pytest.mark.slow
@with_scripts
def test_train_and_validate(digits, tmp_path):
    rows = train(digits, tmp_path, "--epochs", "2")
    assert float(rows[1]["eval_top1"]) > 70  # ten classes
    given = ["--data-dir", str(digits), "--split", "val", "--checkpoint", str(tmp_path / "run/last.pth.tar")]
    done = run_script("validate.py", *given, "--use-train-size")
    found = json.loads(done.stdout.rpartition("--result")[2])
    assert found["top1"] == pytest.approx(float(rows[1]["eval_top1"]), abs=0.3)


@pytest.mark.slow
@with_scripts
def test_options_of_training_together(digits, tmp_path):
    """Two processes, bfloat16, the compiler, layer-wise rates, checkpointing and an average of the weights."""
    write_weights("resnet18", tmp_path / "backbone.pth")
    options = [
        "--epochs",
        "1",
        "--amp",
        "--amp-dtype",
        "bfloat16",
        "--torchcompile",
        "inductor",
        "--grad-checkpointing",
    ]
    options += ["--layer-decay", "0.2", "--layer-decay-min-scale", "0.2", "--model-ema", "--model-ema-decay", "0.9"]
    options += ["--pretrained", "--pretrained-path", str(tmp_path / "backbone.pth")]
    options += ["--device-modules", "timm_gsop", "tests.cpu_distributed"]
    (row,) = train(digits, tmp_path, *options, processes=2)
    assert float(row["train_loss"]) < 2.4
    saved = torch.load(tmp_path / "run/last.pth.tar", weights_only=False)
    gates = [value for name, value in saved["state_dict_ema"].items() if "expand_conv.weight" in name]
    assert len(gates) == 2
    assert all(value.count_nonzero() > 0 for value in gates)  # the blocks are not neutral any more
