"""Every kernel against float64, in each precision, layout and odd size: on a GPU, or interpreted on a CPU.

test_kernels.py runs this file in a process with ``TRITON_INTERPRET=1``, test_gpu.py runs it on a GPU. Both are the same
code.
"""

import copy
import os
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.tolerances import TOLERANCES, gradient_error, output_error
from timm_gsop import ChannelGsop, GsopBlock, IsqrtCovPool2d, MpnCovPool2d, covariance_pool, newton_schulz_sqrt
from timm_gsop.layers import kernels
from timm_gsop.layers.channel_reduction import ChannelReduction, can_fuse, fused_covariance
from timm_gsop.layers.gsop import plain_rescale, rescale

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
ROUNDING = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
LAYOUTS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}
SIZES = [(1, 1, 1, 1), (2, 3, 7, 7), (3, 17, 5, 3), (1, 128, 7, 7), (1, 200, 5, 3)]

halves = pytest.mark.parametrize("dtype", kernels.HALF, ids=str)
layouts = pytest.mark.parametrize("layout", LAYOUTS)
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


@pytest.fixture(autouse=True)
def launches(monkeypatch) -> dict[str, int]:
    """How often the modules of the operators were asked for, so that no test passes on the plain path."""
    found: dict[str, int] = {}
    load = kernels.load

    def noting(operator: str):
        found[operator] = found.get(operator, 0) + 1
        return load(operator)

    monkeypatch.setattr(kernels, "load", noting)
    return found


def features(
    size: tuple[int, ...], dtype: torch.dtype, layout: str = "channels last", mean: float = 0.5
) -> torch.Tensor:
    x = (torch.randn(size) + mean).to(dtype)
    return x.to(DEVICE).contiguous(memory_format=LAYOUTS[layout])


def with_gradients(
    function: Callable[..., torch.Tensor], *inputs: torch.Tensor, expanded: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Value, and gradients in a fixed direction, or in that of a mean over positions."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = function(*inputs)
    direction = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y)
    if expanded:
        direction = direction[:, :, :1, :1].expand_as(y)
    return y.detach(), torch.autograd.grad(y, inputs, direction)


def assert_near(found, expected, output_bound: float, gradient_bound: float) -> None:
    assert output_error(found[0].cpu(), expected[0].cpu()) <= output_bound
    for gradient, right in zip(found[1], expected[1], strict=True):
        assert gradient_error(gradient.cpu(), right.cpu()) <= gradient_bound


@sizes
@layouts
@pytest.mark.parametrize("dtype", kernels.FLOATS, ids=str)
def test_scaling(dtype, layout, size, launches):
    x, weights = features(size, dtype, layout), torch.rand(*size[:2], 1, 1).to(DEVICE, dtype)
    for expanded, factors in ((False, dict(shortcut=0.0, scale=1.0)), (True, dict(shortcut=1.0, scale=2 / 3))):
        found = with_gradients(partial(rescale, **factors), x, weights, expanded=expanded)
        expected = with_gradients(partial(plain_rescale, **factors), x.double(), weights.double(), expanded=expanded)
        assert_near(found, expected, ROUNDING[dtype], ROUNDING[dtype])
        for tensor in (found[0], found[1][0]):
            assert tensor.dtype == dtype
            assert tensor.is_contiguous(memory_format=LAYOUTS[layout])
        with torch.no_grad():
            assert torch.equal(rescale(x, weights, **factors), found[0])
    assert launches["rescale"] == 4


def test_scaling_of_maps_that_are_not_dense():
    x = torch.randn(2, 6, 4, 5, device=DEVICE).bfloat16()
    weights = torch.rand(2, 3, 1, 1, device=DEVICE)  # another precision: the result has the wider one
    for part in (x[:, 1:4], x.transpose(2, 3)[:, ::2], x[:, :3, 1:, ::2], x[:1, :3, :1, :1].expand(2, 3, 4, 4)):
        found = with_gradients(lambda x, w: rescale(x, w, 1.0), part, weights)
        expected = with_gradients(lambda x, w: x + x * w, part.double(), weights.double())
        assert found[0].dtype == torch.float32
        assert_near(found, expected, 1e-6, 2e-2)


