"""The frozen backbone: its feature maps, and a ``second_order`` network of it for every level."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

__all__ = ["Extractor", "create_network", "level_name", "weights_digest"]

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
    """Maps of several feature levels of one backbone, in one run where the backbone can give them in one.

    Args:
        backbone: Name of a network of timm.
        levels: Indices into its ``feature_info``; None for what its ``forward_features`` returns.
        checkpoint: As in :func:`create_network`.
        pretrained: As in :func:`create_network`.
        img_size: Height and width of the images; None for the backbone's own.
        device: Where it runs.
        options: For ``second_order``.

    Attributes:
        levels: The levels, counted from the front, the deepest first.
        networks: A ``second_order`` network for each level, whose ``forward_features`` gives the level's maps.
        names: A name for each level, of which a file's name may begin.
        shapes: Shapes (C, H, W) of the maps.
        left_out: Shape of the maps that the backbone's own head reads, where they are none of the levels'; else None.
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
        options: dict[str, Any] | None = None,
    ) -> None:
        self.backbone = backbone
        self.device = torch.device(device)
        self.options = {**_size_options(backbone, img_size), **(options or {})}
        self.network = create_network(backbone, None, checkpoint, pretrained, **self.options)
        self.levels = _check_levels(levels, len(self.network.feature_info), backbone)
        self.names = [f"{backbone}-{level_name(level)}" for level in self.levels]
        self.data_config = resolve_data_config(dict(img_size=img_size), model=self.network)
        self.weights = weights_digest(self.network.backbone)
        self.autocast = PRECISIONS.get(self.device.type)
        weights = self.network.state_dict()
        self.networks = {}
        for level in self.levels:
            network = create_network(backbone, level, pretrained=False, **self.options)
            network.load_state_dict({name: weights[name] for name in network.state_dict()})
            self.networks[level] = network
        with torch.inference_mode():
            self._find_levels(torch.rand(1, *self.data_config["input_size"]))
        for network in (self.network, *(self.networks[level] for level in self._own)):
            network.to(self.device)
        self.shapes = [tuple(x.shape[1:]) for x in self(torch.zeros(1, *self.data_config["input_size"]))]

    def _find_levels(self, x: torch.Tensor) -> None:
        """Find out where the levels' maps come up in one run: timm's networks differ in what their last norm is for.

        A level may be the last features, or an intermediate one, with or without the norm. Others have a run of their
        own.
        """
        wanted = {level: network.forward_features(x) for level, network in self.networks.items()}
        last = self.network.forward_features(x)
        self._last = {level for level in self.levels if _is_same(wanted[level], last)}
        self.left_out = None if self._last else tuple(last.shape[1:])
        rest = [level for level in self.levels if level is not None and level not in self._last]
        self._norm, self._between, self._own = False, [], set(rest)
        for norm in (False, True) if rest and hasattr(self.network.backbone, "forward_intermediates") else ():
            try:
                found = self._intermediates(x, sorted(rest), norm)
            except (AssertionError, RuntimeError, ValueError):  # a network without such a norm
                continue
            own = {level for level, maps in zip(sorted(rest), found, strict=True) if not _is_same(wanted[level], maps)}
            if len(own) < len(self._own):
                self._norm, self._own, self._between = norm, own, sorted(set(rest) - own)

    def _intermediates(self, x: torch.Tensor, levels: list[int], norm: bool) -> list[torch.Tensor]:
        options: dict[str, Any] = dict(norm=norm, output_fmt="NCHW", intermediates_only=True, stop_early=True)
        found: list[torch.Tensor] = self.network.backbone.forward_intermediates(x, levels, **options)
        return found

    @torch.inference_mode()
    def __call__(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Maps (B, C, H, W) of images (B, 3, H, W), for each level."""
        x = x.to(self.device, non_blocking=True)
        maps: dict[int | None, torch.Tensor] = {}
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            if self._last and self._between:
                options: dict[str, Any] = dict(norm=self._norm, output_fmt="NCHW")
                last, found = self.network.forward_intermediates(x, self._between, **options)
                maps.update(zip(self._between, found, strict=True))
                maps.update(dict.fromkeys(self._last, last))
            elif self._last:
                maps.update(dict.fromkeys(self._last, self.network.forward_features(x)))
            elif self._between:
                maps.update(zip(self._between, self._intermediates(x, self._between, self._norm), strict=True))
            maps.update({level: self.networks[level].forward_features(x) for level in self._own})
        return [maps[level] for level in self.levels]


def _is_same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)


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


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
