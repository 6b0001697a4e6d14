import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.oracles import eigh_function, plain_newton_schulz, random_covariance, sqrt_gradient, truncated_sqrt
from tests.tolerances import gradient_error
from timm_gsop import (
    covariance_pool,
    covariance_sqrt,
    eigh_log,
    eigh_power,
    newton_schulz_inverse_sqrt,
    newton_schulz_sqrt,
)

ROOTS = [newton_schulz_sqrt, eigh_power, newton_schulz_inverse_sqrt, eigh_log]
EXACT = [eigh_power, partial(eigh_power, power=0.3), eigh_log]
newton_schulz = pytest.mark.parametrize("function", [newton_schulz_sqrt, newton_schulz_inverse_sqrt])


@given(st.integers(1, 3), st.integers(1, 12), st.integers(1, 8))
def test_newton_schulz_is_the_truncated_iteration(batch, size, num_iters):
    cov = random_covariance(batch, size)
    torch.testing.assert_close(newton_schulz_sqrt(cov, num_iters), truncated_sqrt(cov, num_iters))


@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
def test_newton_schulz_in_float32(num_iters):
    cov = random_covariance(4, 64, condition=1e4)
    root = newton_schulz_sqrt(cov.float(), num_iters)
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.double(), truncated_sqrt(cov, num_iters), rtol=1e-4, atol=1e-4)


def test_newton_schulz_and_its_gradient_reach_the_exact_ones():
    cov = random_covariance(3, 8).requires_grad_()
    weight = torch.randn(3, 8, 8, dtype=torch.float64)
    weight = weight + weight.mT
    errors = []
    for num_iters in (3, 5, 20):
        root = newton_schulz_sqrt(cov, num_iters)
        (grad,) = torch.autograd.grad((root * weight).sum(), cov)
        exact, exact_grad = eigh_function(cov.detach(), torch.sqrt), sqrt_gradient(cov.detach(), weight)
        errors.append(max((root - exact).norm() / exact.norm(), (grad - exact_grad).norm() / exact_grad.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


@pytest.mark.parametrize("num_iters", [1, 2, 3, 4, 5, 8])
def test_the_inverse_root_is_the_other_half_of_the_iteration(num_iters):
    cov = random_covariance(2, 12)
    torch.testing.assert_close(cov @ newton_schulz_inverse_sqrt(cov, num_iters), truncated_sqrt(cov, num_iters))


def test_the_inverse_root_of_zero_is_zero():
    cov = torch.zeros(1, 3, 3, requires_grad=True)
    root = newton_schulz_inverse_sqrt(cov)
    root.sum().backward()
    assert root.count_nonzero() == cov.grad.count_nonzero() == 0


@newton_schulz
@pytest.mark.parametrize("num_iters", [1, 2, 3, 5, 8, 9, 10])  # from nine on, its last steps by the plain chain rule
def test_newton_schulz_gradients(function, num_iters):
    cov = random_covariance(2, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda c: function(c, num_iters), cov)
    assert torch.autograd.gradgradcheck(lambda c: function(c, num_iters), cov)


@newton_schulz
@pytest.mark.parametrize("num_iters", [1, 2, 3, 4, 5, 8])
def test_newton_schulz_without_gradients_is_the_same(function, num_iters):
    cov = random_covariance(2, 12).requires_grad_()
    with torch.no_grad():
        root = function(cov, num_iters)
    torch.testing.assert_close(root, function(cov, num_iters), rtol=1e-12, atol=1e-12)


def value_and_gradient(function, x, weight, needs_gradient=True):
    x = x.detach().requires_grad_(needs_gradient)
    root = function(x)
    return root.detach(), torch.autograd.grad((root * weight).sum(), x)[0] if needs_gradient else None


@pytest.mark.parametrize("num_iters", range(1, 21))
@pytest.mark.parametrize("positions", [64, 13, 8, 2], ids=lambda m: f"rank {min(m - 1, 16)}")
@pytest.mark.parametrize("what", ["root", "inverse root", "root of features"])
def test_rounding_is_that_of_the_published_iteration(what, positions, num_iters):
    """And of its gradient by autograd, in float32 beside float64: 16 channels, whose covariance has this rank."""
    torch.manual_seed(0)
    x = torch.randn(8, 16, positions, dtype=torch.float64)
    if what == "root of features":  # of at most 8 positions, by matrices between positions
        ours, plain = covariance_sqrt, lambda x, n: plain_newton_schulz(covariance_pool(x), n)[0]
    else:
        x, i = covariance_pool(x), what.startswith("inverse")
        ours, plain = (newton_schulz_sqrt, newton_schulz_inverse_sqrt)[i], lambda c, n: plain_newton_schulz(c, n)[i]
    weight = torch.randn(8, 16, 16, dtype=torch.float64)
    weight = weight + weight.mT
    exact, exact_grad = value_and_gradient(lambda x: plain(x, num_iters), x, weight)
    allowed, allowed_grad = value_and_gradient(lambda x: plain(x, num_iters), x.float(), weight.float())
    for needs_gradient in (True, False):
        root, grad = value_and_gradient(lambda x: ours(x, num_iters), x.float(), weight.float(), needs_gradient)
        assert gradient_error(root, exact) <= 3 * max(gradient_error(allowed, exact), 1e-7)
        if needs_gradient:
            assert gradient_error(grad, exact_grad) <= 3 * max(gradient_error(allowed_grad, exact_grad), 1e-7)


@pytest.mark.parametrize("num_iters", [1, 3, 5])
def test_newton_schulz_gradient_in_float32(num_iters):
    cov, weight = random_covariance(2, 64, condition=1e4), torch.randn(2, 64, 64)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = cov.to(dtype).requires_grad_()
        gradients.append(torch.autograd.grad((newton_schulz_sqrt(x, num_iters) * weight).sum(), x)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * gradients[1].abs().max().item())


def test_newton_schulz_keeps_seven_matrices_for_five_iterations():
    cov, kept = random_covariance(2, 16).requires_grad_(), set()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        newton_schulz_sqrt(cov, 5)
    assert len(kept) <= 7


def test_newton_schulz_gradients_of_each_sample():
    cov, weight = random_covariance(3, 5), torch.randn(3, 5, 5, dtype=torch.float64)
    gradient = torch.func.grad(lambda c, w: (newton_schulz_sqrt(c[None])[0] * w).sum())
    x = cov.clone().requires_grad_()
    (expected,) = torch.autograd.grad((newton_schulz_sqrt(x) * weight).sum(), x)
    torch.testing.assert_close(torch.func.vmap(gradient)(cov, weight), expected)


@pytest.mark.parametrize("power", [0.3, 0.5, 1.0, 2.0])
def test_eigh_power(power):
    cov = random_covariance(3, 6)
    torch.testing.assert_close(eigh_power(cov, power), eigh_function(cov, lambda v: v**power))


@pytest.mark.parametrize("function", EXACT)
@pytest.mark.parametrize("eigenvalues", [(1, 2, 3, 4), (2, 2, 2, 2), (1, 1, 3, 3), (1, 1 + 1e-4, 1 + 2e-4, 3)], ids=str)
def test_derivatives_of_exact_functions(function, eigenvalues):
    """First and second ones, where eigenvalues differ, are repeated, and are near each other; of any matrix."""
    basis, _ = torch.linalg.qr(torch.randn(2, 4, 4, dtype=torch.float64))
    cov = (basis @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.mT).requires_grad_()
    assert torch.autograd.gradcheck(function, cov)
    assert torch.autograd.gradgradcheck(function, cov)


def test_second_derivative_at_a_multiple_of_the_identity_by_hand():
    """Of the root of 4 I in the direction E: sqrt(4 I + t E) = 2 I + t E / 4 - t² E² / 64 + …"""
    direction = torch.randn(3, 3, dtype=torch.float64)
    direction = direction + direction.mT
    weight = torch.randn(3, 3, dtype=torch.float64)
    cov = 4 * torch.eye(3, dtype=torch.float64)
    for derivative in (torch.autograd.functional.hessian, lambda f, t: torch.func.jacrev(torch.func.jacrev(f))(t)):
        second = derivative(lambda t: (eigh_power(cov + t * direction) * weight).sum(), torch.zeros(()).double())
        torch.testing.assert_close(second, -(direction @ direction * weight).sum() / 32)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 3, 1, 1), (2, 6, 2, 1)])
