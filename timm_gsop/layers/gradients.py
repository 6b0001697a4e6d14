"""How a function is evaluated: in at least float32 whatever autocast says, and where with a hand-written gradient.

A backward pass runs, or is traced by the compiler, under whatever autocast is active where it is called. A guard around
the forward pass does not reach it, so every hand-written backward pass guards itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch.autograd import Function

from timm_gsop.layers.exporting import makes_graph

__all__ = [
    "at_least_float32",
    "autocast_disabled",
    "evaluate",
    "function_of_input",
    "gradients_of_reference",
    "without_autocast",
]

Backward = Callable[..., Any]


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or as it is where it is float32 or float64 already."""
    if x.dtype == torch.float32 or x.dtype == torch.float64:
        return x
    return x.float()


def autocast_disabled(device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast leaves tensors of ``device`` alone."""
    if not _has_autocast(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@torch.compiler.assume_constant_result  # the compiler of torch 2.5 cannot look into PyTorch's function
def _has_autocast(device_type: str) -> bool:
    """Whether a device has autocast; the meta device, for one, has not."""
    return torch.amp.is_autocast_available(device_type)


def evaluate(function: type[Function], plain: Callable[..., torch.Tensor], x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Evaluate a function that has a hand-written gradient, with autocast disabled.

    Without gradients, and in graphs, it is made of plain operations. A trace would record an ``autograd.Function`` as a
    call into Python, which can neither be saved nor counted by FLOP counters. ``torch.export`` would keep no more of
    it than its forward pass.

    Args:
        function: The function with its gradient. The first of its outputs counts, if it has several.
        plain: The same function in plain operations.
        x: Its input.
        *args: Its other arguments; tensors among them are differentiated too.

    Returns:
        The value at ``x``.
    """
    with autocast_disabled(x.device):
        needs_gradient = any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in (x, *args))
        if makes_graph() or not (torch.is_grad_enabled() and needs_gradient):
            return plain(x, *args)
        output = function.apply(x, *args)
        return output[0] if isinstance(output, tuple) else output


def function_of_input(plain: Callable[..., torch.Tensor], gradient: Callable[..., torch.Tensor]) -> type[Function]:
    """Make a differentiable function that keeps its input for the gradient and nothing else.

    Args:
        plain: The function of one tensor, and of arguments that are no tensors, in plain operations.
        gradient: Maps the input, the gradient with respect to the output, and the other arguments, to the gradient
            with respect to the input.

    Returns:
        The function, for :func:`evaluate`.
    """

    class FunctionOfInput(Function):
        generate_vmap_rule = True  # for torch.func

        @staticmethod
        def forward(x: torch.Tensor, *others: Any) -> torch.Tensor:
            return plain(x, *others)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
            x, *ctx.others = inputs
            ctx.save_for_backward(x)

        @staticmethod
        @without_autocast
        def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (x,) = ctx.saved_tensors
            return gradient(x, grad, *ctx.others), *[None] * len(ctx.others)

    return FunctionOfInput


def without_autocast(backward: Backward) -> Backward:
    """Decorate the ``backward`` of a ``torch.autograd.Function``: autocast is disabled while it runs."""

    @wraps(backward)
    def guarded(ctx: Any, *grads: torch.Tensor | None) -> Any:
        devices = [grad.device for grad in grads if grad is not None]
        with autocast_disabled(devices[0] if devices else torch.device("cpu")):
            return backward(ctx, *grads)

    return guarded


def gradients_of_reference(
    reference: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, *others: Any
) -> tuple[torch.Tensor | None, ...]:
    """What autograd makes of plain operations, in the ``backward`` of a kernel that cannot be differentiated again.

    Args:
        reference: The same function as the kernel's, in plain operations.
        inputs: Its inputs that may be differentiated.
        grad: Gradient with respect to its output.
        *others: Its other arguments.

    Returns:
        A gradient for each input, or None where the input needs none; with a graph if one is wanted.
    """
    with torch.enable_grad(), autocast_disabled(grad.device):
        views = [x.view_as(x) for x in inputs]  # hooks on the inputs themselves are not called twice
        output = reference(*views, *others)
        needed = [view for view in views if view.requires_grad]
    gradients = iter(torch.autograd.grad(output, needed, grad, create_graph=torch.is_grad_enabled()))
    return tuple(next(gradients) if view.requires_grad else None for view in views)
