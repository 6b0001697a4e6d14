import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from timm_gsop.layers import FLAVORS, create_gsop
from timm_gsop.layers.adaptive_pool import _pool_by_products, adaptive_avg_pool2d

SIZES = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(SIZES, SIZES)
def test_products_pool_as_pytorch_does(size, output_size):
    """Down and up, windows that overlap or not, and the gradient."""
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    expected, actual = F.adaptive_avg_pool2d(x, output_size), _pool_by_products(x, *output_size)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(expected)
    torch.testing.assert_close(*(torch.autograd.grad((y * weight).sum(), x) for y in (actual, expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_keep_half_precision(dtype):
    x = torch.randn(2, 3, 9, 7).to(dtype)
    actual = _pool_by_products(x, 4, 8)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.float(), F.adaptive_avg_pool2d(x.float(), (4, 8)), atol=2e-2, rtol=2e-2)


class Operations(TorchDispatchMode):
    """Names of what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("flavor", FLAVORS)
def test_a_position_block_asks_no_gpu_for_what_it_refuses(flavor, deterministic):
    """The meta device stands for one: PyTorch has no deterministic gradient of adaptive pooling outside of the CPU."""
    block = create_gsop("position", 64, cov_dim=4, spatial_size=3, flavor=flavor, device="meta").eval()
    x = torch.empty(2, 64, 7, 9, device="meta", requires_grad=True)
    with Operations() as operations:
        y = block(x)
        y.sum().backward()
    assert y.shape == x.shape
    assert "aten::bmm" in operations.names
    assert not [name for name in operations.names if "adaptive_avg_pool" in name]


def test_the_cpu_and_other_modes_pool_as_pytorch_does():
    x = torch.randn(2, 3, 7, 9)
    with Operations() as operations:
        y = adaptive_avg_pool2d(x, 3, 4)
    assert torch.equal(y, F.adaptive_avg_pool2d(x, (3, 4)))
    assert "aten::_adaptive_avg_pool2d" in operations.names
