"""What the commands that measure have in common."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.paired import keep_freed_memory

__all__ = ["keep", "parse", "parser"]


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """``--json``, ``--float32-products``; and with ``rounds``, the default for it, ``--rounds`` and ``--device``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="keep the figures in this file")
    options.add_argument(
        "--float32-products",
        default="highest",
        choices=("highest", "high", "medium"),
        help="torch.set_float32_matmul_precision: covariances and square roots are such products",
    )
    if rounds is not None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        options.add_argument("--device", type=torch.device, default=default)
        options.add_argument(
            "--rounds", type=int, default=rounds, help="how often each is timed (default: %(default)s)"
        )
    return options


def parse(options: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line, and set up the process for measuring as it says."""
    args = options.parse_args()
    keep_freed_memory()
    torch.set_float32_matmul_precision(args.float32_products)
    return args


def keep(result: Mapping[str, Any], path: Path | None) -> None:
    """Write figures as JSON, if there is a path to write them to."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")
