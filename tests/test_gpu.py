"""On a GPU: float64's answers in every precision, layout and compiler mode, and training that lasts and repeats."""

import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from tests.layers import CHANNELS, LAYERS
from tests.test_modes import (
    AUTOCAST,
    DEEP,
    FLOAT32_BOUND,
    FUNCTIONS,
    NETWORKS,
    Functions,
    Layers,
    average_in_place_of_maximum,
    bounds_of,
    bounds_of_network,
    evaluate,
    network,
    smooth,
)
from tests.test_training import NETWORKS as TRAINED
from tests.test_training import SMALL, trained
from tests.tolerances import gradient_error, output_error
from timm_gsop import covariance_pool
from timm_gsop.layers import kernels
from timm_gsop.layers.gsop import rescale

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# Not every layer can be captured in a CUDA graph: the exact root cannot (docs/guarantees.md).
COMPILED = {"eager": None, "compiled": {}, "CUDA graphs": dict(mode="reduce-overhead")}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}

trainings = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def cases(*modes: str) -> list:
    """Mode, precision and layout; of what the compiler makes, which takes long, one each is quick."""
    found = []
    for mode, autocast, layout in product(modes, AUTOCAST, LAYOUTS):
        quick = mode == "eager" or (autocast, layout) == ("bfloat16", "channels last")
        marks = [] if quick else [pytest.mark.slow]
        found.append(pytest.param(mode, autocast, layout, marks=marks, id=f"{mode}-{autocast}-{layout}"))
    return found


@pytest.fixture(autouse=True)
def float32_products(monkeypatch) -> None:
    """The GPU's convolutions round float32 to TF32 by default, which is more than our bounds allow."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """What is created without a device is on the GPU."""
    with torch.device("cuda"):
        yield


def assert_as_in_float64(
    model: nn.Module, xs: torch.Tensor, autocast: str, mode: str, layout: str, bounds: tuple[float, float]
) -> None:
    """Outputs and gradients on the GPU are those of the same model in float64 on the CPU."""
    expected_ys, expected_gradients = evaluate(deepcopy(model).double(), xs.double())
    torch.compiler.reset()
    run = model.cuda().to(memory_format=LAYOUTS[layout])
    if COMPILED[mode] is not None:
        run = torch.compile(run, fullgraph=True, **COMPILED[mode])
    xs = xs.cuda()
    if layout == "channels last":
        xs = xs.movedim(2, -1).contiguous().movedim(-1, 2)
    for _ in range(3 if mode == "CUDA graphs" else 1):  # warmed up, recorded, replayed
        if mode == "CUDA graphs":
            torch.compiler.cudagraph_mark_step_begin()
        ys, gradients = evaluate(run, xs, AUTOCAST[autocast])
        for name, y, gradient, expected_y, expected_gradient in zip(
            model.names, ys, gradients, expected_ys, expected_gradients, strict=True
        ):
            assert output_error(y.cpu(), expected_y) <= bounds[0], name
            assert gradient_error(gradient.cpu(), expected_gradient) <= bounds[1], name


@pytest.mark.parametrize(("mode", "autocast", "layout"), cases("eager", "compiled"))
def test_functions(mode, autocast, layout):
    xs = torch.randn(len(FUNCTIONS), 3, 6, 4, 5)
    assert_as_in_float64(Functions(), xs, autocast, mode, layout, (FLOAT32_BOUND, FLOAT32_BOUND))


@trainings
@pytest.mark.parametrize(("mode", "autocast", "layout"), cases("eager", "compiled"))
def test_layers(mode, autocast, layout, training):
    layers = smooth(Layers()).train(training)
    xs = torch.randn(len(LAYERS), 6, CHANNELS, 7, 9)
    assert_as_in_float64(layers, xs, autocast, mode, layout, bounds_of(autocast))


def network_cases() -> list:
    shallow = [name for name in NETWORKS if name not in DEEP]  # the deep ones have no bounds in half precision
    modes = {name: ["eager"] for name in shallow}
    modes["net2"].append("compiled")
    modes["preresnet"].append("CUDA graphs")
    return [
        pytest.param(name, *case.values, marks=case.marks, id=f"{name}-{case.id}")
        for name, of_name in modes.items()
        for case in cases(*of_name)
    ]


@trainings
@pytest.mark.parametrize(("name", "mode", "autocast", "layout"), network_cases())
def test_networks(name, mode, autocast, layout, training, monkeypatch):
    monkeypatch.setattr(nn.functional, "max_pool2d", average_in_place_of_maximum)
    size = 32 if name == "preresnet" else 64
    x = torch.randn(8, 3, size, size)
    model = network(name, x, training)
    # Of a CPU, which rounds otherwise.
    output_bound, gradient_bound = bounds_of_network(name, model, x, autocast, training)
    assert_as_in_float64(model, x[None], autocast, mode, layout, (2 * output_bound, 2 * gradient_bound))


@pytest.mark.parametrize("network", TRAINED)
def test_the_same_seed_gives_the_same_weights_and_steps(network, deterministic, on_gpu, monkeypatch):
    """To the bit, with every operation deterministic. cuBLAS asks for the variable."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    first, second = trained(network, 0), trained(network, 0)
    assert all(value.is_cuda and torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("autocast", [name for name, dtype in AUTOCAST.items() if dtype])
@pytest.mark.parametrize("network", TRAINED)
def test_training_in_half_precision_learns(network, autocast, on_gpu):
    """With scaled gradients, as train.py's: the loss falls, and no step is left out after the first ones."""
    name, kwargs = TRAINED[network]
    model = timm.create_model(name, **{**SMALL, **kwargs}).to(memory_format=torch.channels_last).train()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), torch.amp.GradScaler("cuda")
    kinds, losses = torch.randn(4, 3, 48, 48), []
    for _ in range(40):
        labels = torch.randint(4, (16,))
        with torch.autocast("cuda", AUTOCAST[autocast]):
            loss = F.cross_entropy(model(kinds[labels] + 0.5 * torch.randn(16, 3, 48, 48)), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert scaler.get_scale() >= 2.0**12


@pytest.mark.parametrize("name", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_trained_weights_give_the_same_logits(name):
    model = timm.create_model(name, pretrained=True).eval()
    x = torch.randn(4, *model.pretrained_cfg["input_size"])
    with torch.inference_mode():
        torch.testing.assert_close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), rtol=1e-3, atol=1e-3)


