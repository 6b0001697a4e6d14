"""Training that can be repeated, and that lasts."""

import os
import subprocess
import sys

import pytest
import timm
import torch

from benchmarks.long_run import run

SMALL = dict(channels=(8, 8, 16, 16), cov_dim=8, isqrt_dim=6, num_classes=4, spatial_size=3)
NETWORKS = {
    "net1": ("gsop_resnet26_net1", {}),
    "net2": ("gsop_resnet26_net2", dict(gsop_type="concat")),
    "mpn": ("gsop_resnet26_net2", dict(global_pool="mpn", gsop_type="position")),
    "official": ("gsop_resnet26_net2", dict(flavor="official", channels=(16, 32, 48, 64), gsop_type="max")),
}


def trained(network: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    name, kwargs = NETWORKS[network]
    model = timm.create_model(name, **{**SMALL, **kwargs}).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        loss = torch.nn.functional.cross_entropy(model(torch.randn(4, 3, 48, 48)), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_same_seed_gives_the_same_weights_and_steps(network, deterministic):
    """To the bit, with every operation deterministic."""
    first, second, other = trained(network, 0), trained(network, 0), trained(network, 1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_in_another_process_too():
    """Weights at the start, as PyTorch's generator gives them."""
    code = (
        "import timm, torch; torch.manual_seed(0)\n"
        "model = timm.create_model('gsop_resnet26_net2', channels=(8, 8, 16, 16), cov_dim=8)\n"
        "print(sum(float(p.double().sum()) for p in model.parameters()))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def assert_lasts(log: dict) -> None:
    assert log["finite"]
    assert log["loss"][-1] < log["loss"][0]
    assert log["memory"][-1] - log["memory"][2] < 30  # MiB, after warm-up


def test_a_hundred_steps():
    assert_lasts(run(100))


@pytest.mark.slow
def test_two_thousand_steps_with_spikes_and_noise():
    assert_lasts(run(2000))
