"""What the commands that measure have in common."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

__all__ = ["keep", "parser"]


def parser(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """``--json``; and with ``rounds``, the default for it, ``--rounds`` and ``--device``."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="keep the figures in this file")
    if rounds is not None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        options.add_argument("--device", type=torch.device, default=default)
        options.add_argument(
            "--rounds", type=int, default=rounds, help="how often each is timed (default: %(default)s)"
        )
    return options


def keep(result: Mapping[str, Any], path: Path) -> None:
    """Write figures as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")
