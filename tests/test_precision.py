"""Every block and head in every precision: finite, and near float64 by a stated bound (docs/guarantees.md)."""

import copy

import pytest
import torch
from torch import nn

from timm_gsop.layers import (
    FLAVORS,
    GSOP_TYPES,
    IsqrtCovPool2d,
    MpnCovPool2d,
    OfficialIsqrtCovPool2d,
    covariance_pool,
    create_gsop,
    newton_schulz_sqrt,
    position_covariance,
)

# Of outputs, relative to the largest; of the input's gradient, relative and in norm, for where rounding moves a value
# across a ReLU's corner a single one may be wholly different.
BOUNDS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-4, 1e-3),
    torch.float16: (5e-3, 5e-2),
    torch.bfloat16: (5e-2, 2e-1),
}
BLOCKS = [(gsop_type, flavor) for gsop_type in GSOP_TYPES for flavor in FLAVORS]
HEADS = {"isqrt": IsqrtCovPool2d, "mpn": MpnCovPool2d, "official isqrt": OfficialIsqrtCovPool2d}


def block(gsop_type: str, flavor: str) -> nn.Module:
    return create_gsop(gsop_type, 64, cov_dim=8, spatial_size=3, flavor=flavor).double().train()


def features() -> torch.Tensor:
    return torch.randn(6, 64, 7, 9, dtype=torch.float64)


def run(layer: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient of the input, in training."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
    # A fixed direction: the sum of a normalized output would have no gradient.
    direction = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    (y * direction).sum().backward()
    return y.detach().double(), x.grad.double()


def assert_near(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype, autocast: bool) -> None:
    expected = run(copy.deepcopy(layer), x)
    if autocast:
        found = run(copy.deepcopy(layer).float(), x.float(), dtype)
    else:
        found = run(copy.deepcopy(layer).to(dtype), x.to(dtype))
    assert all(tensor.isfinite().all() for tensor in found)
    of_output, of_gradient = BOUNDS[dtype]
    assert (found[0] - expected[0]).abs().max() <= of_output * expected[0].abs().max()
    assert (found[1] - expected[1]).norm() <= of_gradient * expected[1].norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("gsop_type", "flavor"), BLOCKS)
def test_blocks_in_half_precision(gsop_type, flavor, dtype, autocast):
    assert_near(block(gsop_type, flavor), features(), dtype, autocast)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("gsop_type", "flavor"), BLOCKS)
def test_blocks(gsop_type, flavor, dtype):
    assert_near(block(gsop_type, flavor), features(), dtype, autocast=False)


@pytest.mark.parametrize("autocast", [False, True], ids=["model", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_heads_in_half_precision(head, dtype, autocast):
    assert_near(HEADS[head](64, dim=8).double().train(), features(), dtype, autocast)


@pytest.mark.parametrize("head", HEADS)
def test_heads(head):
    assert_near(HEADS[head](64, dim=8).double().train(), features(), torch.float32, autocast=False)


@pytest.mark.parametrize("covariance", [covariance_pool, position_covariance])
def test_half_precision_does_not_overflow_in_the_covariance(covariance):
    """65 504 is float16's largest number; squares of 1e4 are beyond."""
    x = (1e4 * torch.randn(2, 6, 5, 5)).half()
    cov = covariance(x)
    assert cov.dtype == torch.float32
    assert cov.isfinite().all()
    assert cov.max() > 65504
    torch.testing.assert_close(cov.double(), covariance(x.double()), rtol=1e-5, atol=1.0)
    assert newton_schulz_sqrt(cov).isfinite().all()
