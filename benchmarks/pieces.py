"""Time of each piece of the blocks and of the head, by itself, in inference: python -m benchmarks.pieces.

The blocks are those of GSoP-Net1 with ResNet-50, the head is GSoP-Net2's. ``--json`` keeps the figures for
benchmarks.performance.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.blocks import COV_DIM, HEAD, HEAD_DIM, NUM_ITERS, STAGES
from benchmarks.command_line import keep, parse, parser
from benchmarks.paired import machine, time_paired
from benchmarks.performance import pieces_table
from timm_gsop.layers import ChannelGsop, GsopBlock, IsqrtCovPool2d, covariance_pool

Works = dict[str, Callable[[], Any]]


def block_works(x: torch.Tensor) -> Works:
    """A block, and its pieces."""
    block = GsopBlock(ChannelGsop(x.shape[1], COV_DIM)).to(x.device).eval()
    gsop = block.gsop
    conv, rest = gsop.reduction.conv, nn.Sequential(gsop.reduction.bn, gsop.reduction.act)
    convolved, reduced, cov, weights = conv(x), gsop.reduction(x), gsop.squeeze(x), gsop.channel_weights(x)
    centred = reduced.flatten(2) - reduced.flatten(2).mean(2, keepdim=True)
    return {
        "all of it": lambda: block(x),
        "1×1 reduction": lambda: conv(x),
        "batch normalization and ReLU": lambda: rest(convolved),
        "covariance": lambda: covariance_pool(reduced),
        "covariance: its product": lambda: torch.bmm(centred, centred.mT),
        "excitation": lambda: gsop.excitation(cov),
        "scaling, with the shortcut": lambda: x * (1 + weights),
    }


def head_works(x: torch.Tensor) -> Works:
    """The head, and its pieces."""
    head = IsqrtCovPool2d(x.shape[1], HEAD_DIM, NUM_ITERS).to(x.device).eval()
    reduced, cov = head.reduction(x), head.squeeze(x)
    return {
        "all of it": lambda: head(x),
        "reduction": lambda: head.reduction(x),
        "covariance": lambda: covariance_pool(reduced),
        "square root": lambda: head.normalize(cov),
        "triangle": lambda: head.vectorize(cov),
    }


def row_conv_works(batch: int, device: torch.device) -> Works:
    """The row-wise convolution, and PyTorch's grouped one."""
    ours = ChannelGsop(4, COV_DIM).excitation.row_conv.to(device)
    grouped = nn.Conv2d(COV_DIM, 4 * COV_DIM, (COV_DIM, 1), groups=COV_DIM, bias=False, device=device)
    x = torch.randn(batch, COV_DIM, COV_DIM, 1, device=device)
    return {"row-wise convolution": lambda: ours(x), "PyTorch's, grouped": lambda: grouped(x)}


@torch.inference_mode()
def measure(device: torch.device, batch: int, rounds: int) -> dict[str, Any]:
    """Seconds of each piece; of the blocks', the sum over the four stages."""

    def seconds(works: Works) -> dict[str, float]:
        timings = time_paired(works, next(iter(works)), rounds, device)
        return {name: timing.seconds for name, timing in timings.items()}

    def features(channels: int, size: int) -> torch.Tensor:
        return torch.randn(batch, channels, size, size, device=device).relu_()

    blocks: Counter[str] = Counter()
    for channels, size in STAGES:
        blocks.update(seconds(block_works(features(channels, size))))
    return dict(
        machine=machine(device),
        batch=batch,
        blocks=blocks,
        head=seconds(head_works(features(*HEAD))),
        row_conv=seconds(row_conv_works(batch, device)),
    )


def main() -> None:
    """The command line."""
    options = parser(__doc__, rounds=21)
    options.add_argument("--batch", type=int, default=16, help="images (default: %(default)s)")
    args = parse(options)
    result = measure(args.device, args.batch, args.rounds)
    keep(result, args.json)
    print(pieces_table(result))


if __name__ == "__main__":
    main()
