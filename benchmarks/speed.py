"""Time and memory of blocks, heads and networks: python -m benchmarks.speed.

``--against DIR`` compares this checkout with another one, in alternating rounds; ratios are of this one to the other.
"""

import argparse
import json
import math
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch

from benchmarks.timing import CPU, ROOT, Checkout, keep_freed_memory, machine, seconds, time_paired


class Case(NamedTuple):
    """A public layer or a model, its positional arguments, and the shape of its input without the batch."""

    name: str
    args: tuple[Any, ...]
    shape: tuple[int, ...]

    @property
    def label(self) -> str:
        """How tables name it."""
        return f"{self.name}({', '.join(map(str, self.args))}) on {'×'.join(map(str, self.shape))}"


CASES = {
    "layers": [
        Case("ChannelGsop", (256,), (256, 56, 56)),
        Case("ChannelGsop", (1024,), (1024, 14, 14)),
        Case("PositionGsop", (1024,), (1024, 14, 14)),
        Case("FusedGsop", (1024,), (1024, 14, 14)),
        Case("FusedGsop", (1024, "concat"), (1024, 14, 14)),
        Case("IsqrtCovPool2d", (2048,), (2048, 14, 14)),
        Case("MpnCovPool2d", (2048,), (2048, 14, 14)),
    ],
    "networks": [
        Case("gsop_resnet50_net1", (), (3, 224, 224)),
        Case("gsop_resnet50_net2", (), (3, 224, 224)),
    ],
}
SAMPLE_SECONDS = 0.25  # shorter runs are repeated until a sample takes this long


def compare_checkouts(args: argparse.Namespace) -> dict[str, Any]:
    """Time every case in both checkouts."""
    checkouts = {"this": Checkout(ROOT), "other": Checkout(args.against)}
    rows = []
    for group in args.what:
        for case in CASES[group]:
            for training in (False, True):
                shape = (args.batch, *case.shape)
                request = ("create", case.name, case.args, shape, training, args.bfloat16, str(args.device))
                memory = {name: checkout.ask(*request) for name, checkout in checkouts.items()}
                once = median(seconds(lambda: checkouts["other"].ask("run", 1)) for _ in range(3))
                repeats = math.ceil(SAMPLE_SECONDS / once)
                works = {name: partial(checkout.ask, "run", repeats) for name, checkout in checkouts.items()}
                timing = time_paired(works, "other", args.rounds)["this"]
                timing = timing._replace(seconds=timing.seconds / repeats)
                rows.append(dict(case=case.label, training=training, **timing._asdict(), peak_bytes=memory))
                which = "forward, backward" if training else "inference"
                print(
                    f"{case.label:42} {which:18} {1e3 * timing.seconds:8.1f} ms"
                    f"  time {timing.ratio:.3f} ({timing.low:.3f}–{timing.high:.3f})"
                    f"  peak memory {memory['this'] / max(memory['other'], 1):.3f}",
                    flush=True,
                )
    for checkout in checkouts.values():
        checkout.close()
    return dict(machine=machine(args.device), batch=args.batch, rounds=args.rounds, rows=rows)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(CASES), metavar="{layers,networks}", help="default: both")
    parser.add_argument("--against", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bfloat16", action="store_true", help="under autocast")
    parser.add_argument("--device", type=torch.device, default=CPU)
    parser.add_argument("--json", type=Path, help="keep the figures in this file")
    args = parser.parse_args()
    keep_freed_memory()
    result = compare_checkouts(args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
