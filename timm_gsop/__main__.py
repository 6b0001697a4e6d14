"""What is installed, and which networks have weights: python -m timm_gsop [--json]. Never connects to the network."""

import argparse
import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, model_entrypoint

from timm_gsop import __version__
from timm_gsop.layers import kernels
from timm_gsop.pretrained.locate import weights_state

_NO_WEIGHTS = {"tag": "", "state": "none", "source": "", "untrained": ""}
_OF_THE_BACKBONE = {"state": "its backbone's", "untrained": "neutral blocks, new head"}


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m timm_gsop", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    found = _look_around()
    print(json.dumps(found, indent=2, ensure_ascii=False) if args.json else _as_text(found))


def _look_around() -> dict[str, Any]:
    why_not = _why_no_autoload()
    why_off = kernels.why_off()
    return {
        "timm_gsop": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "device": _device(),
        "kernels": {"active": not why_off, "reason": why_off},
        "autoload": {"active": not why_not, "reason": why_not},
        "models": {name: _weights(name) for name in timm.list_models() if _is_ours(name)},
    }


def _is_ours(model: str) -> bool:
    return model_entrypoint(model).__module__.startswith("timm_gsop.")


def _weights(model: str) -> list[dict[str, str]]:
    """Every set of weights of a model that is more than a name: tag, state, source, and what it leaves untrained."""
    found = []
    for name, cfg in get_arch_pretrained_cfgs(model).items():
        state, source = weights_state(cfg)
        if cfg.file:  # no folders of the user's: this goes into reports of bugs
            source = Path(source).name
        if state != "none":
            notes = dict(note.partition(": ")[::2] for note in cfg.notes or ())
            untrained = notes.get("untrained", "")
            found.append({"tag": name.partition(".")[2], "state": state, "source": source, "untrained": untrained})
    return found


def _device() -> str:
    if torch.cuda.is_available():
        return f"cuda ({torch.cuda.get_device_name()})"
    if torch.backends.mps.is_available():
        return "mps"
    return f"cpu ({torch.get_num_threads()} threads)"


def _why_no_autoload() -> str:
    """Why our models are not registered by importing timm alone; "" if they are."""
    for variable in ("TIMM_GSOP_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        if os.environ.get(variable) == "0":
            return f"{variable}=0"
    if "timm_gsop" not in entry_points(group="torch.backends").names:
        return "timm-gsop is not installed: it runs from its source folder"
    return "" if find_spec("wrapt") else "wrapt is not installed"


def _as_text(found: dict[str, Any]) -> str:
    autoload, of_kernels = found["autoload"], found["kernels"]
    lines = [
        f"timm-gsop {found['timm_gsop']}, timm {found['timm']}, torch {found['torch']}, Python {found['python']}",
        f"device: {found['device']}",
        "GPU kernels: " + ("active" if of_kernels["active"] else f"off ({of_kernels['reason']})"),
        "autoload: "
        + ("active" if autoload["active"] else f"off ({autoload['reason']}); import timm_gsop to register the models"),
        "",
    ]
    rows = [
        (f"{name}.{item['tag']}" if item["tag"] else name, item["state"], item["untrained"], item["source"])
        for name, weights in found["models"].items()
        for item in weights or [_NO_WEIGHTS | (_OF_THE_BACKBONE if name == "second_order" else {})]
    ]
    header = ("model", "weights", "untrained", "from")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    lines += ["", "Neutral blocks change nothing until they are trained. A new head makes random predictions."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
