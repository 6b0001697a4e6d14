"""Leaving Python: ONNX, OpenVINO, int8. Each agrees with the network. test_tracing.py has PyTorch's own graphs."""

from collections import Counter

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests import networks
from tests.layers import BLOCKS, CHANNELS, HEADS, SCALING_LAYERS
from tests.test_modes import Layers
from tests.versions import skip_before_torch_2_6
from timm_gsop import ChannelGsop, GsopBlock, IsqrtCovPool2d

pytestmark = skip_before_torch_2_6(reason="PyTorch's exporters are older than these ways to ask")


def create(name: str) -> nn.Module:
    model = networks.create(name)
    with torch.no_grad():  # gates that are not all one half, and statistics that are not zero and one
        for module in model.modules():
            if hasattr(module, "expand_conv"):
                module.expand_conv.bias.normal_()
        model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def images(batch: int, *size: int) -> torch.Tensor:
    return torch.randn(batch, 3, *(size or (64, 64)))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@networks.parametrize("concat paper", "net2", "avg official", slow=("net2", "avg official"))
def test_onnx(name, tmp_path):
    """Newton–Schulz included; the batch is free."""
    import onnxruntime

    model = create(name)
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: torch.export.Dim.AUTO},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (2, 5):
        x = images(batch)
        (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert isinstance(logits, np.ndarray)
        with torch.no_grad():
            assert_same(torch.from_numpy(logits), model(x))


PIECES = {
    "head, many positions": lambda: IsqrtCovPool2d(16, 64),
    "head, few positions": lambda: IsqrtCovPool2d(16, 128),
    "block": lambda: GsopBlock(ChannelGsop(16, 64)),
}
NO_ARITHMETIC = {"Cast", "Equal", "Expand", "Gather", "LessOrEqual", "Range", "Shape", "Slice", "Squeeze", "Where"}


@pytest.mark.parametrize("free_batch", [False, True])
@pytest.mark.parametrize("piece", PIECES)
def test_onnx_has_arithmetic_alone(piece, free_batch, tmp_path):
    """But for the triangle's indices; the normalization after a convolution is folded. NaN stays NaN.

    Maps are of 7×7. Of 128 channels the iteration runs on 49×49 matrices.
    """
    import onnxruntime

    module = PIECES[piece]()
    x = torch.randn(4, 16, 7, 7)
    module.train()(x)  # statistics that are not zero and one
    module.eval()
    x[1:] = 0.0
    x[2, 3, 4, 5] = float("nan")
    shapes = dict(dynamic_shapes=({0: torch.export.Dim("batch")},)) if free_batch else {}
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False, **shapes)
    nodes = Counter(node.op_type for node in program.model_proto.graph.node)
    assert {name for name in nodes if name in NO_ARITHMETIC} == (set() if piece == "block" else {"Gather"})
    assert nodes["BatchNormalization"] == (1 if piece == "block" else 0)  # that of the covariance
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert expected[2].isnan().any()
    assert expected[[0, 1, 3]].isfinite().all()
    if piece != "block":
        assert np.abs(found[[1, 3]]).max() < 1e-6 * np.abs(found[0]).max()  # constant maps
        assert nodes["MatMul"] == {"head, many positions": 11, "head, few positions": 13}[piece]  # the steps have ten


NOT_CONVERTED = ("mpn", "compact_bilinear")
CONVERTED = [name for name in (*SCALING_LAYERS, *BLOCKS, *HEADS) if name not in NOT_CONVERTED]


def openvino_cases() -> list:
    slow = {("layers", True), ("net1", True), ("net1", False), ("net2", True), ("net2", False), ("second_order", True)}
    cases = [(what, strict) for what in ("layers", "net1", "net2", "second_order") for strict in (False, True)]
    return [pytest.param(*case, marks=[pytest.mark.slow] if case in slow else []) for case in cases]


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="this PyTorch does not say that it exports")
@pytest.mark.parametrize(("what", "strict"), openvino_cases())
def test_openvino_converts_what_was_exported(what, strict):
    """Any batch. docs/deploy.md has what it cannot convert."""
    openvino = pytest.importorskip("openvino")
    batch_dim = 0
    if what == "layers":
        names = list(CONVERTED)
        model, x, batch_dim = Layers(names).eval(), torch.randn(len(names), 2, CHANNELS, 7, 9), 1
    elif what == "second_order":
        model = timm.create_model("second_order", backbone="resnet18", num_classes=5, isqrt_dim=6, cov_dim=8).eval()
        x = images(2)
    else:
        model, x = create(what), images(2)
    free = {batch_dim: torch.export.Dim.AUTO}
    program = torch.export.export(model, (x,), dynamic_shapes=(free,), strict=strict)
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.compile_model(openvino.convert_model(program), "CPU", float32)
    for batch in (x, torch.cat([x, -x], dim=batch_dim)):
        with torch.no_grad():
            expected = model(batch)
        found = compiled([batch.numpy()])
        for i, y in enumerate(expected if what == "layers" else [expected]):
            assert_same(torch.from_numpy(found[i]), y, 1e-5)


@pytest.mark.slow  # test_serving.py has another int8 that is quick
def test_int8_answers_as_float32_does():
    """The shipped Net1 on real test images: 50 set the ranges, others are classified."""
    pytest.importorskip("torchao")
    from examples.quantize_int8 import quantize
    from tests.samples import fashion_mnist

    images, labels = fashion_mnist()
    model = timm.create_model("gsop_preresnet20_net1.fashion_mnist", pretrained=True).eval()
    with torch.no_grad():
        quantized = quantize(model, images[:50])
        answers = [net(images[50:300]).argmax(1) for net in (model, quantized)]
    assert any("quantize_per_tensor" in str(node.target) for node in quantized.graph.nodes)
    right = [(answer == labels[50:300]).float().mean() for answer in answers]
    assert right[1] > right[0] - 0.02
    assert (answers[0] == answers[1]).float().mean() > 0.97
