"""The networks of the demo: all that have weights, each with a copy of itself whose blocks are neutral."""

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import nn

from timm_gsop.layers import ChannelGsop, FusedGsop, PositionGsop, start_at_half
from timm_gsop.pretrained.locate import weights_state
from timm_gsop.viz import preprocess

__all__ = ["BadNetworkError", "Network", "choices", "classify", "load"]

STATES = {"ships": "offline", "cached": "cached", "on the Hub": "download", "at its origin": "download"}

_logger = logging.getLogger(__name__)


class BadNetworkError(RuntimeError):
    """A network cannot be had; the message says so to whom chose it."""


@dataclass
class Network:
    """A network of the demo.

    Attributes:
        model: The network, with its weights, in evaluation.
        neutral: A copy whose blocks scale by one half; None if it has none, or they cannot be neutral.
        labels: The name of each class.
        is_grey: Whether it was trained on grey images.
        about: What it was trained on.
    """

    model: nn.Module
    neutral: nn.Module | None
    labels: Sequence[str]
    is_grey: bool
    about: str

    def prepare(self, image: Image.Image) -> tuple[Image.Image, torch.Tensor]:
        """The image as the network sees it, and its input."""
        return preprocess(image.convert("L") if self.is_grey else image, self.model)


def choices(more: Sequence[str] = ()) -> list[tuple[str, str]]:
    """What to show and the name, of every network of ours with weights; those that are here come first.

    Args:
        more: Names of others that timm can create, ``local-dir:FOLDER`` for one.
    """
    names = [name for name in timm.list_pretrained() if model_entrypoint(name).__module__.startswith("timm_gsop.")]
    states = {name: weights_state(get_pretrained_cfg(name))[0] for name in names}
    found = [name for state in STATES for name in names if states[name] == state]
    return [(name, name) for name in more] + [(f"{name}, {STATES[states[name]]}", name) for name in found]


@lru_cache(maxsize=2)
def load(name: str) -> Network:
    """Create a network with its weights.

    Raises:
        BadNetworkError: If that is not possible; the cause is logged.
    """
    try:
        model = timm.create_model(name, pretrained=True).eval()
    except Exception as error:  # whatever timm, the Hub's client and its connection raise
        _logger.warning("%s cannot be loaded: %s: %s", name, type(error).__name__, error)
        raise BadNetworkError(
            f"{name} could not be loaded: its weights are not on this machine, and could not be downloaded now. "
            "Try again later, or choose another network."
        ) from error
    cfg = model.pretrained_cfg
    about = get_pretrained_cfg(name) if ":" not in name else None
    notes = tuple((about and about.notes) or ())
    data = next((note.removeprefix("data: ") for note in notes if note.startswith("data: ")), "")
    return Network(model, _neutral(model), _labels(model, cfg), data == "Fashion-MNIST", _about(about, data))


def _neutral(model: nn.Module) -> nn.Module | None:
    """A copy whose blocks scale by one half, whatever their input; None if it has none, or one cannot."""
    neutral = copy.deepcopy(model)
    blocks = [module for module in neutral.modules() if isinstance(module, ChannelGsop | PositionGsop | FusedGsop)]
    try:
        for block in blocks:
            start_at_half(block)
    except ValueError:  # blocks by position of the official flavor
        return None
    return neutral if blocks else None


def _about(cfg: Any, data: str) -> str:
    if data == "Fashion-MNIST":
        return "It knows ten kinds of clothing, light on a dark ground, 28×28 pixels, and names every picture as one."
    if data == "CIFAR-10":
        return f"It sees 32×32 pixels, and names every picture as one of: {', '.join(cfg.label_names)}."
    return (cfg and cfg.description) or ""


def _labels(model: Any, cfg: dict[str, Any]) -> Sequence[str]:
    if cfg.get("label_names"):
        return tuple(cfg["label_names"])
    subset = infer_imagenet_subset(model)
    if subset:
        info = ImageNetInfo(subset)
        return [info.index_to_description(i) for i in range(model.num_classes)]
    return [f"class {i}" for i in range(model.num_classes)]


@torch.inference_mode()
def classify(model: nn.Module, x: torch.Tensor, labels: Sequence[str], most: int = 5) -> dict[str, float]:
    """The likeliest classes of one image, with their probabilities, the likeliest first."""
    probabilities = model(x)[0].float().softmax(-1)
    values, indices = probabilities.topk(min(most, len(probabilities)))
    return {labels[i]: value for i, value in zip(indices.tolist(), values.tolist(), strict=True)}
