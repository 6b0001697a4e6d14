"""Every kind of network as a graph: scripted, traced, symbolically traced, exported, compiled. Each answers as it does.

tests/test_layers.py has the layers by themselves, tests/test_export.py what is made of exported graphs.
"""

import pytest
import timm
import torch
from torch import nn

from tests.fresh_process import run_fresh
from tests.networks import FAMILIES, QUICK_FAMILIES, REGISTERED, create, image, parametrize
from tests.test_modes import average_in_place_of_maximum, smooth
from tests.versions import skip_before_torch_2_6

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
with_an_exporter = skip_before_torch_2_6(reason="PyTorch's exporter is older than these ways to ask")

SLOW_FAMILIES = tuple(f"blocks in {name}" for name in FAMILIES if name not in QUICK_FAMILIES)
NOT_SCRIPTABLE = ("blocks in hrnet_w18_small",)  # nor is it without blocks
INSERTED = tuple(f"blocks in {name}" for name in FAMILIES)
SECOND_ORDER = ("second_order of resnet18", "second_order of vit_tiny_patch16_224")


def created(name: str, **kwargs) -> tuple[nn.Module, torch.Tensor]:
    """In evaluation, with gates that are not all one half, and statistics that are not zero and one."""
    model = create(name, **kwargs)
    x = image(model, batch=3)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "expand_conv"):
                module.expand_conv.bias.normal_()
        model.train()(x)
    return model.eval(), x


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@parametrize(
    *(*REGISTERED, *SECOND_ORDER, *(name for name in INSERTED if name not in NOT_SCRIPTABLE)),
    slow=("inception", *SLOW_FAMILIES),
)
def test_script(name):
    """Where timm promises it: with ``scriptable=True``."""
    model, x = created(name, scriptable=True)
    assert_same(torch.jit.script(model)(x), model(x))


# The slow ones have the parts of others.
SLOW_TRACES = ("inception", "channel paper", "position official", "avg paper", "avg official", "max paper")


@parametrize(*REGISTERED, "second_order of resnet18", slow=(*SLOW_TRACES, "concat official"))
def test_trace(name):
    """With gradients and without. PyTorch's own check included; a second call runs the optimized graph."""
    model, x = created(name)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced = torch.jit.trace(model, x)
            for batch in (x, x, x[:2]):
                assert_same(traced(batch), model(batch))


def test_a_saved_trace_needs_no_package(tmp_path):
    names = ("net2", "concat paper", "max official", "mpn", "preresnet")
    for name in names:
        model, x = created(name)
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
    done = run_fresh("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()) == set(names)


@parametrize(*REGISTERED, slow=("inception",))
def test_symbolic_trace(name):
    model, x = created(name)
    assert_same(torch.fx.symbolic_trace(model)(x), model(x))
    head = "classifier" if hasattr(model, "classifier") else "fc"
    assert_same(timm.models.create_feature_extractor(model, [head])(x)[head], model(x))


EXPORTED = ("net1", "net2", "position paper", "concat paper", "avg official", "preresnet", "densenet", *SECOND_ORDER)


@with_an_exporter
@parametrize(*EXPORTED, slow=("net1", "position paper", "second_order of resnet18"))
def test_export_with_any_batch_and_size(name):
    model, x = created(name)
    auto = torch.export.Dim.AUTO
    sizes = {} if "vit" in name else {2: auto, 3: auto}
    program = torch.export.export(model, (x,), dynamic_shapes=({0: auto, **sizes},))
    other = torch.randn(5, 3, *(x.shape[2:] if "vit" in name else (96, 80)))
    for batch in (x, other):
        assert_same(program.module()(batch), model(batch))


@with_an_exporter
@parametrize("densenet", "net2", "concat paper", "avg official", slow=("net2", "concat paper", "avg official"))
def test_compile_without_breaks_and_recompiles(name):
    """One graph; from the third batch size on, none is compiled anew. Graphs are the same for every backend."""
    torch.compiler.reset()
    model, x = created(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x[:2])
        compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for batch in (4, 7):
                batch_of_images = torch.randn(batch, *x.shape[1:])
                assert_same(compiled(batch_of_images), model(batch_of_images))


@pytest.mark.slow
@with_an_exporter
def test_compile_a_training_step(monkeypatch):
    """With PyTorch's default backend: the gradients are the network's, but for the corners of maxima."""
    monkeypatch.setattr(nn.functional, "max_pool2d", average_in_place_of_maximum)
    torch.compiler.reset()
    model, x = created("net2")
    compiled = torch.compile(smooth(model).train(), fullgraph=True)
    gradients = []
    for network in (model, compiled):
        model.zero_grad()
        torch.nn.functional.cross_entropy(network(x), torch.arange(3)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        tolerance = 1e-3 * expected.abs().max().item() + 1e-6
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-2, atol=tolerance)


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
