"""The heads that came after iSQRT-COV are the published functions, values and gradients, wherever those are finite."""

import math

import pytest
import torch
from torch import nn

from benchmarks.timing import peak_bytes
from tests import head_oracles
from tests.layers import CHANNELS, HEADS, randomize
from tests.versions import skip_before_torch_2_6
from timm_gsop import BdcPool2d, CovPool2d, DropCovPool2d, MomentPool2d, SvpnPool2d
from timm_gsop.layers.bdc_pool import channel_distances
from timm_gsop.layers.dropcov_pool import drop_rate_of, weigh_and_drop
from timm_gsop.layers.svpn_pool import singular_value_power_norm

FLOAT64 = dict(dtype=torch.float64)
batches = pytest.mark.parametrize("batch", [1, 3])
sizes = pytest.mark.parametrize("size", [(4, 4), (1, 9), (7, 5)], ids=str)


def assert_same_function(pool: nn.Module, oracle, x: torch.Tensor) -> None:
    """Values, and gradients with respect to the input and every parameter, in float64."""
    x = x.requires_grad_()
    inputs = [x, *pool.parameters()]
    found, expected = pool(x), oracle(x)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    gradients = (torch.autograd.grad(y, inputs, direction, allow_unused=True) for y in (found, expected))
    for of_pool, of_oracle in zip(*gradients, strict=True):
        torch.testing.assert_close(of_pool, of_oracle)


def reduced(pool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return pool.reduction(x).flatten(2)


@batches
@sizes
def test_cov_and_dropcov_in_evaluation_are_the_covariance(batch, size):
    x = torch.randn(batch, 6, *size, **FLOAT64)
    for pool in (CovPool2d(6, 4, **FLOAT64), DropCovPool2d(6, 4, **FLOAT64)):
        randomize(pool).eval()
        expected = [head_oracles.triangle(head_oracles.covariance(sample)) for sample in reduced(pool, x)]
        torch.testing.assert_close(pool(x), torch.stack(expected))


@batches
@sizes
def test_dropcov_in_training(batch, size):
    """With the uniform noise that decides which channels stay, drawn once more from the same seed."""
    rates = []

    def oracle(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        noise = torch.rand(batch, 12, 1, 1, **FLOAT64)[:, :, 0, 0]
        y, rate = head_oracles.dropcov(reduced(pool, x), pool.importance.weight.flatten(), noise)
        rates.append(rate)
        return y

    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return pool(x)

    pool = randomize(DropCovPool2d(6, 12, **FLOAT64)).train()
    for kernel in ([0.3, 0.9, -0.4], [0.1, -20.0, 0.1]):  # weak channels as the important ones: many are dropped
        with torch.no_grad():
            pool.importance.weight.copy_(torch.tensor(kernel))
        seeded.parameters = pool.parameters
        assert_same_function(seeded, oracle, torch.randn(batch, 6, *size, **FLOAT64))
    assert 0 < rates[-1] < 1


def test_dropcov_drops_channels_of_samples_at_its_rate():
    torch.manual_seed(0)
    x, logits = torch.randn(64, 256, 6, 6), torch.zeros(64, 256)
    x[:, 0] *= 30  # one channel has nearly all of the covariance, and importance is even
    rate = drop_rate_of(x * (1 + 1 / 256), logits.softmax(1)).item()
    kept = weigh_and_drop(x, logits) / (x * (1 + 1 / 256))
    assert 0.8 < rate < 1
    dropped = kept.isclose(torch.zeros(())).flatten(2)
    assert (dropped.all(2) | ~dropped.any(2)).all()
    assert dropped.float().mean().item() == pytest.approx(rate, abs=0.01)
    torch.testing.assert_close(kept.max(), torch.tensor(1 / (1 - rate)))


def test_the_rate_of_dropcov_leaves_out_samples_without_covariance():
    x, importance = torch.randn(3, 16, 5, 5), torch.rand(3, 16)
    x[1] = 7.3
    torch.testing.assert_close(drop_rate_of(x, importance), drop_rate_of(x[[0, 2]], importance[[0, 2]]))
    assert drop_rate_of(x[:, :, :1, :1], importance) == 0
    opposite = torch.zeros(1, 16).scatter(1, torch.tensor([[3]]), 1.0)
    x = torch.zeros(1, 16, 5, 5)
    x[0, 2] = torch.randn(5, 5)
    assert drop_rate_of(x, opposite) == 1 - 1 / 16  # the released code drops everything


@batches
@sizes
@pytest.mark.parametrize("dim", [4, 6, None])
def test_bdc(batch, size, dim):
    """Nothing is reduced where ``dim`` is the number of channels, or None; BN's statistics are those of the batch."""
    pool = randomize(BdcPool2d(6, dim, **FLOAT64)).train()
    assert isinstance(pool.reduction, nn.Identity) == (dim != 4)
    positions = size[0] * size[1]
    assert_same_function(
        pool,
        lambda x: head_oracles.bdc(reduced(pool, x), pool.temperature.exp() / (2 * positions)),
        torch.randn(batch, 6, *size, **FLOAT64),
    )


@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0, 300.0])
def test_distances_of_channels_do_not_cancel(offset):
    """In float32 an offset of 300 standard deviations costs no digits: products without centring lose 2e-2."""
    x = torch.randn(2, 16, 49, **FLOAT64) + offset * torch.randn(2, 1, 49, **FLOAT64)
    exact = (x[:, :, None] - x[:, None]).square().mean(3)
    error = (channel_distances(x.float()) - exact).abs().max() / exact.max()
    assert error < 1e-6 * max(1, offset)  # the features themselves are rounded
    assert (channel_distances(x.float()).diagonal(dim1=1, dim2=2) == 0).all()


