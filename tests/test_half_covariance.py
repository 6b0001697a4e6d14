"""The arithmetic of half-precision products with sums in float32, which PyTorch has on NVIDIA's GPUs only: emulated."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from tests.tolerances import TOLERANCES, gradient_error, output_error
from timm_gsop import covariance_pool
from timm_gsop.layers import half_covariance
from timm_gsop.layers.half_covariance import has_exact_products

HALF = (torch.bfloat16, torch.float16)


def products_in_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Exact products, added in float32."""
    return torch.bmm(a.float(), b.float())


def truncated(x: np.ndarray) -> np.ndarray:
    rounded = x.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(x), np.nextafter(rounded, np.float32(0)), rounded)


def products_in_steps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As tensor cores may add at worst: sixteen products exactly, then the digits beyond float32's are cut off."""
    total = np.zeros((a.shape[0], a.shape[1], b.shape[2]), np.float32)
    for k in range(0, a.shape[2], 16):
        step = torch.bmm(a[:, :, k : k + 16].double(), b[:, k : k + 16].double())
        total = truncated(total.astype(np.float64) + step.numpy())
    return torch.from_numpy(total)


class Pooled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return covariance_pool(x)


@pytest.fixture(params=[products_in_float32, products_in_steps], ids=lambda product: product.__name__)
def emulated(request, monkeypatch) -> None:
    monkeypatch.setattr(half_covariance, "_product", request.param)
    monkeypatch.setattr(half_covariance, "_is_on_nvidias_gpu", lambda x: True)
    monkeypatch.setattr(half_covariance, "_BMM_HAS_OUT_DTYPE", True)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("mean", [0, 1, 10, 30, 100])
@pytest.mark.parametrize("size", [(3, 7, 7), (17, 5, 3), (4, 56, 56)], ids=str)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_near_float64(dtype, size, mean):
    """Also where means are large beside the spread: that of the rounded map."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = (torch.randn(2, *size) + mean).to(dtype).contiguous(memory_format=layout)
        results = []
        for x_ in (x.requires_grad_(), x.detach().double().requires_grad_()):
            cov = covariance_pool(x_)
            direction = torch.cos(torch.arange(cov.numel(), dtype=torch.float64)).view_as(cov).to(cov)
            results.append((cov.detach(), torch.autograd.grad(cov, x_, direction)[0]))
        (cov, gradient), (expected, expected_gradient) = results
        output_bound, gradient_bound = TOLERANCES[dtype]
        assert cov.dtype == torch.float32
        assert gradient.dtype == dtype
        assert gradient.is_contiguous(memory_format=layout)
        assert output_error(cov, expected) <= output_bound / 10
        assert gradient_error(gradient, expected_gradient) <= gradient_bound / 10


@pytest.mark.usefixtures("emulated")
def test_gradients_of_float16_keep_their_range():
    """A loss that is scaled by 2¹⁶ over 49 positions, and one of 1e-3: S alone would leave float16's range."""
    x = torch.randn(2, 5, 7, 7).half()
    for size in (2.0**16, 1e-3):
        found, expected = x.clone().requires_grad_(), x.double().requires_grad_()
        (gradient,) = torch.autograd.grad(size * covariance_pool(found).square().mean(), found)
        (right,) = torch.autograd.grad(size * covariance_pool(expected).square().mean(), expected)
        assert gradient.isfinite().all()
        assert gradient_error(gradient, right.half()) <= 5e-3


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_constant_map_has_no_positive_variance(dtype):
    cov = covariance_pool(torch.full((2, 5, 46, 45), 1.2345).to(dtype))
    assert cov.abs().max() < 1e-10
    assert (cov.diagonal(dim1=1, dim2=2) <= 0).all()


@pytest.mark.usefixtures("emulated")
def test_second_derivatives_are_those_of_float32():
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        x = torch.linspace(-2, 2, 24).view(2, 3, 4).bfloat16().to(dtype).sin().requires_grad_()
        (first,) = torch.autograd.grad(covariance_pool(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), x)[0])
    assert gradient_error(*results) <= 2e-2


def doubled(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return 2 * products_in_float32(a, b)


@pytest.mark.skipif(not half_covariance._BMM_HAS_OUT_DTYPE, reason="PyTorch before 2.8 has no such product")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_compiler_gets_it_too_and_exported_graphs_do_not(backend, monkeypatch):
    """Seen by a product that is wrong by two, in the value and in the gradient."""
    monkeypatch.setattr(half_covariance, "_product", doubled)
    x = torch.randn(2, 3, 5, 5).bfloat16()
    x = (x - x.float().mean((2, 3), keepdim=True)).bfloat16().requires_grad_()
    expected = covariance_pool(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    monkeypatch.setattr(half_covariance, "_is_on_nvidias_gpu", lambda x: True)
    monkeypatch.setattr(half_covariance, "_BMM_HAS_OUT_DTYPE", True)
    torch.compiler.reset()
    compiled = torch.compile(covariance_pool, backend=backend, fullgraph=True)
    for function in (covariance_pool, compiled):
        cov = function(x)
        (gradient,) = torch.autograd.grad((cov / 2).square().sum(), x)
        torch.testing.assert_close(cov, 2 * expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(gradient, 2 * expected_gradient / 2, rtol=5e-2, atol=5e-2)
    exported = torch.export.export(Pooled(), (x.detach(),)).module()
    torch.testing.assert_close(exported(x.detach()), expected, rtol=1e-3, atol=1e-3)


def test_only_where_pytorch_has_it():
    assert not has_exact_products(torch.randn(2, 3, 4).bfloat16())


def test_not_where_something_looks_at_single_operations(monkeypatch):
    """PyTorch 2.11's counter of operations fails at a product with another type of output."""
    monkeypatch.setattr(half_covariance, "_is_on_nvidias_gpu", lambda x: True)
    monkeypatch.setattr(half_covariance, "_BMM_HAS_OUT_DTYPE", True)
    x = torch.randn(2, 3, 4).bfloat16()
    assert has_exact_products(x)
    with FlopCounterMode(display=False):
        assert not has_exact_products(x)
    with forward_ad.dual_level():
        assert not has_exact_products(x)
