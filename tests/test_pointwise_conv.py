import pytest
import torch
import torch.nn.functional as F

from timm_gsop.layers.pointwise_conv import PointwiseConv2d


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (2, 2), (9, 8)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_is_the_convolution(layout, size, bias, batch):
    layer = PointwiseConv2d(6, 5, bias=bias).double()
    x = torch.randn(batch, 6, *size, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = F.conv2d(x, layer.weight, layer.bias)
    weight = torch.randn_like(expected)
    actual = layer(x)
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad((y * weight).sum(), inputs) for y in (actual, expected)]
    torch.testing.assert_close(*gradients)


def test_a_stride_is_kept():
    layer = PointwiseConv2d(2, 3)
    layer.stride = (2, 2)
    assert layer(torch.randn(1, 2, 8, 8)).shape == (1, 3, 4, 4)


def test_autocast_has_its_effect():
    layer = PointwiseConv2d(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 4, 5, 5)).dtype == torch.bfloat16
