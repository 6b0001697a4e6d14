"""Training that can be repeated, and that lasts.

The figures of docs/guarantees.md: python -m pytest tests/test_training.py -k two_thousand -s
"""

import json
import resource
from typing import Any

import pytest
import timm
import torch

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


def long_run(steps: int) -> dict[str, Any]:
    """Train on random images of four kinds, a fifth of the labels wrong; every 250th step has 30 times the rate.

    For every tenth of the steps: mean loss, largest gradient norm, and the process's peak memory (MiB).
    """
    torch.manual_seed(0)
    model = timm.create_model(
        "gsop_resnet26_net2",
        channels=(8, 8, 16, 16),
        cov_dim=8,
        isqrt_dim=8,
        num_classes=4,
        gsop_type="avg",
        spatial_size=3,
    ).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    kinds = torch.randn(4, 3, 32, 32)
    log: dict[str, Any] = dict(steps=steps, loss=[], grad_norm=[], memory=[], finite=True)
    losses, norms = [], []
    for step in range(1, steps + 1):
        labels = torch.randint(0, 4, (8,))
        images = kinds[labels] + torch.randn(8, 3, 32, 32)
        wrong = torch.rand(8) < 0.2
        labels = torch.where(wrong, torch.randint(0, 4, (8,)), labels)
        optimizer.param_groups[0]["lr"] = 0.02 * (30.0 if step % 250 == 0 else 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)  # what it was before
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm.item())
        if step % (steps // 10) == 0:
            log["loss"].append(sum(losses) / len(losses))
            log["grad_norm"].append(max(norms))
            log["memory"].append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            losses, norms = [], []
    finite = all(value.isfinite().all() for value in model.state_dict().values())
    numbers = torch.tensor([*log["loss"], *log["grad_norm"]])
    log["finite"] = bool(finite and numbers.isfinite().all())
    return log


def assert_lasts(log: dict) -> None:
    assert log["finite"]
    assert log["loss"][-1] < log["loss"][0]
    assert log["memory"][-1] - log["memory"][2] < 30  # MiB, after warm-up


def test_a_hundred_steps():
    assert_lasts(long_run(100))


@pytest.mark.slow
def test_two_thousand_steps_with_spikes_and_noise():
    log = long_run(2000)
    print(json.dumps(log))
    assert_lasts(log)
