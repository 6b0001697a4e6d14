import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.oracles import channel_gsop
from timm_gsop import ChannelGsop, GsopBlock


def randomize(module: nn.Module) -> nn.Module:
    """Give every parameter and statistic a random value, so that none hides behind a zero or a one."""
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.normal_(std=0.5)
    return module


def test_block_by_hand():
    """One channel, two pixels, cov_dim 1: small enough to follow with a pencil."""
    gsop = ChannelGsop(1, cov_dim=1).double().eval()
    e = gsop.excitation
    with torch.no_grad():
        gsop.reduce_conv.weight.fill_(2.0)
        e.row_conv.weight.copy_(torch.tensor([1.0, -1.0, 2.0, -2.0]).view(4, 1, 1, 1))
        e.expand_conv.weight.copy_(torch.tensor([1.0, 10.0, 1.0, 10.0]).view(1, 4, 1, 1))
        e.expand_conv.bias.fill_(-4.0)
        for bn in (gsop.reduce_bn, e.cov_bn, e.row_conv_bn):
            bn.eps = 0.0
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).view(1, 1, 1, 2)
    # reduced: 2, 6; mean 4; covariance (4 + 4) / 2 = 4; row conv: 4, -4, 8, -8; LeakyReLU: 4, -0.4, 8, -0.8
    # logit: 4 - 4 + 8 - 8 - 4 = -4
    weight = torch.sigmoid(torch.tensor(-4.0, dtype=torch.float64))
    torch.testing.assert_close(gsop(x), weight * x)
    torch.testing.assert_close(GsopBlock(gsop)(x), (1 + weight) * x)


@given(
    channels=st.integers(1, 9),
    cov_dim=st.integers(1, 9),
    batch=st.integers(1, 3),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
)
def test_block_equals_the_paper_row_by_row(channels, cov_dim, batch, size):
    gsop = randomize(ChannelGsop(channels, cov_dim, dtype=torch.float64)).eval()
    x = torch.randn(batch, channels, *size, dtype=torch.float64)
    torch.testing.assert_close(GsopBlock(gsop)(x), channel_gsop(x, gsop.state_dict()))


def test_gradients():
    block = randomize(GsopBlock(ChannelGsop(3, 2, dtype=torch.float64))).eval()
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)


def test_parameters_of_the_paper():
    """Table 2, conv4_x: C·d, 2d, 4d·d and 4d·C; 0.72 M together."""
    channels, d = 1024, 128
    gsop = ChannelGsop(channels, d)
    counts = {name: p.numel() for name, p in gsop.named_parameters()}
    assert counts["reduce_conv.weight"] == channels * d
    assert counts["excitation.cov_bn.weight"] + counts["excitation.cov_bn.bias"] == 2 * d
    assert counts["excitation.row_conv.weight"] == 4 * d * d
    assert counts["excitation.expand_conv.weight"] == 4 * d * channels
    convolutions = sum(m.weight.numel() for m in gsop.modules() if isinstance(m, nn.Conv2d))
    assert convolutions == 1024 * 128 + 128 * 512 + 512 * 1024
    others = 2 * d + 2 * 4 * d + channels  # the batch normalizations after two convolutions, the gate's bias
    assert sum(counts.values()) == convolutions + 2 * d + others


def test_normalization_is_row_wise():
    """In training, every row of the covariance has mean 0 and variance 1 over batch and columns."""
    gsop = ChannelGsop(6, 4).train()
    seen = []
    gsop.excitation.cov_bn.register_forward_hook(lambda module, args, output: seen.append(output))
    gsop(torch.randn(8, 6, 5, 5))
    rows = seen[0].squeeze(-1).transpose(0, 1).flatten(1)
    torch.testing.assert_close(rows.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(1, correction=0), torch.ones(4), atol=1e-2, rtol=0)


def test_row_convolution_sees_its_row_only():
    excitation = ChannelGsop(6, 4).excitation.eval()
    cov = torch.randn(1, 4, 4, requires_grad=True)
    hidden = excitation.row_conv(cov.unsqueeze(-1)).flatten()
    for output, value in enumerate(hidden):
        (grad,) = torch.autograd.grad(value, cov, retain_graph=True)
        assert grad[0].abs().sum(1).nonzero().flatten().tolist() == [output // 4]


def test_constant_image_gives_finite_values_and_gradients():
    block = GsopBlock(ChannelGsop(4, 3)).train()
    x = torch.ones(2, 4, 5, 5, requires_grad=True)
    y = block(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(dtype):
    block = GsopBlock(ChannelGsop(8, 4, dtype=dtype)).eval()
    x = torch.randn(2, 8, 5, 5).to(dtype)
    assert block(x).dtype == dtype
    reference = GsopBlock(ChannelGsop(8, 4)).eval()
    reference.load_state_dict(block.state_dict())
    torch.testing.assert_close(block(x).float(), reference(x.float()), rtol=0.02, atol=0.02)


def test_is_an_attention_layer_of_timm():
    import timm

    model = timm.create_model("resnet26", block_args=dict(attn_layer=ChannelGsop), num_classes=3).eval()
    assert isinstance(model.layer1[0].se, ChannelGsop)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(("argument", "value"), [("channels", 0), ("cov_dim", 0), ("cov_dim", 2.5)])
def test_bad_argument_is_named(argument, value):
    with pytest.raises(ValueError, match=f"{argument}={value} .* integer >= 1"):
        ChannelGsop(**{"channels": 4, argument: value})


def test_wrong_rank_is_named():
    with pytest.raises(ValueError, match=r"input has shape \(4, 8, 8\).* accepted: \(B, C, H, W\)"):
        ChannelGsop(4)(torch.zeros(4, 8, 8))


def test_batch_of_one_in_training_is_named():
    gsop = ChannelGsop(4, 2)
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match=r"input has shape \(1, 4, 8, 8\), a batch of one.*at least 2"):
        gsop.train()(x)
    assert gsop.eval()(x).shape == x.shape
