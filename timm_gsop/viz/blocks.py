"""Pictures of what GSoP blocks and covariance pooling make of an image: python -m timm_gsop.viz MODEL IMAGE OUT.png."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import create_transform, resolve_data_config
from timm.models import get_model_input_config
from timm.utils import ParseKwargs
from torch import nn

from timm_gsop.insert import evaluation_mode
from timm_gsop.layers import ChannelGsop, CovPool2d, PositionGsop
from timm_gsop.viz.figure import check_output, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Record", "draw", "preprocess", "record"]

MAX_ROWS = 9  # of more blocks, that many are drawn: evenly spaced ones, the last among them


@dataclass
class Record:
    """What one layer made of an image.

    Attributes:
        name: Name of the layer in the model.
        covariance: Its covariance matrix, (d, d).
        normalized: The matrix after row-wise batch normalization in a block; in covariance pooling its square root, or
            itself.
        channel_weights: (C,), of a channel-wise block.
        position_weights: (H, W), of a position-wise block.
        normalization: What ``normalized`` is, in words.
    """

    name: str
    covariance: torch.Tensor
    normalized: torch.Tensor
    channel_weights: torch.Tensor | None = None
    position_weights: torch.Tensor | None = None
    normalization: str = "after row-wise BN"


@torch.no_grad()
def record(model: nn.Module, image: torch.Tensor) -> list[Record]:
    """Run a model on one image, and look into its second-order layers, in the order in which they run.

    Args:
        model: Any model with GSoP layers or covariance pooling in it. It runs in evaluation, and is left as it was.
        image: (1, C, H, W), preprocessed.

    Returns:
        One record a layer; a fused block has two, by channel and by position.

    Raises:
        ValueError: If ``image`` is not one image, or ``model`` has no such layer, or runs none of them.
    """
    if image.ndim != 4 or image.shape[0] != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}; accepted: (1, C, H, W), one image.")
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ChannelGsop | PositionGsop | CovPool2d)
    }
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} has neither GSoP blocks nor covariance pooling; accepted: one with either."
        )
    inputs: dict[nn.Module, torch.Tensor] = {}

    def note_input_of(layer: Any) -> Any:
        return layer.register_forward_pre_hook(lambda _, args: inputs.update({layer: args[0].clone()}))

    hooks = [note_input_of(layer) for layer in layers.values()]
    try:
        with evaluation_mode(model):
            model(image)
            if not inputs:
                raise ValueError(f"model={type(model).__name__} called none of its layers {', '.join(layers)}.")
            names = {module: name for name, module in layers.items()}
            return [_look_into(names[module], module, x) for module, x in inputs.items()]
    finally:
        for hook in hooks:
            hook.remove()


def _look_into(name: str, layer: Any, x: torch.Tensor) -> Record:
    covariance = layer.squeeze(x)
    if isinstance(layer, CovPool2d):
        return Record(name, covariance[0], layer.normalize(covariance)[0], normalization=layer.normalization)
    normalized = layer.excitation.normalize_rows(covariance)[0, :, :, 0]
    if isinstance(layer, ChannelGsop):
        return Record(name, covariance[0], normalized, channel_weights=layer.weights(x).flatten())
    return Record(name, covariance[0], normalized, position_weights=layer.weights(x)[0, 0])


def preprocess(image: Image.Image, model: nn.Module, size: int | None = None) -> tuple[Image.Image, torch.Tensor]:
    """Prepare an image for a model, as timm does for evaluation.

    Args:
        image: The image, of any size and mode.
        model: A timm model of images with 1 or 3 channels.
        size: Side of the square that the model sees; its own by default.

    Returns:
        The image, cropped as the model sees it, and its input, (1, C, H, W).

    Raises:
        ValueError: If the model takes another number of channels.

    Example:
        >>> import timm
        >>> from timm_gsop.viz import preprocess, record
        >>> model = timm.create_model("gsop_preresnet20_net1", pretrained=True)
        >>> crop, x = preprocess(Image.new("RGB", (40, 30)), model)
        >>> crop.size, tuple(x.shape), record(model, x)[0].name
        ((32, 32), (1, 3, 32, 32), 'stages.0.blocks.gsop1.gsop')
    """
    config = resolve_data_config(get_model_input_config(model), model=model)
    if size is not None:
        config["input_size"] = (config["input_size"][0], size, size)
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise ValueError(f"model takes images of {channels} channels; accepted: 1 or 3.")
    if channels == 1:
        config.update({key: (sum(config[key]) / len(config[key]),) for key in ("mean", "std")})
    image = image.convert("L" if channels == 1 else "RGB")
    transform = create_transform(**config)
    crop, normalize = transform.transforms[:-2], transform.transforms[-2:]
    for step in crop:
        image = step(image)
    x: Any = image
    for step in normalize:
        x = step(x)
    return image, x.unsqueeze(0)


def draw(records: Sequence[Record], image: Image.Image, title: str = "") -> "Figure":
    """Draw records as a figure: a row a layer; weights, covariance, and covariance after normalization.

    Args:
        records: What :func:`record` returned; of more than 9, evenly spaced ones are drawn.
        image: The image, as the model saw it.
        title: Stands above the figure.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    if len(records) > MAX_ROWS:
        title += f"\n{MAX_ROWS} of {len(records)} layers"
        last = len(records) - 1
        records = [records[round(i * last / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]
    figure = new_figure(9, 2.5 * (len(records) + 1))
    axes = figure.subplots(len(records) + 1, 3, width_ratios=(1.5, 1, 1), squeeze=False)
    axes[0, 0].imshow(image.convert("RGB"))
    axes[0, 0].set_title("image", fontsize=9)
    for ax in axes[0]:
        ax.axis("off")
    for row, item in zip(axes[1:], records, strict=True):
        _draw_weights(row[0], item, image)
        size = len(item.covariance)
        _draw_matrix(row[1], item.covariance, f"covariance, {size}×{size}")
        _draw_matrix(row[2], item.normalized, item.normalization)
    figure.suptitle(title)
    return figure


def _draw_weights(ax: Any, item: Record, image: Image.Image) -> None:
    if item.channel_weights is not None:
        weights = item.channel_weights.float().cpu().numpy()
        order = -np.sort(-weights)
        ax.fill_between(range(len(order)), order, step="mid", color="#9ecae1")
        ax.axhline(weights.mean(), color="#08519c", linewidth=1, label=f"mean {weights.mean():.2f}")
        ax.set(ylim=(-0.25, 1.02), yticks=(0, 0.5, 1), xlim=(0, len(order) - 1), xlabel="channels, sorted by weight")
        strip = (0, len(order) - 1, -0.22, -0.06)  # the same weights, unsorted
        ax.imshow(weights[None], extent=strip, aspect="auto", cmap="Blues", vmin=0, vmax=1)
        ax.legend(fontsize=8, loc="upper right")
    elif item.position_weights is not None:
        weights = item.position_weights.float().cpu().numpy()
        ax.imshow(image.convert("L"), cmap="gray")
        extent = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
        shown = ax.imshow(weights, extent=extent, cmap="inferno", alpha=0.6, interpolation="bilinear")
        ax.figure.colorbar(shown, ax=ax)
        ax.axis("off")
    else:
        for name, matrix in {"covariance": item.covariance, item.normalization: item.normalized}.items():
            eigenvalues = np.linalg.eigvalsh(matrix.double().cpu().numpy())[::-1].clip(0)
            ax.plot(eigenvalues / max(eigenvalues[0], 1e-30), label=name)
        ax.set(yscale="log", ylim=(1e-6, 2), xlabel="eigenvalues, relative to the largest")
        ax.legend(fontsize=8)
    ax.set_title(item.name, fontsize=9)


def _draw_matrix(ax: Any, matrix: torch.Tensor, title: str) -> None:
    values = matrix.float().cpu().numpy()
    limit = np.quantile(np.abs(values), 0.99) or 1.0
    shown = ax.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, interpolation="antialiased")
    ax.figure.colorbar(shown, ax=ax, extend="both")  # the largest one in a hundred are beyond
    ax.set_title(title, fontsize=9)
    ax.set(xticks=(), yticks=())


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``MODEL IMAGE OUT.png``."""
    parser = argparse.ArgumentParser(prog="python -m timm_gsop.viz", description=__doc__)
    parser.add_argument("model", help="name of a model, or local-dir:FOLDER, or hf-hub:REPOSITORY")
    parser.add_argument("image", type=Path)
    parser.add_argument("out", type=Path, help="the picture to write; its ending decides the format")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--checkpoint", default="", help="weights to load into the model")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--img-size", type=int, help="side of the square that the model sees, in place of its own")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=_KeyValues, metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    if args.img_size is not None and args.img_size < 1:
        parser.error(f"--img-size={args.img_size} is not accepted; it must be an integer >= 1.")
    if args.checkpoint and not Path(args.checkpoint).is_file():
        parser.error(f"--checkpoint={args.checkpoint!r} is no file.")
    try:
        check_output(args.out)
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)  # the picture of an untrained model is always the same
    try:
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained,
            checkpoint_path=args.checkpoint,
            num_classes=args.num_classes,
            **args.model_kwargs,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.error(f"model={args.model!r} cannot be created: {_reason(error)}")
    try:
        image, x = preprocess(_open(args.image), model, args.img_size)
        trained = args.pretrained or args.checkpoint
        figure = draw(record(model, x), image, title=args.model if trained else f"{args.model}, untrained")
    except (ModuleNotFoundError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    try:
        save_figure(figure, args.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


def _reason(error: Exception) -> str:
    """What is wrong, in one line; of weights with another number of classes, how to say it."""
    text = " ".join(str(error).split()) or type(error).__name__
    classes = re.search(r"size mismatch for (?:fc|classifier|head\S*)\.bias: .*?\[(\d+)\].*?\[(\d+)\]", text)
    if classes:
        return (
            f"its checkpoint has {classes[1]} classes and the model {classes[2]}; accepted: --num-classes {classes[1]}."
        )
    return text if len(text) <= 400 else f"{text[:400]} …"


class _KeyValues(ParseKwargs):
    """timm's, with an error of one line where there is no ``=``."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"{option} {value!r} is not accepted; it must be KEY=VALUE.")
        super().__call__(parser, namespace, values, option)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except UnidentifiedImageError as error:
        raise ValueError(f"image={str(path)!r} is not an image that Pillow can read.") from error
