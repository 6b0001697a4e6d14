"""Weights whose head differs from the network's load without it."""

import logging
from typing import Any

import torch

from timm_gsop.pretrained.checkpoint import Weights

__all__ = ["check_isqrt_dim", "fit_head"]

REDUCTION = "global_pool.reduction.conv.weight"

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