@pytest.mark.parametrize("content", [torch.ones, torch.randn])
def test_second_derivatives_of_singular_maps_are_finite(shape, content):
    x = content(shape, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(eigh_power(covariance_pool(x)).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    assert second.isfinite().all()


@pytest.mark.parametrize("root", ROOTS)
def test_the_symmetric_part_is_read(root):
    cov = random_covariance(2, 4) + 0.1 * torch.randn(2, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(root(cov), root((cov + cov.mT) / 2))
    assert torch.autograd.gradcheck(root, cov.requires_grad_())


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("training", [False, True])
def test_what_is_not_finite_spoils_its_own_matrix_alone(root, bad, training):
    cov = random_covariance(3, 4)
    expected = root(cov)
    cov[1, 0, 2] = cov[1, 2, 0] = bad
    cov.requires_grad_(training)
    result = root(cov)
    assert result[1].isnan().all()
    torch.testing.assert_close(result[[0, 2]], expected[[0, 2]])
    if training:
        result.sum().backward()
        assert cov.grad[1].isnan().all()
        assert cov.grad[[0, 2]].isfinite().all()


def test_logarithm():
    cov = random_covariance(3, 5)
    torch.testing.assert_close(torch.linalg.matrix_exp(eigh_log(cov, eps=0.0)), cov)
    torch.testing.assert_close(torch.linalg.matrix_exp(eigh_log(cov, 0.1)), cov + 0.1 * torch.eye(5).double())
    assert torch.equal(eigh_log(torch.zeros(2, 2), 1.0), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"eps=-1 .* >= 0"):
        eigh_log(cov, -1)


def test_a_tiny_trace_in_float64_is_no_zero():
    cov = 1e-40 * random_covariance(2, 4)
    torch.testing.assert_close(1e20 * newton_schulz_sqrt(cov), newton_schulz_sqrt(1e40 * cov))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-23, 0, 23])
def test_exact_root_of_any_scale(dtype, exponent):
    """Squares of the smallest and the largest leave float32's range."""
    cov = random_covariance(4, 12, rank=3).to(dtype)
    root = eigh_power(10.0**exponent * cov)
    torch.testing.assert_close(root / 10.0 ** (exponent / 2), eigh_power(cov), rtol=1e-3, atol=1e-3)


def test_integers_of_numpy_are_integers():
    cov = random_covariance(2, 4)
    torch.testing.assert_close(newton_schulz_sqrt(cov, np.int64(3)), newton_schulz_sqrt(cov, 3), rtol=0, atol=0)


def test_a_matrix_that_does_not_converge_in_float32_is_decomposed_in_float64(monkeypatch):
    """LAPACK failed in float32 while MPN-COV pooling was trained; which matrices fail depends on its version."""
    cov = random_covariance(3, 12)
    expected = eigh_power(cov)
    eigh = torch.linalg.eigh

    def fails_in_float32(x):
        if x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("linalg.eigh: the algorithm failed to converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails_in_float32)
    x = cov.float().requires_grad_()
    root = eigh_power(x)
    root.sum().backward()
    assert root.dtype == torch.float32
    torch.testing.assert_close(root.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), sqrt_gradient(cov, torch.ones_like(cov)), rtol=1e-3, atol=1e-3)


def test_eigh_power_gradient_of_repeated_eigenvalues():
    cov = (4 * torch.eye(5, dtype=torch.float64)).repeat(2, 1, 1).requires_grad_()
    weight = torch.randn(2, 5, 5, dtype=torch.float64)
    weight = weight + weight.mT
    (grad,) = torch.autograd.grad((eigh_power(cov) * weight).sum(), cov)
    torch.testing.assert_close(grad, sqrt_gradient(cov.detach(), weight))
    torch.testing.assert_close(grad, weight / 4)  # by hand: d sqrt(4 I) = d / (2 + 2)


@pytest.mark.parametrize("root", ROOTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_covariance_gives_zeros_and_zero_gradients(root, dtype):
    cov = torch.zeros(2, 6, 6, dtype=dtype, requires_grad=True)
    result = root(cov)
    result.sum().backward()
    assert result.count_nonzero() == 0
    assert cov.grad.count_nonzero() == 0


@pytest.mark.parametrize("root", ROOTS[:2])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rank_deficient_covariance(root, scale):
    cov = (scale * random_covariance(2, 16, rank=3)).float().requires_grad_()
    result = root(cov)
    result.sum().backward()
    assert result.isfinite().all()
    assert cov.grad.isfinite().all()
    expected = truncated_sqrt(cov.detach(), 5) if root is newton_schulz_sqrt else eigh_power(cov.detach().double())
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3 * scale**0.5)


@pytest.mark.parametrize("root", ROOTS[:2])
@given(scale=st.floats(1e-6, 1e6))
def test_scaling_the_covariance_scales_the_root(root, scale):
    cov = random_covariance(1, 5)
    torch.testing.assert_close(root(scale * cov), scale**0.5 * root(cov))


@pytest.mark.parametrize("root", ROOTS)
def test_autocast_has_no_effect(root):
    cov = random_covariance(2, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = root(cov)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, root(cov), rtol=0, atol=0)


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_non_square_is_named(root, shape):
    with pytest.raises(ValueError, match=r"cov has shape .* accepted: \(…, C, C\)"):
        root(torch.zeros(shape))


@pytest.mark.parametrize("root", ROOTS)
def test_complex_matrices_are_refused(root):
    with pytest.raises(ValueError, match=r"cov has dtype torch.complex64"):
        root(torch.eye(3, dtype=torch.complex64))


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 0, 3), (2, 1, 3)], ids=str)
def test_leading_dimensions_are_kept(root, leading):
    cov = random_covariance(6, 4)[: math.prod(leading)].reshape(*leading, 4, 4).requires_grad_()
    result = root(cov)
    assert result.shape == cov.shape
    torch.testing.assert_close(result.reshape(-1, 4, 4), root(cov.reshape(-1, 4, 4)), rtol=0, atol=0)
    (grad,) = torch.autograd.grad(result.sum(), cov)
    assert grad.shape == cov.shape


@pytest.mark.parametrize("num_iters", [0, -1, 1.5])
def test_bad_num_iters_is_named(num_iters):
    with pytest.raises(ValueError, match=f"num_iters={num_iters} .* integer >= 1"):
        newton_schulz_sqrt(torch.eye(2)[None], num_iters)


@pytest.mark.parametrize("power", [0, -0.5])
def test_bad_power_is_named(power):
    with pytest.raises(ValueError, match=f"power={power} .* > 0"):
        eigh_power(torch.eye(2)[None], power)
