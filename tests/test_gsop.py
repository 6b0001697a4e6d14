import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import SEModule
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from benchmarks.timing import saved_bytes
from tests.layers import randomize
from tests.oracles import channel_gsop, position_gsop, resize_bilinear
from timm_gsop import ChannelGsop, FusedGsop, GsopBlock, PositionGsop
from timm_gsop.layers import FLAVORS, GSOP_TYPES, create_gsop, create_second_order_pool
from timm_gsop.layers.row_conv import RowConv2d

SIZES = st.tuples(st.integers(1, 6), st.integers(1, 6))
every_kind = pytest.mark.parametrize(("gsop_type", "flavor"), [(t, f) for t in GSOP_TYPES for f in FLAVORS])


def create(gsop_type: str, flavor: str = "paper", **kwargs) -> nn.Module:
    """A small layer of 64 channels, the fewest that the official concatenation accepts."""
    side = None if gsop_type == "channel" else 3
    return create_gsop(gsop_type, 64, cov_dim=4, spatial_size=side, flavor=flavor, **kwargs)


def test_channel_block_by_hand():
    """One channel, two pixels, cov_dim 1: small enough to follow with a pencil."""
    gsop = ChannelGsop(1, cov_dim=1).double().eval()
    e = gsop.excitation
    with torch.no_grad():
        gsop.reduction.conv.weight.fill_(2.0)
        e.row_conv.weight.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0]).view(4, 1, 1, 1))
        e.expand_conv.weight.copy_(torch.tensor([1.0, 10.0, 1.0, 10.0]).view(1, 4, 1, 1))
        e.expand_conv.bias.fill_(-4.0)
        for bn in (gsop.reduction.bn, e.cov_bn, e.row_conv_bn):
            bn.eps = 0.0
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
    # reduced: 2, 6; mean 4; covariance (4 + 4) / 2 = 4; row conv: 4, -4, 8, -8; LeakyReLU: 4, -0.4, 8, -0.8
    # logit: 4 - 4 + 8 - 8 - 4 = -4
    weight = torch.sigmoid(torch.tensor(-4.0, dtype=torch.float64))
    torch.testing.assert_close(gsop(x), weight * x)
    torch.testing.assert_close(GsopBlock(gsop)(x), (1 + weight) * x)


def test_position_block_by_hand():
    """Two channels, one position, spatial_size 1: its variance over the channels decides its weight."""
    gsop = PositionGsop(2, rd_channels=2, spatial_size=1).double().eval()
    e = gsop.excitation
    with torch.no_grad():
        gsop.reduction.conv.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
        e.row_conv.weight.copy_(torch.tensor([1.0, 2.0, -10.0, 0.0]).view(4, 1, 1, 1))
        e.expand_conv.weight.copy_(torch.tensor([1.0, 1.0, 1.0, 5.0]).view(1, 4, 1, 1))
        e.expand_conv.bias.fill_(-7.0)
        for bn in (gsop.reduction.bn, e.cov_bn, e.row_conv_bn):
            bn.eps = 0.0
    x = torch.tensor([[1.0, 1.0], [2.0, 8.0]], dtype=torch.float64).view(1, 2, 1, 2)
    # pooled: 1 and 5; mean 3; variance (4 + 4) / 2 = 4; row conv: 4, 8, -40, 0; LeakyReLU: 4, 8, -4, 0
    # logit: 4 + 8 - 4 - 7 = 1, for both pixels
    torch.testing.assert_close(gsop(x), torch.sigmoid(torch.tensor(1.0, dtype=torch.float64)) * x)


@given(channels=st.integers(1, 9), cov_dim=st.integers(1, 9), batch=st.integers(1, 3), size=SIZES)
def test_channel_block_equals_the_paper_row_by_row(channels, cov_dim, batch, size):
    gsop = randomize(ChannelGsop(channels, cov_dim, dtype=torch.float64)).eval()
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(GsopBlock(gsop)(x), x + channel_gsop(x, gsop.state_dict()))


@given(
    channels=st.integers(1, 5),
    rd_channels=st.integers(1, 5),
    batch=st.integers(1, 3),
    side=st.integers(1, 4),
    size=SIZES,
)
def test_position_block_equals_the_paper_row_by_row(channels, rd_channels, batch, side, size):
    """Maps of any size and shape, smaller than the square that they are pooled to included."""
    gsop = randomize(PositionGsop(channels, rd_channels, side, dtype=torch.float64)).eval()
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(GsopBlock(gsop)(x), x + position_gsop(x, gsop.state_dict(), side))


