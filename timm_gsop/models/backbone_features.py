"""What a network's ``forward_features`` returns, and how that becomes a feature map (B, C, H, W)."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import get_device_dtype
from timm.models import get_model_input_config
from torch import nn

from timm_gsop.insert import evaluation_mode

__all__ = ["BackboneFeatures", "ChannelsFirst", "TokensToMap", "feature_map", "tokens_to_map"]

# Leaves in torch.fx's graphs: within a trace, shapes are no numbers that they could test.
for _leaf in ("tokens_to_map", "token_grid"):
    torch.fx.wrap(_leaf)


class BackboneFeatures(NamedTuple):
    """What a network's ``forward_features`` returns, and what it does not need for that.

    Attributes:
        layout: ``"NCHW"``, ``"NHWC"`` or ``"tokens"``.
        channels: Their channels.
        image_size: Height and width of the image that they are of.
        grid_size: Their height and width.
        num_prefix_tokens: Of tokens: how many do not belong to the image.
        not_called: Names of modules that are not called.
        unused: Names of parameters on which they do not depend.
    """

    layout: str
    channels: int
    image_size: tuple[int, int]
    grid_size: tuple[int, int]
    num_prefix_tokens: int
    not_called: set[str]
    unused: set[str]

    @classmethod
    def of(cls, name: str, model: Any) -> "BackboneFeatures":
        """Find out by running a model once, on a blank image.

        Args:
            name: The model's name, for errors.
            model: The model.

        Raises:
            ValueError: If its features are neither maps nor tokens.
        """
        called: set[str] = set()
        names = {module: path for path, module in model.named_modules()}
        hooks = [m.register_forward_pre_hook(lambda m, _: called.add(names[m])) for m in names]
        size = get_model_input_config(model)["input_size"]
        try:
            with torch.enable_grad(), evaluation_mode(model):
                features = model.forward_features(torch.zeros(1, *size, **get_device_dtype(model)))
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(features, torch.Tensor) or features.ndim not in (3, 4):
            found = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
            raise ValueError(
                f"backbone={name!r} has features of {found}; accepted: networks whose forward_features returns "
                "(B, C, H, W), (B, H, W, C) or tokens (B, N, C)."
            )
        prefix, image = 0, (int(size[1]), int(size[2]))
        if features.ndim == 3:
            layout, channels = "tokens", features.shape[2]
            prefix = _num_prefix_tokens(model, features.shape[1])
            grid = _grid_size(model, features.shape[1] - prefix, image)
        elif getattr(model, "output_fmt", "NCHW") == "NHWC":
            layout, channels, grid = "NHWC", features.shape[3], (features.shape[1], features.shape[2])
        else:
            layout, channels, grid = "NCHW", features.shape[1], (features.shape[2], features.shape[3])
        used = _parameters_behind(features[:, prefix:] if layout == "tokens" else features)
        unused = {path for path, p in model.named_parameters() if p.requires_grad and id(p) not in used}
        return cls(layout, channels, image, grid, prefix, set(names.values()) - called, unused)


def feature_map(features: BackboneFeatures) -> nn.Module:
    """The layer that makes a map (B, C, H, W) of a network's features."""
    if features.layout == "tokens":
        return TokensToMap(features.num_prefix_tokens, features.image_size, features.grid_size)
    return ChannelsFirst() if features.layout == "NHWC" else nn.Identity()


class ChannelsFirst(nn.Module):
    """Maps with the channels last, as maps with the channels first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Permute (B, H, W, C) to (B, C, H, W)."""
        return x.permute(0, 3, 1, 2)


