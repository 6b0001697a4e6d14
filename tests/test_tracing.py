"""torch.jit.trace, with and without gradients, for every family; converters and counters that trace."""

import subprocess
import sys

import pytest
import timm
import torch

from tests.test_modes import NETWORKS

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")


def create(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    model_name, kwargs = NETWORKS[name]
    model = timm.create_model(model_name, **kwargs)
    size = 96 if name == "inception" else 32 if name == "preresnet" else 64
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():  # statistics that are not zero and one
        model.train()(x)
    return model.eval(), x


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_agrees_also_for_other_batches(name, grad):
    """PyTorch's own check included; a second call runs the optimized graph."""
    model, x = create(name)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
        for batch in (x, x, x[:2]):
            torch.testing.assert_close(traced(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_a_saved_trace_needs_no_package(tmp_path):
    for name in NETWORKS:
        model, x = create(name)
        torch.jit.trace(model, x).save(tmp_path / f"{name}.pt")
        torch.save((x, model(x).detach()), tmp_path / f"{name}.data")
    code = (
        "import pathlib, sys, torch\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.pt'):\n"
        "    x, logits = torch.load(path.with_suffix('.data'), weights_only=True)\n"
        "    model = torch.jit.load(path)\n"
        "    for grad in (True, False, True):\n"
        "        with torch.set_grad_enabled(grad):\n"
        "            torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)\n"
        "    print(path.stem)\n"
        "assert not any(name.startswith(('timm_gsop.', 'timm.')) for name in sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(NETWORKS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gsop_preresnet20_net1", "gsop_preresnet20_net2"])
def test_openvino_converts_what_ships(name):
    openvino = pytest.importorskip("openvino")
    model = timm.create_model(name, pretrained=True).eval()
    example = torch.randn(3, 3, 32, 32)
    converted = openvino.convert_model(model, example_input=example)
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for x in (example, torch.randn(5, 3, 32, 32)):
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(compiled(x.numpy())[0]), model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "gmacs"), [("gsop_resnet50_net1", 6.5), ("gsop_resnet50_net2", 6.7)])
def test_fvcore_counts_every_product(name, gmacs):
    counting = pytest.importorskip("fvcore.nn")
    analysis = counting.FlopCountAnalysis(timm.create_model(name).eval(), torch.randn(1, 3, 224, 224))
    analysis.unsupported_ops_warnings(False)
    assert analysis.total() / 1e9 >= gmacs
    assert not {"aten::bmm", "aten::baddbmm", "aten::conv2d", "aten::_convolution"} & set(analysis.unsupported_ops())
