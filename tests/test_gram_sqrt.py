"""The root of a covariance from the features: on small maps another way, with the same result."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.oracles import truncated_sqrt
from timm_gsop import IsqrtCovPool2d, covariance_pool, covariance_sqrt, newton_schulz_sqrt

FEW, MANY = (2, 12, 3, 2), (2, 12, 4, 5)  # positions, beside half of the channels
both_ways = pytest.mark.parametrize("shape", [FEW, MANY], ids=["few positions", "many positions"])


@given(st.integers(0, 3), st.integers(1, 12), st.integers(2, 12), st.integers(1, 8))  # one has no covariance
def test_is_the_truncated_iteration(batch, channels, positions, num_iters):
    x = torch.randn(batch, channels, positions, dtype=torch.float64)
    torch.testing.assert_close(covariance_sqrt(x, num_iters), truncated_sqrt(covariance_pool(x), num_iters))


@both_ways
@pytest.mark.parametrize("num_iters", [1, 2, 3, 5])
def test_gradients(shape, num_iters):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[0], shape[1], shape[1], dtype=torch.float64)
    gradients = [
        torch.autograd.grad((root * weight).sum(), x)[0]
        for root in (covariance_sqrt(x, num_iters), newton_schulz_sqrt(covariance_pool(x), num_iters))
    ]
    torch.testing.assert_close(*gradients)
    small = x.detach()[:1, :6, :1].requires_grad_()  # two positions of six channels, or five
    assert torch.autograd.gradcheck(lambda x: covariance_sqrt(x, num_iters), small)
    assert torch.autograd.gradgradcheck(lambda x: covariance_sqrt(x, num_iters), small)


@both_ways
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e4, 1e17])
def test_digits_in_float32(shape, scale):
    x, weight = scale * torch.randn(shape), torch.randn(shape[0], shape[1], shape[1])
    found = []
    for leaf in (x.requires_grad_(), x.detach().double().requires_grad_()):
        root = covariance_sqrt(leaf) if leaf is x else newton_schulz_sqrt(covariance_pool(leaf))
        found.append((root.double(), torch.autograd.grad((root * weight).sum(), leaf)[0].double()))
    for value, exact in zip(*found, strict=True):
        assert (value - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("training", [False, True])
def test_a_small_map_costs_less(training):
    """49 positions and 256 channels: 10 products of 49×49 for 10 of 256×256."""
    x, flops = torch.randn(1, 256, 7, 7, requires_grad=training), []
    for function in (covariance_sqrt, lambda x: newton_schulz_sqrt(covariance_pool(x))):
        with FlopCounterMode(display=False) as counter:
            y = function(x)
            if training:
                y.sum().backward()
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1] / 15


@both_ways
def test_a_constant_map_has_a_zero_root_and_gradient(shape):
    x = torch.ones(shape)
    x[0] = torch.randn(shape[1:])
    x.requires_grad_()
    root = covariance_sqrt(x)
    root.sum().backward()
    assert root[0].count_nonzero() > 0
    assert root[1].count_nonzero() == 0
    assert x.grad[1].count_nonzero() == 0


@both_ways
def test_gradients_of_each_sample(shape):
    x = torch.randn(shape, dtype=torch.float64)
    gradient = torch.func.grad(lambda sample: covariance_sqrt(sample[None]).pow(3).sum())
    expected = torch.stack([gradient(sample) for sample in x])
    torch.testing.assert_close(torch.func.vmap(gradient)(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@both_ways
@pytest.mark.parametrize("how", ["scripted", "traced", "exported", "exported strictly", "compiled"])
def test_one_graph_serves_maps_of_all_sizes(how, shape):
    """Made from a small map or from a large one; a compiled graph too, which is not made again for each size."""
    torch.compiler.reset()
    pool, example = IsqrtCovPool2d(12, 12).eval(), torch.randn(shape)
    auto = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO) if hasattr(torch.export.Dim, "AUTO") else None
    if how.startswith("exported"):
        if auto is None:
            pytest.skip("this version of PyTorch cannot infer which sizes are free")
        program = torch.export.export(pool, (example,), dynamic_shapes=(auto,), strict=how == "exported strictly")
        run = program.module()
    elif how == "compiled":
        run = torch.compile(pool, backend="aot_eager", dynamic=True, fullgraph=True)
    else:
        run = torch.jit.script(pool) if how == "scripted" else torch.jit.trace(pool, example)
    for size in ((3, 12, 2, 3), (1, 12, 6, 5), (5, 12, 3, 2)):
        x = torch.randn(size)
        expected = pool.vectorize(newton_schulz_sqrt(covariance_pool(pool.reduction(x))))
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("x", "num_iters", "name"), [(torch.zeros(3), 5, "x"), (torch.zeros(1, 2, 3), 0, "num_iters")])
def test_bad_arguments_are_named(x, num_iters, name):
    with pytest.raises(ValueError, match=name):
        covariance_sqrt(x, num_iters)
