"""What our networks promise beyond what timm's own suite checks (test_timm_suite.py)."""

import pytest
import timm
import timm.optim
import torch
from timm.models.resnet import Bottleneck, ResNet

from benchmarks.cost import measure
from tests.checkpointing import check_grad_checkpointing_changes_nothing
from timm_gsop.layers import FLAVORS, GSOP_TYPES, ChannelGsop, GsopBlock, IsqrtCovPool2d, MpnCovPool2d

ALL_MODELS = timm.list_models(module=["gsop_resnet", "gsop_preresnet", "gsop_densenet", "gsop_inception"])
# As small as the families get: narrow ResNets with all their parts, and the 20-layer networks.
NARROW = dict(channels=(8, 16, 24, 32), num_classes=5, cov_dim=8, isqrt_dim=6)
SMALL_MODELS = {
    "gsop_resnet18_net2": NARROW,
    "gsop_resnet26_net1": NARROW,
    "gsop_resnet26_net2": NARROW,
    "isqrt_resnet26": NARROW,
    "mpncov_resnet50": NARROW,
    "gsop_resnext50_32x4d_net2": dict(NARROW, channels=(16, 32, 48, 64)),
    "preresnet20": dict(num_classes=5),
    "gsop_preresnet20_net1": dict(num_classes=5, cov_dim=8),
    "gsop_preresnet20_net2": dict(num_classes=5, cov_dim=8, isqrt_dim=6),
}
# Every kind of block and both flavors; the official concatenation wants 64·2^k channels.
VARIANTS = {
    f"{gsop_type}-{flavor}": dict(gsop_type=gsop_type, flavor=flavor, channels=(16, 32, 64, 128), spatial_size=3)
    for gsop_type in GSOP_TYPES
    for flavor in FLAVORS
}
variants = pytest.mark.parametrize("variant", VARIANTS)
small_models = pytest.mark.parametrize("name", SMALL_MODELS)


def create(name: str, **kwargs) -> torch.nn.Module:
    return timm.create_model(name, **{**SMALL_MODELS[name], **kwargs})


