"""The flavor "official": each way in which the released code differs from the paper.

The code: https://github.com/ZilinGao/Global-Second-order-Pooling-Convolutional-Networks
"""

import pytest
import timm
import torch
from torch import nn

from tests.layers import randomize
from timm_gsop.layers import (
    GSOP_TYPES,
    GsopBlock,
    OfficialChannelGsop,
    OfficialFusedGsop,
    OfficialIsqrtCovPool2d,
    OfficialPositionGsop,
)
from timm_gsop.layers.official import OfficialConcatenation, official_position_covariance
from timm_gsop.layers.triangle import tril_vectorize


def convolve(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1×1 convolution with bias, as a product."""
    return torch.einsum("oc,cm->om", conv.weight[:, :, 0, 0], x) + conv.bias[:, None]


def normalize(bn: nn.BatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    scaled = (x.T - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias
    return scaled.T


def excite(excitation: nn.Module, cov: torch.Tensor, act) -> torch.Tensor:
    rows = normalize(excitation.cov_bn, cov)
    hidden = torch.stack([rows[k // 4] @ excitation.row_conv.weight[k, 0, :, 0] for k in range(4 * len(rows))])
    hidden = act(hidden + excitation.row_conv.bias)
    return torch.sigmoid(convolve(excitation.expand_conv, hidden[:, None])[:, 0])


@pytest.mark.parametrize("stride", [1, 2])
def test_channel_weights(stride):
    """ReLU, strided convolution with bias, BN, ReLU, covariance, row BN, two convolutions with nothing between."""
    gsop = randomize(OfficialChannelGsop(5, 4, stride, dtype=torch.float64)).eval()
    x = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    for sample, weights in zip(x, gsop.weights(x), strict=True):
        pixels = sample[:, ::stride, ::stride].flatten(1).clamp_min(0)
        reduced = normalize(gsop.reduction.bn, convolve(gsop.reduction.conv, pixels)).clamp_min(0)
        expected = excite(gsop.excitation, torch.cov(reduced, correction=0), act=lambda hidden: hidden)
        torch.testing.assert_close(weights.flatten(), expected)
    torch.testing.assert_close(gsop(x), x * gsop.weights(x))


def test_position_weights():
    """ReLU, convolution with bias, BN and no ReLU, pooling, row BN, convolutions with ReLU between, nearest pixels."""
    gsop = randomize(OfficialPositionGsop(5, 4, 2, dtype=torch.float64)).eval()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    for sample, weights in zip(x, gsop.weights(x), strict=True):
        reduced = normalize(gsop.reduction.bn, convolve(gsop.reduction.conv, sample.flatten(1).clamp_min(0)))
        pooled = reduced.view(4, 2, 2, 2, 3).mean((2, 4)).flatten(1)
        cov = official_position_covariance(pooled[None, :, :, None])[0]
        expected = excite(gsop.excitation, cov, act=torch.relu).view(2, 2)
        torch.testing.assert_close(weights[0], expected.repeat_interleave(2, 0).repeat_interleave(3, 1))
    torch.testing.assert_close(gsop(x), (x * gsop.weights(x)).clamp_min(0))


def test_position_covariance_centres_with_the_number_of_positions():
    x = torch.randn(3, 10, 2, 3, dtype=torch.float64)
    channels, positions = 10, 6
    centring = torch.eye(channels) / positions - torch.ones(channels, channels) / positions**2
    expected = torch.stack([sample.flatten(1).T @ centring.double() @ sample.flatten(1) for sample in x])
    torch.testing.assert_close(official_position_covariance(x), expected)


def test_average_is_a_sum():
    gsop = randomize(OfficialFusedGsop(8, "avg", cov_dim=4, spatial_size=2)).eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(gsop(x), gsop.channel(x) + gsop.position(x))


def test_maximum():
    gsop = randomize(OfficialFusedGsop(8, "max", cov_dim=4, spatial_size=2)).eval()
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(gsop(x), torch.max(gsop.channel(x), gsop.position(x)))


@pytest.mark.parametrize(
    ("channels", "groups", "kernel", "padding"),
    [(256, 4, 11, 5), (512, 8, 9, 4), (1024, 16, 7, 3), (2048, 32, 5, 2)],
)
def test_concatenation_of_each_stage(channels, groups, kernel, padding):
    fuse = OfficialConcatenation(channels)
    for conv in (fuse.conv1, fuse.conv2):
        assert (conv.groups, conv.kernel_size, conv.padding) == (groups, (kernel, 1), (padding, 0))
        assert conv.bias is not None
    a, b = torch.randn(2, 2, channels, 3, 4)
    torch.testing.assert_close(fuse.eval()(a, b), (fuse.conv1(a) + fuse.conv2(b)) / (1 + 1e-5) ** 0.5)


def test_concatenation_of_other_channels_is_named():
    with pytest.raises(ValueError, match="channels=96 is not accepted; accepted: 64, 128, 256, 512, 1024, 2048"):
        OfficialConcatenation(96)


def test_triangle_is_row_major_lower():
    mat = torch.tensor([[[1, 2, 4], [2, 3, 5], [4, 5, 6]]])
    assert tril_vectorize(mat).tolist() == [[1, 2, 3, 4, 5, 6]]


def test_pooling_has_three_iterations_and_the_lower_triangle():
    from timm_gsop import covariance_pool, newton_schulz_sqrt

    pool = OfficialIsqrtCovPool2d(6, dim=4).eval()
    x = torch.randn(2, 6, 5, 5)
    root = newton_schulz_sqrt(covariance_pool(pool.reduction(x)), num_iters=3)
    expected = torch.stack([root[:, i, j] for i in range(4) for j in range(i + 1)], dim=1)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
@pytest.mark.parametrize("net", [1, 2])
def test_network(gsop_type, net):
    """Blocks inside the last bottleneck's residual branch; stride 2 in layer1 only; a batch of one can train."""
    with torch.device("meta"):
        model = timm.create_model(f"gsop_resnet50_net{net}", gsop_type=gsop_type, flavor="official")
        vanilla = timm.create_model("resnet50")
    stages = (1, 2, 3, 4) if net == 1 else (1, 2, 3)
    assert not any(isinstance(m, GsopBlock) for m in model.modules())
    placed = {name.split(".se.")[0] for name, _ in model.named_parameters() if ".se." in name}
    assert placed == {f"layer{s}.{(3, 4, 6, 3)[s - 1] - 1}" for s in stages}
    strides = {
        n.split(".")[0]: m.reduction.conv.stride[0] for n, m in model.named_modules() if type(m) is OfficialChannelGsop
    }
    assert strides == ({} if gsop_type == "position" else {f"layer{s}": 2 if s == 1 else 1 for s in stages})
    backbone = {
        name for name in model.state_dict() if ".se." not in name and not name.startswith(("global_pool", "fc"))
    }
    assert backbone == {name for name in vanilla.state_dict() if not name.startswith("fc")}
    if net == 2:
        assert model.global_pool.num_iters == 3


@pytest.mark.parametrize("net", [1, 2])
def test_scaled_before_the_addition(net):
    """With all weights at one half (a zero last convolution), doubling bn3 gives back the network without blocks."""
    kwargs = dict(channels=(16, 32, 64, 128), num_classes=5, cov_dim=8, isqrt_dim=6, flavor="official")
    model = timm.create_model(f"gsop_resnet26_net{net}", **kwargs).eval()
    plain = timm.create_model(f"gsop_resnet26_net{net}", gsop_layers=(), **kwargs).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "se", None) is not None:
                nn.init.zeros_(module.se.excitation.expand_conv.weight)
                module.bn3.weight.mul_(2)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
