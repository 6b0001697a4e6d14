"""How a block becomes a part of a network: a module on the way of the data, whose weights keep their names."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from timm.models import FeatureDictNet, group_parameters
from torch import nn

from timm_gsop.layers import GsopBlock

__all__ = ["CHILD", "attach_gsop", "can_attach_gsop", "group_with_blocks", "keep_names"]

CHILD = "gsop"  # the name of a block in the module whose output it takes
SIBLING = f"_{CHILD}"  # the end of its name where it follows that module instead, in a container

_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict)
_Undo = Callable[[], None]


def attach_gsop(block: GsopBlock, model: nn.Module, path: str) -> _Undo:
    """Make a block take the output of one of a model's modules, and whatever reads that output read the block.

    Other tools replace layers by type, such as norms and activations, and re-register what they keep. So a block is
    never inside of such a layer:

    * of a plain ``nn.Sequential``, it becomes the last child, ``gsop``;
    * after a layer of PyTorch's, such as an activation, the two become a ``nn.Sequential`` in the layer's place;
    * after a layer with weights that is in a plain ``nn.Sequential`` already, and after containers whose forward pass
      calls all of their children in its own way, the block becomes the next child of the container around them;
    * of any other module it becomes a child, which a forward hook of that module calls.

    Weights are saved and loaded under the names that they have always had: the layer's own, and ``gsop`` in the module
    (:func:`keep_names`).

    Args:
        block: The block.
        model: The model. Its feature levels that end with the module end with the block then.
        path: Name of the module in the model; :func:`can_attach_gsop` says which are accepted.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: If there is no way, or the module already has a child of that name, such as a block.
    """
    module = model.get_submodule(path)
    if hasattr(module, CHILD):
        raise ValueError(f"module={type(module).__name__} has a {CHILD!r} already; accepted: a module without one.")
    way = _way(model, path)
    if way is None:
        raise ValueError(
            f"path={path!r} ({type(module).__name__}) has no place for a block; accepted: any module but a container "
            "that is not in a nn.Sequential."
        )
    return way(block, model, path)


def can_attach_gsop(model: nn.Module, path: str) -> bool:
    """Whether :func:`attach_gsop` has a way to put a block after the module of that name."""
    return _way(model, path) is not None


def _way(model: nn.Module, path: str) -> Callable[[GsopBlock, nn.Module, str], _Undo] | None:
    module = model.get_submodule(path)
    if is_plain_sequential(module):
        return _append
    is_layer = _is_layer_of_pytorch(module)
    if not is_layer and not isinstance(module, nn.Sequential | nn.ModuleDict | nn.ModuleList):
        return _hook
    if _is_called_in_order(_parent(model, path)) and (module.state_dict() or not is_layer):
        return _follow
    return _wrap if is_layer else None


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other, whatever they are."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _is_called_in_order(module: nn.Module) -> bool:
    return is_plain_sequential(module) or isinstance(module, FeatureDictNet)


def _is_layer_of_pytorch(module: nn.Module) -> bool:
    """Whether tools may replace a module by its type: PyTorch's own layers, all that derive from one, all leaves."""
    of_pytorch = [base for base in type(module).__mro__ if base.__module__.startswith("torch.nn.modules.")]
    return not set(of_pytorch) <= set(_CONTAINERS) or not any(module.children())


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _append(block: GsopBlock, model: nn.Module, path: str) -> _Undo:
    module = model.get_submodule(path)
    module.add_module(CHILD, block)
    return partial(module._modules.pop, CHILD)  # type: ignore[return-value]


def _hook(block: GsopBlock, model: nn.Module, path: str) -> _Undo:
    module = model.get_submodule(path)
    module.add_module(CHILD, block)
    hook = module.register_forward_hook(apply_gsop)

    def undo() -> None:
        hook.remove()
        del module._modules[CHILD]

    return undo


