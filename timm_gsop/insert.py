"""GSoP blocks in any timm model whose feature maps are (B, C, H, W)."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import get_model_input_config
from torch import nn

from timm_gsop.attach import CHILD, attach_gsop, can_attach_gsop, group_with_blocks, keep_names
from timm_gsop.layers import NEUTRAL_SCALE, GsopBlock, check_gsop, create_gsop, start_at_half

__all__ = ["evaluation_mode", "insert_gsop"]


def insert_gsop(
    model: nn.Module,
    gsop_type: str = "channel",
    stages: Sequence[int] | None = None,
    cov_dim: int = 128,
    spatial_size: int = 8,
    neutral: bool = False,
) -> nn.Module:
    """Put a GSoP block with its shortcut after stages of a model, in place.

    A block becomes a module on the way of the data (:func:`timm_gsop.attach.attach_gsop`). The model's own weights keep
    their names, so that its pretrained weights still load, and a stage's feature map is what its block returns. Places
    are found, and checked, by running the model once or a few times on a blank image. In layer-wise learning rates, a
    block has the rate of its stage. timm does not record the blocks when it saves the model. To load one, create it,
    insert with the same arguments, then load the weights. The registered network ``second_order`` records all of this
    in its configuration.

    Args:
        model: A timm model with ``feature_info``; also one created with ``features_only=True``.
        gsop_type: Kind of the blocks, see :func:`timm_gsop.layers.create_gsop`.
        stages: Indices into the model's ``feature_info``, as timm's ``out_indices``; None for all whose stride is at
            least 4, which leaves the stem out.
        cov_dim: Channels after reduction in a block.
        spatial_size: In blocks by position: side of the square that the map is pooled to.
        neutral: Whether the blocks start as the identity, in training as well as in evaluation, so that pretrained
            weights keep their function: the weights of a block start at one half, and its output is multiplied by 2/3.
            Blocks without this factor multiply their input by about 1.5.

    Returns:
        ``model``.

    Raises:
        ValueError: If an argument is not among the accepted ones, or the model has no ``feature_info``, or blocks there
            already, or no place for one: feature maps in another layout, as in most transformers. The model is
            unchanged then.

    Example:
        >>> import timm, torch
        >>> model = timm.create_model("convnext_atto", num_classes=5).eval()
        >>> image = torch.randn(1, 3, 64, 64)
        >>> before = model(image)
        >>> after = insert_gsop(model, cov_dim=16, neutral=True)(image)
        >>> torch.allclose(before, after, atol=1e-6)
        True
    """
    check_gsop(gsop_type, cov_dim, spatial_size, flavor="paper")
    levels = _feature_levels(model, stages)
    calls = _Calls(model)
    sites = {level: _possible_sites(model, calls, level) for level in levels}
    blocks = {}
    for level in levels:
        side = None if gsop_type == "channel" else spatial_size
        gsop = create_gsop(gsop_type, calls.features[level].shape[1], cov_dim, side, **get_device_dtype(model))
        if neutral:
            start_at_half(gsop)
        blocks[level] = GsopBlock(gsop, scale=NEUTRAL_SCALE if neutral else 1.0).train(model.training)
    _attach_where_called_once(model, blocks, sites)
    if blocks and hasattr(model, "group_matcher"):
        grouped: Any = partial(group_with_blocks, model, model.group_matcher)
        model.group_matcher = grouped
    return model


class _Calls:
    """Which modules returned the model's feature maps in one run."""

    def __init__(self, model: nn.Module) -> None:
        self._came_from: dict[tuple[int, int], list[str]] = {}
        self._keep: list[Any] = []  # tensors that live have ids of their own

        def note(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                self._keep += [args, output]
                if isinstance(output, torch.Tensor):
                    paths = self._came_from.setdefault(self._key(output), [])
                    passed_on = bool(paths) and len(args) > 0 and args[0] is output  # an identity made nothing
                    paths += [] if passed_on else [path]

            return hook

        hooks = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
        try:
            self.features = _run(model)
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _key(x: torch.Tensor) -> tuple[int, int]:
        return id(x), x._version  # an activation in place changes the version

    def came_from(self, level: int) -> list[str]:
        """Names of the modules whose output is the feature map, inner ones first."""
        return self._came_from.get(self._key(self.features[level]), [])


def _feature_levels(model: nn.Module, stages: Sequence[int] | None) -> list[int]:
    if not hasattr(model, "feature_info"):
        raise ValueError(f"model={type(model).__name__} has no feature_info; accepted: timm models that have it.")
    infos = _feature_infos(model)
    if stages is None:
        return [i for i, info in enumerate(infos) if info["reduction"] >= 4]
    known = range(len(infos))
    if isinstance(stages, int | str) or len(set(stages)) < len(stages) or not set(stages) <= set(known):
        raise ValueError(
            f"stages={stages!r} is not accepted; it must be a sequence of different indices of {list(known)}."
        )
    return sorted(stages)


def _feature_infos(model: nn.Module) -> list[dict[str, Any]]:
    info: Any = model.feature_info
    return info.get_dicts() if hasattr(info, "get_dicts") else list(info)


@torch.no_grad()
def _run(model: Any) -> list[torch.Tensor]:
    """Feature maps of a blank image, in evaluation: no statistics change, nor the modules' modes."""
    image = torch.zeros(1, *get_model_input_config(model)["input_size"], **get_device_dtype(model))
    with evaluation_mode(model):
        if hasattr(model, "forward_intermediates"):
            return model.forward_intermediates(image, intermediates_only=True)
        return model(image)  # created with features_only


def _possible_sites(model: nn.Module, calls: _Calls, level: int) -> list[str]:
    """Names of the modules that a block could follow, best first."""
    info, feature = _feature_infos(model)[level], calls.features[level]
    shape = tuple(feature.shape)
    if len(shape) != 4 or shape[1] != info["num_chs"]:
        raise ValueError(
            f"model={type(model).__name__} has features of shape {shape} at stage {level} ({info['module']}); "
            f"accepted: (B, {info['num_chs']}, H, W)."
        )
    sites = [path for path in calls.came_from(level) if can_attach_gsop(model, path)]
    sites.reverse()  # outer ones first
    sites.sort(key=lambda path: not _takes_one_tensor(model.get_submodule(path)))
    return sites


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether a hook that is typed so fits the module: TorchScript refuses others."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 1 and parameters[0].annotation in (inspect.Parameter.empty, torch.Tensor)


def _attach_where_called_once(model: nn.Module, blocks: dict[int, GsopBlock], sites: dict[int, list[str]]) -> None:
    """Attach each block to the first of its sites where it is called just once, and makes the feature map."""
    detach: dict[int, Callable[[], None]] = {}
    tried: dict[int, list[str]] = {level: [] for level in blocks}  # where it is called just once
    try:
        pending = list(blocks)
        while pending:
            for level in pending:
                if not sites[level]:
                    module = _feature_infos(model)[level]["module"]
                    raise ValueError(
                        f"model={type(model).__name__} has no place for a block at stage {level} ({module}); accepted: "
                        "models whose feature maps come out of one module, as (B, C, H, W)."
                    )
                tried[level].append(sites[level].pop(0))
                detach[level] = attach_gsop(blocks[level], model, tried[level][-1])
            calls, made = _count_calls(model, blocks)
            pending = [level for level in blocks if calls[level] != 1 or not made[level]]
            for level in reversed(pending):
                detach.pop(level)()
                if calls[level] != 1:
                    tried[level].pop()
    except BaseException:
        for undo in reversed(detach.values()):
            undo()
        raise
    for level, (first, *others) in tried.items():
        if others:  # where blocks were before they had to make the feature map
            block: Any = blocks[level]
            block.names = (f"{others[-1]}.{CHILD}", f"{first}.{CHILD}")
            keep_names(model)


def _count_calls(model: nn.Module, blocks: dict[int, GsopBlock]) -> tuple[dict[int, int], dict[int, bool]]:
    """How often each block is called, and whether what it returns is the feature map of its stage."""
    outputs: dict[int, list[torch.Tensor]] = {level: [] for level in blocks}

    def note(level: int) -> Callable[..., None]:
        return lambda _, __, output: outputs[level].append(output)

    hooks = [block.register_forward_hook(note(level)) for level, block in blocks.items()]
    try:
        features = _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    made = {level: any(output is features[level] for output in found) for level, found in outputs.items()}
    return {level: len(found) for level, found in outputs.items()}, made


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation, and every module of it back into its own mode at the end, whatever happens."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
