"""A model as a folder in the layout of the Hugging Face Hub: config.json and model.safetensors."""

import json
import tempfile
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import save_for_hf
from torch import nn

__all__ = ["save_hub_folder"]


def save_hub_folder(model: nn.Module, folder: Path, data_config: dict[str, Any] | None = None) -> None:
    """Write a model so that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` restores it, or write nothing.

    Models of 1 000 classes get ImageNet-1k's label names, from timm.

    Args:
        model: A model that ``timm.create_model`` made, which records its arguments.
        folder: The folder; it must not exist, or be empty.
        data_config: Preprocessing, where it is not the model's default.

    Raises:
        ValueError: If the folder has something in it already.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={str(folder)!r} has something in it already; accepted: a new or empty folder.")
    config: dict[str, Any] = {}
    if model.num_classes == 1000:
        imagenet = ImageNetInfo("imagenet-1k")
        descriptions = imagenet.label_descriptions(as_dict=True)
        config = dict(label_names=imagenet.label_names(), label_descriptions=descriptions)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as partial:
        complete = Path(partial) / "complete"
        save_for_hf(model, complete, model_config=config, data_config=data_config, safe_serialization=True)
        _drop_num_classes(complete / "config.json")
        complete.replace(folder)


def _drop_num_classes(path: Path) -> None:
    """Leave ``num_classes`` to the root of the file: transformers passes it itself, and would pass it twice."""
    config = json.loads(path.read_text())
    config.get("model_args", {}).pop("num_classes", None)
    path.write_text(json.dumps(config, indent=2))