def image(name: str, batch: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return (
        torch.randn(batch, 3, height // 2, width // 2) if "preresnet" in name else torch.randn(batch, 3, height, width)
    )


def test_every_promised_model_is_registered():
    promised = {f"gsop_resnet{depth}_net{net}" for depth in (18, 26, 34, 50, 101, 152) for net in (1, 2)}
    promised |= {f"isqrt_resnet{depth}" for depth in (18, 26, 34, 50, 101)}
    promised |= {"mpncov_resnet50", "isqrt_preresnet164"}
    promised |= {f"preresnet{depth}" for depth in (20, 56, 164)}
    promised |= {f"gsop_preresnet{depth}_net{net}" for depth in (20, 56, 164) for net in (1, 2)}
    zoo = ("resnext50_32x4d", "densenet121", "inception_v3")
    promised |= {f"gsop_{base}_net{net}" for base in zoo for net in (1, 2)}
    assert set(ALL_MODELS) == promised


# Millions of parameters and GMACs: our own count, and for CIFAR-100 that of the paper's Table 6.
@pytest.mark.parametrize(
    ("name", "params", "gmacs", "tolerance"),
    [
        ("gsop_resnet50_net1", 28.29, 6.51, 0.005),
        ("gsop_resnet50_net2", 58.28, 6.81, 0.005),
        ("preresnet164", 1.7, None, 0.06 / 1.7),
        ("gsop_preresnet164_net1", 2.9, None, 0.06 / 2.9),
        ("gsop_preresnet164_net2", 3.6, None, 0.06 / 3.6),
    ],
)
def test_cost(name, params, gmacs, tolerance):
    cost = measure(name)
    assert cost.params / 1e6 == pytest.approx(params, rel=tolerance)
    if gmacs is not None:
        assert cost.macs / 1e9 == pytest.approx(gmacs, rel=tolerance)


@pytest.mark.parametrize("pool", ["isqrt", "avg"])
def test_last_stage_keeps_its_size(pool):
    with torch.device("meta"):
        model = timm.create_model("gsop_resnet26_net1", global_pool=pool).eval()
        shapes = [f.shape[1:] for f in model.forward_intermediates(torch.randn(1, 3, 224, 224))[1]]
    assert shapes == [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 14, 14)]
    assert all(m.dilation == (1, 1) for m in model.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("kwargs", [dict(output_stride=8), dict(output_stride=16), dict(last_stride=2)])
def test_other_strides_are_timms(kwargs):
    ours = timm.create_model("gsop_resnet26_net1", gsop_layers=(), num_classes=5, **kwargs).eval()
    output_stride = kwargs.get("output_stride", 32)
    theirs = ResNet(Bottleneck, (2, 2, 2, 2), num_classes=5, output_stride=output_stride).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.feature_info == theirs.feature_info


@pytest.mark.parametrize(
    "kwargs", [dict(avg_down=True), dict(aa_layer=timm.layers.BlurPool2d), dict(down_kernel_size=3)]
)
def test_stride_is_removed_from_every_variant_of_the_shortcut(kwargs):
    model = create("gsop_resnet26_net1", **kwargs).eval()
    shapes = [f.shape[2:] for f in model.forward_intermediates(torch.randn(1, 3, 64, 64))[1]]
    assert shapes[3] == shapes[4] == (4, 4)


def test_backbone_weights_have_timms_names():
    vanilla = timm.create_model("resnet50", num_classes=5)
    model = timm.create_model("gsop_resnet50_net1", num_classes=5)
    missing, unexpected = model.load_state_dict(vanilla.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".gsop." in name for name in missing)


def test_cifar_backbone_weights_have_the_same_names_with_and_without_blocks():
    vanilla, model = create("preresnet20"), create("gsop_preresnet20_net1")
    missing, unexpected = model.load_state_dict(vanilla.state_dict(), strict=False)
    assert not unexpected
    assert missing
    assert all(".gsop." in name for name in missing)


@pytest.mark.parametrize(
    ("name", "placement"),
    [
        ("preresnet164", []),
        ("gsop_preresnet20_net1", [(s, 1) for s in (0, 1, 2)]),
        ("gsop_preresnet20_net2", [(s, 1) for s in (0, 1)]),
        ("gsop_preresnet164_net1", [(s, i) for s in (0, 1, 2) for i in (2, 5, 8, 11, 14, 17)]),
        ("gsop_preresnet164_net2", [(s, i) for s in (0, 1, 2) for i in (2, 5, 8, 11, 14, 17)][:-1]),
        ("isqrt_preresnet164", []),
    ],
)
def test_cifar_placement(name, placement):
    with torch.device("meta"):
        model = timm.create_model(name)
    names = [n for n, m in model.named_modules() if isinstance(m, GsopBlock)]
    assert names == [f"stages.{stage}.blocks.gsop{i}" for stage, i in placement]


@pytest.mark.parametrize("gsop_layers", [(), (1,), (2,), (3,), (4,), [4, 2], (1, 2, 3, 4)])
def test_placement(gsop_layers):
    model = create("gsop_resnet26_net1", gsop_layers=gsop_layers)
    names = [n for n, m in model.named_modules() if isinstance(m, GsopBlock)]
    assert names == [f"layer{stage}.2" for stage in sorted(gsop_layers)]


def test_arguments_reach_the_layers():
    model = create("gsop_resnet26_net2", cov_dim=7, isqrt_dim=9, isqrt_iters=3)
    assert {m.reduction.conv.out_channels for m in model.modules() if isinstance(m, ChannelGsop)} == {7}
    assert isinstance(model.global_pool, IsqrtCovPool2d)
    assert (model.global_pool.out_features, model.global_pool.num_iters) == (45, 3)
    assert isinstance(create("mpncov_resnet50").global_pool, MpnCovPool2d)


@small_models
@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 64)])
def test_any_image_size(name, size):
    logits = create(name).eval()(image(name, 1, *size))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


@small_models
def test_a_training_step_reaches_every_parameter(name):
    model = create(name).train()
    model(image(name)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@small_models
def test_grad_checkpointing_changes_nothing(name):
    check_grad_checkpointing_changes_nothing(create(name), image(name))


@small_models
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", "isqrt"])
def test_first_and_second_order_pools(name, pool):
    model = create(name, global_pool=pool).eval()
    features = model.forward_features(image(name))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    assert model.forward_head(features).shape == (2, 5)
    model.reset_classifier(3)
    assert model.forward_head(features).shape == (2, 3)
    model.reset_classifier(0, "")
    assert model.forward_head(features).shape == features.shape
    model.reset_classifier(4, pool)
    assert model.forward_head(features).shape == (2, 4)


@small_models
def test_reset_classifier_keeps_the_trained_pooling(name):
    model = create(name).eval()
    x = image(name)
    before = model.forward_head(model.forward_features(x), pre_logits=True)
    model.reset_classifier(7)
    torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), before)


