"""Options used together: autocast × compiler × place of the backward pass × training or evaluation give one answer.

The compiler's graphs take long to make, so that functions share one, and layers another.
"""

from collections.abc import Callable, Iterable
from itertools import product

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from tests.layers import CHANNELS, LAYERS
from tests.networks import REGISTERED
from tests.oracles import random_covariance
from tests.tolerances import TOLERANCES, gradient_error, output_error
from timm_gsop.layers import (
    bilinear_pool,
    covariance_pool,
    covariance_sqrt,
    eigh_power,
    newton_schulz_sqrt,
    position_covariance,
)
from timm_gsop.layers.gsop import Maximum
from timm_gsop.layers.official import official_position_covariance

BACKENDS = ("eager", "aot_eager", "inductor")
AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
FLOAT32_BOUND = 1e-4  # nothing is rounded to half precision where the input is float32


FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "covariance_pool": covariance_pool,
    "position_covariance": position_covariance,
    "official_position_covariance": official_position_covariance,
    **{f"newton_schulz_sqrt, {n}": lambda x, n=n: newton_schulz_sqrt(covariance_pool(x), n) for n in (1, 3, 5)},
    "covariance_sqrt, few positions": lambda x: covariance_sqrt(x.flatten(2).transpose(1, 2)),
    "eigh_power": lambda x: eigh_power(covariance_pool(x), 0.5),
    "bilinear_pool": bilinear_pool,
}


class Functions(nn.Module):
    """Every function in one graph, each of features of its own: (F, B, C, H, W)."""

    names = tuple(FUNCTIONS)

    def forward(self, xs: torch.Tensor) -> list[torch.Tensor]:
        return [function(x) for function, x in zip(FUNCTIONS.values(), xs, strict=True)]


class Layers(nn.Module):
    """Every kind of block and head in one graph, each of features of its own: (L, B, C, H, W)."""

    def __init__(self, names: Iterable[str] = LAYERS) -> None:
        super().__init__()
        self.names = tuple(names)
        self.layers = nn.ModuleList([LAYERS[name]() for name in self.names])

    def forward(self, xs: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer, x in zip(self.layers, xs, strict=True)]


class Network(nn.Module):
    """A network, of one batch of images: (1, B, C, H, W)."""

    names = ("logits",)

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList([model])

    def forward(self, xs: torch.Tensor) -> list[torch.Tensor]:
        return [self.layers[0](xs[0])]


NETWORKS = {
    **{name: REGISTERED[name] for name in ("net1", "net2", "mpn", "resnext", "preresnet", "densenet", "inception")},
    **{name: REGISTERED[f"{name} paper"] for name in ("position", "concat")},
    "official": REGISTERED["max official"],
}
QUICK = ("net2", "preresnet")
DEEP = ("inception",)  # untrained, it is so deep that in bfloat16 its bound would allow anything: not compared

# A network of this package rounds as often as timm's own of the same family and size, but is more sensitive: batch
# normalization after a pooling divides the differences between images by their spread, which is small among images of
# noise. Sensitivity is seen in float32: how far do logits and gradients move with the image? The error of half
# precision, for each unit of sensitivity, was up to 3 times timm's for logits, 2 times for gradients, over four seeds.
ALLOWED = 4
ROUNDING = 2.0**-8  # by which the image is moved, bfloat16's


def plain_network(name: str) -> tuple[str, dict]:
    """timm's own network of the same family and size."""
    model_name, kwargs = NETWORKS[name]
    plain_name = model_name.removeprefix("gsop_").replace("mpncov_", "").split(".")[0].rsplit("_net", 1)[0]
    ours = ("gsop_type", "cov_dim", "spatial_size", "flavor", "isqrt_dim", "isqrt_drop")
    return plain_name, {key: value for key, value in kwargs.items() if key not in ours}


def network(name: str, x: torch.Tensor, training: bool, plain: bool = False) -> nn.Module:
    """A network with the statistics of a trained one: with others, activations leave float16's range."""
    model_name, kwargs = plain_network(name) if plain else NETWORKS[name]
    model = smooth(timm.create_model(model_name, **kwargs))
    update_bn([x], model)
    return Network(model).train(training)


