"""The registry of heads, and every head in networks: options, errors, saving, tools."""

import json
from typing import ClassVar

import pytest
import timm
import torch
from timm.utils import ParseKwargs
from torch import nn

from docs.measured import heads_tables
from tests.layers import SMALL_OPTIONS
from timm_gsop.hub.hub_folder import check_hub_folder, save_hub_folder
from timm_gsop.hub.model_card import model_card
from timm_gsop.layers import (
    SECOND_ORDER_POOLS,
    CovPool2d,
    OfficialIsqrtCovPool2d,
    SecondOrderPool2d,
    accepted_arguments,
    create_second_order_pool,
    pool_cost,
    register_pool,
)
from timm_gsop.layers.second_order_pool import SHARED
from timm_gsop.probe import HEADS
from timm_gsop.probe.heads import create_head

every_pool = pytest.mark.parametrize("pool_type", SECOND_ORDER_POOLS)
SMALL = dict(isqrt_dim=6, isqrt_iters=2, compact_bilinear_dim=20)
OPTIONS = {**SMALL_OPTIONS, "compact_bilinear": {"seed": 3, "dim": 5}}
NETWORKS = {
    "gsop_resnet26_net1": dict(channels=(8, 16, 24, 32), layers=(1, 1, 1, 1), cov_dim=8, num_classes=5),
    "second_order": dict(backbone="vit_tiny_patch16_224", depth=2, embed_dim=48, num_classes=5),
}


def create(name: str, pool_type: str, **kwargs) -> nn.Module:
    options = {"pool_kwargs": OPTIONS[pool_type]} if pool_type in OPTIONS else {}
    return timm.create_model(name, global_pool=pool_type, **{**NETWORKS[name], **SMALL, **options, **kwargs})


def image(name: str, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *((224, 224) if name == "second_order" else (64, 64)))


@every_pool
def test_a_pool_says_what_it_is_and_costs(pool_type):
    pool_class = SECOND_ORDER_POOLS[pool_type]
    assert pool_class.pool_type == pool_type
    assert pool_class.take_when
    shared = {name: SMALL[name] for name in accepted_arguments(pool_type) if name in SMALL}
    pool = create_second_order_pool(pool_type, 48, **shared, pool_kwargs=OPTIONS.get(pool_type)).eval()
    for name, value in OPTIONS.get(pool_type, {}).items():
        assert pool_class.options()[name] != value
    assert pool(torch.randn(3, 48, 5, 4)).shape == (3, pool.out_features)
    cost, larger = pool_cost(pool, 5, 4), pool_cost(pool, 10, 8)
    assert cost.params == larger.params == sum(p.numel() for p in pool.parameters())
    assert larger.macs > cost.macs > 0


@every_pool
def test_what_a_pool_does_not_use_is_refused(pool_type):
    accepted = accepted_arguments(pool_type)
    for name, value in {**SMALL, "flavor": "official"}.items():
        if name in accepted:
            create_second_order_pool(pool_type, 8, **{name: value})
        else:
            message = f"{name}={value!r} is not accepted with pool_type={pool_type!r}, .*accepted: "
            with pytest.raises(ValueError, match=message + ", ".join(accepted)):
                create_second_order_pool(pool_type, 8, **{name: value})
            create_second_order_pool(pool_type, 8, **{name: SHARED[name]})  # the default is that of all networks
    with pytest.raises(ValueError, match="flavor='bogus' is not accepted; accepted: 'paper', 'official'"):
        create_second_order_pool(pool_type, 8, flavor="bogus")


class VarPool2d(SecondOrderPool2d):
    """Variances: those of each reduced channel."""

    pool_type = "var"
    take_when = "products of two channels are too many"
    shared: ClassVar = {"isqrt_dim": "dim"}

    def __init__(self, in_features, dim=256, root="none", clamp=True, *, device=None, dtype=None):
        super().__init__(in_features, dim)
        self.root, self.clamp = root, clamp
        self.conv = nn.Conv2d(in_features, dim, 1, device=device, dtype=dtype)

    def forward(self, x):
        var = self.conv(x).flatten(2).var(dim=2, correction=0)
        return (var.clamp_min(1e-6) if self.clamp else var) ** (0.5 if self.root == "square" else 1)