def test_bdc_of_equal_channels_has_finite_gradients():
    pool = BdcPool2d(6, None)
    x = torch.randn(2, 1, 4, 4).repeat(1, 6, 1, 1).requires_grad_()
    pool(x).sum().backward()
    assert x.grad.isfinite().all()
    assert pool.temperature.grad.isfinite()
    assert pool.no_weight_decay() == {"temperature"}


def test_second_derivatives_of_distances():
    x = torch.randn(2, 3, 4, **FLOAT64, requires_grad=True)
    assert torch.autograd.gradgradcheck(channel_distances, x)


@batches
@sizes
@pytest.mark.parametrize("centring", ["scalar", "channel"])
def test_svpn(batch, size, centring):
    for steps in (1, 3):
        pool = SvpnPool2d(6, 2, 4, num_iters=steps, centring=centring, drop=0, first_moment=False, **FLOAT64).train()
        randomize(pool)
        assert_same_function(
            pool,
            lambda x, pool=pool, steps=steps: head_oracles.svpn(
                x.flatten(2), pool.proj.weight[:, :, 0, 0], pool.vector, 2, centring == "channel", steps
            ),
            torch.randn(batch, 6, *size, **FLOAT64),
        )


def test_svpn_takes_the_largest_singular_value_to_a_power():
    mat, start = torch.randn(3, 5, 5, **FLOAT64), torch.randn(5, **FLOAT64)
    u, s, vh = torch.linalg.svd(mat)
    for alpha in (0.5, 0.25):
        normalized = singular_value_power_norm(mat, start, alpha, num_iters=300)
        expected = torch.cat([s[:, :1] ** alpha, s[:, 1:] / (s[:, :1] ** (1 - alpha) + 1e-5)], dim=1)
        torch.testing.assert_close(normalized, u @ torch.diag_embed(expected) @ vh, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_svpn_of_zero_matrices_is_zero_with_finite_gradients(dtype):
    mat = torch.zeros(2, 4, 4, dtype=dtype)
    mat[1, 0, 1] = 3.0  # and of one whose product with the start is zero
    vector = torch.tensor([1.0, 0, 0, 0], dtype=dtype, requires_grad=True)
    y = singular_value_power_norm(mat.requires_grad_(), vector)
    y.sum().backward()
    assert y[0].count_nonzero() == 0
    assert all(t.isfinite().all() for t in (y, mat.grad, vector.grad))


def test_svpn_drops_entries_in_training_and_not_the_first_moment():
    pool, x = SvpnPool2d(6, 2, 4, drop=0.5), torch.randn(3, 6, 4, 4)
    trained, evaluated = pool.train()(x), pool.eval()(x)
    torch.testing.assert_close(trained[:, :6], x.mean((2, 3)))
    scale = trained[:, 6:] / evaluated[:, 6:]
    assert {round(value, 3) for value in scale.flatten().tolist()} == {0.0, 2.0}


@batches
@sizes
def test_moment(batch, size):
    pool = randomize(MomentPool2d(6, 32, first_moment=False, **FLOAT64)).train()
    weights = dict(pool.named_parameters())
    assert_same_function(
        pool, lambda x: head_oracles.moment(x.flatten(2), weights), torch.randn(batch, 6, *size, **FLOAT64)
    )


def test_moment_has_the_published_sizes():
    pool = MomentPool2d(768)
    assert pool.out_features == 768 + 2883
    parameters = sum(p.numel() for p in pool.parameters())
    assert parameters + 1000 * (pool.out_features + 1) == pytest.approx(4.047e6, rel=1e-3)
    x = nn.functional.layer_norm(torch.randn(4, 196, 768), (768,)).transpose(1, 2).unsqueeze(3)
    assert 2 * pool(x)[:, 768:].std().item() == pytest.approx(0.014, abs=0.004)


@pytest.mark.parametrize(
    "create", [lambda **kw: SvpnPool2d(6, 1, 4, drop=0, **kw), lambda **kw: MomentPool2d(6, 28, **kw)]
)
def test_one_classifier_is_the_published_sum_of_two(create):
    """First moment in front: a token where there is one, else the average; the scale of both is alike."""
    pool, x, token = create(), torch.randn(2, 6, 3, 4), torch.randn(2, 6)
    alone = create(first_moment=False)
    alone.load_state_dict(pool.state_dict())
    scale = 0.5 if isinstance(pool, MomentPool2d) else 1.0
    for first, y in ((token, pool(x, token)), (x.mean((2, 3)), pool(x))):
        torch.testing.assert_close(y, scale * torch.cat([first, alone(x)], dim=1))
    torch.testing.assert_close(alone(x, token), alone(x))
    assert (pool.takes_token, alone.takes_token) == (True, False)
    tokens = x.flatten(2)[:, :, torch.randperm(12)].unsqueeze(3)  # in any order
    torch.testing.assert_close(pool(tokens), pool(x))
    with pytest.raises(ValueError, match=r"token has shape \(2, 5\); accepted: \(B, 6\)"):
        pool(x, token[:, :5])


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: DropCovPool2d(6, 0), "dim=0 .* integer >= 1"),
        (lambda: BdcPool2d(6, 0), "dim=0 .* integer >= 1"),
        (lambda: BdcPool2d(0), "in_features=0"),
        (lambda: SvpnPool2d(6, 0), "num_heads=0"),
        (lambda: SvpnPool2d(6, head_dim=0), "head_dim=0"),
        (lambda: SvpnPool2d(6, num_iters=0), "num_iters=0"),
        (lambda: SvpnPool2d(6, centring="row"), "centring='row' is not accepted; accepted: 'scalar', 'channel'"),
        (lambda: SvpnPool2d(6, drop=1.5), "drop=1.5 .* >= 0 and < 1"),
        (lambda: SvpnPool2d(6, alpha=-1), "alpha=-1 .* >= 0 and < 1"),
        (lambda: SvpnPool2d(6, first_moment="no"), "first_moment='no'"),
        (lambda: MomentPool2d(6, 30), "hidden_dim=30 .* multiple of 4, 28 or more"),
        (lambda: MomentPool2d(6, 24), "hidden_dim=24"),
        (lambda: MomentPool2d(0), "in_features=0"),
    ],
)
def test_bad_arguments_are_named(create, message):
    with pytest.raises(ValueError, match=message):
        create()


