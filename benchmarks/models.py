"""Time and memory of whole networks beside their peers: python -m benchmarks.models.

The twin is the same ResNet-50 without blocks, its last stage not down-sampled either. On a CPU: batch 16, float32. On a
GPU: batch 256, channels last, bfloat16 by autocast. ``--json`` keeps the figures for benchmarks.performance.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_gsop
from benchmarks.cost import measure as measure_cost
from benchmarks.paired import keep_freed_memory, machine, peak_bytes, time_paired
from benchmarks.performance import models_table
from timm_gsop.layers import ChannelGsop

RECOMPUTING = "gsop_resnet50_net1, covariances computed again for the gradient"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "twin": ("gsop_resnet50_net1.untrained", dict(gsop_layers=())),
    "gsop_resnet50_net1": ("gsop_resnet50_net1.untrained", {}),
    "gsop_resnet50_net2": ("gsop_resnet50_net2.untrained", {}),
    RECOMPUTING: ("gsop_resnet50_net1.untrained", {}),
    "isqrt_resnet50": ("isqrt_resnet50.untrained", {}),
    "resnet50": ("resnet50", {}),
}
FEW = ("twin", "gsop_resnet50_net1", "gsop_resnet50_net2")


def create(name: str, device: torch.device, size: int) -> nn.Module:
    """A network with statistics of some data, and with channels last on a GPU."""
    model, kwargs = NETWORKS[name]
    network = timm.create_model(model, **kwargs).to(device).train()
    with torch.no_grad():
        network(torch.randn(4, 3, size, size, device=device))
    if name == RECOMPUTING:
        for module in network.modules():
            if isinstance(module, ChannelGsop):
                module.squeeze = partial(checkpoint, module.squeeze, use_reentrant=False)
    return network.to(memory_format=torch.channels_last) if device.type == "cuda" else network


def inference(network: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], None]:
    """Run it on ``x``."""

    def run() -> None:
        with torch.inference_mode(), _autocast(x):
            network(x)

    return run


def training(network: nn.Module, x: torch.Tensor, of: nn.Module | None = None) -> Callable[[], None]:
    """Run a training step without the optimizer's: forward, backward."""

    def run() -> None:
        with _autocast(x):
            loss = network(x).float().logsumexp(1).sum()
        loss.backward()
        (of or network).zero_grad()

    return run


def _autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")


def measure(ways: Sequence[str], device: torch.device, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Time the networks in each way, relative to the twin."""
    x = torch.randn(batch, 3, size, size, device=device)
    if device.type == "cuda":
        x = x.to(memory_format=torch.channels_last)
    result: dict[str, Any] = dict(machine=machine(), batch=batch, size=size, ways={})
    for way in ways:
        names = FEW if way in ("fused", "compiled", "compiled training") else tuple(NETWORKS)
        if way != "training":
            names = tuple(name for name in names if name != RECOMPUTING)
        networks = {name: create(name, device, size) for name in names}
        is_training = "training" in way
        for network in networks.values():
            network.train(is_training)
        if way == "fused":
            networks = {name: timm_gsop.fuse_conv_bn(network) for name, network in networks.items()}
        run: dict[str, Callable] = dict(networks)
        if way.startswith("compiled"):
            run = {name: torch.compile(network) for name, network in networks.items()}
        if is_training:
            works = {name: training(run[name], x, networks[name]) for name in names}
        else:
            works = {name: inference(run[name], x) for name in names}
        timings = time_paired(works, "twin", max(5, rounds // 3) if is_training else rounds)
        result["ways"][way] = {name: timing._asdict() for name, timing in timings.items()}
        if way == "training":
            for name, work in works.items():
                result["ways"][way][name]["peak_bytes"] = peak_bytes(work)
    result["cost"] = {name: measure_cost(model, **kwargs)._asdict() for name, (model, kwargs) in NETWORKS.items()}
    return result


WAYS = ("inference", "fused", "training", "compiled", "compiled training")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ways", nargs="+", default=WAYS[:3], choices=WAYS, help="compiling takes minutes on a CPU")
    parser.add_argument("--batch", type=int, help="images; default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--size", type=int, default=224, help="their height and width")
    parser.add_argument("--rounds", type=int, default=31, help="a third of it in training")
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args()
    keep_freed_memory()
    device = torch.device(args.device)
    batch = args.batch or (256 if device.type == "cuda" else 16)
    result = measure(args.ways, device, batch, args.size, args.rounds)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print(models_table(result).text)


if __name__ == "__main__":
    main()