@pytest.fixture
def new_head(monkeypatch):
    monkeypatch.setitem(OPTIONS, "var", {"root": "square", "clamp": False})
    assert register_pool(VarPool2d) is VarPool2d
    yield
    del SECOND_ORDER_POOLS["var"]


def test_a_new_head_is_everywhere_once_it_is_registered(new_head, tmp_path):
    """In networks, saved ones and their cards, under its own options; in the probe, and in the tables of the docs."""
    test_a_pool_says_what_it_is_and_costs("var")
    test_what_a_pool_does_not_use_is_refused("var")
    for name in NETWORKS:
        test_in_a_network(name, "var", tmp_path / name)
    with pytest.raises(ValueError, match="no option of global_pool='var'; accepted: 'root', 'clamp'"):
        create("second_order", "var", pool_kwargs={"roots": 1})
    assert list(HEADS) == ["avg", "mlp", *SECOND_ORDER_POOLS]
    head = create_head(timm.create_model("second_order", backbone="test_resnet", isqrt_dim=6), "var", 3, seed=0)
    assert (type(head.global_pool), head.fc.in_features) == (VarPool2d, 6)
    what, cost = heads_tables({"rows": [{"backbone": "test_resnet", "alternatives": {}}]})
    assert '| `"var"` | Variances: those of each reduced channel | products of two channels are too many | ' in what
    assert '| `"var"` | 256 |' in cost


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"pool_type": None}, "Head.pool_type=None is not accepted"),
        ({"take_when": ""}, "Head.take_when='' is not accepted"),
        ({"pool_type": "isqrt"}, "pool_type='isqrt' is not accepted; it is the name of IsqrtCovPool2d"),
        ({"pool_type": "avg"}, "pool_type='avg' is not accepted; it is the name of timm's"),
        ({"shared": {"cov_dim": "dim"}}, "Head.shared='cov_dim' is not accepted; accepted: 'isqrt_dim'"),
        ({"shared": {}, "__init__": lambda self, in_features, dim: None}, "Head has no default for dim"),
        (
            {"shared": {}, "__init__": lambda self, in_features, rank=1: None},
            "Head has an option rank, which every head",
        ),
    ],
)
def test_a_head_that_says_too_little_is_not_registered(attributes, message):
    before = dict(SECOND_ORDER_POOLS)
    with pytest.raises(ValueError, match=message):
        register_pool(type("Head", (VarPool2d,), {"pool_type": "head", **attributes}))
    assert before == SECOND_ORDER_POOLS


def test_the_official_flavor_has_its_own_pool():
    assert type(create_second_order_pool("isqrt", 8, flavor="official")) is OfficialIsqrtCovPool2d


@pytest.mark.parametrize(
    ("pool_type", "pool_kwargs", "message"),
    [
        ("svpn", {"heads": 2}, "heads=2, which is no option of global_pool='svpn'; accepted: 'num_heads', 'head_dim'"),
        ("mpn", {"dim": 8}, "dim=8, .*accepted: 'rank'.* Its dim is set by isqrt_dim"),
        ("cov", {"rank": 0}, "out_features=0 .*integer >= 1"),
        ("avg", {"num_heads": 2}, "no option of global_pool='avg'; accepted: none"),
        ("svpn", "num_heads=2", "pool_kwargs='num_heads=2' .*must be a dictionary, or None"),
        ("svpn", {"num_heads": 0}, "num_heads=0 .*integer >= 1"),
    ],
)
@pytest.mark.parametrize("name", NETWORKS)
def test_bad_options_are_named(name, pool_type, pool_kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, global_pool=pool_type, pool_kwargs=pool_kwargs, **NETWORKS[name])