def test_initial_weights_are_the_published_ones():
    for pool in (DropCovPool2d(64, 256), BdcPool2d(64, 256)):
        assert pool.reduction.conv.weight.std().item() == pytest.approx(math.sqrt(2 / 256), rel=0.05)
    assert SvpnPool2d(256).proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("create", "pairs"),
    [(lambda: BdcPool2d(64, None), 64**2), (lambda: SvpnPool2d(64), 6 * 24**2), (lambda: MomentPool2d(64), 3 * 128**2)],
)
def test_memory_in_training_is_below_half_of_that_of_every_pair_of_channels(create, pairs):
    pool, x = create().train(), torch.randn(4, 64, 48, 48, requires_grad=True)
    assert peak_bytes(lambda: pool(x).sum().backward()) < 4 * pairs * x[:, 0].numel() / 2


class Heads(nn.Module):
    """Several heads of the same features."""

    def __init__(self, kinds: list[str]) -> None:
        super().__init__()
        self.heads = nn.ModuleList([randomize(HEADS[kind]()) for kind in kinds])

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [head(x) for head in self.heads]


@skip_before_torch_2_6(reason="PyTorch's exporter is older than this way to ask")
def test_onnx(tmp_path):
    """The batch is free."""
    import onnxruntime

    heads, x = Heads(["dropcov", "bdc", "svpn", "moment"]).eval(), torch.randn(2, CHANNELS, 5, 5)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(heads, (x,), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    program.save(tmp_path / "heads.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "heads.onnx", providers=["CPUExecutionProvider"])
    for images in (x, torch.randn(5, CHANNELS, 5, 5)):
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for result, expected in zip(found, heads(images), strict=True):
            torch.testing.assert_close(torch.from_numpy(result), expected.detach(), rtol=1e-3, atol=1e-4)