def bounds_of_network(
    name: str, model: nn.Module, x: torch.Tensor, autocast: str, training: bool
) -> tuple[float, float]:
    """Of logits and of gradients: what timm's own network is off, in proportion to how sensitive the two are."""
    if AUTOCAST[autocast] is None:
        return bounds_of(autocast)
    plain = network(name, x, training, plain=True)
    moved = x * (1 + ROUNDING * torch.randn_like(x))
    error = distances(evaluate(plain, x[None], AUTOCAST[autocast]), evaluate(plain, x[None]))
    ours, theirs = (distances(evaluate(m, moved[None]), evaluate(m, x[None])) for m in (model, plain))
    output_bound, gradient_bound = (ALLOWED * e * a / b for e, a, b in zip(error, ours, theirs, strict=True))
    return output_bound, gradient_bound


def distances(actual: tuple[list, list], expected: tuple[list, list]) -> tuple[float, float]:
    """Of logits and of gradients, in norm: a largest logit among few is large or small by chance."""
    output, gradient = (gradient_error(a[0], e[0]) for a, e in zip(actual, expected, strict=True))
    return output, gradient


class SmoothMaximum(nn.Module):
    """log(exp a + exp b)."""

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.logaddexp(a, b)


def average_in_place_of_maximum(
    x: torch.Tensor, kernel_size: int, stride: int | None = None, padding: int = 0, *others: object, **options: object
) -> torch.Tensor:
    """Average pooling with the arguments of max_pool2d. Even float32 meets the corners of a maximum.

    Channels first: on a GPU, PyTorch's gradient of padded average pooling was wrong with channels last, before July
    2026 (https://github.com/pytorch/pytorch/issues/188344).
    """
    return nn.functional.avg_pool2d(x.contiguous(), kernel_size, stride, padding)


def smooth(model: nn.Module) -> nn.Module:
    """Without ReLUs and maxima: where half precision moves a value across their corner, gradients jump."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU | nn.LeakyReLU):
                setattr(module, name, nn.SiLU())
            if isinstance(child, Maximum):
                setattr(module, name, SmoothMaximum())
    return model


def evaluate(
    model: nn.Module, xs: torch.Tensor, autocast: torch.dtype | None = None, backward_inside: bool = False
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs, and of each the gradient with respect to its input and its weights, in one vector."""
    xs = xs.clone().requires_grad_()
    weights = [list(layer.parameters()) for layer in getattr(model, "layers", ())]
    found = [xs, *(weight for of_layer in weights for weight in of_layer)]

    def differentiate(ys: list[torch.Tensor]) -> list[torch.Tensor]:
        # In a fixed direction: the sum of a normalized output would have no gradient.
        directions = [torch.sin(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y) for y in ys]
        # DropCov uses some weights in training alone.
        of_inputs, *of_weights = torch.autograd.grad(ys, found, directions, materialize_grads=True)
        rest = iter(of_weights)
        of_layers = [[next(rest) for _ in of_layer] for of_layer in weights] or [[] for _ in ys]
        return [torch.cat([g.flatten() for g in (x, *layer)]) for x, layer in zip(of_inputs, of_layers, strict=True)]

    with torch.autocast(xs.device.type, autocast, enabled=autocast is not None):
        ys = model(xs)
        gradients = differentiate(ys) if backward_inside else []
    return ys, gradients or differentiate(ys)


def assert_one_answer(
    model: nn.Module,
    xs: torch.Tensor,
    backend: str,
    autocast: str,
    bounds: tuple[float, float],
    error_of_output: Callable[[torch.Tensor, torch.Tensor], float] = output_error,
) -> None:
    """Wherever the backward pass is called, and whatever compiles, the answer is plain float32's."""
    expected = evaluate(model, xs)
    torch.compiler.reset()
    run = model if backend == "eager" else torch.compile(model, backend=backend, fullgraph=True)
    for inside in (False, True):
        ys, gradients = evaluate(run, xs, AUTOCAST[autocast], inside)
        for i, name in enumerate(model.names):
            place = f"{name}, backward {'inside' if inside else 'outside'}"
            assert error_of_output(ys[i], expected[0][i]) <= bounds[0], place
            assert gradient_error(gradients[i], expected[1][i]) <= bounds[1], place


