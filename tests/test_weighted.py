"""Positions with weights: against torch.cov, in every mode."""

import copy

import pytest
import torch
from torch import nn

from tests.oracles import truncated_sqrt
from timm_gsop import covariance_pool, covariance_sqrt
from timm_gsop.layers import bilinear_pool

FUNCTIONS = [covariance_pool, bilinear_pool, covariance_sqrt]
MANY, FEW = (3, 6, 4, 5), (3, 6, 1, 3)  # positions, beside half of the channels
every_function = pytest.mark.parametrize("function", FUNCTIONS)
both_ways = pytest.mark.parametrize("shape", [MANY, FEW], ids=["many positions", "few positions"])


def samples(shape, dtype=torch.float64):
    """Features, and weights of which some are zero."""
    weights = torch.rand(shape[0], *shape[2:], dtype=torch.float64)
    weights[..., 1] = 0
    return torch.randn(shape, dtype=torch.float64).to(dtype), weights.to(dtype)


def oracle(function, x, weights):
    if function is bilinear_pool:
        products = torch.einsum("bcm,bdm->bmcd", x.flatten(2), x.flatten(2))
        return torch.stack(
            [(p * w[:, None, None]).sum(0) / w.sum() for p, w in zip(products, weights.flatten(1), strict=True)]
        )
    cov = torch.stack(
        [torch.cov(s.flatten(1), aweights=w.flatten(), correction=0) for s, w in zip(x, weights, strict=True)]
    )
    return truncated_sqrt(cov, 5) if function is covariance_sqrt else cov


@every_function
@both_ways
def test_is_the_weighted_statistic(function, shape):
    x, weights = samples(shape)
    expected = oracle(function, x, weights)
    torch.testing.assert_close(function(x, weights=weights), expected)
    torch.testing.assert_close(function(x, weights=1e9 * weights.flatten(1)), expected)
    torch.testing.assert_close(function(x, weights=weights.requires_grad_()), expected)
    torch.testing.assert_close(function(x[1], weights=weights[1], spatial_dims=2), expected[1])


@every_function
@both_ways
def test_a_mask_leaves_positions_out(function, shape):
    x, weights = samples(shape)
    mask = weights[:1].expand_as(weights) > 0
    kept = x.flatten(2)[:, :, mask[0].flatten()]
    x = torch.where(mask[:, None], x, 1e3)
    torch.testing.assert_close(function(x, weights=mask), function(kept))
    torch.testing.assert_close(function(x, weights=torch.zeros(mask.shape)), torch.zeros(3, 6, 6).double())


@every_function
@both_ways
@pytest.mark.parametrize("of", ["features", "weights", "both"])
def test_gradients(function, shape, of):
    x, weights = samples((1, *shape[1:]))
    x, weights = x.requires_grad_(of != "weights"), weights.requires_grad_(of != "features")
    if of == "features":
        assert torch.autograd.gradcheck(lambda x: function(x, weights=weights), x)
        assert torch.autograd.gradgradcheck(lambda x: function(x, weights=weights), x)
        return
    # A weight of zero too: numeric differences need a little on either side of it, which the formula has.
    assert torch.autograd.gradcheck(lambda x, w: function(x, weights=w), (x, weights))
    assert torch.autograd.gradgradcheck(lambda x, w: function(x, weights=w), (x, weights))


class Weighted(nn.Module):
    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.kind == 0:
            return covariance_pool(x, weights)
        return bilinear_pool(x, weights) if self.kind == 1 else covariance_sqrt(x, 5, weights)


def run(module, x, weights, backward_inside=False, autocast=False):
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x, weights)
        if backward_inside:
            y.square().sum().backward()
    if not backward_inside:
        y.square().sum().backward()
    return y.detach(), x.grad, weights.grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("how", ["eager", "scripted", "traced", "exported", "compiled"])
def test_every_way_to_run_it_agrees(how, kind):
    torch.compiler.reset()
    module, (x, weights) = Weighted(kind), samples(MANY, torch.float32)
    expected = run(copy.deepcopy(module), x, weights)
    if how == "scripted":
        module = torch.jit.script(module)
    elif how == "traced":
        module = torch.jit.trace(module, (x, weights))
    elif how == "exported":
        module = torch.export.export(module, (x, weights)).module()
    elif how == "compiled":
        module = torch.compile(module, backend="aot_eager", fullgraph=True)
    for autocast in (False, True) if how in ("eager", "compiled") else (False,):
        for inside in (False, True):
            for found, value in zip(run(module, x, weights, inside, autocast), expected, strict=True):
                torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@every_function
@both_ways
def test_gradients_of_each_sample(function, shape):
    x, weights = samples(shape)
    gradient = torch.func.grad(lambda x, w: function(x[None], weights=w[None]).pow(3).sum(), argnums=(0, 1))
    expected = [
        torch.stack(grads)
        for grads in zip(*(gradient(*sample) for sample in zip(x, weights, strict=True)), strict=True)
    ]
    torch.testing.assert_close(torch.func.vmap(gradient)(x, weights), tuple(expected))