@sizes
@layouts
@halves
def test_covariance(dtype, layout, size, launches):
    x = features(size, dtype, layout)
    found, expected = with_gradients(covariance_pool, x), with_gradients(covariance_pool, x.double())
    assert found[0].dtype == torch.float32
    assert found[1][0].dtype == dtype
    assert found[1][0].is_contiguous(memory_format=LAYOUTS[layout])
    assert_near(found, expected, 1e-5, ROUNDING[dtype])
    assert output_error(found[0].mT, found[0]) <= 1e-6
    with torch.no_grad():
        assert torch.equal(covariance_pool(x), found[0])
    assert launches["covariance"] == 2


@pytest.mark.parametrize("mean", [3.0, 30.0, 100.0])
@halves
def test_covariance_where_means_are_large_beside_the_spread(dtype, mean):
    x = features((2, 5, 9, 8), dtype, mean=mean)
    found, expected = with_gradients(covariance_pool, x), with_gradients(covariance_pool, x.double())
    # Where they are not much larger, their differences are rounded, as the map itself was.
    assert_near(found, expected, TOLERANCES[dtype][0] / 20, ROUNDING[dtype])


@halves
def test_covariance_of_many_positions(dtype):
    """Two programs share them."""
    x = features((1, 3, 46, 45), dtype, mean=10.0)
    found, expected = with_gradients(covariance_pool, x), with_gradients(covariance_pool, x.double())
    assert_near(found, expected, 1e-4, ROUNDING[dtype])


@halves
def test_gradients_far_from_one_neither_overflow_nor_vanish(dtype):
    """1e-4 / 49 and 1e4 · 49 positions' worth of it; float16 ends at 6e-8 and 65 504."""
    x = features((2, 5, 7, 7), dtype)
    for size in (1e-6, 1e6):
        wide = x.double().requires_grad_()
        (expected,) = torch.autograd.grad(size * covariance_pool(wide).sum(), wide)
        half = (x / 1).requires_grad_()
        (found,) = torch.autograd.grad(size * covariance_pool(half).sum(), half)
        if dtype == torch.float16:  # what a float16 can hold of it
            expected = expected.half().double()
        same = expected.isinf() & (found == expected)
        error = (found.double() - expected)[~same]
        assert error.norm() <= (0.5 if size < 1 and dtype == torch.float16 else 0.02) * expected[~same].norm()


def test_a_constant_map_has_a_covariance_of_zero():
    for dtype in kernels.HALF:
        x = torch.full((1, 3, 46, 45), 1.2345, device=DEVICE).to(dtype).requires_grad_()
        cov = covariance_pool(x)
        assert not cov.any()
        newton_schulz_sqrt(cov).sum().backward()
        assert not x.grad.any()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@halves
def test_what_is_not_finite_stays_in_its_image(dtype, bad):
    x, weights = features((3, 5, 4, 4), dtype), torch.rand(3, 5, 1, 1, device=DEVICE).to(dtype)
    x[1, 2, 3, 3] = bad
    reduction = ChannelReduction(5, 4).to(DEVICE, dtype).eval()
    for function in (covariance_pool, lambda x: rescale(x, weights, 1.0), lambda x: fused_covariance(reduction, x)):
        y, (gradient,) = with_gradients(function, x)
        for found in (y, gradient):
            assert found[[0, 2]].isfinite().all()
        assert not y[1].isfinite().all()


def reductions(dtype: torch.dtype, channels: int, **options) -> tuple[ChannelReduction, ChannelReduction]:
    """A reduction, and the same in float64, whose convolution leaves the map as it is."""
    reduction = ChannelReduction(channels, channels).to(DEVICE)
    reduction.bn = nn.BatchNorm2d(channels, **options).to(DEVICE)
    with torch.no_grad():
        reduction.conv.weight.copy_(torch.eye(channels)[:, :, None, None])
        for tensor in (reduction.bn.weight, reduction.bn.bias):
            tensor.normal_()
        if reduction.bn.running_mean is not None:
            reduction.bn.running_mean.normal_()
            reduction.bn.running_var.uniform_(0.5, 2)
    double = copy.deepcopy(reduction).double()
    reduction.conv.to(dtype)
    return reduction, double