@small_models
@pytest.mark.parametrize("feature_cls", [None, "getter", "hook"])
def test_features_only(name, feature_cls):
    kwargs = {} if feature_cls is None else dict(feature_cls=feature_cls)
    model = create(name, features_only=True, **kwargs).eval()
    x = image(name)
    for feature, channels, reduction in zip(
        model(x), *map(list, (model.feature_info.channels(), model.feature_info.reduction())), strict=True
    ):
        assert feature.shape == (2, channels, x.shape[2] // reduction, x.shape[3] // reduction)


@small_models
def test_features_only_out_indices(name):
    x = image(name)
    model = create(name).eval()
    levels = model.forward_intermediates(x, intermediates_only=True)
    for indices, expected in [((1, 3), [levels[1], levels[3]]), ((-1,), levels[-1:]), (2, levels[-2:])]:
        taken = model.forward_intermediates(x, indices=indices, intermediates_only=True)
        for feature, level in zip(taken, expected, strict=True):
            torch.testing.assert_close(feature, level)


@pytest.mark.parametrize("indices", [0, 5, [4], [-5]])
def test_bad_indices_are_refused_as_timm_refuses_them(indices):
    model = create("gsop_preresnet20_net1").eval()
    with pytest.raises(AssertionError, match="out of range"):
        model.forward_intermediates(torch.randn(1, 3, 32, 32), indices=indices)
    with pytest.raises(AssertionError, match="out of range"):
        model.prune_intermediate_layers(indices)


@small_models
def test_in_chans(name):
    assert create(name, in_chans=1).eval()(image(name)[:, :1]).shape == (2, 5)


@small_models
def test_stochastic_depth(name):
    model = create(name, drop_path_rate=0.5)
    assert any(isinstance(m, timm.layers.DropPath) for m in model.modules())


def dropped(model: torch.nn.Module) -> float:
    """Share of the features that dropout takes from the classifier in training."""
    features = torch.rand(64, model.num_features, 7, 7) * torch.rand(64, model.num_features, 1, 1)
    model.eval()
    shown = model.forward_head(features, pre_logits=True) != 0
    return (model.train().forward_head(features, pre_logits=True)[shown] == 0).float().mean().item()


DROPS = [
    ("preresnet20", {}, 0.0),
    ("preresnet20", dict(global_pool="isqrt", drop_rate=0.0), 0.5),  # what train.py passes
    ("gsop_preresnet20_net1", dict(drop_rate=0.3), 0.3),
    ("gsop_preresnet20_net2", dict(drop_rate=0.0), 0.5),
    ("gsop_preresnet20_net2", dict(drop_rate=0.5), 0.5),  # once, not twice
    ("gsop_preresnet20_net2", dict(drop_rate=0.8), 0.8),
    ("gsop_preresnet20_net2", dict(isqrt_drop=0.0), 0.0),
    ("isqrt_resnet26", {}, 0.0),
    ("isqrt_resnet26", dict(isqrt_drop=0.5), 0.5),
    ("mpncov_resnet50", dict(isqrt_drop=0.5, drop_rate=0.2), 0.5),
    ("gsop_resnet26_net1", dict(isqrt_drop=0.5, drop_rate=0.2), 0.2),
]


@pytest.mark.parametrize(("name", "kwargs", "share"), DROPS)
def test_dropout_before_the_classifier(name, kwargs, share, tmp_path):
    model = create(name, **kwargs)
    assert dropped(model) == pytest.approx(share, abs=0.06)
    if "drop_rate" not in kwargs:  # which timm does not save
        timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
        assert dropped(timm.create_model(f"local-dir:{tmp_path}")) == pytest.approx(share, abs=0.06)


def test_dropout_follows_the_pooling():
    model = create("gsop_preresnet20_net2")
    for pool, share in ((None, 0.5), ("avg", 0.0), ("mpn", 0.5)):
        model.reset_classifier(3, pool)
        assert dropped(model) == pytest.approx(share, abs=0.06)


@small_models
def test_device_and_dtype_arguments(name):
    model = create(name, device="cpu", dtype=torch.bfloat16).eval()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(image(name).bfloat16()).dtype == torch.bfloat16


@small_models
def test_parameter_groups_follow_depth(name):
    """Layer decay (timm's --layer-decay) sees blocks in order: GSoP block after the bottleneck that it follows."""
    model = create(name)
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    first_seen = list(dict.fromkeys(groups[n] for n, _ in model.named_parameters()))
    assert first_seen == sorted(first_seen)
    assert {n for n, _ in model.named_parameters()} == set(groups)
    assert groups["fc.weight"] == max(groups.values())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        *[(name, {}) for name in SMALL_MODELS],
        *[("gsop_resnet26_net2", kwargs) for kwargs in VARIANTS.values()],
        ("gsop_densenet121_net1", dict(growth_rate=8, block_config=(2, 2, 2, 2))),
        ("gsop_densenet121_net2", dict(growth_rate=8, block_config=(2, 2, 2, 2))),
        ("gsop_inception_v3_net1", {}),
        ("gsop_inception_v3_net2", {}),
    ],
)
def test_a_fine_grained_recipe_has_two_rates(name, kwargs):
    """timm's ``--layer-decay 0.2 --layer-decay-min-scale 0.2``: the head learns five times as fast as the rest."""
    model = timm.create_model(name, **{**SMALL_MODELS.get(name, {}), **kwargs})
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=0.2, min_scale=0.2)
    names = {parameter: key for key, parameter in model.named_parameters()}
    fast = {names[p] for group in groups if group["lr_scale"] == 1 for p in group["params"]}
    assert {group["lr_scale"] for group in groups} == {0.2, 1}
    assert fast == {key for key in names.values() if key.startswith(("global_pool.", "fc.", "classifier."))}
    timm.optim.param_groups_layer_decay(model, layer_decay=0.2, min_scale=0.2, no_opt_scale=0.5)
    assert fast == {key for key, parameter in model.named_parameters() if parameter.requires_grad}


