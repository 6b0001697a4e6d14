"""Bilinear and compact bilinear pooling."""

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn

from tests.versions import BEFORE_TORCH_2_6, skip_before_torch_2_6
from timm_gsop import BilinearPool2d, CompactBilinearPool2d
from timm_gsop.layers import bilinear_pool, compact_bilinear_pool
from timm_gsop.layers.bilinear_pool import signed_sqrt_normalize

CREATE = {
    "bilinear": lambda **kwargs: BilinearPool2d(6, **kwargs),
    "bilinear reduced": lambda **kwargs: BilinearPool2d(6, dim=4, **kwargs),
    "compact": lambda **kwargs: CompactBilinearPool2d(6, out_features=37, **kwargs),
    "compact reduced": lambda **kwargs: CompactBilinearPool2d(6, out_features=32, dim=4, **kwargs),
}
every_pool = pytest.mark.parametrize("kind", CREATE)


def sketch_oracle(x: np.ndarray, pool: CompactBilinearPool2d) -> np.ndarray:
    """Each product of two channels goes to the element that the sum of their hashes says."""
    hashes, signs = pool.hashes.numpy(), pool.signs.numpy()
    out = np.zeros((len(x), pool.out_features))
    for b, sample in enumerate(x):
        for i in range(x.shape[1]):
            for j in range(x.shape[1]):
                element = (hashes[0, i] + hashes[1, j]) % pool.out_features
                out[b, element] += signs[0, i] * signs[1, j] * (sample[i] * sample[j]).sum()
    return out


def normalized(vectors: np.ndarray) -> torch.Tensor:
    roots = np.sign(vectors) * np.sqrt(np.abs(vectors) + 1e-8)
    return torch.from_numpy(roots / np.linalg.norm(roots, axis=1, keepdims=True))


def test_bilinear_is_the_mean_of_outer_products():
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64)
    outer = np.stack([np.mean([np.outer(p, p) for p in sample.flatten(1).T.numpy()], axis=0) for sample in x])
    torch.testing.assert_close(bilinear_pool(x), torch.from_numpy(outer))
    torch.testing.assert_close(BilinearPool2d(6)(x), normalized(outer.reshape(3, 36)))


@pytest.mark.parametrize("out_features", [8, 37, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compact_bilinear_is_the_sketch_of_the_outer_products(out_features, dtype):
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64).to(dtype)
    pool = CompactBilinearPool2d(6, out_features)
    expected = sketch_oracle(x.double().flatten(2).numpy(), pool)
    sketch = compact_bilinear_pool(x, pool.hashes, pool.signs, out_features)
    torch.testing.assert_close(sketch.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    assert ((sketch == 0) == torch.from_numpy(expected == 0)).all()  # no rounding where no two hashes add up to
    torch.testing.assert_close(pool(x).double(), normalized(expected), rtol=1e-4, atol=1e-4)


def test_inner_products_of_sketches_are_squared_inner_products_on_average():
    x, y = torch.rand(2, 1, 16, 2, 2, dtype=torch.float64)
    exact = (x.flatten(2).mT @ y.flatten(2)).square().sum()
    found = []
    for seed in range(400):
        pool = CompactBilinearPool2d(16, out_features=64, seed=seed)
        a, b = (compact_bilinear_pool(z, pool.hashes, pool.signs, 64) for z in (x, y))
        found.append((a * b).sum())
    found = torch.stack(found)
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - exact).abs() < 4 * error
    assert error < 0.05 * exact


def test_hashes_are_drawn_from_a_generator_of_their_own():
    before = torch.get_rng_state()
    pool = CompactBilinearPool2d(64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    again = CompactBilinearPool2d(64)
    assert torch.equal(pool.hashes, again.hashes)
    assert torch.equal(pool.signs, again.signs)
    other = CompactBilinearPool2d(64, seed=1)
    assert not torch.equal(pool.hashes, other.hashes)
    assert not torch.equal(pool.hashes[0], pool.hashes[1])
    assert pool.hashes.min() >= 0
    assert 8192 * 0.9 < pool.hashes.max() < 8192
    assert set(pool.signs.unique().tolist()) == {-1, 1}


def test_hashes_belong_to_the_weights():
    pool, x = CompactBilinearPool2d(6, 32, seed=1), torch.randn(2, 6, 3, 3)
    other = CompactBilinearPool2d(6, 32)
    assert not torch.allclose(pool(x), other(x))
    other.load_state_dict(pool.state_dict())
    torch.testing.assert_close(pool(x), other(x), rtol=0, atol=0)
    with torch.device("meta"):
        empty = CompactBilinearPool2d(6, 32, seed=1)
    assert empty.hashes.is_meta
    empty.to_empty(device="cpu").init_weights()
    torch.testing.assert_close(pool(x), empty(x), rtol=0, atol=0)
    assert pool.bfloat16().hashes.dtype == torch.int64


@every_pool
def test_gradients(kind):
    pool = CREATE[kind](dtype=torch.float64).eval()
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pool, x)
    assert torch.autograd.gradgradcheck(lambda x: bilinear_pool(x), x)


@every_pool
def test_zero_maps_are_zero_with_finite_gradients(kind):
    pool = CREATE[kind]().eval()
    x = torch.zeros(2, 6, 3, 3, requires_grad=True)
    y = pool(x)
    assert y.count_nonzero() == 0
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in pool.parameters())


