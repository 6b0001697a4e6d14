"""What the search and the trainings of one head found, cached beside the maps, so that no run does it again."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import nn

import timm_gsop
from timm_gsop import layers
from timm_gsop.complete_file import replacing
from timm_gsop.probe import heads
from timm_gsop.probe.heads import Options, Trained
from timm_gsop.probe.network import weights_digest

__all__ = ["Found", "cache_file", "cached"]

Found = tuple[Options, list[Trained]]
"""The options that the search chose, and what was trained with them, for each split."""
NUMBERS = ("validation", "validation_loss", "train_seconds", "infer_seconds")


def cache_file(maps: np.ndarray, name: str, head: nn.Sequential, task: Sequence[str | np.ndarray]) -> Path | None:
    """The file for a head, named by all that its training depends on.

    Args:
        maps: The maps, as :func:`cached_maps` gives them; their file's name stands for images and backbone.
        name: Name of the head.
        head: The head as it is before training, from the first seed.
        task: What else there is: which images are for what, and seeds.

    Returns:
        The file, which may not exist; None for a head whose source cannot be read, so that a change of it would go
        unnoticed.
    """
    if not isinstance(maps, np.memmap) or maps.filename is None:
        return None
    try:
        layer_files = sorted(Path(layers.__path__[0]).rglob("*.py"))  # a head calls functions of other files
        sources = [inspect.getsource(heads), *(file.read_text("utf-8") for file in layer_files)]
        sources += [inspect.getsource(type(part)) for part in head]
    except (OSError, TypeError):
        return None
    digest = hashlib.sha256("\n".join([timm_gsop.__version__, torch.__version__, repr(head), *sources]).encode())
    digest.update(weights_digest(head).encode())
    for part in task:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    maps_file = Path(maps.filename)
    return maps_file.with_name(f"{maps_file.stem}-{name}-{digest.hexdigest()[:16]}.safetensors")


def cached(file: Path | None, train: Callable[[], Found]) -> Found:
    """What is in the file, or else what ``train`` finds, which is then in the file."""
    if file is not None and file.exists():
        return _load(file)
    found = train()
    if file is not None:
        _save(file, found)
    return found


def _save(file: Path, found: Found) -> None:
    options, trained = found
    arrays, numbers = {}, []
    for i, one in enumerate(trained):
        arrays[f"{i}.logits"] = np.ascontiguousarray(one.logits)
        arrays.update({f"{i}.state.{name}": np.ascontiguousarray(value) for name, value in one.state.items()})
        numbers.append({name: getattr(one, name) for name in NUMBERS})
    metadata = dict(options=json.dumps(options._asdict()), numbers=json.dumps(numbers))
    with replacing(file) as partial:
        save_file(arrays, partial, metadata)


def _load(file: Path) -> Found:
    with safe_open(file, framework="numpy") as opened:
        metadata = opened.metadata()
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)
    trained = []
    for i, numbers in enumerate(json.loads(metadata["numbers"])):
        prefix = f"{i}.state."
        state = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
        trained.append(Trained(logits=arrays[f"{i}.logits"], state=state, **numbers))
    return Options(**json.loads(metadata["options"])), trained
