"""Time and memory of whole networks beside their peers: python -m benchmarks.models.

The twin is the same ResNet-50 without blocks, its last stage not down-sampled either. On a CPU: batch 16, float32. On a
GPU: batch 256, bfloat16. Bfloat16 is by autocast, with channels last. Training has a third of the rounds. ``--json``
keeps the figures for benchmarks.performance.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.command_line import keep, parse, parser
from benchmarks.cost import measure as measure_cost
from benchmarks.paired import machine, peak_bytes, time_paired
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
    "training": {**ALL, RECOMPUTING: Network("gsop_resnet50_net1.untrained", recomputes=True)},
    "compiled": FEW,
    "compiled training": FEW,
}
DTYPES = ("float32", "bfloat16")


def create(network: Network, device: torch.device, size: int) -> nn.Module:
    """Create it, with statistics of some data."""
    model = timm.create_model(network.model, **network.kwargs).to(device).train()
    with torch.no_grad():
        model(torch.randn(4, 3, size, size, device=device))
    if network.recomputes:
        for module in model.modules():
            if isinstance(module, ChannelGsop):
                module.squeeze = partial(checkpoint, module.squeeze, use_reentrant=False)
    return model


@torch.inference_mode()
def infer(model: nn.Module, x: torch.Tensor, bfloat16: bool) -> None:
    """Run it on ``x``."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        model(x)


def train(model: nn.Module, x: torch.Tensor, bfloat16: bool) -> None:
    """Run a training step without the optimizer's part: forward, backward."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
        loss = model(x).float().logsumexp(1).sum()
    loss.backward()
    model.zero_grad()


def measure(
    ways: Sequence[str], device: torch.device, dtype: str, batch: int, size: int, rounds: int
) -> dict[str, Any]:
    """Time the networks in each way, relative to the twin."""
    bfloat16 = dtype == "bfloat16"
    layout = torch.channels_last if bfloat16 else torch.contiguous_format
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    result: dict[str, Any] = dict(machine=machine(device), dtype=dtype, batch=batch, size=size, ways={})
    for way in ways:
        is_training = "training" in way
        works: dict[str, Callable[[], None]] = {}
        for name, network in WAYS[way].items():
            model = create(network, device, size).train(is_training).to(memory_format=layout)
            if way.startswith("compiled"):
                model = torch.compile(model)
            works[name] = partial(train if is_training else infer, model, x, bfloat16)
        timings = time_paired(works, "twin", max(5, rounds // 3) if is_training else rounds, device)
        result["ways"][way] = {name: timing._asdict() for name, timing in timings.items()}
        if is_training:
            for name, work in works.items():
                result["ways"][way][name]["peak_bytes"] = peak_bytes(work, device)
    measured = {name: network for way in ways for name, network in WAYS[way].items()}
    result["cost"] = {name: measure_cost(n.model, **n.kwargs)._asdict() for name, n in measured.items()}
    return result


def main() -> None:
    """The command line."""
    options = parser(__doc__, rounds=31)
    ways = ("inference", "training")
    options.add_argument("--ways", nargs="+", default=ways, choices=WAYS, help="compiling takes minutes on a CPU")
    options.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    options.add_argument("--batch", type=int, help="images (default: 16 on a CPU, 256 on a GPU)")
    options.add_argument("--size", type=int, default=224, help="their height and width (default: %(default)s)")
    args = parse(options)
    dtype, batch = ("bfloat16", 256) if args.device.type == "cuda" else ("float32", 16)
    dtype, batch = args.dtype or dtype, args.batch or batch
    result = measure(args.ways, args.device, dtype, batch, args.size, args.rounds)
    keep(result, args.json)
    print(models_table(result))


if __name__ == "__main__":
    main()
