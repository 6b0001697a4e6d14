"""How weights come to fit a network: without their head where it differs, and not at all if they are of another one.

Weights of a network with other options are refused with the option that they have.
"""

import logging
import re
from math import isqrt
from typing import Any

import torch

from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["check_isqrt_dim", "check_options", "check_same_network", "fit_head"]

REDUCTION = "global_pool.reduction.conv.weight"

_REDUCTION = re.compile(r"(.+\.(?:gsop|se))\.(?:(?:channel|position)\.)?reduction\.conv\.weight")
_STAGE = re.compile(r"layer(\d)\.|stages\.(\d)\.")

_logger = logging.getLogger(__name__)


def fit_head(weights: Weights, model: Any, say: bool = True) -> Weights:
    """Replace the head of weights by the network's own, untrained one where they differ in global pooling.

    They differ if the pooling's weights have other names or sizes, or if the classifiers read different numbers of
    features. Weights that are incomplete, or do not fit otherwise, are left as they are, for
    timm to refuse.

    Args:
        weights: By the network's names.
        model: One of our networks.
        say: Whether to log, in one line, what is left out and what starts untrained.

    Returns:
        ``weights``, or all of them but the head, with the network's own.
    """
    own = model.state_dict()
    classifier = model.classifier_name
    theirs, ours = _shapes_of_head(weights, classifier), _shapes_of_head(own, classifier)
    same_width = None in (theirs[1], ours[1]) or theirs[1] == ours[1]
    if theirs[0] == ours[0] and same_width:
        return weights

    def in_head(name: str) -> bool:
        return name.startswith(("global_pool.", f"{classifier}."))

    left_out = sorted(filter(in_head, weights))
    new = {name: value for name, value in own.items() if in_head(name)}
    if say and (left_out or new):
        _logger.warning(
            "The weights are of a network with another head than global_pool=%r here. Left out: %s. Untrained: %s.",
            model.global_pool.pool_type if hasattr(model.global_pool, "pool_type") else "",
            ", ".join(left_out) or "nothing",
            ", ".join(sorted(new)) or "nothing",
        )
    return {**{name: value for name, value in weights.items() if not in_head(name)}, **new}


def check_isqrt_dim(weights: Weights, model: Any, chosen: bool) -> None:
    """Raise ``ValueError`` if covariance pooling has another size in the weights, which nobody has chosen.

    Args:
        weights: By the network's names.
        model: One of our networks.
        chosen: Whether ``isqrt_dim`` was given: then the head of the weights is left out (:func:`fit_head`).
    """
    theirs, ours = weights.get(REDUCTION), model.state_dict().get(REDUCTION)
    if chosen or theirs is None or ours is None or len(theirs) == len(ours):
        return
    raise ValueError(
        f"isqrt_dim={len(ours)}, the default, is not accepted with these weights; accepted: isqrt_dim={len(theirs)}, "
        f"as they have it. For an untrained head, give isqrt_dim={len(ours)}."
    )


def _shapes_of_head(weights: Weights, classifier: str) -> tuple[dict[str, torch.Size], int | None]:
    """Shapes of the pooling's weights, but for norms and counts, and features that the classifier reads, if any."""
    pooling = {
        name: value.shape
        for name, value in weights.items()
        if name.startswith("global_pool.") and value.ndim != 1 and not name.endswith("num_batches_tracked")
    }
    linear = weights.get(f"{classifier}.weight")
    return pooling, (None if linear is None else linear.shape[1])


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

    timm adapts the latter to other images, and :func:`fit_head` looks after the head.

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
    if found := _differences(own, given):
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


def _differences(own: Weights, weights: Weights) -> str:
    """What is missing, surplus, or of another shape in weights for a network; "" if nothing is.

    Args:
        own: The network's.
        weights: Those to be loaded.
    """
    faults = {
        "missing": sorted(own.keys() - weights.keys()),
        "surplus": sorted(weights.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)}, not {tuple(value.shape)}"
            for name, value in own.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    return "; ".join(f"{what}: {_some(names)}" for what, names in faults.items() if names)


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
