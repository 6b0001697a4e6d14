"""The backbone and a head of the comparison as one network, in a folder for timm and the Hub."""

import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models import PretrainedCfg

from timm_gsop.hub import stage
from timm_gsop.hub.hub_folder import save_hub_folder
from timm_gsop.models.second_order import backbone_notes
from timm_gsop.probe.network import create_network, level_name
from timm_gsop.probe.table import Row

__all__ = ["Choice", "fine_tune_command", "save_network"]


class Choice(NamedTuple):
    """The head to save, and how its network is made."""

    backbone: str
    level: int | None
    head: str
    state: dict[str, np.ndarray]
    top1: float
    checkpoint: str | Path | None
    pretrained: bool
    options: dict[str, Any]


def save_network(
    choice: Choice,
    folder: Path,
    data_config: dict[str, Any],
    class_names: Sequence[str],
    row: Row,
    data: str,
    test_images: int,
) -> None:
    """Write the network, its class names and its model card, or nothing.

    Args:
        choice: The head.
        folder: A new folder.
        data_config: timm's data configuration.
        class_names: Names of the classes.
        row: What was measured.
        data: Name of the data set.
        test_images: How many images tested it.
    """
    network = create_network(
        choice.backbone,
        choice.level,
        choice.checkpoint,
        choice.pretrained,
        num_classes=len(class_names),
        global_pool=choice.head,
        **choice.options,
    )
    state = {name: torch.from_numpy(value) for name, value in choice.state.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    parameters = {name for name, _ in network.named_parameters() if not name.startswith("backbone.")}
    if unexpected or (forgotten := sorted(parameters.intersection(missing))):
        raise RuntimeError(f"The head does not fit the network: {unexpected or forgotten}.")
    each = ", ".join(f"{value:.2f}" for value in row.each)
    where = "the last features" if choice.level is None else f"feature level {level_name(choice.level)}"
    notes = (
        f"data: {Path(data).name}",
        f"recipe: `python -m timm_gsop.probe`: frozen backbone, {where}; head trained with AdamW, learning rate "
        f"{row.lr:g}, weight decay {row.weight_decay:g}, by a search on validation images",
        f"measured: top-1 {choice.top1:.2f} % on {test_images} test images, on feature maps in float16",
        f"measured: of {len(row.each)} trainings of this head, {row.top1:.2f} % in the mean ({each})",
        f"measured: that is {row.difference:+.2f} points (95 % interval {row.low:+.2f} to {row.high:+.2f}) against "
        "average pooling and a linear classifier on the deepest level",
    )
    known = dict(note.partition(": ")[::2] for note in backbone_notes(choice.backbone))
    provenance = PretrainedCfg(
        architecture="second_order",
        tag="probe",
        description=f"`{choice.head}` head, trained on the frozen backbone {known['backbone']}",
        notes=notes,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".probe.", dir=folder.parent) as partial:
        complete = Path(partial) / "complete"
        save_hub_folder(network, complete, data_config, provenance, dict(label_names=list(class_names)))
        stage(complete, f"ORG/{choice.backbone.partition('.')[0]}_{choice.head}", folder)


def fine_tune_command(folder: Path, data_dir: str | Path, dataset: str, num_classes: int, img_size: int) -> str:
    """The command line of timm's train.py that trains the whole saved network on."""
    data = ["--data-dir", str(data_dir), *(["--dataset", dataset] if dataset else [])]
    options = (
        "--opt adamw --lr 1e-4 --weight-decay 0.05 --layer-decay 0.75 --epochs 20 --warmup-epochs 2 --batch-size 32"
    )
    model = ["--model", f"local-dir:{folder}", "--pretrained", "--num-classes", str(num_classes)]
    words = ["python", "train.py", *data, *model, "--img-size", str(img_size), *options.split()]
    return shlex.join(words if torch.cuda.is_available() else [*words, "--device", "cpu"])
