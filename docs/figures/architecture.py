"""Draws docs/figures/architecture.png: the two networks on ResNet-50, and the GSoP block.

Run ``python docs/figures/architecture.py`` from the root of the repository. Coordinates are pixels, y points down.
"""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

WIDTH, HEIGHT, DPI = 1640, 926, 100
# Fill and edge by role: light tints and darker shades of Okabe and Ito's colour-blind-safe blue, orange and green.
CONV, COV, PLAIN = ("#d6e8f7", "#0072b2"), ("#fde3bd", "#c96f00"), ("#d3eee4", "#00795a")
LEGEND = {"convolution, linear": CONV, "second-order statistics": COV, "elementwise, normalization, averaging": PLAIN}
INK, GREY = "#1f1f1f", "#5a5a5a"
TEXT, SMALL, TITLE = 15, 14, 18  # font sizes
Point = tuple[float, float]


def label(ax: Axes, x: float, y: float, text: str, size: float = SMALL, color: str = GREY, **kwargs: object) -> None:
    """Text; centred at (x, y) unless told otherwise."""
    ax.text(x, y, text, **dict(ha="center", va="center", fontsize=size, color=color, linespacing=1.25) | kwargs)


def caption(ax: Axes, x: float, y: float, text: str) -> None:
    """Lines of text below y, on baselines that they share with the captions beside them."""
    for i, row in enumerate(text.splitlines()):
        label(ax, x, y + 26 + 24 * i, row, va="baseline")


def box(
    ax: Axes, x: float, y: float, width: float, text: str, role: tuple[str, str], shape: str = "", height: float = 88
) -> None:
    """A rounded box with its centre at (x, y), and the shape of its output below; its text is upright if narrow."""
    corner, (fill, edge) = (x - width / 2, y - height / 2), role
    style = "round,pad=0,rounding_size=9"
    ax.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=fill, ec=edge, lw=1.6, zorder=2))
    label(ax, x, y, text, TEXT, INK, rotation=90 if width < 50 else 0, zorder=3)
    caption(ax, x, y + height / 2, shape)


def line(ax: Axes, points: Sequence[Point], color: str = INK) -> None:
    """A line through the points."""
    ax.plot(*zip(*points, strict=True), color=color, lw=1.6, solid_capstyle="round", solid_joinstyle="round", zorder=1)


def arrow(ax: Axes, *points: Point) -> None:
    """A line through the points, with its head at the last one."""
    line(ax, points[:-1])
    style = dict(arrowstyle="-|>,head_length=0.5,head_width=0.22", mutation_scale=16, color=INK, lw=1.6)
    ax.annotate("", points[-1], points[-2], arrowprops=dict(style, shrinkA=0, shrinkB=0, joinstyle="miter"))


def arrows(ax: Axes, y: float, *spans: Point) -> None:
    """Horizontal arrows, each from one x to another."""
    for start, end in spans:
        arrow(ax, (start, y), (end, y))


def matrix(ax: Axes, x: float, y: float, values: np.ndarray, cell: int, shape: str) -> None:
    """A matrix as coloured cells with its centre at (x, y); blank where not a number; its shape is below."""
    half = len(values) * cell / 2
    limit = 0.7 * np.nanmax(np.abs(values))
    extent = (x - half, x + half, y + half, y - half)
    ax.imshow(values, "PuOr_r", extent=extent, vmin=-limit, vmax=limit, interpolation="nearest", zorder=2)
    ax.add_patch(Rectangle((x - half, y - half), 2 * half, 2 * half, fc="none", ec=COV[1], lw=1.6, zorder=3))
    caption(ax, x, y + half, shape)


def example_covariance(size: int = 11) -> np.ndarray:
    """A covariance matrix of random channels that share a few patterns."""
    rng = np.random.default_rng(5)
    features = rng.normal(size=(size, 4)) @ rng.normal(size=(4, 60)) + 0.8 * rng.normal(size=(size, 60))
    return np.cov(features)


