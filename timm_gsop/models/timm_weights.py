"""Configurations of networks that start from weights of timm's, on ImageNet-1k."""

from typing import Any

from timm.models import get_arch_pretrained_cfgs

__all__ = ["with_timm_weights"]

# What timm's configuration says of its weights, and is true of them in our networks too.
_OF_THE_WEIGHTS = (
    *("num_classes", "input_size", "test_input_size", "crop_pct", "test_crop_pct", "crop_mode", "interpolation"),
    *("mean", "std", "license"),
)
_SAME_SIZE = (
    " The last stage keeps its size here, for which the weights were not trained; last_stride=2 gives the function of "
    "timm's network."
)


def with_timm_weights(
    model: str, origin: str, cfg: dict[str, Any], new_head: bool = False, same_function: bool = False
) -> dict[str, dict[str, Any]]:
    """Configuration of one of our networks with timm's weights of its backbone; blocks in it start neutral.

    The weights are read by timm from its own repository on the Hub. They get timm's tag.

    Args:
        model: Registered name of ours.
        origin: Name of timm's network, with its tag.
        cfg: The network's configuration without weights.
        new_head: Whether the network ends with covariance pooling, which timm's weights do not have.
        same_function: Whether our network computes what timm's does, but for a new head.

    Returns:
        The configuration by its name with its tag; nothing if the installed timm does not know the weights.
    """
    base = get_arch_pretrained_cfgs(origin).get(origin)
    if base is None:
        return {}
    known = {key: getattr(base, key) for key in _OF_THE_WEIGHTS if getattr(base, key) is not None}
    blocks = f"timm's {origin}, trained on ImageNet-1k"
    if "gsop" in model:
        blocks += "; with GSoP blocks that are untrained and neutral: they leave the function of its backbone as it is"
    head = "; covariance pooling and classifier are untrained." if new_head else "."
    untrained = ["neutral blocks"] * ("gsop" in model) + ["new head"] * new_head
    return {
        f"{model}.{base.tag}": {
            **cfg,
            **known,
            "hf_hub_id": f"timm/{origin}",
            "origin_url": f"https://huggingface.co/timm/{origin}",
            "description": blocks + head + ("" if same_function else _SAME_SIZE),
            "notes": ("data: ImageNet-1k", *([f"untrained: {', '.join(untrained)}"] if untrained else ())),
        }
    }