def test_kernels():
    """As test_kernels.py, which has Triton interpret the same file."""
    assert not kernels.why_off()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/kernel_cases.py"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


def test_batches_of_more_than_2_to_31_elements(on_gpu):
    x = torch.zeros(5_600_000, 8, 7, 7, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    x[-1] = torch.randn(8, 7, 7)
    weights = torch.rand(len(x), 8, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(rescale(x, weights, 1.0)[-1], x[-1] * (1 + weights[-1]))
        torch.testing.assert_close(covariance_pool(x)[-1], covariance_pool(x[-1:].double())[0].float())


@pytest.mark.parametrize("name", ["net1", "net2"])
def test_kernels_change_a_network_within_its_precision(name, on_gpu, monkeypatch):
    """A training step in bfloat16, with kernels and without, and with the same running statistics."""
    monkeypatch.setattr(nn.functional, "max_pool2d", average_in_place_of_maximum)
    x = torch.randn(8, 3, 64, 64)
    model = network(name, x, True).to(memory_format=torch.channels_last)
    results = []
    for setting in ("1", "0"):
        monkeypatch.setenv("TIMM_GSOP_KERNELS", setting)
        run = deepcopy(model)
        results.append((*evaluate(run, x[None], torch.bfloat16), dict(run.named_buffers())))
    output_bound, gradient_bound = bounds_of("bfloat16")
    assert output_error(results[0][0][0], results[1][0][0]) <= output_bound
    assert gradient_error(results[0][1][0], results[1][1][0]) <= gradient_bound
    for buffer, found in results[0][2].items():
        torch.testing.assert_close(found, results[1][2][buffer], rtol=2e-2, atol=2e-2)