class TokensToMap(nn.Module):
    """Tokens of an image, arranged as a map.

    Args:
        num_prefix_tokens: How many of the first ones do not belong to the image: class and register tokens.
        image_size: Height and width of an image.
        grid_size: Rows and columns of that image's tokens.
    """

    def __init__(self, num_prefix_tokens: int, image_size: tuple[int, int], grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.num_prefix_tokens = num_prefix_tokens
        self.image_size = image_size
        self.grid_size = grid_size

    def forward(self, x: torch.Tensor, height: int = 0, width: int = 0) -> torch.Tensor:
        """Arrange tokens (B, N, C) of an image of a height and width: (B, C, H', W').

        Without them, the image has the size that the layer was made for. Tokens that make no grid become one column.
        """
        rows, columns = token_grid(x.shape[1] - self.num_prefix_tokens, self.image_size, self.grid_size, height, width)
        return tokens_to_map(x, self.num_prefix_tokens, rows, columns)


def token_grid(
    num_tokens: int, image_size: tuple[int, int], grid_size: tuple[int, int], height: int, width: int
) -> tuple[int, int]:
    """Rows and columns of the tokens of an image, given those of an image of another size.

    Args:
        num_tokens: The image's own tokens.
        image_size: Height and width of the other image.
        grid_size: Rows and columns of its tokens.
        height: The image's height; 0 for that of the other.
        width: The image's width.
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  # two levels: TorchScript must not see the second condition
        if torch.jit.is_tracing():  # a trace keeps the grid
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", torch.jit.TracerWarning)
                num_tokens, height, width = int(num_tokens), int(height), int(width)
    rows, columns = grid_size
    if height > 0:
        tall, wide = height * rows, width * columns
        rows, columns = tall // image_size[0], wide // image_size[1]
        if rows * columns != num_tokens:  # patches are padded, or convolutions round up
            rows, columns = -(-tall // image_size[0]), -(-wide // image_size[1])
    return (rows, columns) if rows * columns == num_tokens else (num_tokens, 1)


def tokens_to_map(x: torch.Tensor, num_prefix_tokens: int, height: int, width: int) -> torch.Tensor:
    """Arrange tokens as a map: (B, N, C) to (B, C, H, W), or to (B, C, M, 1) if M, the number of tokens, is not H·W.

    Args:
        x: Tokens.
        num_prefix_tokens: How many of the first ones do not belong to the image: class and register tokens.
        height: Rows of the map, H.
        width: Columns of the map, W.

    Examples:
        >>> tokens_to_map(torch.randn(2, 1 + 12, 8), 1, 3, 4).shape
        torch.Size([2, 8, 3, 4])
    """
    x = x[:, num_prefix_tokens:].transpose(1, 2)
    # In a trace sizes are tensors, which a condition would record as constants.
    if (torch.jit.is_scripting() or not torch.jit.is_tracing()) and x.shape[2] != height * width:
        return x.unsqueeze(3)
    return x.reshape(x.shape[0], x.shape[1], height, width)


def _num_prefix_tokens(model: Any, num_tokens: int) -> int:
    """How many tokens come before those of the image: class and register tokens."""
    if hasattr(model, "num_prefix_tokens"):
        return int(model.num_prefix_tokens)
    num_patches = getattr(getattr(model, "patch_embed", None), "num_patches", num_tokens)
    if num_patches <= num_tokens:
        return int(num_tokens - num_patches)
    return int(getattr(model, "cls_token", None) is not None)


def _grid_size(model: Any, num_tokens: int, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the image's tokens; one column where they make no grid."""
    height, width = image_size
    patch = round((height * width / num_tokens) ** 0.5)
    grids = [getattr(getattr(model, "patch_embed", None), "grid_size", None), (height // patch, width // patch)]
    known = [(int(grid[0]), int(grid[1])) for grid in grids if grid is not None]
    return next((grid for grid in known if grid[0] * grid[1] == num_tokens), (num_tokens, 1))


def _parameters_behind(x: torch.Tensor) -> set[int]:
    """Identities of the parameters from which a tensor was computed."""
    found: set[int] = set()
    seen: set[Any] = set()
    stack = [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        stack += [child for child, _ in node.next_functions]
    return found