@every_pool
@pytest.mark.parametrize("name", NETWORKS)
def test_in_a_network(name, pool_type, tmp_path):
    """A step reaches every parameter; what is saved, options included, loads to the bit; the card says what it is."""
    model = create(name, pool_type).train()
    for key, value in OPTIONS.get(pool_type, {}).items():
        found = getattr(model.global_pool, key, value)
        assert isinstance(found, nn.Module) or found == value
    x = image(name)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    features = model.eval().forward_features(x)
    torch.testing.assert_close(model.forward_head(features), model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_intermediates(x)[0], features, rtol=0, atol=0)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    save_hub_folder(model, tmp_path / "folder")
    recorded = json.loads((tmp_path / "folder/config.json").read_text())["model_args"].get("pool_kwargs")
    assert recorded == OPTIONS.get(pool_type)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    card = model_card(check_hub_folder(tmp_path / "folder"), "me/birds")
    assert f"**Head**: `{pool_type}`" in card
    assert all(f"{key}={value!r}" in card for key, value in OPTIONS.get(pool_type, {}).items())


@every_pool
@pytest.mark.parametrize("name", NETWORKS)
def test_a_low_rank_classifier(name, pool_type, tmp_path):
    """The classifier's matrix is a product of two, which a step reaches. It is saved and loaded to the bit.

    Another number of classes keeps the projection, another pool does not.
    """
    options = {**OPTIONS.get(pool_type, {}), "rank": 3}
    model = create(name, pool_type, pool_kwargs=options).train()
    x = image(name)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    projection = model.global_pool.projection
    assert (projection.out_features, model.head_hidden_size, model.fc.in_features) == (3, 3, 3)
    vectors = []
    projection.register_forward_pre_hook(lambda _, args: vectors.append(args[0]))
    logits = model.eval()(x)
    low_rank = model.fc.weight @ projection.weight  # of the features of the head alone
    torch.testing.assert_close(logits, vectors[0] @ low_rank.T + model.fc.bias)
    assert projection.in_features == create(name, pool_type).head_hidden_size
    save_hub_folder(model, tmp_path / "folder")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), logits, rtol=0, atol=0)
    assert f"**Head**: `{pool_type}`" in (card := model_card(check_hub_folder(tmp_path / "folder"), "me/birds"))
    assert "rank=3" in card
    fewer = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=2)
    torch.testing.assert_close(fewer.global_pool.state_dict(), model.global_pool.state_dict(), rtol=0, atol=0)
    model.reset_classifier(2)
    assert model.global_pool.projection is projection
    model.reset_classifier(2, "cov" if pool_type == "isqrt" else "isqrt")
    assert model.fc.in_features == 21  # 6 · 7 / 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("pool_type", ["isqrt", "svpn"])
def test_a_low_rank_classifier_is_scripted_and_initialized(pool_type):
    """With a token or without; lengths are kept on average."""
    pool = create_second_order_pool(
        pool_type, 48, pool_kwargs={"rank": 512}, **({"isqrt_dim": 8} if pool_type == "isqrt" else {})
    ).eval()
    x, token = torch.randn(2, 48, 5, 4), torch.randn(2, 48)
    args = (x, token) if pool.takes_token else (x,)
    torch.testing.assert_close(torch.jit.script(pool)(*args), pool(*args))
    ratio = pool(*args).norm(dim=1) / pool.head(*args).norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones(2), rtol=0.2, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        (dict(isqrt_dim=64), "isqrt_dim=16 has fewer"),
        (dict(global_pool="compact_bilinear"), "compact_bilinear_dim=256 has fewer"),
        (dict(isqrt_dim=16), None),
        (dict(isqrt_dim=64, num_classes=0), None),
        (dict(global_pool="avg"), None),
    ],
)
def test_a_head_that_is_larger_than_its_backbone_is_said(kwargs, expected, caplog):
    """With the width that has fewer parameters."""
    caplog.set_level("INFO", logger="timm_gsop.models.global_pool")
    model = timm.create_model("second_order", backbone="test_resnet", **{"num_classes": 1000, **kwargs})
    lines = [record.message for record in caplog.records if "parameters" in record.message]
    assert len(lines) == (expected is not None)
    if expected is not None:
        assert expected in lines[0]
        name, _, width = expected.partition(" ")[0].partition("=")
        sizes = []
        for factor in (1, 2):
            small = timm.create_model(
                "second_order", backbone="test_resnet", **{"num_classes": 1000, **kwargs, name: factor * int(width)}
            )
            sizes.append(sum(p.numel() for part in (small.global_pool, small.fc) for p in part.parameters()))
        backbone = sum(p.numel() for p in model.backbone.parameters())
        assert sizes[0] <= backbone < sizes[1]


