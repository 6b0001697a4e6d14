"""Weights of another network, or of one with other options, are refused with the option that they have."""

import re
from math import isqrt
from typing import Any

from timm_gsop.pretrained.checkpoint import Weights, differences

__all__ = ["check_options", "check_same_network"]

_REDUCTION = re.compile(r"(.+\.(?:gsop|se))\.(?:(?:channel|position)\.)?reduction\.conv\.weight")
_STAGE = re.compile(r"layer(\d)\.|stages\.(\d)\.")


def check_options(weights: Weights, model: Any) -> None:
    """Raise ``ValueError`` if weights have other blocks than the network, naming the options that they have.

    Args:
        weights: By the network's names.
        model: One of our networks.
    """
    own = model.state_dict()
    here, there = _options_of(own), _options_of(weights)
    wrong = [name for name in here if name in there and here[name] != there[name]]
    if wrong:
        raise ValueError(
            "; ".join(f"{name}={here[name]} is not accepted with these weights" for name in wrong)
            + f"; accepted: {', '.join(f'{name}={there[name]}' for name in wrong)}, as they have it."
        )
    places, of_weights = _stages_of(own), _stages_of(weights)
    if places != of_weights:
        name = "gsop_stages" if any(key.startswith("backbone.") for key in own) else "gsop_layers"
        raise ValueError(
            f"{name}: the network has blocks in {_listed(places)}, and the weights have them in {_listed(of_weights)}; "
            f"accepted: those of the weights."
        )


def check_same_network(weights: Weights, model: Any, name: str) -> None:
    """Raise ``ValueError`` if weights do not fit the network, leaving aside its head and its first convolution.

    timm adapts the latter to other images, and :func:`timm_gsop.pretrained.head.fit_head` looks after the head.

    Args:
        weights: By the network's names.
        model: One of our networks.
        name: What it is called.
    """
    first = model.pretrained_cfg.get("first_conv") or ()
    convs = (first,) if isinstance(first, str) else first
    aside = ("global_pool.", f"{model.classifier_name}.", *(f"{conv}." for conv in convs))

    def body(tensors: Weights) -> Weights:
        return {
            key: value
            for key, value in tensors.items()
            if not key.startswith(aside) and not key.endswith("num_batches_tracked")
        }

    own, given = body(model.state_dict()), body(weights)
    if found := differences(own, given):
        fitting = sum(key in given and given[key].shape == value.shape for key, value in own.items())
        raise ValueError(
            f"The weights are of another network than {name}, of whose {len(own)} tensors before the head they fit "
            f"{fitting}. {found}."
        )


def _options_of(weights: Weights) -> dict[str, str]:
    """What the first block shows of the arguments that made it, as they are written in Python."""
    match = next(filter(None, map(_REDUCTION.fullmatch, weights)), None)
    if match is None:
        return {}
    block = match[1]
    found = {"flavor": repr("official" if block.endswith(".se") else "paper")}
    is_fused = f"{block}.position.reduction.conv.weight" in weights
    if is_fused:
        has_fuse = any(key.startswith(f"{block}.fuse.") for key in weights)
        found["gsop_type"] = "'concat'" if has_fuse else "'avg' or 'max'"
    part = f"{block}.channel" if is_fused else block
    dim, channels = weights[f"{part}.reduction.conv.weight"].shape[:2]
    rows, outputs = (len(weights.get(f"{part}.excitation.{name}.weight", ())) for name in ("cov_bn", "expand_conv"))
    if not is_fused:
        found["gsop_type"] = repr("channel" if (rows, outputs) == (dim, channels) else "position")
    found["cov_dim"] = repr(dim)
    if found["gsop_type"] != "'channel'":
        positions = weights.get(
            f"{block}.position.excitation.cov_bn.weight" if is_fused else f"{part}.excitation.cov_bn.weight", ()
        )
        found["spatial_size"] = repr(isqrt(len(positions)))
    return found


def _stages_of(weights: Weights) -> tuple[int | str, ...]:
    """Stages with blocks, counted from 1 where the names have numbers, or the modules that have them."""
    blocks = [match[1] for match in map(_REDUCTION.fullmatch, weights) if match]
    found: list[int | str] = []
    for block in blocks:
        number = _STAGE.match(block)
        stage = (
            block.removesuffix(".gsop").removesuffix(".gsop")
            if number is None
            else int(number[1] or int(number[2]) + 1)
        )
        if stage not in found:
            found.append(stage)
    return tuple(sorted(found, key=str))


def _listed(stages: tuple[int | str, ...]) -> str:
    return ", ".join(map(str, stages)) or "no stage"
