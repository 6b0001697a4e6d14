"""What no one should feed a network, and someone will: the layers stay finite, or pass on what is not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from timm_gsop.layers import (
    FLAVORS,
    GSOP_TYPES,
    IsqrtCovPool2d,
    MpnCovPool2d,
    covariance_pool,
    create_gsop,
    eigh_power,
    newton_schulz_sqrt,
    position_covariance,
)

CASES = settings(max_examples=150)
LAYOUTS = ("contiguous", "channels_last", "transposed", "strided", "sliced")
CONTENTS = ("normal", "constant", "zero", "few positions differ", "large", "small", "large mean")


def content(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    x = torch.randn(shape)
    if kind == "constant":
        return torch.full(shape, 3.0)
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "few positions differ":
        return x * (torch.rand(shape) < 0.02)
    return {"normal": x, "large": 1e4 * x, "small": 1e-12 * x, "large mean": x + 1e3}[kind]


def lay_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, elsewhere in memory."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "strided":
        return torch.stack([x, x + 1], dim=-1)[..., 0]
    if layout == "sliced":
        return torch.cat([x + 1, x], dim=1)[:, x.shape[1] :]
    return x


blocks = st.builds(lambda kind, flavor: (kind, flavor), st.sampled_from(GSOP_TYPES), st.sampled_from(FLAVORS))
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def layer_of(kind: str, flavor: str) -> nn.Module:
    torch.manual_seed(0)
    return create_gsop(kind, 64, cov_dim=6, spatial_size=None if kind == "channel" else 3, flavor=flavor)


@CASES
@given(blocks, st.integers(2, 4), sizes, st.sampled_from(CONTENTS), st.sampled_from(LAYOUTS), st.integers(0, 99))
def test_blocks_are_finite_in_training(block, batch, size, kind, layout, seed):
    """Also on maps of one pixel or one row, larger and smaller than the square that they are pooled to."""
    layer = layer_of(*block).train()
    torch.manual_seed(seed)
    plain = content(kind, (batch, 64, *size))
    x = lay_out(plain, layout).detach().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    if layout != "contiguous":
        # In float64: where the input hardly varies, normalization makes large what float32 rounds differently.
        double = layer_of(*block).train().double()
        y, expected = double(lay_out(plain.double(), layout)), double(plain.double())
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6 * plain.abs().max().item() + 1e-300)


@CASES
@given(blocks, st.integers(0, 3), sizes, st.sampled_from(CONTENTS), st.integers(0, 99))
def test_blocks_take_any_batch_in_evaluation(block, batch, size, kind, seed):
    """None, one, and each image by itself as among others."""
    layer = layer_of(*block).eval()
    torch.manual_seed(seed)
    x = content(kind, (batch, 64, *size))
    y = layer(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    for i in range(batch):
        tolerance = 1e-4 * max(y[i].abs().max().item(), 1e-30)
        torch.testing.assert_close(layer(x[i : i + 1])[0], y[i], rtol=1e-3, atol=tolerance)


@CASES
@given(
    st.sampled_from((IsqrtCovPool2d, MpnCovPool2d)),
    st.integers(0, 4),
    sizes,
    st.sampled_from(CONTENTS),
    st.integers(0, 99),
)
def test_heads_are_finite(pool, batch, size, kind, seed):
    """With more channels than positions too, where the covariance is singular."""
    torch.manual_seed(seed)
    layer = pool(16, dim=12).train(batch > 1)
    x = content(kind, (batch, 16, *size)).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.shape == (batch, 78)
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@CASES
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from((1e-12, 1e-4, 1.0, 1e4)),
    st.integers(1, 7),
    st.integers(0, 99),
)
def test_roots_of_near_singular_covariances(channels, positions, scale, num_iters, seed):
    torch.manual_seed(seed)
    x = scale * torch.randn(3, channels, positions)
    cov = covariance_pool(x).requires_grad_()
    for root in (newton_schulz_sqrt(cov, num_iters), eigh_power(cov, 0.5)):
        assert root.isfinite().all()
        # No root is larger than the exact one's norm, the square root of the trace.
        assert (root.norm(dim=(1, 2)) <= 1.01 * cov.diagonal(dim1=1, dim2=2).sum(1).sqrt() + 1e-30).all()
        (gradient,) = torch.autograd.grad(root.sum(), cov)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("flavor", FLAVORS)
@pytest.mark.parametrize("gsop_type", GSOP_TYPES)
def test_what_is_not_finite_is_passed_on(gsop_type, flavor, training, bad):
    """Not hidden, and no crash; in evaluation, only the image that has it is spoilt."""
    if bad == -math.inf and flavor == "official" and gsop_type != "channel":
        bad = math.inf  # these end in a ReLU, which makes zero of -inf
    layer = layer_of(gsop_type, flavor).train(training)
    x = torch.randn(3, 64, 5, 5)
    x[1, 2, 3, 3] = bad
    y = layer(x)
    assert not y[1].isfinite().all()
    if not training:
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("function", [covariance_pool, position_covariance])
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 1, 1, 1), (2, 4, 1, 7)])
def test_covariance_of_little(function, shape):
    cov = function(torch.randn(shape))
    assert cov.isfinite().all()
    assert cov.shape[0] == shape[0]


@pytest.mark.parametrize("pool", [IsqrtCovPool2d, MpnCovPool2d])
def test_heads_do_not_hide_nan(pool):
    layer = pool(16, dim=12).eval()
    x = torch.randn(2, 16, 5, 5)
    x[0, 0, 0, 0] = math.nan
    y = layer(x)
    assert y[0].isnan().any()
    assert y[1].isfinite().all()
