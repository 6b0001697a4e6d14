"""How the cost of second-order pooling grows, measured, and what its operations predict: python -m benchmarks.growth.

``--json`` keeps the figures; ``--figure`` draws them. On a GPU where one is.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command_line import keep, parse, parser
from benchmarks.paired import machine, time_paired
from timm_gsop.layers import ChannelGsop, GsopBlock, IsqrtCovPool2d, covariance_pool, newton_schulz_sqrt
from timm_gsop.viz.figure import new_figure, save_figure

__all__ = ["GROWTHS", "Growth", "exponent"]

CHANNELS = 256


class Growth(NamedTuple):
    """What grows with what: the values tried, and how to run it with one."""

    values: tuple[int, ...]
    create: Callable[[int, torch.device], Callable[[], Any]]


def _covariance(batch: int, dim: int, size: int, device: torch.device) -> Callable[[], Any]:
    x = torch.randn(batch, dim, size, size, device=device)
    return lambda: covariance_pool(x)


def _root(batch: int, dim: int, num_iters: int, device: torch.device) -> Callable[[], Any]:
    cov = covariance_pool(torch.randn(batch, dim, 2 * dim, device=device))
    return lambda: newton_schulz_sqrt(cov, num_iters)


def _block(batch: int, dim: int, size: int, device: torch.device) -> Callable[[], Any]:
    block = GsopBlock(ChannelGsop(CHANNELS, dim)).eval().to(device)
    x = torch.randn(batch, CHANNELS, size, size, device=device)
    return lambda: block(x)


def _head(batch: int, dim: int, size: int, device: torch.device) -> Callable[[], Any]:
    head = IsqrtCovPool2d(CHANNELS, dim).eval().to(device)
    x = torch.randn(batch, CHANNELS, size, size, device=device)
    return lambda: head(x)


DIMS = (32, 64, 128, 256, 512)
SIZES = (7, 14, 28, 56)
BATCHES = (1, 2, 4, 8, 16, 32)
GROWTHS = {
    "cov_dim": {
        "covariance, 14×14": Growth(DIMS, lambda d, device: _covariance(16, d, 14, device)),
        "square root, 5 iterations": Growth(DIMS, lambda d, device: _root(16, d, 5, device)),
        "block, 256×28×28": Growth(DIMS, lambda d, device: _block(16, d, 28, device)),
        "head, 256×14×14": Growth(DIMS, lambda d, device: _head(16, d, 14, device)),
    },
    "height and width": {
        "covariance, 128 channels": Growth(SIZES, lambda s, device: _covariance(16, 128, s, device)),
        "block, 256 channels": Growth(SIZES, lambda s, device: _block(16, 128, s, device)),
        "head, 256 channels": Growth(SIZES, lambda s, device: _head(16, 256, s, device)),
    },
    "iterations": {"square root, 256×256": Growth(tuple(range(1, 11)), lambda n, device: _root(16, 256, n, device))},
    "batch": {
        "block, 256×28×28": Growth(BATCHES, lambda b, device: _block(b, 128, 28, device)),
        "head, 256×14×14": Growth(BATCHES, lambda b, device: _head(b, 256, 14, device)),
    },
}


def exponent(values: Sequence[int], costs: Sequence[float]) -> float:
    """Slope between the two largest values, both axes logarithmic: where the term that wins in the end shows most."""
    return math.log(costs[-1] / costs[-2]) / math.log(values[-1] / values[-2])


def operations(work: Callable[[], Any]) -> int:
    """Multiply-accumulates, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


def measure(device: torch.device, rounds: int) -> dict[str, Any]:
    """Everything, in inference."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        for by, growths in GROWTHS.items():
            found[by] = {}
            for name, growth in growths.items():
                works = {str(value): growth.create(value, device) for value in growth.values}
                timings = time_paired(works, str(growth.values[0]), rounds, device)
                seconds = [timings[str(value)].seconds for value in growth.values]
                found[by][name] = dict(
                    values=growth.values, seconds=seconds, macs=[operations(w) for w in works.values()]
                )
    return dict(machine=machine(device), batch=16, growths=found)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each quantity: curves, and dashed, multiply-accumulates at the speed of the largest value."""
    figure = new_figure(16, 4)
    axes = figure.subplots(1, len(result["growths"]))
    for axis, (by, curves) in zip(axes, result["growths"].items(), strict=True):
        for name, curve in curves.items():
            values, times = curve["values"], [1e3 * seconds for seconds in curve["seconds"]]
            label = f"{name}: {exponent(values, times):.1f}, predicted {exponent(values, curve['macs']):.1f}"
            (line,) = axis.plot(values, times, "o-", label=label)
            predicted = [times[-1] * macs / curve["macs"][-1] for macs in curve["macs"]]
            axis.plot(values, predicted, "--", color=line.get_color(), alpha=0.5)
        axis.set(xscale="log", yscale="log", xlabel=by, ylabel="inference (ms)")
        axis.set_xticks(values, [str(value) for value in values], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def main() -> None:
    """The command line."""
    options = parser(__doc__, rounds=15)
    options.add_argument("--figure", type=Path, help="draw them into this file")
    args = parse(options)
    result = measure(args.device, args.rounds)
    keep(result, args.json)
    if args.figure:
        draw(result, args.figure)
    for by, curves in result["growths"].items():
        for name, curve in curves.items():
            found, predicted = (exponent(curve["values"], curve[key]) for key in ("seconds", "macs"))
            print(f"{name}, with {by}: exponent {found:.2f}, predicted {predicted:.2f}")


if __name__ == "__main__":
    main()