def bounds_of(autocast: str) -> tuple[float, float]:
    return TOLERANCES[AUTOCAST[autocast] or torch.float32]


def function_cases() -> list:
    """Eager, and one of each compiler."""
    quick = {("inductor", "bfloat16"), ("aot_eager", "float32"), *(("eager", autocast) for autocast in AUTOCAST)}
    cases = [(backend, autocast) for backend in BACKENDS for autocast in AUTOCAST]
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in cases]


@pytest.mark.parametrize(("backend", "autocast"), function_cases())
def test_functions(backend, autocast):
    xs = torch.randn(len(FUNCTIONS), 3, 6, 4, 5)
    assert_one_answer(Functions(), xs, backend, autocast, (FLOAT32_BOUND, FLOAT32_BOUND))


def layer_cases() -> list:
    cases = []
    for backend in BACKENDS:
        for autocast in AUTOCAST:
            for training in (True, False):
                quick = backend == "eager" or (backend == "aot_eager" and autocast == "bfloat16" and training)
                marks = [] if quick else [pytest.mark.slow]
                mode = "training" if training else "evaluation"
                cases.append(pytest.param(backend, autocast, training, marks=marks, id=f"{backend}-{autocast}-{mode}"))
    return cases


@pytest.mark.parametrize(("backend", "autocast", "training"), layer_cases())
def test_layers(backend, autocast, training):
    layers = smooth(Layers()).train(training)
    torch.manual_seed(0)  # so that another layer at the end leaves the features of these as they are
    assert_one_answer(layers, torch.randn(len(LAYERS), 6, CHANNELS, 7, 9), backend, autocast, bounds_of(autocast))


QUICK_COMPILED = {("net2", "bfloat16", True), ("preresnet", "float32", False)}


def network_cases() -> list:
    cases = []
    for name, backend, autocast, training in product(NETWORKS, BACKENDS, AUTOCAST, (True, False)):
        if name in DEEP and autocast == "bfloat16":
            continue
        quick = backend == "aot_eager" and (name, autocast, training) in QUICK_COMPILED
        quick = quick or (backend == "eager" and name in QUICK and autocast != "float16")  # which takes long on a CPU
        quick = quick or (name, backend, autocast, training) == ("net2", "eager", "float16", True)
        marks = [] if quick else [pytest.mark.slow]
        case = f"{name}-{backend}-{autocast}-{'training' if training else 'evaluation'}"
        cases.append(pytest.param(name, backend, autocast, training, marks=marks, id=case))
    return cases


@pytest.mark.parametrize(("name", "backend", "autocast", "training"), network_cases())
def test_networks(name, backend, autocast, training, monkeypatch):
    monkeypatch.setattr(nn.functional, "max_pool2d", average_in_place_of_maximum)
    size = {"inception": 139, "preresnet": 32}.get(name, 64)
    x = torch.randn(8, 3, size, size)
    model = network(name, x, training)
    assert model(x[None])[0].std(dim=0).min() > 1e-3, "the logits do not depend on the image"
    bounds = bounds_of_network(name, model, x, autocast, training)
    assert_one_answer(model, x[None], backend, autocast, bounds, gradient_error)  # in norm, as the bounds


def test_second_derivatives_and_samples_of_the_exact_root():
    cov = random_covariance(3, 4)
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(lambda c, w: (eigh_power(c[None])[0] * w).sum()))(cov, weight)
    x = cov.clone().requires_grad_()
    (expected,) = torch.autograd.grad((eigh_power(x) * weight).sum(), x)
    torch.testing.assert_close(per_sample, expected)
