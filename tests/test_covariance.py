import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from timm_gsop import covariance_pool, newton_schulz_sqrt, position_covariance, triu_unvectorize, triu_vectorize
from timm_gsop.layers import bilinear_pool
from timm_gsop.layers.triangle import tril_vectorize

LARGE_MEAN = 1e3


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6))
def test_equals_torch_cov_of_each_sample(batch, channels, height, width):
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    expected = torch.stack([torch.cov(s.flatten(1), correction=0).view(channels, channels) for s in x])
    torch.testing.assert_close(covariance_pool(x), expected)
    torch.testing.assert_close(covariance_pool(x.flatten(2)), expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_does_not_matter(layout):
    x = torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(covariance_pool(x.to(memory_format=layout)), covariance_pool(x.flatten(2)))


def test_large_mean_does_not_cancel():
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64) + LARGE_MEAN
    torch.testing.assert_close(covariance_pool(x.float()).double(), covariance_pool(x), rtol=1e-3, atol=1e-3)


def test_gradients():
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(covariance_pool, x)
    assert torch.autograd.gradgradcheck(covariance_pool, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_its_input_and_nothing_else(dtype):
    x, kept = torch.randn(2, 3, 4, 4, dtype=dtype, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        covariance_pool(x)
    assert {saved.data_ptr() for saved in kept} == {x.data_ptr()}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_has_the_layout_of_the_features(layout):
    x = torch.randn(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    (grad,) = torch.autograd.grad(covariance_pool(x).square().sum(), x)
    assert grad.is_contiguous(memory_format=layout)


def test_gradients_of_each_sample():
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    gradient = torch.func.grad(lambda sample: covariance_pool(sample[None]).square().sum())
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(covariance_pool(leaf).square().sum(), leaf)
    torch.testing.assert_close(torch.func.vmap(gradient)(x), expected)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_is_computed_in_at_least_float32(dtype, expected):
    x = (1e4 * torch.randn(2, 4, 3, 3)).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cov = covariance_pool(x)
    assert cov.dtype == expected
    torch.testing.assert_close(cov.double(), covariance_pool(x.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(4,), (1, 2, 3, 4, 5)])
def test_wrong_rank_is_named(shape):
    with pytest.raises(ValueError, match=r"x has shape .* accepted: \(B, C, H, W\)"):
        covariance_pool(torch.zeros(shape))


def test_triangle_is_row_major_upper():
    mat = torch.tensor([[[1, 2, 3], [2, 4, 5], [3, 5, 6]]])
    assert triu_vectorize(mat).tolist() == [[1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_triangle_of_non_square_is_named(shape):
    with pytest.raises(ValueError, match=r"mat has shape .* accepted: \(…, C, C\)"):
        triu_vectorize(torch.zeros(shape))


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


@pytest.mark.parametrize(
    ("shape", "spatial_dims", "expected"),
    [
        ((3, 8), None, (3, 3)),
        ((3, 2, 4), 2, (3, 3)),
        ((2, 5, 3, 8), 1, (2, 5, 3, 3)),
        ((2, 3, 2, 2, 2), 3, (2, 3, 3)),
        ((0, 5, 3, 8), 1, (0, 5, 3, 3)),
    ],
)
@pytest.mark.parametrize("function", [covariance_pool, bilinear_pool, position_covariance])
def test_leading_dimensions_and_volumes(function, shape, spatial_dims, expected):
    x = torch.randn(shape, dtype=torch.float64)
    result = function(x, spatial_dims=spatial_dims)
    batch = function(x.reshape(-1, 3, 8) if x.numel() else x.new_empty(0, 3, 8))
    assert result.shape == (expected if function is not position_covariance else (*expected[:-2], 8, 8))
    torch.testing.assert_close(result, batch.reshape(result.shape))


@pytest.mark.parametrize("function", [covariance_pool, bilinear_pool, position_covariance])
@pytest.mark.parametrize(
    ("x", "kwargs", "message"),
    [
        (torch.ones(1, 2, 3, dtype=torch.complex64), {}, "x has dtype torch.complex64"),
        (torch.ones(1, 2, 0), {}, "without positions"),
        (torch.ones(1, 2, 0, 3), {}, "without positions"),
        (torch.ones(2, 3), dict(spatial_dims=2), "2 dimensions; accepted: channels and 2"),
        (torch.ones(2, 3), dict(spatial_dims=0), "spatial_dims=0"),
    ],
)
def test_what_has_no_covariance_is_refused(function, x, kwargs, message):
    with pytest.raises(ValueError, match=message):
        function(x, **kwargs)


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 2), (1, 2, 3)], ids=str)
def test_weights_of_another_shape_are_named(shape):
    with pytest.raises(ValueError, match=r"weights has shape .* \(2, 2, 3\) or \(2, 6\)"):
        covariance_pool(torch.zeros(2, 4, 2, 3), torch.ones(shape))


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 4, 4), (0, 2, 2), (1, 1)])
def test_triangles_and_back(shape, scale):
    mat = torch.randn(shape, dtype=torch.float64)
    mat = mat + mat.mT
    vectors = triu_vectorize(mat, scale=scale)
    assert vectors.shape == (*shape[:-2], shape[-1] * (shape[-1] + 1) // 2)
    torch.testing.assert_close(triu_unvectorize(vectors, scale=scale), mat)
    torch.testing.assert_close(tril_vectorize(triu_unvectorize(vectors, scale=scale)), tril_vectorize(mat))
    if scale:
        torch.testing.assert_close(vectors.norm(dim=-1), torch.linalg.matrix_norm(mat))
    vectors = vectors.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: triu_unvectorize(v, scale=scale), vectors)


def test_what_is_no_triangle_is_named():
    with pytest.raises(ValueError, match="vectors has 4 elements"):
        triu_unvectorize(torch.zeros(2, 4))