@pytest.mark.parametrize("fusion", ["avg", "max", "concat"])
def test_fusion_is_of_the_two_scaled_tensors(fusion):
    gsop = randomize(FusedGsop(5, fusion, cov_dim=4, spatial_size=3, dtype=torch.float64)).eval()
    x = torch.randn(2, 5, 7, 4, dtype=torch.float64)
    weights = gsop.state_dict()

    def of(part: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}

    by_channel, by_position = channel_gsop(x, of("channel.")), position_gsop(x, of("position."), 3)
    if fusion == "concat":
        kernel = weights["fuse.conv.weight"][:, :, 0, 0]
        expected = torch.einsum("oc,bchw->bohw", kernel[:, :5], by_channel) + weights["fuse.conv.bias"][:, None, None]
        expected = expected + torch.einsum("oc,bchw->bohw", kernel[:, 5:], by_position)
    else:
        expected = (by_channel + by_position) / 2 if fusion == "avg" else torch.max(by_channel, by_position)
    torch.testing.assert_close(gsop(x), expected)


def test_resizing_of_the_oracle_is_bilinear():
    """A weight map of 2×2, spread over 1×4 pixels: rows average; columns at 1/4 of the way outwards of each centre."""
    weights = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(resize_bilinear(weights, 1, 4), torch.tensor([[0, 0.25, 0.75, 1]], dtype=torch.float64))


def test_parameters_of_the_channel_block():
    """Table 2, conv4_x: C·d, 2d, 4d·d and 4d·C; 0.72 M together."""
    channels, d = 1024, 128
    gsop = ChannelGsop(channels, d)
    counts = {name: p.numel() for name, p in gsop.named_parameters()}
    assert counts["reduction.conv.weight"] == channels * d
    assert counts["excitation.cov_bn.weight"] + counts["excitation.cov_bn.bias"] == 2 * d
    assert counts["excitation.row_conv.weight"] == 4 * d * d
    assert counts["excitation.expand_conv.weight"] == 4 * d * channels
    convolutions = sum(m.weight.numel() for m in gsop.modules() if isinstance(m, nn.Conv2d))
    assert convolutions == 1024 * 128 + 128 * 512 + 512 * 1024
    others = 2 * d + 2 * 4 * d + channels  # the batch normalizations after two convolutions, the gate's bias
    assert sum(counts.values()) == convolutions + 2 * d + others


def test_parameters_of_the_position_block():
    """Table 2, conv4_x: 0.16 M."""
    convolutions = [m.weight.numel() for m in PositionGsop(1024).modules() if isinstance(m, nn.Conv2d)]
    assert convolutions == [1024 * 128, 64 * 256, 256 * 64]


@pytest.mark.parametrize("gsop_class", [ChannelGsop, PositionGsop])
def test_normalization_is_row_wise(gsop_class):
    """In training, every row of the covariance has mean 0 and variance 1 over batch and columns."""
    gsop = gsop_class(6, 4).train()
    gsop.excitation.cov_bn.eps = 1e-12
    seen = []
    gsop.excitation.cov_bn.register_forward_hook(lambda module, args, output: seen.append(output))
    gsop(100 * torch.randn(8, 6, 9, 9))
    rows = seen[0].squeeze(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(len(rows)), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(len(rows)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(5, 1), (7, 1), (5, 3)], ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [dict(), dict(bias=False), dict(stride=2), dict(padding=(1, 0)), dict(groups=1), dict(dilation=1)],
    ids=str,
)
def test_row_convolution_is_pytorchs_convolution(kwargs, size):
    """The same arguments give the same result, on whole rows and on anything else."""
    arguments = dict(in_channels=5, out_channels=20, kernel_size=(5, 1), groups=5, dtype=torch.float64)
    conv = RowConv2d(**{**arguments, **kwargs})
    plain = nn.Conv2d(**{**arguments, **kwargs})
    plain.load_state_dict(conv.state_dict())
    x = torch.randn(3, 5, *size, dtype=torch.float64)
    torch.testing.assert_close(conv(x), plain(x))


