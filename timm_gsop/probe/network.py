"""The frozen backbone: its feature maps, and a ``second_order`` network of it for every level."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

__all__ = ["Extractor", "create_network", "level_name"]

PRECISIONS = {"cuda": torch.float16, "mps": torch.float16}
"""Half precision on devices that are faster with it."""


def create_network(
    backbone: str, level: int | None, checkpoint: str | Path | None = None, pretrained: bool = True, **kwargs: Any
) -> Any:
    """A ``second_order`` network with the backbone's weights, in evaluation.

    Args:
        backbone: Name of a network of timm.
        level: Index into its ``feature_info``; None for what its ``forward_features`` returns.
        checkpoint: File of weights of the backbone, in place of those that its name stands for.
        pretrained: Whether to load weights at all.
        **kwargs: For ``second_order``.

    Raises:
        ValueError: If ``second_order`` does not accept an argument.
        RuntimeError: If the weights cannot be loaded.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint={str(checkpoint)!r} is not a file.")
    overlay = None if checkpoint is None else dict(file=str(checkpoint))
    if level is not None:
        kwargs["level"] = level
    create = dict(dict(num_classes=0, global_pool="avg"), backbone=backbone, **kwargs)
    try:
        return timm.create_model("second_order", pretrained=pretrained, pretrained_cfg_overlay=overlay, **create).eval()
    except (ValueError, TypeError):
        raise
    except Exception as error:  # the Hub's, PyTorch's, the system's
        reason = " ".join(str(error).split())[:300]
        raise RuntimeError(
            f"The weights of {checkpoint or backbone} could not be loaded: {type(error).__name__}: {reason} "
            "Connect to the network once, so that they are cached, or pass --checkpoint FILE."
        ) from error


class Extractor:
    """Maps of several feature levels of one backbone, in one run.

    Args:
        backbone: Name of a network of timm.
        levels: Indices into its ``feature_info``; None for what its ``forward_features`` returns.
        checkpoint: As in :func:`create_network`.
        pretrained: As in :func:`create_network`.
        img_size: Height and width of the images; None for the backbone's own.
        device: Where it runs.

    Attributes:
        size_options: What the backbone is built with for ``img_size``.
        levels: The levels, counted from the front.
        names: A name for each level, without characters that a file's name may not have.
        shapes: Shapes (C, H, W) of the maps.
        data_config: timm's data configuration.
        weights: SHA-256 of the backbone's weights.
        autocast: Half precision in which it runs; None for float32.
    """

    def __init__(
        self,
        backbone: str,
        levels: Sequence[int | None],
        checkpoint: str | Path | None = None,
        pretrained: bool = True,
        img_size: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.backbone = backbone
        self.device = torch.device(device)
        self.size_options = _size_options(backbone, img_size)
        self.network = create_network(backbone, None, checkpoint, pretrained, **self.size_options)
        self.network.to(self.device)
        self.levels = _check_levels(levels, len(self.network.feature_info), backbone)
        self.names = [f"{backbone}-{level_name(level)}" for level in self.levels]
        self.data_config = resolve_data_config(dict(img_size=img_size), model=self.network)
        self.weights = _digest(self.network.backbone)
        self.autocast = PRECISIONS.get(self.device.type)
        self.shapes = [tuple(x.shape[1:]) for x in self(torch.zeros(1, *self.data_config["input_size"]))]

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps (B, C, H, W) of images (B, 3, H, W), for each level."""
        x = x.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            indices = [level for level in self.levels if level is not None]
            if not indices:
                return [self.network.forward_features(x)]
            by_level: dict[int | None, torch.Tensor] = {}
            if None not in self.levels:
                found = self.network.forward_intermediates(
                    x, sorted(indices), output_fmt="NCHW", intermediates_only=True, stop_early=True
                )
            else:
                by_level[None], found = self.network.forward_intermediates(x, sorted(indices), output_fmt="NCHW")
            by_level.update(zip(sorted(indices), found, strict=True))
            return [by_level[level] for level in self.levels]


def level_name(level: int | None) -> str:
    """What a level is called in tables."""
    return "final" if level is None else str(level)


def _check_levels(levels: Sequence[int | None], count: int, backbone: str) -> list[int | None]:
    """Levels counted from the front, each once, the deepest first.

    Raises:
        ValueError: If one is not there.
    """
    accepted = range(-count, count)
    if not levels or not all(level is None or level in accepted for level in levels):
        raise ValueError(
            f"levels={levels!r} is not accepted for backbone={backbone!r}; accepted: integers from {-count} to "
            f"{count - 1}, and None (on the command line, final) for what its forward_features returns."
        )
    found = {None if level is None else level % count for level in levels}
    return sorted(found, key=lambda level: count if level is None else level, reverse=True)


def _size_options(backbone: str, img_size: int | None) -> dict[str, Any]:
    """``img_size`` for a backbone that is built for one size, as vision transformers are."""
    cfg = timm.get_pretrained_cfg(backbone, allow_unregistered=True) if img_size else None
    return dict(img_size=img_size) if cfg is not None and cfg.fixed_input_size else {}


def _digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
