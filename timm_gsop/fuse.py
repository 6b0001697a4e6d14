"""Batch normalization folded into the convolutions before it, for inference."""

import copy

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fuse_conv_bn"]


class _Tracer(torch.fx.Tracer):
    """Does not look into convolutions and batch normalizations of other packages than PyTorch either."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.BatchNorm2d)) or super().is_leaf_module(m, module_qualified_name)


def fuse_conv_bn(model: nn.Module) -> nn.Module:
    """Copy a network, with every batch normalization that follows a convolution folded into it.

    The copy computes the same, faster, and is for inference only. It is the same kind of model: ``forward_features``
    and the like stay. Weights have other names and values, so that it neither loads nor gives checkpoints of the
    original. ``torch.compile`` with freezing does the same to a compiled graph.

    Args:
        model: A network that ``torch.fx`` can trace, in evaluation mode.

    Returns:
        The copy, in evaluation mode.

    Raises:
        ValueError: If ``model`` is in training mode: its statistics are not final.
    """
    if model.training:
        raise ValueError("model is in training mode; accepted: a model in evaluation mode, see model.eval()")
    fused = copy.deepcopy(model)
    graph = _Tracer().trace(fused)
    modules = dict(fused.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[node.target], nn.BatchNorm2d):
            continue
        before, bn = node.args[0], modules[node.target]
        follows_conv = before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d)
        shared = follows_conv and (len(before.users) > 1 or calls.count(before.target) > 1)
        if not follows_conv or shared or calls.count(node.target) > 1 or not bn.track_running_stats:
            continue
        fused.set_submodule(before.target, fuse_conv_bn_eval(modules[before.target], bn))
        rest = nn.Sequential(bn.drop, bn.act) if isinstance(bn, BatchNormAct2d) else nn.Identity()
        fused.set_submodule(node.target, rest)
    return fused