@every_pool
def test_an_empty_batch(kind):
    pool = CREATE[kind]().eval()
    x = torch.randn(0, 6, 3, 3, requires_grad=True)
    y = pool(x)
    y.sum().backward()
    assert y.shape == (0, pool.out_features)
    assert x.grad.shape == x.shape


def test_the_gradient_of_a_sketch_where_products_cancel():
    """Two channels, hashes and signs such that the only element is x0² - x1²: zero for equal ones, its gradient not."""
    x = torch.ones(1, 2, 1, dtype=torch.float64, requires_grad=True)
    hashes, signs = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[1, 1], [1, -1]])
    sketch = compact_bilinear_pool(x, hashes, signs, 2)  # x0² - x1², and x1·x0 - x0·x1, which is always zero
    assert sketch.tolist() == [[0, 0]]
    (grad,) = torch.autograd.grad(sketch[0, 0], x, retain_graph=True)
    torch.testing.assert_close(grad.flatten(), torch.tensor([2.0, -2.0]).double())


@every_pool
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_vectors_have_length_one(kind, scale):
    y = CREATE[kind]().eval()(scale * torch.randn(3, 6, 4, 4))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(3))


def test_signed_sqrt_keeps_signs_and_bounds_the_gradient():
    x = torch.tensor([[-4.0, 0.0, 1e-30, 9.0]], requires_grad=True)
    y = signed_sqrt_normalize(x)
    assert y.sign().tolist() == [[-1, 0, 1, 1]]
    torch.testing.assert_close(y[0, 3] / y[0, 0], torch.tensor(-1.5))
    y[0, 2].backward()
    assert x.grad.abs().max() < 1e4


@every_pool
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(kind, dtype):
    assert CREATE[kind](dtype=dtype).eval()(torch.randn(2, 6, 5, 5).to(dtype)).dtype == dtype


