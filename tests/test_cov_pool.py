import pytest
import torch

from tests.oracles import eigh_function, truncated_sqrt
from timm_gsop import IsqrtCovPool2d, MpnCovPool2d, covariance_pool, newton_schulz_sqrt
from timm_gsop.layers import create_second_order_pool

POOLS = [IsqrtCovPool2d, MpnCovPool2d]


@pytest.mark.parametrize("pool_class", POOLS)
def test_is_the_triangle_of_the_root_of_the_covariance(pool_class):
    pool = pool_class(6, dim=4, dtype=torch.float64).eval()
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    pixels = torch.einsum("dc,bcm->bdm", pool.reduction.conv.weight[:, :, 0, 0], x.flatten(2))
    reduced = (pixels / (1 + 1e-5) ** 0.5).clamp_min(0)  # a fresh batch normalization in evaluation
    cov = torch.stack([torch.cov(sample, correction=0) for sample in reduced])
    root = truncated_sqrt(cov, 5) if pool_class is IsqrtCovPool2d else eigh_function(cov, lambda v: v.relu().sqrt())
    expected = torch.stack([root[:, i, j] for i in range(4) for j in range(i, 4)], dim=1)
    torch.testing.assert_close(pool(x), expected)


@pytest.mark.parametrize("pool_class", POOLS)
def test_shape_and_parameters_of_the_paper(pool_class):
    pool = pool_class(2048)
    assert pool.out_features == 256 * 257 // 2 == 32896
    assert pool.reduction.conv.weight.numel() == 2048 * 256
    assert pool(torch.randn(2, 2048, 7, 7)).shape == (2, 32896)


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
def test_iterations_are_used(num_iters):
    pool = IsqrtCovPool2d(6, 4, num_iters).eval()
    x = torch.randn(2, 6, 5, 5)
    same_weights = IsqrtCovPool2d(6, 4, num_iters + 1).eval()
    same_weights.load_state_dict(pool.state_dict())
    assert not torch.allclose(pool(x), same_weights(x))


@pytest.mark.parametrize("pool_class", POOLS)
def test_constant_and_single_pixel_maps_are_zero(pool_class):
    pool = pool_class(6, dim=4).train()
    for x in (torch.ones(2, 6, 5, 5), torch.randn(2, 6, 1, 1)):
        x.requires_grad_()
        y = pool(x)
        y.sum().backward()
        assert y.count_nonzero() == 0
        assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("pool_class", "argument"),
    [(IsqrtCovPool2d, "in_features"), (IsqrtCovPool2d, "dim"), (IsqrtCovPool2d, "num_iters"), (MpnCovPool2d, "dim")],
)
def test_bad_argument_is_named(pool_class, argument):
    with pytest.raises(ValueError, match=f"{argument}=0 .* integer >= 1"):
        pool_class(**{"in_features": 4, argument: 0})


@pytest.mark.parametrize("flavor", ["paper", "official"])
def test_relu6_before_the_covariance(flavor):
    pool = create_second_order_pool("isqrt", 6, isqrt_dim=4, flavor=flavor, pool_kwargs=dict(act_layer="relu6")).eval()
    x = 20 * torch.randn(3, 6, 5, 7)
    reduced = pool.reduction.bn(pool.reduction.conv(x)).clamp(0, 6)
    root = newton_schulz_sqrt(covariance_pool(reduced), pool.num_iters)
    torch.testing.assert_close(pool(x), pool.vectorize(root))
    assert (reduced == 6).any()
    with pytest.raises(ValueError, match="act_layer='gelu' is not accepted; accepted: 'relu', 'relu6'"):
        IsqrtCovPool2d(6, 4, act_layer="gelu")
