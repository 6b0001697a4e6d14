"""GSoP blocks in any timm model whose feature maps are (B, C, H, W)."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers import get_device_dtype
from timm.models import get_model_input_config
from torch import nn

from timm_gsop.layers import NEUTRAL_SCALE, GsopBlock, check_gsop, create_gsop, start_at_half

__all__ = ["attach_gsop", "evaluation_mode", "insert_gsop"]

CHILD = "gsop"  # the name that a block has in the module that it follows or precedes


def insert_gsop(
    model: nn.Module,
    gsop_type: str = "channel",
    stages: Sequence[int] | None = None,
    cov_dim: int = 128,
    spatial_size: int = 8,
    neutral: bool = False,
) -> nn.Module:
    """Put a GSoP block with its shortcut after stages of a model, in place.

    A block becomes the child ``gsop`` of the module whose output it takes, so that the model's own weights keep their
    names, and its pretrained weights still load. Places are found, and checked, by running the model once or a few
    times on a blank image. timm does not record the blocks when it saves the model. To load one, create it, insert with
    the same arguments, then load the weights. The registered network ``second_order`` records all of this in its
    configuration.

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
    return model


class _Calls:
    """Which tensors went into and came out of which modules, and are the model's feature maps, in one run."""

    def __init__(self, model: nn.Module) -> None:
        self._came_from: dict[tuple[int, int], list[nn.Module]] = {}
        self._went_into: dict[int, list[nn.Module]] = {}
        self._keep: list[Any] = []  # tensors that live have ids of their own

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._keep += [args, output]
            if isinstance(output, torch.Tensor):
                modules = self._came_from.setdefault(self._key(output), [])
                passed_on = bool(modules) and len(args) > 0 and args[0] is output  # an identity made nothing
                modules += [] if passed_on else [module]
            if args:
                self._went_into.setdefault(id(args[0]), []).append(module)

        hooks = [module.register_forward_hook(note) for module in model.modules() if module is not model]
        try:
            self.features = _run(model)
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _key(x: torch.Tensor) -> tuple[int, int]:
        return id(x), x._version  # an activation in place changes the version

    def came_from(self, level: int) -> list[nn.Module]:
        """Modules whose output is the feature map, inner ones first."""
        return self._came_from.get(self._key(self.features[level]), [])

    def went_into(self, level: int) -> list[nn.Module]:
        """Modules whose input is the feature map."""
        return self._went_into.get(id(self.features[level]), [])


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


def _possible_sites(model: nn.Module, calls: _Calls, level: int) -> list[tuple[nn.Module, bool]]:
    """Modules to attach a block to, best first, and whether the block goes in front of the module."""
    info, feature = _feature_infos(model)[level], calls.features[level]
    shape = tuple(feature.shape)
    if len(shape) != 4 or shape[1] != info["num_chs"]:
        raise ValueError(
            f"model={type(model).__name__} has features of shape {shape} at stage {level} ({info['module']}); "
            f"accepted: (B, {info['num_chs']}, H, W)."
        )
    behind = [module for module in calls.came_from(level) if _takes_children(module)]
    before = [module for module in calls.went_into(level) if _is_plain_sequential(module)]
    behind.reverse()  # outer ones first
    behind.sort(key=lambda module: not _takes_one_tensor(module))
    return [*[(module, False) for module in behind], *[(module, True) for module in before]]


def _takes_one_tensor(module: nn.Module) -> bool:
    """Whether a hook that is typed so fits the module: TorchScript refuses others."""
    _, *parameters = inspect.signature(type(module).forward).parameters.values()
    return len(parameters) == 1 and parameters[0].annotation in (inspect.Parameter.empty, torch.Tensor)


def _is_plain_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _takes_children(module: nn.Module) -> bool:
    """Whether an extra child is safe: not in containers whose items the forward pass calls in its own way."""
    return _is_plain_sequential(module) or not isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList)


def _attach_where_called_once(
    model: nn.Module, blocks: dict[int, GsopBlock], sites: dict[int, list[tuple[nn.Module, bool]]]
) -> None:
    """Attach each block to the first of its sites where a forward pass calls it just once."""
    detach: dict[int, Callable[[], None]] = {}
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
                detach[level] = attach_gsop(blocks[level], *sites[level].pop(0))
            counts = _count_calls(model, blocks)
            pending = [level for level in blocks if counts[level] != 1]
            for level in pending:
                detach.pop(level)()
    except BaseException:
        for undo in detach.values():
            undo()
        raise


def _count_calls(model: nn.Module, blocks: dict[int, GsopBlock]) -> dict[int, int]:
    counts = dict.fromkeys(blocks, 0)

    def count(level: int) -> Any:
        def hook(*_: Any) -> None:
            counts[level] += 1

        return hook

    hooks = [block.register_forward_hook(count(level)) for level, block in blocks.items()]
    try:
        _run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def attach_gsop(block: nn.Module, module: nn.Module, in_front: bool = False) -> Callable[[], None]:
    """Make a block the child ``gsop`` of a module, so that it takes the module's output, or its input.

    Args:
        block: The block.
        module: The module. A plain ``nn.Sequential`` gets the block as its last child; another one gets a forward hook.
        in_front: Whether the block takes the input; of a plain ``nn.Sequential`` only, as its first child.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: If the module already has a child of that name, such as a block.
    """
    if hasattr(module, CHILD):
        raise ValueError(f"module={type(module).__name__} has a {CHILD!r} already; accepted: a module without one.")
    if in_front:
        children = dict(module._modules)
        module._modules.clear()
        module._modules.update({CHILD: block, **children})
    else:
        module.add_module(CHILD, block)
    hook = None if _is_plain_sequential(module) else module.register_forward_hook(apply_gsop)

    def detach() -> None:
        del module._modules[CHILD]
        if hook is not None:
            hook.remove()

    return detach


def apply_gsop(self, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Forward hook: pass a module's output through its child ``gsop``."""
    return self.gsop(output)


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