@pytest.mark.parametrize("kind", ["bilinear", "compact"])
@pytest.mark.parametrize("compiled", [None, "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_reaches_neither_the_output_nor_the_gradient(kind, compiled, backward_inside):
    torch.compiler.reset()
    pool = CREATE[kind]()
    network = torch.compile(pool, backend=compiled, fullgraph=True) if compiled else pool
    x = torch.randn(2, 6, 16, 16)
    direction = torch.randn(2, pool.out_features)
    results = []
    for use, autocast in ((pool, False), (network, True)):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = use(inputs)
            if backward_inside:
                (y * direction).sum().backward()
        if not backward_inside:
            (y * direction).sum().backward()
        results.append((y.detach(), inputs.grad))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def with_statistics(kind: str) -> torch.nn.Module:
    """A pool in evaluation mode, its batch normalization with the statistics of some maps."""
    pool = CREATE[kind]().train()
    pool(torch.randn(8, 6, 5, 5))
    return pool.eval()


@every_pool
def test_script_trace_and_fx(kind, tmp_path):
    pool = with_statistics(kind)
    x, other = torch.randn(2, 6, 5, 5), torch.randn(3, 6, 7, 4)
    torch.jit.script(pool).save(tmp_path / "script.pt")
    torch.jit.trace(pool, x).save(tmp_path / "trace.pt")
    for name in ("script", "trace"):
        torch.testing.assert_close(torch.jit.load(tmp_path / f"{name}.pt")(x), pool(x))
    torch.testing.assert_close(torch.jit.load(tmp_path / "script.pt")(other), pool(other))
    torch.testing.assert_close(torch.fx.symbolic_trace(pool)(other), pool(other))


@every_pool
def test_export(kind):
    if "compact" in kind and BEFORE_TORCH_2_6:
        pytest.skip("PyTorch 2.5 cannot export a Fourier transform of a free shape")
    pool = with_statistics(kind)
    x, other = torch.randn(2, 6, 5, 5), torch.randn(3, 6, 7, 4)
    auto = torch.export.Dim.AUTO
    program = torch.export.export(pool, (x,), dynamic_shapes=({0: auto, 2: auto, 3: auto},))
    torch.testing.assert_close(program.module()(other), pool(other))


@skip_before_torch_2_6(reason="PyTorch's exporter is older than this way to ask")
@pytest.mark.parametrize("kind", ["bilinear reduced", "compact"])
def test_onnx(kind, tmp_path):
    """The Fourier transform included, of a power of two as by default; the batch is free."""
    import onnxruntime

    pool = (CREATE[kind]() if kind != "compact" else CompactBilinearPool2d(6, out_features=64)).eval()
    batch = torch.export.Dim("batch")
    x = torch.randn(2, 6, 5, 5)
    program = torch.onnx.export(pool, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    program.save(tmp_path / "pool.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "pool.onnx", providers=["CPUExecutionProvider"])
    for image in (x, torch.randn(5, 6, 5, 5)):
        (found,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), pool(image).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pool", ["bilinear", "compact_bilinear"])
def test_in_a_network_trained_saved_and_loaded(pool, tmp_path):
    options = dict(cov_dim=8, isqrt_dim=6, compact_bilinear_dim=50, num_classes=4)
    model = timm.create_model("gsop_preresnet20_net1", global_pool=pool, **options).train()
    assert model.head_hidden_size == (36 if pool == "bilinear" else 50)
    assert model.fc.in_features == model.head_hidden_size
    x = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    timm.models.save_for_hf(model.eval(), tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    model.reset_classifier(3)
    assert model(x).shape == (4, 3)


def test_bad_size_in_a_network_is_named():
    with pytest.raises(ValueError, match=r"compact_bilinear_dim=0 .* integer >= 1"):
        timm.create_model("gsop_preresnet20_net1", compact_bilinear_dim=0)


@every_pool
def test_copies_are_independent(kind):
    pool, x = CREATE[kind]().eval(), torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(copy.deepcopy(pool)(x), pool(x), rtol=0, atol=0)


@every_pool
def test_wrong_rank_is_named(kind):
    with pytest.raises(ValueError, match=r"input has shape \(6, 8, 8\).* accepted: \(B, C, H, W\)"):
        CREATE[kind]()(torch.zeros(6, 8, 8))


@pytest.mark.parametrize(
    ("pool_class", "argument"),
    [
        (BilinearPool2d, "in_features"),
        (BilinearPool2d, "dim"),
        (CompactBilinearPool2d, "in_features"),
        (CompactBilinearPool2d, "out_features"),
        (CompactBilinearPool2d, "dim"),
    ],
)
def test_bad_argument_is_named(pool_class: type[nn.Module], argument):
    with pytest.raises(ValueError, match=f"{argument}=0 .* integer >= 1"):
        pool_class(**{"in_features": 4, argument: 0})