def apply_gsop(self, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Forward hook: pass a module's output through its child ``gsop``."""
    return self.gsop(output)


class _LayerAndBlock(nn.Sequential):
    """A layer of a model and the block after it; the layer's weights are saved without the ``0`` in their names."""


def _wrap(block: GsopBlock, model: nn.Module, path: str) -> _Undo:
    layer = model.get_submodule(path)
    both = _LayerAndBlock()
    both.add_module("0", layer)
    both.add_module(CHILD, block)
    if hasattr(layer, "inplace"):  # timm's features_only does not checkpoint what changes its input
        both.inplace = layer.inplace
    both.train(layer.training)
    parent, name = _parent(model, path), path.rpartition(".")[2]
    parent._modules[name] = both
    undo_names = keep_names(model) if layer.state_dict() else None

    def undo() -> None:
        parent._modules[name] = layer
        if undo_names is not None:
            undo_names()

    return undo


def _follow(block: Any, model: nn.Module, path: str) -> _Undo:
    container, name = _parent(model, path), path.rpartition(".")[2]
    names = list(container._modules)
    position = names.index(name)
    after = names[position + 1] if position + 1 < len(names) else None
    if not isinstance(container._modules[name], nn.Sequential | nn.ModuleDict | nn.ModuleList):
        saved = f"{name}.{CHILD}"
    elif after is not None and is_plain_sequential(container._modules[after]):  # type: ignore[arg-type]
        saved = f"{after}.{CHILD}"  # of which the block once was the first child
    else:
        saved = f"{name}{SIBLING}"
    block.names = (f"{name}{SIBLING}", saved)
    modules = list(container._modules.items())
    container._modules.clear()
    container._modules.update([*modules[: position + 1], (block.names[0], block), *modules[position + 1 :]])
    undo_levels = _move_levels(model, container, path, position)
    undo_names = keep_names(model)

    def undo() -> None:
        undo_levels()
        del container._modules[f"{name}{SIBLING}"]
        undo_names()
        for held in container._modules.values():
            vars(held).pop(CHILD, None)

    return undo


def _move_levels(model: Any, container: nn.Module, path: str, position: int) -> _Undo:
    """Let the feature levels that end with a module end with the block after it, wherever timm has noted them."""
    info = getattr(model, "feature_info", [])
    levels = [level for level in getattr(info, "info", info) if level["module"] == path]
    returned = container.return_layers if isinstance(container, FeatureDictNet) else {}
    in_features = container is getattr(model, "features", None) and hasattr(model, "feature_ends")
    name = path.rpartition(".")[2]
    follower = f"{name}{SIBLING}"

    for level in levels:
        level["module"] += SIBLING
    if in_features:  # positions in DenseNet's and VGG's one sequence
        model.feature_ends = [end + (end >= position) for end in model.feature_ends]
    if name in returned:
        returned[follower] = returned.pop(name)

    def undo() -> None:
        for level in levels:
            level["module"] = path
        if in_features:
            position = list(container._modules).index(follower)
            model.feature_ends = [end - (end >= position) for end in model.feature_ends]
        if follower in returned:
            returned[name] = returned.pop(follower)

    return undo


def keep_names(model: nn.Module) -> _Undo:
    """Let a model save and load its blocks, and the layers that they follow, under their lasting names.

    Args:
        model: The model, or what timm made of its modules.

    Returns:
        A function that undoes it.
    """
    if _rename_saved in model._state_dict_hooks.values():
        return lambda: None
    hooks = [
        model.register_state_dict_post_hook(_rename_saved),
        model.register_load_state_dict_pre_hook(_rename_loaded),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo


def _lasting_names(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Beginnings of names in a model, and what weights are saved under in their place."""
    for path, module in model.named_modules():
        if isinstance(module, _LayerAndBlock):
            yield f"{path}.{CHILD}.", f"{path}.{CHILD}."
            yield f"{path}.0.", f"{path}."
        own, saved = getattr(module, "names", ("", ""))
        if isinstance(module, GsopBlock) and own and path.endswith(own):
            yield f"{path}.", f"{path.removesuffix(own)}{saved}."


def _rename(tensors: dict[str, Any], names: list[tuple[str, str]]) -> None:
    """Let names of tensors begin with the second of a pair in place of the first, and leave the tensors' order."""
    items = list(tensors.items())
    tensors.clear()
    for name, tensor in items:
        old, new = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        tensors[f"{new}{name.removeprefix(old)}"] = tensor


def _rename_saved(model: nn.Module, weights: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(weights, [(f"{prefix}{own}", f"{prefix}{saved}") for own, saved in _lasting_names(model)])
    _make_saved_names_attributes(model)


def _rename_loaded(model: nn.Module, weights: dict[str, Any], prefix: str, *_: Any) -> None:
    _rename(weights, [(f"{prefix}{saved}", f"{prefix}{own}") for own, saved in _lasting_names(model)])


def _make_saved_names_attributes(model: nn.Module) -> None:
    """Let those who look weights up by their saved names find them: transformers and ``functional_call``, for two."""
    modules = dict(model.named_modules())
    for own, saved in _lasting_names(model):
        holder = modules.get(saved.removesuffix(f".{CHILD}."))
        if own != saved and holder is not None:
            holder.__dict__[CHILD] = modules[own.removesuffix(".")]  # no child: it has its place


def group_with_blocks(model: Any, matcher: Any, coarse: bool = False) -> Callable[[str], int]:
    """Group a model's parameters by depth, for layer-wise learning rates, each block with its stage.

    Args:
        model: The model.
        matcher: The model's own ``group_matcher``.
        coarse: Whether stages are groups, as in timm.

    Returns:
        A function from the name of a parameter to its group, counted from 0.
    """
    groups: dict[str, int] = group_parameters(model, matcher(coarse=coarse), reverse=True)
    of_blocks = tuple(f"{path}." for path, module in model.named_modules() if isinstance(module, GsopBlock))
    grouped, before = {}, 0
    for name, _ in model.named_parameters():  # what is registered before a block is of its stage
        before = before if name.startswith(of_blocks) else groups[name]
        grouped[name] = before
    last = max(grouped.values(), default=0)
    return lambda name: grouped.get(name, last)
