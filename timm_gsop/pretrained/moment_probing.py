"""Checkpoints of moment probing: a ViT with its head, as ``second_order``.

Source (names and shapes; no code of theirs): https://github.com/mingzeG/Moment-Probing
"""

from math import isqrt

import torch
from timm.models import is_model

from timm_gsop.pretrained.checkpoint import Weights
from timm_gsop.pretrained.released import Released

__all__ = ["from_moment_probing"]

WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
HEAD = {
    "proj.weight": "proj.weight",
    "proj.bias": "proj.bias",
    "ln.weight": "norm.weight",
    "ln.bias": "norm.bias",
    "downblocks.0.0.weight": "convs.0.weight",
    "downblocks.0.2.weight": "convs.2.weight",
}
CLASSIFIERS = ("classifier1", "classifier2")


def from_moment_probing(weights: Weights, backbone: str | None = None) -> Released:
    """Recognise a ViT with the head of moment probing, by names and shapes.

    The mean of its two classifiers, of the class token and of the second moments, becomes one classifier.

    Args:
        weights: The weights, by their names there.
        backbone: Name of the backbone in timm; None for the ViT that width, patches and tokens show.

    Raises:
        ValueError: If it is not such a checkpoint.
    """
    needed = [*(f"head.{name}" for name in HEAD), "patch_embed.proj.weight", "pos_embed", "cls_token"]
    needed += [f"head.{name}.{part}" for name in CLASSIFIERS for part in ("weight", "bias")]
    if missing := [name for name in needed if name not in weights]:
        raise ValueError(
            f"The checkpoint has no {missing[0]}; accepted: a ViT with the head of moment probing. Heads of networks "
            "with feature maps are not."
        )
    if any("psrp" in name.lower() for name in weights):
        raise ValueError("The checkpoint has PSRP modules, those of MP+; accepted: moment probing without them.")
    if backbone is None:
        backbone = _backbone(weights)
    renamed = {f"backbone.{name}": value for name, value in weights.items() if not name.startswith("head.")}
    for theirs, ours in HEAD.items():
        value = weights[f"head.{theirs}"]
        renamed[f"global_pool.{ours}"] = value[:, :, None, None] if theirs == "proj.weight" else value
    renamed["fc.weight"] = torch.cat([weights[f"head.{name}.weight"] for name in CLASSIFIERS], dim=1)
    renamed["fc.bias"] = sum(weights[f"head.{name}.bias"] for name in CLASSIFIERS) / 2  # type: ignore[assignment]
    kwargs = dict(
        backbone=backbone,
        global_pool="moment",
        num_classes=len(renamed["fc.bias"]),
        pool_kwargs=dict(hidden_dim=len(weights["head.proj.bias"])),
    )
    return Released(model_name="second_order", model_kwargs=kwargs, weights=renamed)


def _backbone(weights: Weights) -> str:
    width, _, _, patch = weights["patch_embed.proj.weight"].shape
    size = patch * isqrt(weights["pos_embed"].shape[1] - 1)
    name = f"vit_{WIDTHS.get(width, 'unknown')}_patch{patch}_{size}"
    if not is_model(name):
        raise ValueError(
            f"The checkpoint has a ViT of width {width}, with patches of {patch} and images of {size}, which timm does "
            "not have; accepted: its name in timm, as the argument backbone."
        )
    return name
