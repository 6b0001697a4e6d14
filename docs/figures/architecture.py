"""Draws docs/figures/architecture.png, the networks and the block: python docs/figures/architecture.py."""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

# Colours by role (Okabe and Ito's palette, lightened): convolution, second-order statistics, elementwise, data.
CONV, COV, ELEMENTWISE, DATA = "#c6dbef", "#fdd0a2", "#d9f0d3", "#f0f0f0"
INK = "#222222"


def box(ax: Axes, x: float, y: float, text: str, color: str, width: float = 1.6, height: float = 0.9) -> None:
    """A rounded box with its centre at (x, y)."""
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0,rounding_size=0.12"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=color, edgecolor=INK, linewidth=1))
    ax.text(x, y, text, ha="center", va="center", fontsize=10.5, color=INK, linespacing=1.25)


def arrow(ax: Axes, *points: tuple[float, float]) -> None:
    """A line through the points, with its head at the last one."""
    for start, end in pairwise(points[:-1]):
        ax.plot(*zip(start, end, strict=True), color=INK, linewidth=1.2, solid_capstyle="round")
    ax.annotate("", points[-1], points[-2], arrowprops=dict(arrowstyle="-|>", color=INK, lw=1.2, shrinkA=0, shrinkB=0))


def note(ax: Axes, x: float, y: float, text: str, **kwargs: object) -> None:
    """Small text centred at (x, y)."""
    ax.text(x, y, text, **{**dict(ha="center", va="center", fontsize=9.5, color="#555555"), **kwargs})


def draw_networks(ax: Axes) -> None:
    """GSoP-Net1 and Net2 on ResNet-50."""
    note(ax, 0.1, 3.55, "(a)  GSoP-Net on ResNet-50", ha="left", fontsize=13, color=INK, weight="bold")
    y = 2.0
    stages = [("stem", "64 × 56²"), ("layer1", "256 × 56²"), ("layer2", "512 × 28²"), ("layer3", "1024 × 14²")]
    x = 0.9
    note(ax, x, y, "image\n3 × 224²", color=INK)
    previous = x + 0.55
    for i, (name, shape) in enumerate(stages):
        x += 1.75 if i in (0, 1) else 1.5
        arrow(ax, (previous, y), (x - 0.6, y))
        box(ax, x, y, name, CONV, width=1.2)
        note(ax, x, y - 0.72, shape)
        previous = x + 0.6
        if i > 0:
            x += 1.25
            arrow(ax, (previous, y), (x - 0.42, y))
            box(ax, x, y, "GSoP", COV, width=0.84)
            previous = x + 0.42
    x += 1.6
    arrow(ax, (previous, y), (x - 0.65, y))
    box(ax, x, y, "layer4", CONV, width=1.3)
    note(ax, x, y - 0.72, "2048 × 14²")
    note(ax, x, y + 0.72, "stride 1")
    fork = x + 0.65
    for dy, name in ((0.95, "Net1"), (-0.95, "Net2")):
        arrow(ax, (fork, y), (fork + 0.25, y), (fork + 0.25, y + dy), (fork + 1.0, y + dy))
        note(ax, fork + 0.62, y + dy + 0.28, name, fontsize=11.5, color=INK, weight="bold")
    top, bottom, x = y + 0.95, y - 0.95, fork + 1.0
    box(ax, x + 0.45, top, "GSoP", COV, width=0.9)
    arrow(ax, (x + 0.9, top), (x + 1.3, top))
    box(ax, x + 2.1, top, "average\npooling", ELEMENTWISE)
    arrow(ax, (x + 2.9, top), (x + 3.75, top))
    note(ax, x + 3.32, top + 0.3, "2048")
    box(ax, x + 1.45, bottom, "iSQRT-COV pooling\n√Σ of 256 channels", COV, width=2.9)
    arrow(ax, (x + 2.9, bottom), (x + 3.75, bottom))
    note(ax, x + 3.32, bottom + 0.3, "32 896")
    for end in (top, bottom):
        box(ax, x + 4.15, end, "FC", CONV, width=0.8)
    ax.set(xlim=(0, x + 4.7), ylim=(0.4, 3.8))