@every_kind
def test_shortcut(gsop_type, flavor):
    gsop = randomize(create(gsop_type, flavor)).eval()
    x = torch.randn(2, 64, 6, 5)
    torch.testing.assert_close(GsopBlock(gsop)(x), x + gsop(x))


def block_of_channels(scale: float = 1.0) -> GsopBlock:
    return GsopBlock(randomize(ChannelGsop(6, 4)).eval(), scale)


@pytest.mark.parametrize("scale", [1.0, 2 / 3])
def test_a_hook_on_the_layer_sees_what_it_returns_and_may_change_it(scale):
    block, x, seen = block_of_channels(scale), torch.randn(2, 6, 5, 5), []
    scaled = block.gsop(x)
    block.gsop.register_forward_hook(lambda module, args, y: seen.append((args, y)) or 3 * y)
    torch.testing.assert_close(block(x), scale * (x + 3 * scaled))
    ((args, y),) = seen
    assert len(args) == 1
    assert torch.equal(args[0], x)
    assert torch.equal(y, scaled)


def test_a_hook_on_the_layers_input_may_change_it():
    block, x = block_of_channels(), torch.randn(2, 6, 5, 5)
    block.gsop.register_forward_pre_hook(lambda module, args: torch.zeros_like(args[0]))
    assert not block.gsop(x).any()
    assert block(x).shape == x.shape


def test_a_hook_on_the_layers_gradient_sees_that_of_the_layer_alone():
    block, x = block_of_channels(), torch.randn(2, 6, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(block.gsop(x).sum(), x)
    seen = []
    block.gsop.register_full_backward_hook(lambda module, grads, _: seen.extend(grads))
    block(x).sum().backward()
    torch.testing.assert_close(seen, [expected])


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("gsop", [lambda: SEModule(6, rd_channels=2), lambda: PositionGsop(6, 4, 2), nn.Identity])
def test_a_layer_that_is_exchanged_is_used(gsop):
    block, x = block_of_channels(), torch.randn(2, 6, 5, 5)
    block.gsop = gsop().eval()
    torch.testing.assert_close(block(x), x + block.gsop(x))
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))


def test_a_forward_of_ones_own_is_called():
    class Negated(ChannelGsop):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -super().forward(x)

    block, x = GsopBlock(Negated(6, 4).eval()), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(block(x), x + block.gsop(x))
    block = block_of_channels()  # as accelerate's hooks do: on the object
    block.gsop.forward = lambda x: 2 * x
    torch.testing.assert_close(block(x), 3 * x)


def test_a_checkpointed_layer_saves_memory_and_nothing_else_changes():
    """Only its input is kept, which exists anyway."""
    x = torch.randn(3, 6, 16, 16, requires_grad=True, dtype=torch.float64)
    block = GsopBlock(ChannelGsop(6, 4, dtype=x.dtype)).train()
    wrapped = copy.deepcopy(block)
    wrapped.gsop = checkpoint_wrapper(wrapped.gsop)
    gradients = [torch.autograd.grad(b(x).square().sum(), [x, *b.parameters()]) for b in (block, wrapped)]
    torch.testing.assert_close(*gradients)
    assert saved_bytes(block, x) > 8 * 4 * 3 * 16 * 16  # at least one reduced map
    assert saved_bytes(wrapped, x) == 0