def test_options_go_with_their_pool(tmp_path):
    """Another pool has its defaults, also after it was saved; the same pool keeps its weights."""
    model = create("gsop_resnet26_net1", "svpn").eval()
    vector = model.global_pool.vector
    model.reset_classifier(3)
    assert model.global_pool.vector is vector
    model.reset_classifier(3, "moment")
    assert model.global_pool.proj.out_channels == 512
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = image("gsop_resnet26_net1")
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_options_from_train_pys_command_line():
    import argparse

    parser = argparse.ArgumentParser()
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
    args = parser.parse_args(["--model-kwargs", "pool_kwargs={'num_heads':3,'head_dim':4}"])
    model = timm.create_model(
        "gsop_resnet26_net1", global_pool="svpn", **{**NETWORKS["gsop_resnet26_net1"], **args.model_kwargs}
    )
    assert (model.global_pool.num_heads, model.global_pool.head_dim) == (3, 4)


@every_pool
def test_pretrained_weights_of_another_head_leave_it_out(pool_type, tmp_path):
    """With and without a classifier."""
    name = "gsop_resnet26_net1"
    torch.save(create(name, "avg").state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"), num_classes=5)
    for classes in (5, 0):
        model = create(name, pool_type, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        assert model(image(name)).shape == (2, classes or model.head_hidden_size)


@pytest.mark.parametrize("pool_type", ["svpn", "moment"])
def test_a_head_is_given_the_class_token(pool_type):
    """The first of the backbone's tokens, in front of the second moments; features are the backbone's own tokens."""
    model = create("second_order", pool_type, pool_kwargs={**OPTIONS[pool_type], "first_moment": True}).eval()
    x = image("second_order")
    tokens = model.backbone.forward_features(x)
    torch.testing.assert_close(model.forward_features(x), tokens)
    scale = 0.5 if pool_type == "moment" else 1.0
    found = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(found[:, :48], scale * tokens[:, 0])
    patches = tokens[:, 1:].transpose(1, 2).unsqueeze(3)
    torch.testing.assert_close(found, model.global_pool(patches, tokens[:, 0]))
    model.reset_classifier(5, "isqrt")
    assert model.forward_features(x).shape == (2, 48, 14, 14)
    assert model(x).shape == (2, 5)


def test_without_a_class_token_the_average_comes_first():
    """Registers are no class tokens."""
    options = dict(depth=1, embed_dim=48, num_heads=3, img_size=64, num_classes=5, global_pool="svpn")
    model = timm.create_model("second_order", backbone="vit_medium_patch16_reg4_gap_256", **options).eval()
    assert model.num_prefix_tokens == 4
    features = model.forward_features(torch.randn(2, 3, 64, 64))
    assert features.shape == (2, 48, 4, 4)
    found = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(found[:, :48], features.mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("pool_type", ["svpn", "moment"])
def test_every_way_to_run_a_transformer_with_it(pool_type):
    """Scripted, traced, exported, compiled in one graph; with the class token where the head takes it."""
    model = create("second_order", pool_type).eval()
    x = image("second_order")
    expected = model(x)
    auto = torch.export.Dim.AUTO
    torch.compiler.reset()
    ways = dict(
        script=torch.jit.script(model),
        trace=torch.jit.trace(model, x),
        export=torch.export.export(model, (x,), dynamic_shapes=({0: auto},)).module(),
        compile=torch.compile(model, fullgraph=True, backend="aot_eager"),
    )
    for name, way in ways.items():
        torch.testing.assert_close(way(x), expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "pool_type", [name for name, pool in SECOND_ORDER_POOLS.items() if issubclass(pool, CovPool2d)]
)
def test_pictures_of_covariances(pool_type):
    from timm_gsop.viz import record

    model = create("gsop_resnet26_net1", pool_type, gsop_layers=()).eval()
    (found,) = record(model, image("gsop_resnet26_net1", 1))
    assert found.covariance.shape == (6, 6)
    normalized = found.normalization != "not normalized"
    assert torch.equal(found.normalized, found.covariance) != normalized