def draw_block(ax: Axes) -> None:
    """The channel-wise block."""
    note(ax, 0.1, 4.35, "(b)  GSoP block", ha="left", fontsize=13, color=INK, weight="bold")
    y, left = 2.2, 1.0
    note(ax, left, y, "x\nC×H×W", color=INK, fontsize=11)
    steps = [
        (2.95, "1×1 conv\nBN, ReLU", CONV, "d×H×W", 1.6),
        (6.75, "row-wise\nBN", CONV, "d×d", 1.3),
        (8.75, "row-wise conv\nBN, LeakyReLU", CONV, "4d", 1.9),
        (10.95, "1×1 conv\nsigmoid", CONV, "C weights", 1.6),
    ]
    for x, text, color, shape, width in steps:
        box(ax, x, y, text, color, width)
        note(ax, x, y - 0.72, shape)
    rng = np.random.default_rng(3)
    factors = rng.normal(size=(9, 5))
    extent = (4.35, 5.55, y - 0.6, y + 0.6)
    ax.imshow(factors @ factors.T, extent=extent, cmap="PuOr", vmin=-8, vmax=8, zorder=2, interpolation="nearest")
    ax.plot([4.35, 5.55, 5.55, 4.35, 4.35], [y - 0.6, y - 0.6, y + 0.6, y + 0.6, y - 0.6], color=INK, lw=1, zorder=3)
    note(ax, 4.95, y - 0.86, "covariance of the\nchannels, d×d", va="top")
    for start, end in ((1.5, 2.15), (3.75, 4.35), (5.55, 6.1), (7.4, 7.8), (9.7, 10.15)):
        arrow(ax, (start, y), (end, y))
    multiply, add = 13.1, 14.4
    for x, sign in ((multiply, "×"), (add, "+")):
        ax.add_patch(plt.Circle((x, y), 0.28, facecolor=ELEMENTWISE, edgecolor=INK, linewidth=1, zorder=3))
        ax.text(x, y - 0.02, sign, ha="center", va="center", fontsize=15, color=INK, zorder=4)
    arrow(ax, (11.75, y), (multiply - 0.28, y))
    arrow(ax, (multiply + 0.28, y), (add - 0.28, y))
    arrow(ax, (add + 0.28, y), (15.35, y))
    note(ax, 15.85, y, "x + w·x\nC×H×W", color=INK, fontsize=11)
    arrow(ax, (left, y - 0.45), (left, 0.45), (multiply, 0.45), (multiply, y - 0.28))
    arrow(ax, (left, 0.45), (left, 0.15), (add, 0.15), (add, y - 0.28))
    note(ax, 12.05, 0.68, "scales its channels")
    note(ax, 14.55, 0.68, "shortcut", ha="left")
    for start, end, name in ((2.15, 5.55, "squeeze"), (6.1, 11.75, "excitation")):
        bracket = [(start, 3.15), (start, 3.3), (end, 3.3), (end, 3.15)]
        ax.plot(*zip(*bracket, strict=True), color="#555555", linewidth=1)
        note(ax, (start + end) / 2, 3.58, name, fontsize=11.5, style="italic")
    ax.set(xlim=(0, 16.6), ylim=(0, 4.6))


def main() -> None:
    """Draw the figure."""
    figure, axes = plt.subplots(2, 1, figsize=(13.5, 7.4), height_ratios=(3.4, 4.2), layout="constrained")
    for ax, draw in zip(axes, (draw_networks, draw_block), strict=True):
        draw(ax)
        ax.set_aspect("equal")
        ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=120, facecolor="white")


if __name__ == "__main__":
    main()