def assert_same_statistics(bn: nn.BatchNorm2d, double: nn.BatchNorm2d) -> None:
    for found, expected in zip(bn.buffers(), double.buffers(), strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [(2, 3, 7, 7), (3, 17, 1, 1), (1, 128, 7, 7), (1, 200, 5, 3)], ids=str)
@layouts
@halves
def test_normalization_relu_and_covariance(dtype, layout, size, training, launches):
    reduction, double = (module.train(training) for module in reductions(dtype, size[1]))
    x = features(size, dtype, layout)
    assert can_fuse(reduction, x) == (size[2] > 1)  # else someone warns
    results = []
    for module, x_ in ((reduction, x), (double, x.double())):
        x_ = x_.requires_grad_()
        cov = fused_covariance(module, x_)
        direction = torch.cos(torch.arange(cov.numel(), dtype=torch.float64)).view_as(cov).to(cov)
        found = torch.autograd.grad(cov, (x_, module.bn.weight, module.bn.bias), direction)
        results.append((cov.detach(), found))
    found, expected = results
    assert launches["norm_covariance"] == 1
    assert found[1][0].is_contiguous(memory_format=LAYOUTS[layout])
    output_bound, gradient_bound = TOLERANCES[dtype]
    assert_near(found, expected, output_bound, gradient_bound)
    assert_same_statistics(reduction.bn, double.bn)


@pytest.mark.parametrize(
    "options", [dict(momentum=None), dict(momentum=0.9), dict(track_running_stats=False), dict(eps=0.1)], ids=str
)
def test_statistics_are_those_of_pytorchs_batch_normalization(options):
    reduction, double = reductions(torch.bfloat16, 5, **options)
    for training in (True, True, False, True):
        x = features((4, 5, 6, 7), torch.bfloat16, mean=20.0)
        results = []
        for module, x_ in ((reduction, x), (double, x.double())):
            module.train(training)
            with torch.no_grad():
                results.append(fused_covariance(module, x_))
        assert output_error(results[0].cpu(), results[1].cpu()) <= TOLERANCES[torch.bfloat16][0]
        assert_same_statistics(reduction.bn, double.bn)


@pytest.mark.parametrize("size", [1, 3, 17, 64, 130])
def test_sum_of_a_matrix_and_its_transpose(size, launches):
    from timm_gsop.layers.matrix_sqrt import _plus_transpose

    mat = torch.randn(3, size, size, device=DEVICE)
    for a in (mat, mat.mT, mat[::2], mat[:1, :1, :1].expand(2, size, size)):
        assert torch.equal(_plus_transpose(a), a + a.mT)
    assert launches["symmetric"] == 4