@small_models
def test_scriptable_gives_the_same(name):
    model = create(name, scriptable=True).eval()
    x = image(name)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


INITIALIZED = {
    **{name: (name, {}) for name in SMALL_MODELS},
    **{variant: ("gsop_resnet26_net2", kwargs) for variant, kwargs in VARIANTS.items()},
    **{f"cifar-{kind}": ("gsop_preresnet20_net2", dict(gsop_type=kind, spatial_size=4)) for kind in GSOP_TYPES},
    "zero_init_last-cifar": ("preresnet20", dict(zero_init_last=True)),
    "zero_init_last-resnet": ("gsop_resnet26_net1", dict(zero_init_last=False)),
    "attention-cifar": ("preresnet20", dict(attn_layer="se")),
    "attention-resnet": ("gsop_resnet26_net1", dict(block_args=dict(attn_layer=ChannelGsop))),
    "mpn": ("gsop_preresnet20_net1", dict(global_pool="mpn")),
    "no classifier": ("gsop_preresnet20_net1", dict(num_classes=0)),
    **{
        f"densenet-{kind}": ("gsop_densenet121_net2", dict(growth_rate=8, block_config=(2, 2, 2), gsop_type=kind))
        for kind in GSOP_TYPES
    },
    "inception": ("gsop_inception_v3_net2", dict(gsop_type="concat", cov_dim=16)),
}


@pytest.mark.parametrize("case", INITIALIZED)
def test_init_weights_gives_what_construction_gives(case):
    """Also to a model from the meta device, whose memory holds anything."""
    name, kwargs = INITIALIZED[case]
    kwargs = {**SMALL_MODELS.get(name, {}), "cov_dim": 16, "isqrt_dim": 16, **kwargs}
    fresh = timm.create_model(name, **kwargs).eval()
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs).eval()
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(7)
    model.init_weights()
    for key, value in model.state_dict().items():
        expected = fresh.state_dict()[key]
        if expected.unique().numel() == 1:  # zero biases, batch normalization, zero_init_last
            torch.testing.assert_close(value, expected, rtol=0, atol=0, msg=key)
        else:
            spread = 5 / expected.numel() ** 0.5
            assert value.std().item() == pytest.approx(expected.std().item(), rel=spread), key
            assert value.mean().item() == pytest.approx(0, abs=expected.std().item() * spread), key
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model(x), fresh(x))


