"""What every layer promises: shapes, errors, gradients, precision, and one answer in every way it is run."""

import copy
import math

import pytest
import torch
from torch import nn

import timm_gsop.layers
from tests.layers import CHANNELS, HEADS, LAYERS, randomize
from tests.tolerances import TOLERANCES, gradient_error, output_error
from tests.versions import skip_before_torch_2_6
from timm_gsop.layers import Gsop, GsopBlock, SecondOrderPool2d

every_layer = pytest.mark.parametrize("name", LAYERS)


def features(*size: int, batch: int = 6, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, CHANNELS, *(size or (7, 9)), dtype=dtype)


def shape_of_output(name: str, layer: nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    return (len(x), layer.out_features) if name in HEADS else tuple(x.shape)


def test_no_public_layer_is_left_out():
    names = [name for name in timm_gsop.layers.__all__ if isinstance(getattr(timm_gsop.layers, name), type)]
    public = {getattr(timm_gsop.layers, name) for name in names} - {Gsop, SecondOrderPool2d}
    made = {type(module) for create in LAYERS.values() for module in create().modules()}
    assert public <= made


@every_layer
@pytest.mark.parametrize("size", [(8, 8), (1, 1), (1, 9), (17, 5)], ids=str)
def test_any_map_size_trains(name, size):
    layer, x = LAYERS[name]().train(), features(*size).requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    assert y.shape == shape_of_output(name, layer, x)
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@every_layer
def test_a_constant_map_gives_finite_values_and_gradients(name):
    layer, x = LAYERS[name]().train(), torch.ones(2, CHANNELS, 5, 5, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@every_layer
@pytest.mark.parametrize("shape", [(CHANNELS, 8, 8), (2, CHANNELS), (1, 2, CHANNELS, 3, 3)], ids=str)
def test_wrong_rank_is_named(name, shape):
    with pytest.raises(ValueError, match=r"input has shape \(.*\).* accepted: \(B, C, H, W\)"):
        LAYERS[name]()(torch.zeros(shape))


@every_layer
def test_gradients(name):
    layer = randomize(LAYERS[name](dtype=torch.float64)).eval()
    x = features(2, 2, batch=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer(x).flatten(1)[:, ::7].sum(dim=1), x)


@every_layer
def test_weights_load_and_copies_agree(name):
    layer, x = randomize(LAYERS[name]()).eval(), features()
    loaded = LAYERS[name]().eval()
    loaded.load_state_dict(layer.state_dict())
    for other in (loaded, copy.deepcopy(layer)):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)


def run(layer: nn.Module, x: torch.Tensor, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and the gradient of the input, in training."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = layer(x)
    # In a fixed direction: the sum of a normalized output would have no gradient.
    direction = torch.sin(torch.arange(y.numel(), dtype=torch.float64)).reshape(y.shape).to(y.dtype)
    (y * direction).sum().backward()
    return y.detach(), x.grad


@every_layer
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [*((dtype, False) for dtype in TOLERANCES), (torch.float16, True), (torch.bfloat16, True)],
    ids=str,
)
def test_precision(name, dtype, autocast):
    """Near float64 by a stated bound (docs/guarantees.md), as a model in that precision and by autocast."""
    layer, x = LAYERS[name]().double().train(), features(dtype=torch.float64)
    expected = run(copy.deepcopy(layer), x)
    found = run(layer.float(), x.float(), dtype) if autocast else run(layer.to(dtype), x.to(dtype))
    assert all(tensor.isfinite().all() for tensor in found)
    assert autocast or {tensor.dtype for tensor in found} == {dtype}
    of_output, of_gradient = TOLERANCES[dtype]
    assert output_error(found[0], expected[0]) <= of_output
    assert gradient_error(found[1], expected[1]) <= of_gradient


def scripted(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.jit.script(layer)


def traced(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.jit.trace(layer, x)


def traced_by_fx(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.fx.symbolic_trace(layer)


def exported(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    auto = torch.export.Dim.AUTO
    return torch.export.export(layer, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()


@every_layer
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(scripted, marks=pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")),
        pytest.param(traced, marks=pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")),
        traced_by_fx,
        pytest.param(exported, marks=skip_before_torch_2_6(reason="an older exporter")),
    ],
)
def test_every_way_to_run_it_agrees(name, way):
    layer = randomize(LAYERS[name]()).eval()
    other = way(layer, features())
    for x in (features(), features(5, 4, batch=3)):
        expected = layer(x)
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5 * max(1.0, expected.abs().max().item()))


@every_layer
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_is_not_hidden(name, bad):
    layer, x = LAYERS[name]().eval(), features()
    x[1, 2, 3, 3] = bad
    y = layer(x)
    assert not y[1].isfinite().all()
    assert y[[0, 2, 3]].isfinite().all()


def test_a_block_goes_around_any_attention_layer_of_timm():
    from timm.layers import EcaModule, SEModule

    for attention in (SEModule(CHANNELS), EcaModule(CHANNELS)):
        x = features()
        torch.testing.assert_close(GsopBlock(attention)(x), x + attention(x))
        torch.testing.assert_close(GsopBlock(attention, scale=0.5)(x), (x + attention(x)) / 2)
        torch.testing.assert_close(torch.jit.script(GsopBlock(attention))(x), x + attention(x))


def test_a_block_refuses_a_scale_that_is_not_positive():
    with pytest.raises(ValueError, match="scale=0 is not accepted"):
        GsopBlock(nn.Identity(), scale=0)