def test_second_derivatives_are_the_plain_ones():
    reduction = ChannelReduction(4, 3).to(DEVICE).eval()
    reduction.conv.to(torch.bfloat16)
    x, weights = features((2, 4, 3, 3), torch.bfloat16), torch.rand(2, 4, 1, 1, device=DEVICE)
    functions = {
        "rescale": (lambda x, w: rescale(x, w, 1.0), lambda x, w: x + x * w),
        "covariance": (lambda x, w: covariance_pool(x) + w.sum(), None),
        "fused": (lambda x, w: fused_covariance(copy.deepcopy(reduction).to(x.device), x) + w.sum(), None),
    }
    for function, _ in functions.values():
        results = []
        for wide in (False, True):
            inputs = [(t.float() if wide else t).detach().clone().requires_grad_() for t in (x, weights)]
            if wide:
                reduction.float()
            y = function(*inputs)
            first = torch.autograd.grad(y.float().square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(first[0].float().square().sum(), inputs[0])
            results.append((first[0].detach(), second))
            reduction.conv.to(torch.bfloat16)
        assert_near(*results, 5e-2, 5e-2)


def test_a_graph_that_is_kept_gives_the_same_gradient_twice(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    block, x = GsopBlock(ChannelGsop(5, 4).to(DEVICE)).train(), features((3, 5, 4, 4), torch.bfloat16)
    x = x.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block(x).float().square().sum()
    inputs = [x, *block.parameters()]
    first, second = (torch.autograd.grad(y, inputs, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_checkpointed_block_has_the_same_gradients():
    block, x = GsopBlock(ChannelGsop(5, 4).to(DEVICE)).train(), features((3, 5, 4, 4), torch.bfloat16)
    results = []
    for module in (block, checkpoint_wrapper(copy.deepcopy(block))):
        with torch.autocast(DEVICE, torch.bfloat16):
            results.append(with_gradients(module, x))
    assert_near(*results, 1e-6, 1e-6)


def watched(reduction: ChannelReduction) -> list[Callable[[], None]]:
    """Everything that makes the plain path necessary."""
    hook = lambda *_: None  # noqa: E731
    return [
        lambda: reduction.register_forward_hook(hook),
        lambda: reduction.bn.register_forward_pre_hook(hook),
        lambda: reduction.act.register_full_backward_hook(hook),
        lambda: torch.nn.modules.module.register_module_forward_hook(hook),
        lambda: setattr(reduction, "act", nn.SiLU()),
        lambda: setattr(reduction, "bn", nn.SyncBatchNorm(3)),
        lambda: setattr(reduction, "bn", nn.BatchNorm2d(3, affine=False)),
        lambda: setattr(reduction.bn, "forward", hook),
        lambda: reduction.append(nn.Identity()),
    ]


@pytest.mark.parametrize("change", range(9))
def test_a_reduction_that_is_watched_or_changed_is_called(change):
    reduction = ChannelReduction(4, 3).to(DEVICE, torch.bfloat16)
    x = features((2, 4, 3, 3), torch.bfloat16)
    assert can_fuse(reduction, x)
    handle = watched(reduction)[change]()
    try:
        assert not can_fuse(reduction, x)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()


@pytest.mark.parametrize("pool", [IsqrtCovPool2d, MpnCovPool2d])
def test_covariance_pooling_takes_the_kernels(pool, launches):
    head = pool(7, 5).to(DEVICE).train()
    plain = copy.deepcopy(head).double()
    x = features((3, 7, 4, 4), torch.bfloat16)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = with_gradients(head, x)
    assert launches["norm_covariance"] == 1
    assert "symmetric" in launches
    assert_near(found, with_gradients(plain, x.double()), *TOLERANCES[torch.bfloat16])


def test_a_hook_on_what_is_fused_is_called(launches):
    gsop, x, seen = ChannelGsop(5, 4).to(DEVICE, torch.bfloat16), features((3, 5, 4, 4), torch.bfloat16), []
    expected = gsop(x)
    assert launches["norm_covariance"] == 1
    gsop.reduction.act.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    torch.testing.assert_close(gsop(x), expected, rtol=2e-2, atol=2e-2)
    assert seen == [(3, 4, 4, 4)]
    assert launches == {"norm_covariance": 1, "covariance": 1, "rescale": 2}


def test_a_block_under_autocast_takes_every_kernel(launches):
    """In training, with the layout of its map; float32 parameters."""
    block = GsopBlock(ChannelGsop(20, 6).to(DEVICE), scale=2 / 3).train()
    plain = copy.deepcopy(block).double()
    x = features((3, 20, 5, 4), torch.bfloat16)
    results = []
    for module, x_, enabled in ((block, x, True), (plain, x.double(), False)):
        x_ = x_.requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            y = module(x_)
        direction = torch.cos(torch.arange(y.numel(), dtype=torch.float64)).view_as(y).to(y)
        results.append((y.detach(), torch.autograd.grad(y, (x_,), direction)))
    assert launches == {"norm_covariance": 1, "rescale": 1}
    assert_near(*results, *TOLERANCES[torch.bfloat16])


def network() -> nn.Module:
    torch.manual_seed(0)
    parts = (nn.Conv2d(3, 8, 3, stride=2), GsopBlock(ChannelGsop(8, 6)), IsqrtCovPool2d(8, 6), nn.Linear(21, 4))
    return nn.Sequential(*parts).to(DEVICE).train()


@pytest.fixture
def one_process(tmp_path):
    backend = "gloo" if DEVICE == "cpu" else "nccl"
    torch.distributed.init_process_group(backend, f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP", "EMA"])
def test_a_wrapped_network_makes_the_same_steps(wrapper, launches, one_process):
    """As timm's train.py wraps it, under autocast; the kernels are those of the network by itself."""
    from timm.utils import ModelEmaV3
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, inner = network(), network()
    ema = ModelEmaV3(inner, decay=0.5) if wrapper == "EMA" else None
    wrapped = nn.parallel.DistributedDataParallel(inner) if wrapper == "DDP" else inner
    if wrapper == "FSDP":
        for part in (*inner, inner):
            fully_shard(part, mesh=init_device_mesh(DEVICE, (1,)))
    x = torch.randn(4, 3, 9, 9, device=DEVICE)
    used, averages = [], [p.detach().clone() for p in plain.parameters()]
    for module in (plain, wrapped):
        before = dict(launches)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = module(x).float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if module is plain:
                averages = [(a + p.detach()) / 2 for a, p in zip(averages, plain.parameters(), strict=True)]
            elif ema is not None:
                ema.update(module)
        used.append({name: count - before.get(name, 0) for name, count in launches.items()})
    assert used[0] == used[1]
    assert used[0]["norm_covariance"] == 4  # block and head, twice
    for p, expected in zip(inner.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor() if wrapper == "FSDP" else p, expected, rtol=1e-5, atol=1e-6)
    for average, expected in zip(ema.module.parameters() if ema else (), averages, strict=ema is not None):
        torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["off", "compiled", "traced", "functorch", "fx", "dispatch mode", "forward mode"])
def test_the_plain_path_is_taken(way, launches, monkeypatch):
    block, x = GsopBlock(ChannelGsop(5, 4).to(DEVICE, torch.bfloat16)).eval(), features((2, 5, 4, 4), torch.bfloat16)
    expected = block(x)
    launches.clear()
    if way == "off":
        monkeypatch.setenv("TIMM_GSOP_KERNELS", "0")
        assert kernels.why_off() == "TIMM_GSOP_KERNELS=0"
        found = block(x)
    elif way == "compiled":
        found = torch.compile(block, backend="eager", fullgraph=True)(x)
    elif way == "traced":
        found = torch.jit.trace(block, x, check_trace=False)(x)
        launches.clear()  # the trace itself has none; a leaf of fx and TorchScript may
    elif way == "functorch":
        found = torch.func.vmap(lambda x: block(x[None])[0])(x)
    elif way == "fx":
        with torch.no_grad():
            found = torch.fx.symbolic_trace(block)(x)
        launches.clear()  # its leaves are our functions, and may use kernels
    elif way == "dispatch mode":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            found = block(x)
        assert counter.get_total_flops() >= 2 * 2 * (5 * 4 + 4 * 4) * 16
    else:
        with torch.autograd.forward_ad.dual_level():
            found = block(x)
    assert not launches
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_offsets_beyond_32_bits_are_of_images_only():
    """A batch may be larger than 2³¹ elements, one image may not: offsets within it have 32 bits."""
    from timm_gsop.layers.kernels import rescale as operator

    small = torch.empty(1, device=DEVICE, dtype=torch.bfloat16)
    batch, image = small.expand(70_000, 2048, 7, 7), small.expand(1, 2048, 1024, 1025)
    assert batch.numel() > 2**31
    assert kernels.usable(batch)
    assert not kernels.usable(image)
    assert kernels._extent(torch.empty(2, 2**31 + 1, device="meta")[:, :: 2**30]) > 2**31 - 1
    grid, _ = operator._plan(torch.empty(1, device=DEVICE).expand(70_000, 2048, 49))
    assert grid[0] < 2**31
    assert grid[1] <= 65_535