def test_zero_init_last_can_be_chosen_again():
    model = create("gsop_resnet26_net1")
    assert not model.layer1[0].bn3.weight.any()
    model.init_weights(zero_init_last=False)
    assert model.layer1[0].bn3.weight.all()


@small_models
def test_save_and_load_restore_arguments_and_logits(name, tmp_path):
    model = create(name, in_chans=1).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image(name)[:, :1]
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@variants
@pytest.mark.parametrize("net", [1, 2])
def test_every_kind_of_block_trains(variant, net):
    model = create(f"gsop_resnet26_net{net}", **VARIANTS[variant]).train()
    model(torch.randn(2, 3, 64, 96)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@variants
def test_every_kind_of_block_is_scriptable(variant):
    model = create("gsop_resnet26_net2", scriptable=True, **VARIANTS[variant]).eval()
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@variants
def test_every_kind_of_block_is_traced_by_fx(variant):
    model = create("gsop_resnet26_net2", **VARIANTS[variant]).eval()
    x = torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(timm.models.create_feature_extractor(model, ["layer3", "fc"])(x)["fc"], model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))


@variants
def test_every_kind_of_block_is_saved_and_loaded(variant, tmp_path):
    model = create("gsop_resnet26_net2", **VARIANTS[variant]).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_every_kind_of_block_in_the_cifar_family(gsop_type):
    model = create("gsop_preresnet20_net2", gsop_type=gsop_type, spatial_size=3).train()
    model(torch.randn(2, 3, 32, 24)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["gsop_resnet26_net2", "gsop_preresnet20_net2"])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("gsop_type", "spatial", "accepted: 'channel', 'position', 'avg', 'max', 'concat'"),
        ("flavor", "authors", "accepted: 'paper'"),
        ("spatial_size", 0, "integer >= 1"),
        ("global_pool", "sum", "accepted: '', 'avg'.*'isqrt', 'mpn'"),
        ("gsop_layers", (0, 1), "stages from 1 to [34]"),
        ("gsop_layers", (5,), "stages from 1 to [34]"),
        ("gsop_layers", (1, 1), "different stages"),
        ("gsop_layers", 2, "a sequence of"),
        ("cov_dim", 0, "integer >= 1"),
        ("isqrt_dim", 0, "integer >= 1"),
        ("isqrt_iters", 0, "integer >= 1"),
        ("isqrt_drop", 1.0, "a number >= 0 and < 1"),
        ("last_stride", 3, "1, 2"),
    ],
)
def test_bad_argument_is_named(name, argument, value, message):
    with pytest.raises(ValueError, match=f"{argument}=.*{message}") as error:
        create(name, **{argument: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("last_stride", [1, 2])
def test_contradicting_strides_are_named(output_stride, last_stride):
    message = (
        f"last_stride={last_stride} is not accepted with output_stride={output_stride}.*accepted: last_stride=None"
    )
    with pytest.raises(ValueError, match=message):
        create("gsop_resnet26_net1", output_stride=output_stride, last_stride=last_stride)


def test_bad_attention_is_named():
    with pytest.raises(ValueError, match="attn_layer='sea' is not accepted; accepted: timm's"):
        create("preresnet20", attn_layer="sea")


def test_attention_of_before_loads_by_its_old_name():
    """It was part of ``drop_path``."""
    model = create("preresnet20", attn_layer="se").eval()
    renamed = {key.replace(".attn.", ".drop_path.attn."): value for key, value in model.state_dict().items()}
    assert renamed.keys() != model.state_dict().keys()
    other = create("preresnet20", attn_layer="se").eval()
    other.load_state_dict(renamed)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_bad_output_stride_is_named():
    with pytest.raises(ValueError, match="output_stride=64 is not accepted; accepted: 8, 16, 32"):
        create("gsop_resnet26_net1", output_stride=64)


def test_bad_pool_in_reset_classifier_is_named():
    with pytest.raises(ValueError, match="global_pool='sum' is not accepted; accepted: "):
        create("gsop_resnet26_net1").reset_classifier(3, "sum")


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="cov_dims"):
        create("gsop_preresnet20_net1", cov_dims=3)
