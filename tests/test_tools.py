"""What other people's tools do to a network's modules leaves every block called once, with its weights."""

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch import nn

from tests.networks import FAMILIES, QUICK_FAMILIES
from timm_gsop import insert_gsop
from timm_gsop.layers import GsopBlock

SMALL = dict(num_classes=5, cov_dim=4, isqrt_dim=4)
# One network of each of our own families, and of each flavor.
NETWORKS = {
    "gsop_resnet26_net1": dict(channels=(8, 16, 24, 32)),
    "gsop_resnet26_net2": dict(channels=(32, 64, 96, 128), flavor="official"),
    "gsop_resnet18_net2": dict(channels=(8, 16, 24, 32), gsop_type="concat", spatial_size=3),
    "gsop_resnext50_32x4d_net1": dict(channels=(16, 32, 48, 64)),
    "gsop_preresnet20_net1": {},
    "gsop_densenet121_net1": dict(growth_rate=8, block_config=(2, 2, 2, 2)),
    "gsop_inception_v3_net1": {},
    "second_order": dict(backbone="vgg11_bn", gsop_stages=(2, 3, 4)),
}


def every_layer_replaced(kinds: tuple[type[nn.Module], ...], new: Callable[[nn.Module], nn.Module]) -> Callable:
    def replace(model: nn.Module) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, kinds):
                    setattr(parent, name, new(child))
        return model

    return replace


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU)
NORMS = (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)
TOOLS = {
    "convert_sync_batchnorm": convert_sync_batchnorm,
    "PyTorch's convert_sync_batchnorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "freeze_batch_norm_2d": freeze_batch_norm_2d,
    "convert_splitbn_model": convert_splitbn_model,
    "every activation replaced": every_layer_replaced(ACTIVATIONS, lambda _: nn.Softplus()),
    "every norm replaced": every_layer_replaced(NORMS, lambda _: nn.Identity()),
    "reparameterize_model": reparameterize_model,
    "deepcopy": copy.deepcopy,
}


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """What holds GSoP layers, by name; in the official flavor the layers themselves."""
    layers = ("timm_gsop.layers.gsop", "timm_gsop.layers.official")
    found = {name: m for name, m in model.named_modules() if isinstance(m, GsopBlock)}
    official = {name: m for name, m in model.named_modules() if name.endswith(".se") and type(m).__module__ in layers}
    return found or official


def weights_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    marks = (".gsop.", ".se.")
    return {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if any(mark in name for mark in marks) and not name.endswith("num_batches_tracked")
    }


def calls_of(model: nn.Module) -> list[int]:
    calls = dict.fromkeys(blocks_of(model), 0)

    def count(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            calls[name] += 1

        return hook

    hooks = [block.register_forward_hook(count(name)) for name, block in blocks_of(model).items()]
    with torch.no_grad():
        model.eval()(torch.zeros(2, *model.pretrained_cfg["input_size"], device="meta"))
    for hook in hooks:
        hook.remove()
    return list(calls.values())


def create(name: str) -> nn.Module:
    """Without storage: what is asked is which modules are called, and which weights there are."""
    with torch.device("meta"):
        if name in NETWORKS:
            return timm.create_model(name, **{**SMALL, **NETWORKS[name]})
        return insert_gsop(timm.create_model(name, num_classes=5), cov_dim=4)


# The rest of insert_gsop's families have the same kinds of places.
slow_families = [pytest.param(name, marks=[] if name in QUICK_FAMILIES else [pytest.mark.slow]) for name in FAMILIES]


@pytest.mark.parametrize("name", [*NETWORKS, *slow_families])
def test_blocks_are_called_once_with_their_weights(name):
    model = create(name)
    weights = weights_of(model)
    assert weights
    for tool_name, tool in TOOLS.items():
        if tool_name == "convert_splitbn_model" and name == "densenet121":
            continue  # timm's loses the activation, and the aux norms, of BatchNormAct2d: without blocks too
        with torch.device("meta"):
            changed = tool(copy.deepcopy(model))
        assert set(calls_of(changed)) == {1}, tool_name
        if tool_name != "every norm replaced":  # which has none of the blocks' own
            found = weights_of(changed)
            assert {key: found.get(key) for key in weights} == weights, tool_name


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "second_order"])
@pytest.mark.parametrize("tool", ["convert_sync_batchnorm", "freeze_batch_norm_2d"])
def test_logits_stay(name, tool):
    """And blocks learn."""
    model = timm.create_model(name, **{**SMALL, **NETWORKS[name]}).eval()
    x = torch.randn(2, 3, 96, 96)
    expected = model(x)
    changed = TOOLS[tool](model)
    torch.testing.assert_close(changed(x), expected, rtol=1e-4, atol=1e-5)
    changed(x).square().sum().backward()
    for block in blocks_of(changed).values():
        assert all(p.grad is not None for p in block.parameters())


@pytest.mark.parametrize("tool", ["none", "convert_sync_batchnorm"])
def test_weights_are_found_by_the_names_that_they_are_saved_under(tool):
    """As transformers and ``functional_call`` look them up, also where a block is saved under another module's name."""
    model = timm.create_model("gsop_densenet121_net1", **{**SMALL, **NETWORKS["gsop_densenet121_net1"]}).eval()
    model = TOOLS.get(tool, lambda module: module)(model)
    x = torch.randn(2, 3, 64, 64)
    weights = {name: torch.randn_like(w) if "expand_conv" in name else w for name, w in model.state_dict().items()}
    assert "features.norm5.gsop.gsop.excitation.expand_conv.weight" in weights
    assert "features.transition1.gsop.gsop.excitation.expand_conv.weight" in weights
    found = torch.func.functional_call(model, weights, (x,))
    for name, value in weights.items():
        with torch.no_grad():
            model.get_submodule(name.rpartition(".")[0]).state_dict()[name.rpartition(".")[2]].copy_(value)
    torch.testing.assert_close(model(x), found)
    twin = timm.create_model("gsop_densenet121_net1", **{**SMALL, **NETWORKS["gsop_densenet121_net1"]}).eval()
    twin.load_state_dict(weights)
    torch.testing.assert_close(twin(x), found)


CUT = {**NETWORKS, "second_order of tokens": dict(backbone="vit_tiny_patch16_224", depth=2)}


@pytest.mark.parametrize("name", CUT)
def test_a_network_is_cut_by_its_children(name):
    """They are in the order of calls: without the last one pooled features, without the last two the feature map."""
    model = timm.create_model(name.partition(" ")[0], **{**SMALL, **CUT[name]}).eval()
    x = torch.randn(2, 3, 224, 224) if "tokens" in name else torch.randn(2, 3, 96, 96)
    children = list(model.children())
    features = model.forward_features(x)
    torch.testing.assert_close(nn.Sequential(*children[:-2])(x), features)
    pooled = nn.Sequential(*children[:-1])(x)
    torch.testing.assert_close(pooled, model.forward_head(features, pre_logits=True))
    assert pooled.shape == (2, model.head_hidden_size)
