"""Time and memory of whole networks beside their peers: python -m benchmarks.models.

The twin is the same ResNet-50 without blocks, its last stage not down-sampled either. On a CPU: batch 16, float32. On a
GPU: batch 256, channels last, bfloat16 by autocast. ``--json`` keeps the figures for benchmarks.performance.
Training has a third of the rounds.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import timm_gsop
from benchmarks.command_line import keep, parser
from benchmarks.cost import measure as measure_cost
from benchmarks.paired import keep_freed_memory, machine, peak_bytes, time_paired
from benchmarks.performance import models_table
from timm_gsop.layers import ChannelGsop


class Network(NamedTuple):
    """One of timm's or ours, and its arguments; and whether its covariances are computed again for the gradient."""

    model: str
    kwargs: Mapping[str, Any] = {}
    recomputes: bool = False


FEW = {
    "twin": Network("gsop_resnet50_net1.untrained", dict(gsop_layers=())),
    "gsop_resnet50_net1": Network("gsop_resnet50_net1.untrained"),
    "gsop_resnet50_net2": Network("gsop_resnet50_net2.untrained"),
}
ALL = {
    **FEW,
    "isqrt_resnet50": Network("isqrt_resnet50.untrained"),
    "resnet50": Network("resnet50"),
}
RECOMPUTING = "gsop_resnet50_net1, covariances computed again for the gradient"
WAYS = {
    "inference": ALL,
    "fused": FEW,
    "training": {**ALL, RECOMPUTING: Network("gsop_resnet50_net1.untrained", recomputes=True)},
    "compiled": FEW,
    "compiled training": FEW,
}


def create(network: Network, device: torch.device, size: int) -> nn.Module:
    """Create it, with statistics of some data, and with channels last on a GPU."""
    model = timm.create_model(network.model, **network.kwargs).to(device).train()
    with torch.no_grad():
        model(torch.randn(4, 3, size, size, device=device))
    if network.recomputes:
        for module in model.modules():
            if isinstance(module, ChannelGsop):
                module.squeeze = partial(checkpoint, module.squeeze, use_reentrant=False)
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


@torch.inference_mode()
def infer(model: nn.Module, x: torch.Tensor) -> None:
    """Run it on ``x``."""
    with _autocast(x):
        model(x)


def train(model: nn.Module, x: torch.Tensor) -> None:
    """Run a training step without the optimizer's part: forward, backward."""
    with _autocast(x):
        loss = model(x).float().logsumexp(1).sum()
    loss.backward()
    model.zero_grad()


def _autocast(x: torch.Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")


def measure(ways: Sequence[str], device: torch.device, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Time the networks in each way, relative to the twin."""
    x = torch.randn(batch, 3, size, size, device=device)
    if device.type == "cuda":
        x = x.to(memory_format=torch.channels_last)
    result: dict[str, Any] = dict(machine=machine(device), batch=batch, size=size, ways={}, cost={})
    for way in ways:
        is_training = "training" in way
        works: dict[str, Callable[[], None]] = {}
        for name, network in WAYS[way].items():
            model = create(network, device, size).train(is_training)
            if way == "fused":
                model = timm_gsop.fuse_conv_bn(model)
            elif way.startswith("compiled"):
                model = torch.compile(model)
            works[name] = partial(train if is_training else infer, model, x)
            result["cost"][name] = measure_cost(network.model, **network.kwargs)._asdict()
        timings = time_paired(works, "twin", max(5, rounds // 3) if is_training else rounds, device)
        result["ways"][way] = {name: timing._asdict() for name, timing in timings.items()}
        if way == "training":
            for name, work in works.items():
                result["ways"][way][name]["peak_bytes"] = peak_bytes(work, device)
    return result


def main() -> None:
    """The command line."""
    options = parser(__doc__, rounds=31)
    ways = ("inference", "fused", "training")
    options.add_argument("--ways", nargs="+", default=ways, choices=WAYS, help="compiling takes minutes on a CPU")
    options.add_argument("--batch", type=int, help="images (default: 16 on a CPU, 256 on a GPU)")
    options.add_argument("--size", type=int, default=224, help="their height and width (default: %(default)s)")
    args = options.parse_args()
    keep_freed_memory()
    batch = args.batch or (256 if args.device.type == "cuda" else 16)
    result = measure(args.ways, args.device, batch, args.size, args.rounds)
    if args.json:
        keep(result, args.json)
    print(models_table(result))


if __name__ == "__main__":
    main()
