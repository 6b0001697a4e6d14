"""Our modules under the hands of other libraries: they are PyTorch's own, or take their arguments and mean the same."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.networks import NARROW
from tests.test_modes import NETWORKS
from tests.versions import skip_before_torch_2_6
from timm_gsop.layers import PositionGsop

today = skip_before_torch_2_6(reason="today's PEFT and torchao need PyTorch 2.6")
VARIANTS = ["net1", "net2", "position", "concat", "official", "preresnet"]


def create(name: str) -> nn.Module:
    model_name, kwargs = NETWORKS[name]
    return timm.create_model(model_name, **kwargs)


def images(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_convolution_can_be_made_again_from_its_arguments(name):
    for conv in [m for m in create(name).modules() if isinstance(m, nn.Conv2d)]:
        again = type(conv)(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            bias=conv.bias is not None,
        )
        again.load_state_dict(conv.state_dict())
        assert again.weight.shape == conv.weight.shape


@today
@pytest.mark.parametrize("name", ["net2", "official", "concat", "preresnet"])
def test_lora_trains_and_merges(name):
    peft = pytest.importorskip("peft")
    model = create(name).eval()
    config = peft.LoraConfig(target_modules=["reduction.conv", "expand_conv"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(copy.deepcopy(model), config).train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    trained = {key: p.clone() for key, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in key for key in trained)
    nn.functional.cross_entropy(adapted(images()), torch.arange(4)).backward()
    optimizer.step()
    assert any(not torch.equal(p, trained[key]) for key, p in adapted.named_parameters() if key in trained)
    x = images()
    expected = adapted.eval()(x)
    merged = adapted.merge_and_unload()
    assert {key for key, _ in merged.named_parameters()} == {key for key, _ in model.named_parameters()}
    torch.testing.assert_close(merged(x), expected, rtol=1e-3, atol=1e-4)


@today
@pytest.mark.parametrize("name", ["net1", "net2"])
def test_weight_only_int8(name):
    quantization = pytest.importorskip("torchao.quantization")
    model = create(name).eval()
    x = images()
    with torch.no_grad():
        expected = model(x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        assert type(model.fc.weight.data) is not torch.Tensor
        torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["net1", "net2", "position", "concat", "resnext", "preresnet", "densenet"])
def test_structured_pruning(name):
    """With the layers that docs/deploy.md lists as kept: what is left runs, trains and is smaller."""
    pruning = pytest.importorskip("torch_pruning")
    model, x = create(name).eval(), images()
    by_position = name in ("position", "concat")
    kept = {key: m for key, m in model.named_modules() if key.endswith(("reduction", "row_conv"))}
    kept.update({key: m for key, m in model.named_modules() if isinstance(m, PositionGsop)})
    rows = [len(p) for m in kept.values() for p in m.parameters()]
    size = sum(p.numel() for p in model.parameters())
    pruner = pruning.pruner.MagnitudePruner(
        model,
        x,
        importance=pruning.importance.MagnitudeImportance(),
        pruning_ratio=0.5,
        ignored_layers=[*kept.values(), model.get_classifier()],
    )
    pruner.step()
    assert [len(p) for m in kept.values() for p in m.parameters()] == rows
    assert sum(p.numel() for p in model.parameters()) < (0.7 if by_position or name == "densenet" else 0.4) * size
    nn.functional.cross_entropy(model.train()(x), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_pruning_by_pytorch():
    from torch.nn.utils import prune

    model = timm.create_model("gsop_resnet26_net2", **NARROW).eval()
    for module in [m for m in model.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", amount=0.5)
    assert model(images()).isfinite().all()
