"""GSoP-Net on ResNeXt, DenseNet and Inception-v3."""

import pytest
import timm
import torch

from timm_gsop.layers import GSOP_TYPES, GsopBlock, IsqrtCovPool2d, PositionGsop

# As small as the bases allow; Inception-v3 has one width, and accepts no image below 75 pixels.
SMALL_BASES = {
    "resnext50_32x4d": dict(channels=(16, 32, 48, 64)),
    "densenet121": dict(growth_rate=8, block_config=(2, 2, 2, 2)),
    "inception_v3": {},
}
PLACEMENT = {
    "resnext50_32x4d": ["layer1.3", "layer2.4", "layer3.6", "layer4.3"],
    "densenet121": [*(f"features.denseblock{i}_gsop" for i in (1, 2, 3)), "features.norm5_gsop"],
    "inception_v3": ["Mixed_5d.gsop", "Mixed_6e.gsop", "Mixed_7c.gsop"],
}
every_network = pytest.mark.parametrize(("base", "net"), [(base, net) for base in SMALL_BASES for net in (1, 2)])


def create(base: str, net: int, **kwargs) -> torch.nn.Module:
    small = dict(SMALL_BASES[base], num_classes=5, cov_dim=8, isqrt_dim=6)
    return timm.create_model(f"gsop_{base}_net{net}", **{**small, **kwargs})


@every_network
def test_placement(base, net):
    model = create(base, net)
    names = [name for name, m in model.named_modules() if isinstance(m, GsopBlock)]
    assert names == PLACEMENT[base][: len(PLACEMENT[base]) + 1 - net]
    assert isinstance(model.global_pool, IsqrtCovPool2d) == (net == 2)


@pytest.mark.parametrize("base", SMALL_BASES)
def test_the_bases_weights_load_by_their_own_names(base):
    vanilla = timm.create_model(base, num_classes=5, **SMALL_BASES[base])
    missing, unexpected = create(base, 1).load_state_dict(vanilla.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".gsop." in name for name in missing)


@pytest.mark.parametrize("base", ["densenet121", "inception_v3"])
def test_blocks_scale_what_the_base_computes(base):
    """With all weights at one half, a last block makes the base's features 1.5 times as large."""
    vanilla = timm.create_model(base, num_classes=5, **SMALL_BASES[base]).eval()
    last = 4 if base == "densenet121" else 3
    model = create(base, 1, gsop_layers=(last,)).eval()
    model.load_state_dict(vanilla.state_dict(), strict=False)
    for block in [m for m in model.modules() if isinstance(m, GsopBlock)]:
        torch.nn.init.zeros_(block.gsop.excitation.expand_conv.weight)
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model.forward_features(x), 1.5 * vanilla.forward_features(x))


@every_network
def test_training_saving_and_loading(base, net, tmp_path):
    model = create(base, net, in_chans=1, gsop_type="position", spatial_size=3).train()
    assert any(isinstance(m, PositionGsop) for m in model.modules())
    x = torch.randn(2, 1, 96, 80)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("base", SMALL_BASES)
@pytest.mark.parametrize("pool", ["avg", "catavgmax", "isqrt"])
def test_first_and_second_order_pools(base, pool):
    model = create(base, 1, global_pool=pool).eval()
    features = model.forward_features(torch.randn(1, 3, 96, 96))
    assert model.forward_head(features, pre_logits=True).shape == (1, model.head_hidden_size)
    model.reset_classifier(3)
    assert model.get_classifier().out_features == 3
    assert model.forward_head(features).shape == (1, 3)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
@pytest.mark.parametrize("base", ["densenet121", "inception_v3"])
def test_every_kind_of_block(base, gsop_type):
    model = create(base, 2, gsop_type=gsop_type, spatial_size=3).eval()
    assert model(torch.randn(1, 3, 96, 96)).isfinite().all()


@pytest.mark.parametrize("base", ["densenet121", "inception_v3"])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("gsop_type", "spatial"),
        ("global_pool", "sum"),
        ("gsop_layers", (5,)),
        ("cov_dim", 0),
        ("spatial_size", 0),
        ("isqrt_dim", 0),
        ("isqrt_iters", 0),
        ("flavor", "official"),
    ],
)
def test_bad_argument_is_named(base, argument, value):
    with pytest.raises(ValueError, match=f"{argument}=") as error:
        create(base, 1, **{argument: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("base", "smallest"), [("densenet121", 29), ("inception_v3", 75)])
def test_an_image_that_is_too_small_is_named(base, smallest):
    model = create(base, 2).eval()
    assert model(torch.randn(1, 3, smallest, 96)).isfinite().all()
    x = torch.randn(1, 3, 96, smallest - 1)
    for run in (model, model.forward_intermediates):
        with pytest.raises(ValueError, match=rf"\(1, 3, 96, {smallest - 1}\).*at least {smallest}×{smallest}"):
            run(x)
    features = create(base, 1, features_only=True, out_indices=(0,), feature_cls="getter").eval()
    assert features(x)[0].isfinite().all()  # a part of the network has other limits


def test_every_way_to_a_graph():
    """The image's size is checked only outside of graphs."""
    model = create("densenet121", 1, block_config=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 96, 80)
    expected = model(x)
    graphs = [torch.jit.script(model), torch.jit.trace(model, x), torch.fx.symbolic_trace(model)]
    graphs += [torch.export.export(model, (x,)).module(), torch.compile(model, backend="aot_eager", fullgraph=True)]
    for graph in graphs:
        torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)


def test_auxiliary_logits_are_refused():
    with pytest.raises(ValueError, match="aux_logits=True is not accepted; accepted: False"):
        create("inception_v3", 1, aux_logits=True)