def draw_networks(ax: Axes) -> None:
    """Panel (a): the backbone, with a block after each of three stages, and the two ways to end it."""
    label(ax, 30, 36, "(a)  GSoP-Net on ResNet-50", TITLE, INK, ha="left", weight="bold")
    y, upper, lower = 274, 160, 388
    label(ax, 74, y, "image", TEXT, INK)
    caption(ax, 74, y + 44, "224×224\n3 ch")
    box(ax, 216, y, 152, "7×7 conv, /2\nmax pool, /2", CONV, "56×56\n64 ch")
    arrows(ax, y, (112, 140), (292, 318))
    stages = [("layer1", "56×56\n256 ch"), ("layer2", "28×28\n512 ch"), ("layer3", "14×14\n1024 ch")]
    for x, (name, shape) in zip((362, 536, 710), stages, strict=True):
        box(ax, x, y, 88, name, CONV, shape)
        box(ax, x + 87, y, 38, "GSoP", COV)
        arrows(ax, y, (x + 44, x + 68), (x + 106, x + 130))
    box(ax, 884, y, 88, "layer4", CONV, "14×14\n2048 ch")
    label(ax, 928, y - 54, "stride 1: no\ndown-sampling", ha="right", va="bottom", style="italic")
    for branch, name, end in ((upper, "GSoP-Net1", 1046), (lower, "GSoP-Net2", 1004)):
        arrow(ax, (928, y), (958, y), (958, branch), (end, branch))
        label(ax, 988, branch - 68, name, 16, INK, ha="left", va="baseline", weight="bold")
        box(ax, 1579, branch, 62, "FC", CONV, "classes")

    box(ax, 1065, upper, 38, "GSoP", COV, "14×14\n2048 ch")
    box(ax, 1324, upper, 116, "average\npooling", PLAIN, "2048")
    arrows(ax, upper, (1084, 1266), (1382, 1548))

    frame = FancyBboxPatch((988, lower - 58), 522, 166, boxstyle="round,pad=0,rounding_size=9", fc="#fffaf2", ec=COV[1])
    frame.set(linewidth=1.2, linestyle=(0, (4, 3)), zorder=0)
    ax.add_patch(frame)
    label(ax, 1510, lower - 68, "iSQRT-COV pooling", style="italic", ha="right", va="baseline")
    cov = example_covariance()
    eigenvalues, eigenvectors = np.linalg.eigh(cov)
    root = eigenvectors * np.sqrt(eigenvalues) @ eigenvectors.T
    box(ax, 1065, lower, 122, "1×1 conv\nBN, ReLU", CONV, "14×14\n256 ch")
    matrix(ax, 1196, lower, cov, 8, "256×256\ncovariance")
    box(ax, 1324, lower, 116, "Newton–\nSchulz √", COV, "256×256")
    matrix(ax, 1452, lower, np.where(np.tri(len(root), k=-1), np.nan, root), 8, "32 896\ntriangle")
    arrows(ax, lower, (1126, 1152), (1240, 1266), (1382, 1408), (1496, 1548))


def draw_block(ax: Axes) -> None:
    """Panel (b): the channel-wise block."""
    label(ax, 30, 566, "(b)  GSoP block, channel-wise", TITLE, INK, ha="left", weight="bold")
    y, below, multiply, add = 718, 874, 1270, 1390
    label(ax, 80, y - 13, "x", 17, INK, style="italic")
    label(ax, 80, y + 15, "C×H×W")
    box(ax, 246, y, 136, "1×1 conv\nBN, ReLU", CONV, "d×H×W, d = 128")
    matrix(ax, 429, y, example_covariance(), 10, "d×d\nchannel covariance")
    box(ax, 605, y, 122, "row-wise\nBN", PLAIN, "d×d")
    box(ax, 839, y, 226, "row-wise conv\nBN, LeakyReLU(0.1)", CONV, "4d\n(one group per row)")
    box(ax, 1075, y, 142, "1×1 conv\nsigmoid", CONV, "C weights in (0, 1)")
    arrows(ax, y, (126, 178), (314, 374), (484, 544), (666, 726), (952, 1004), (1146, multiply - 24))
    arrows(ax, y, (multiply + 24, add - 24), (add + 24, 1490))
    for x, sign in ((multiply, "×"), (add, "+")):
        ax.add_patch(Circle((x, y), 24, fc=PLAIN[0], ec=PLAIN[1], lw=1.6, zorder=2))
        label(ax, x, y + 1, sign, 22, INK, zorder=3)
        arrow(ax, (80, y + 34), (80, below), (x, below), (x, y + 24))
    ax.add_patch(Circle((multiply, below), 4.5, color=INK))
    label(ax, multiply - 14, below - 32, "scale the channels of x", ha="right")
    label(ax, add + 14, below - 32, "shortcut", ha="left")
    label(ax, 1548, y - 13, "output", TEXT, INK)
    label(ax, 1548, y + 15, "C×H×W")
    for left, right, name in ((178, 484, "squeeze"), (544, 1146, "excitation")):
        line(ax, [(left, 650), (left, 638), (right, 638), (right, 650)], GREY)
        label(ax, (left + right) / 2, 626, name, 16, INK, va="baseline", style="italic")


def draw_legend(ax: Axes) -> None:
    """The roles that the colours stand for, at the top right."""
    for x, (name, (fill, edge)) in zip((744, 971, 1234), LEGEND.items(), strict=True):
        ax.add_patch(Rectangle((x, 28), 16, 16, fc=fill, ec=edge, lw=1.4))
        label(ax, x + 25, 41, name, 13, ha="left", va="baseline")


def main() -> None:
    """Draw the figure."""
    figure = plt.figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0, 0, 1, 1))
    draw_networks(ax)
    draw_block(ax)
    draw_legend(ax)
    line(ax, [(30, 524), (1610, 524)], "#d0d0d0")
    ax.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="equal")
    ax.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()
