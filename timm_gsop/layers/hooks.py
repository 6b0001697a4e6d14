"""Whether anyone watches a module by hooks, which see only what passes through a call of it."""

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["is_hooked", "output_is_hooked"]


def output_is_hooked(module: nn.Module) -> bool:
    """Whether a hook sees what ``module`` returns, or the gradient of that. One on its input alone does not count."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks or _any_for_all_modules())


def is_hooked(module: nn.Module) -> bool:
    """Whether any hook is called when ``module`` is."""
    return bool(module._forward_pre_hooks) or output_is_hooked(module)


def _any_for_all_modules() -> bool:
    """Hooks of ``register_module_forward_hook`` and the like."""
    return bool(torch_module._has_any_global_hook())
