"""Time and memory of a GSoP block and of covariance pooling beside their peers: python -m benchmarks.blocks.

The four stages of ResNet-50 at 224×224, the last one without down-sampling: batch 16 on a CPU, 256 on a GPU. ``--json``
keeps the figures; benchmarks.performance makes the page of them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import create_attn
from torch import nn

from benchmarks.command_line import keep, parse, parser
from benchmarks.paired import machine, saved_bytes, seconds, time_paired
from benchmarks.performance import blocks_table
from benchmarks.textbook import EighPool2d, TextbookChannelGsop, TextbookIsqrtCovPool2d
from timm_gsop.layers import ChannelGsop, GsopBlock, IsqrtCovPool2d

STAGES = ((256, 56), (512, 28), (1024, 14), (2048, 14))
HEAD = (2048, 14)
FIRST_ORDER = ("se", "cbam", "eca", "gc")
COV_DIM, HEAD_DIM, NUM_ITERS = 128, 256, 5


def blocks(channels: int) -> dict[str, nn.Module]:
    """What stands after a stage: our block, the textbook's, timm's first-order attention."""
    attention = {name: create_attn(name, channels) for name in FIRST_ORDER}
    return {
        "ours": GsopBlock(ChannelGsop(channels, COV_DIM)),
        "textbook": GsopBlock(TextbookChannelGsop(channels, COV_DIM)),
        **attention,
    }


def heads(channels: int) -> dict[str, nn.Module]:
    """What pools at the end: ours, the textbook's, and the exact root by PyTorch's eigen-decomposition."""
    return {
        "ours": IsqrtCovPool2d(channels, HEAD_DIM, NUM_ITERS),
        "textbook": TextbookIsqrtCovPool2d(channels, HEAD_DIM),
        "eigh": EighPool2d(channels, HEAD_DIM),
    }


def block_pieces(channels: int, positions: int) -> list[tuple[int, int]]:
    """Multiply-accumulates and float32 values moved, of an image: reduction, covariance, excitation, scaling."""
    d = COV_DIM
    return [
        (channels * d * positions, (channels + d) * positions),
        (d * d * positions, d * positions + d * d),
        (4 * d * d + 4 * d * channels, d * d + channels),
        (0, 2 * channels * positions),
    ]


def head_pieces(channels: int, positions: int, training: bool) -> list[tuple[int, int]]:
    """Multiply-accumulates and float32 values moved, of an image: reduction, covariance, root, triangle."""
    d = HEAD_DIM
    products = (12 + 17) / 3 if training else 10  # the whole is tripled in training
    return [
        (channels * d * positions, (channels + d) * positions),
        (d * d * positions, d * positions + d * d),
        (int(products * d**3), 2 * d * d),
        (0, d * d + d * (d + 1) // 2),
    ]


def speeds(device: torch.device) -> dict[str, float]:
    """Multiply-accumulates a second of a large float32 product, and bytes a second of a copy: the best of ten."""
    a = torch.randn(4096, 4096, device=device)
    big = torch.randn(2**26, device=device)
    copy = torch.empty_like(big)
    return dict(
        macs=4096**3 / min(seconds(lambda: a @ a, device) for _ in range(10)),
        bytes=8 * 2**26 / min(seconds(lambda: copy.copy_(big), device) for _ in range(10)),
    )


def floor(pieces: list[tuple[int, int]], batch: int, training: bool, speed: Mapping[str, float]) -> float:
    """Seconds that arithmetic or memory take at least, whichever is more for each piece; training counts thrice."""
    times = (max(macs / speed["macs"], 4 * values / speed["bytes"]) for macs, values in pieces)
    return (3 if training else 1) * batch * sum(times)


def compare(modules: Mapping[str, nn.Module], x: torch.Tensor, training: bool, rounds: int) -> dict[str, Any]:
    """Time the modules on ``x``, relative to ours; in training, forward and backward, and the memory that is kept."""

    def step(module: nn.Module) -> None:
        if training:
            module(x).sum().backward()
        else:
            with torch.inference_mode():
                module(x)

    for module in modules.values():
        module.to(x.device).train(training)
    works = {name: partial(step, module) for name, module in modules.items()}
    timings = time_paired(works, "ours", rounds, x.device)
    found = {name: timing._asdict() for name, timing in timings.items()}
    if training:
        for name, module in modules.items():
            found[name]["saved_bytes"] = saved_bytes(module, x)
    return found


def measure(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Everything."""
    speed = speeds(device)
    rows = []
    for kind, places in (("block", STAGES), ("head", (HEAD,))):
        for channels, size in places:
            x = torch.randn(batch, channels, size, size, device=device).relu_().requires_grad_()
            for training in (False, True):
                modules = blocks(channels) if kind == "block" else heads(channels)
                pieces = block_pieces(channels, size**2)
                if kind == "head":
                    pieces = head_pieces(channels, size**2, training)
                row = dict(kind=kind, channels=channels, size=size, training=training)
                row["floor"] = floor(pieces, batch, training, speed)
                rows.append(dict(row, alternatives=compare(modules, x, training, rounds)))
    return dict(machine=machine(device), batch=batch, speed=speed, rows=rows)


def main() -> None:
    """The command line."""
    options = parser(__doc__, rounds=15)
    options.add_argument("--batch", type=int, help="images (default: 16 on a CPU, 256 on a GPU)")
    args = parse(options)
    result = measure(args.device, args.batch or (256 if args.device.type == "cuda" else 16), args.rounds)
    keep(result, args.json)
    print(blocks_table(result))


if __name__ == "__main__":
    main()