def test_scaling_and_shortcut_take_one_pass():
    """One operation makes a tensor of the map's size."""
    block, x = block_of_channels(), torch.randn(2, 6, 8, 8)
    operations = []

    class Counted(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == x.shape:
                operations.append(function)
            return out

    with Counted():
        block(x)
    assert len(operations) == 1


def test_a_block_that_was_pickled_before_it_asked_its_layer_loads():
    block, x = block_of_channels(), torch.randn(2, 6, 5, 5)
    block.__dict__["in_one_pass"] = True  # what was an attribute
    loaded = pickle.loads(pickle.dumps(block))
    torch.testing.assert_close(loaded(x), block(x), rtol=0, atol=0)
    loaded.gsop = SEModule(6, rd_channels=2)
    torch.testing.assert_close(loaded(x), x + loaded.gsop(x))


def test_row_convolution_sees_its_row_only():
    excitation = ChannelGsop(6, 4).excitation.eval()
    cov = torch.randn(1, 4, 4, requires_grad=True)
    hidden = excitation.row_conv(cov.unsqueeze(-1)).flatten()
    for output, value in enumerate(hidden):
        (grad,) = torch.autograd.grad(value, cov, retain_graph=True)
        assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [output // 4]


def as_attention_layer(gsop_type: str, flavor: str):
    """What timm's ``attn_layer`` takes: channels first, then ``device`` and ``dtype``."""

    def attn_layer(channels: int, **kwargs) -> nn.Module:
        side = None if gsop_type == "channel" else 3
        return create_gsop(gsop_type, channels, cov_dim=4, spatial_size=side, flavor=flavor, **kwargs)

    return attn_layer


def resnet_with_attention(attn_layer) -> nn.Module:
    return timm.create_model("resnet26", block_args=dict(attn_layer=attn_layer), num_classes=3)


def byobnet_with_attention(attn_layer) -> nn.Module:
    block = timm.models.ByoBlockCfg(type="bottle", d=1, c=64, s=2, gs=0, br=1.0)
    cfg = timm.models.ByoModelCfg(blocks=(block, block), stem_type="3x3", stem_chs=16, attn_layer=attn_layer)
    return timm.models.ByobNet(cfg, num_classes=3)


@every_kind
@pytest.mark.parametrize("network", [resnet_with_attention, byobnet_with_attention])
def test_is_an_attention_layer_of_timm(gsop_type, flavor, network, tmp_path):
    """It trains there, and a checkpoint of it loads again."""
    model = network(as_attention_layer(gsop_type, flavor)).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".excitation." in name}
    assert gradients
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())

    torch.save(model.state_dict(), tmp_path / "checkpoint.pth")
    loaded = network(as_attention_layer(gsop_type, flavor))
    timm.models.load_checkpoint(loaded, str(tmp_path / "checkpoint.pth"))
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_the_class_itself_is_an_attention_layer_of_timm():
    model = timm.create_model("resnet26", block_args=dict(attn_layer=ChannelGsop), num_classes=3)
    assert isinstance(model.layer1[0].se, ChannelGsop)


@pytest.mark.parametrize(
    ("gsop_class", "argument", "value"),
    [
        (ChannelGsop, "channels", 0),
        (ChannelGsop, "cov_dim", 0),
        (ChannelGsop, "cov_dim", 2.5),
        (PositionGsop, "channels", -1),
        (PositionGsop, "rd_channels", 0),
        (PositionGsop, "spatial_size", 0),
        (FusedGsop, "spatial_size", 0),
    ],
)
def test_bad_argument_is_named(gsop_class, argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value} .* integer >= 1"):
        gsop_class(**{"channels": 4, argument: value})


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match="fusion='sum' is not accepted; accepted: 'avg', 'max', 'concat'"):
        FusedGsop(4, "sum")


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_batch_of_one_in_training_is_named(gsop_type):
    gsop = create(gsop_type)
    x = torch.randn(1, 64, 8, 8)
    with pytest.raises(ValueError, match=r"input has shape \(1, 64, 8, 8\), a batch of one.*at least 2"):
        gsop.train()(x)
    assert gsop.eval()(x).shape == x.shape
    timm.utils.freeze(gsop.train())  # frozen batch normalization needs no batch
    assert timm.layers.freeze_batch_norm_2d(gsop)(x).shape == x.shape


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(gsop_type="channel", spatial_size=8), "spatial_size=8 .* gsop_type='channel', which has none"),
        (dict(gsop_type="position", stride=2), "stride=2 .* flavor='paper'"),
        (dict(gsop_type="position", stride=2, flavor="official"), "stride=2 .* gsop_type='position'"),
        (dict(gsop_type="channel", flavor="bogus"), "flavor='bogus' .* 'paper', 'official'"),
    ],
)
def test_what_a_kind_does_not_have_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        create_gsop(channels=8, **kwargs)


def test_a_bogus_flavor_of_pooling_is_refused():
    with pytest.raises(ValueError, match=r"flavor='bogus' .* 'paper', 'official'"):
        create_second_order_pool("mpn", 8, flavor="bogus")


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_integers_of_numpy_make_the_same_layers():
    size = np.int64(3)
    layers = [create_gsop("position", np.int64(8), np.int64(4), size), create_second_order_pool("isqrt", 8, size, size)]
    for layer in layers:
        torch.jit.script(layer)(torch.randn(2, 8, 4, 4))
