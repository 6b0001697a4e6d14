"""What the networks cost, checked against the paper's Tables 2, 3, 5 and 6, as Markdown: python -m benchmarks.cost.

``--update docs/cost.md`` writes the tables into that page. The exit code is 1 if a figure is further from the paper's
than its tolerance, or over 3 % from it without a note in that page.

The paper is Global Second-order Pooling Convolutional Networks, CVPR 2019 - https://arxiv.org/abs/1811.12006. Its FLOPs
are multiply-accumulates.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import SEModule
from torch import nn

import timm_gsop.models  # noqa: F401
from benchmarks import table, update
from timm_gsop.hub.model_card import model_macs
from timm_gsop.layers import ChannelGsop, CovPool2d, GsopBlock, PositionGsop

EXPLAINED_ABOVE = 0.03


class Cost(NamedTuple):
    """Parameters, and multiply-accumulates of one image at the network's own size."""

    params: int
    macs: int


class Check(NamedTuple):
    """A figure of ours, the paper's as printed, the note on their difference (0: there is none), and its tolerance."""

    name: str
    measured: float
    printed: str
    note: int = 0
    tolerance: float = EXPLAINED_ABOVE

    @property
    def difference(self) -> float:
        """How far ours is from the paper's, relative to it."""
        return self.measured / float(self.printed) - 1


Table = tuple[str, list[Check]]  # Markdown, and what in it was checked
Row = tuple[str, str, str, str, str, dict[str, Any]]  # the paper's name and figures; our name, model and its arguments


class GatherExcite(SEModule):
    """GE-θ+ (NeurIPS 2018). In timm 1.0.31, the constructor of its own ``GatherExcite`` raises a TypeError."""

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        size = {256: 56, 512: 28, 1024: 14, 2048: 7}[channels]  # ResNet's maps at 224×224
        conv = nn.Conv2d(channels, channels, size, groups=channels, bias=False)
        self.gather = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of ``x``."""
        return x * super().forward(self.gather(x))


# The blocks on conv4_x: weights and multiply-accumulates, in millions.
TABLE_2 = {"channel-wise": ("0.72", "28.1", "28.1"), "position-wise": ("0.16", "26.2", "26.2")}

# The steps of a block, and the modules that do them.
TABLE_2_STEPS = {
    "1×1 convolution, BN, ReLU": ["reduction"],
    "covariance (by position: of the map pooled to 8×8), BN": ["excitation.cov_bn"],
    "row-wise convolution, BN, LeakyReLU(0.1)": ["excitation.row_conv", "excitation.row_conv_bn"],
    "1×1 convolution, sigmoid": ["excitation.expand_conv"],
    "scaling (by position: by the map interpolated to 14×14)": [],
}
TRIANGLE = "MMACs, of the covariance a triangle, and the scaling"
TABLE_2_TOTALS = ["weights of convolutions (M)", "MMACs, as PyTorch counts", TRIANGLE]

# The layers of ResNet-26: the paper's name, height and width after it, and our name.
TABLE_3 = [("conv1", "112", "conv1"), ("pool1", "56", "maxpool"), ("conv2_x", "56", "layer1")]
TABLE_3 += [("conv3_x", "28", "layer2"), ("conv4_x", "14", "layer3"), ("conv5_x", "14", "layer4")]
TABLE_3_HEADS = ("2", "32")  # K features (1 024) after global pooling, in Net1 and in Net2

# ResNet-50 in millions of parameters and in GFLOPs, all others as multiples of it.
TABLE_5: list[Row] = [
    ("He et al.", "25.5", "3.86", "`resnet50`", "resnet50", {}),
    ("MPN-COV", "2.2", "1.6", "`mpncov_resnet50`", "mpncov_resnet50", {}),
    ("iSQRT-COV", "2.2", "1.6", "`isqrt_resnet50`", "isqrt_resnet50", {}),
    ("SE-Net", "1.1", "1.0", "`seresnet50`", "seresnet50", {}),
    ("GENet", "1.3", "1.0", "`resnet50`, GE-θ+", "resnet50", dict(block_args=dict(attn_layer=GatherExcite))),
    ("CBAM", "1.1", "1.0", "`resnet50`, CBAM", "resnet50", dict(block_args=dict(attn_layer="cbam"))),
    ("GSoP-Net1", "1.1", "1.6", "`gsop_resnet50_net1`", "gsop_resnet50_net1", {}),
    ("GSoP-Net2", "2.3", "1.7", "`gsop_resnet50_net2`", "gsop_resnet50_net2", {}),
    ("ResNeXt", "1.0", "1.0", "`resnext50_32x4d`", "resnext50_32x4d", {}),
    ("DropBlock", "1.0", "1.0", "`resnet50`, `drop_block_rate=0.1`", "resnet50", dict(drop_block_rate=0.1)),
    ("DRN-A-50", "1.0", "4.9", "`resnet50`, `output_stride=8`", "resnet50", dict(output_stride=8)),
]

# CIFAR-100: millions of parameters, and GFLOPs.
MPN = dict(global_pool="mpn")
TABLE_6: list[Row] = [
    ("He et al.", "1.7", "0.25", "`preresnet164`", "preresnet164", {}),
    ("MPN-COV", "2.5", "0.52", "`isqrt_preresnet164`", "isqrt_preresnet164", {}),
    ("MPN-COV", "2.5", "0.52", '`isqrt_preresnet164`, `global_pool="mpn"`', "isqrt_preresnet164", MPN),
    ("GSoP-Net1", "2.9", "0.55", "`gsop_preresnet164_net1`", "gsop_preresnet164_net1", {}),
    ("GSoP-Net2", "3.6", "0.58", "`gsop_preresnet164_net2`", "gsop_preresnet164_net2", {}),
]

# Figures over 3 % from the paper's: the number of the note in docs/cost.md that says why, and how far they may be.
EXPLAINED = {
    "Table 2, channel-wise, MMACs, as PyTorch counts": (1, 0.06),
    "Table 5, He et al., macs": (1, 0.07),
    "Table 5, ResNeXt, macs": (2, 0.05),
    "Table 5, DRN-A-50, macs": (3, 0.06),
    "Table 6, GSoP-Net1, macs": (1, 0.09),
    "Table 6, GSoP-Net2, macs": (1, 0.09),
}

# Tables 4 to 6: top-1 and top-5 error in %. Table 6 gives 19.95 for "MPN-COV [21]": the text calls it iSQRT-COV.
ERROR = {
    "gsop_resnet26_net1": "17.42 / 4.53 (ImageNet-250)",
    "gsop_resnet26_net2": "16.68 / 4.36 (ImageNet-250)",
    "isqrt_resnet26": "17.43 / 4.71 (ImageNet-250)",
    "gsop_resnet50_net1": "22.32 / 6.02 (ImageNet-1K)",
    "gsop_resnet50_net2": "21.19 / 5.64 (ImageNet-1K)",
    "isqrt_resnet50": "22.14 / 6.22 (ImageNet-1K)",
    "mpncov_resnet50": "22.74 / 6.54 (ImageNet-1K)",
    "preresnet164": "24.33 (CIFAR-100)",
    "isqrt_preresnet164": "19.95 (CIFAR-100)",
    "gsop_preresnet164_net1": "20.86 (CIFAR-100)",
    "gsop_preresnet164_net2": "18.58 (CIFAR-100)",
}


def create(model_name: str, **kwargs: Any) -> nn.Module:
    """Create a network on the meta device, for inference."""
    with torch.device("meta"):
        return timm.create_model(model_name, **kwargs).eval()


def output_shapes(model: nn.Module, size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of what a model's modules return, by name and without the batch, for an image (C, H, W)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    for name, module in model.named_modules():
        module.register_forward_hook(partial(record, name))
    model(torch.empty(1, *size, device="meta"))
    return shapes


def measure(model_name: str, **kwargs: Any) -> Cost:
    """Count a network's parameters and multiply-accumulates."""
    model = create(model_name, **kwargs)
    macs = model_macs(model, model.pretrained_cfg["input_size"])[""]
    return Cost(sum(p.numel() for p in model.parameters()), macs)


def terms(model: nn.Module, size: Sequence[int]) -> Counter[str]:
    """Multiply-accumulates by purpose: backbone; reduction, covariance and excitation of all blocks; head.

    Two more are sums as the paper seems to count them. ``as in Table 2``: of covariances, which are symmetric, a
    triangle with its diagonal; and one for each element that a block scales. ``as in Table 6``: without any covariance.
    """
    macs, shapes = model_macs(model, size), output_shapes(model, size)
    parts: Counter[str] = Counter()
    covariances = mirrored = scaled = 0
    for name, module in model.named_modules():
        if isinstance(module, GsopBlock):
            reduction, excitation = (macs[f"{name}.gsop.{part}".lstrip(".")] for part in ("reduction", "excitation"))
            covariance = macs[name] - reduction - excitation
            parts.update(reduction=reduction, covariance=covariance, excitation=excitation)
            rows = module.gsop.excitation.cov_bn.num_features
            covariances += covariance
            mirrored += covariance * (rows - 1) // (2 * rows)
            scaled += math.prod(shapes[name])
        elif isinstance(module, CovPool2d):
            parts["head"] += macs[name]
            rows, *positions = shapes[f"{name}.reduction"]
            covariances += rows**2 * math.prod(positions)
            mirrored += rows * (rows - 1) // 2 * math.prod(positions)
    parts["head"] += macs["fc"]
    parts["backbone"] = macs[""] - parts.total()
    parts["as in Table 2"] = macs[""] - mirrored + scaled
    parts["as in Table 6"] = macs[""] - covariances
    return parts


def compare(name: str, measured: float, printed: str) -> Check:
    """Compare a figure with the paper's."""
    return Check(name, measured, printed, *EXPLAINED.get(name, ()))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str | Check]]) -> Table:
    """Lay out a table; a check in a cell is shown as the difference."""

    def show(cell: str | Check) -> str:
        if isinstance(cell, str):
            return cell
        percent = round(100 * cell.difference, 1)
        text = f"{percent:+.1f} %".replace("-", "−") if percent else "0 %"
        return f"{text} ({cell.note})" if cell.note else text

    text = table(header, [[show(cell) for cell in row] for row in rows])
    return text, [cell for row in rows for cell in row if isinstance(cell, Check)]


def problems(checks: Sequence[Check]) -> list[str]:
    """Say what is wrong: a figure out of its tolerance, or a difference over 3 % without a note, or the reverse."""
    found = []
    for check in checks:
        apart = abs(check.difference)
        figures = f"{check.name}: {check.measured:.4g}, the paper reports {check.printed}"
        if not apart <= check.tolerance:  # NaN too
            found.append(f"{figures}; tolerance {check.tolerance:.0%}.")
        if (apart > EXPLAINED_ABOVE) != bool(check.note):
            found.append(f"{figures}; over 3 % and without a note, or the reverse.")
    return found


def times(sizes: Sequence[int]) -> str:
    """As 128×14×14, without trailing ones."""
    return re.sub("(×1)+$", "", "×".join(map(str, sizes)))


def models() -> Table:
    """Every registered network."""
    rows = []
    for name in timm.list_models(module=["gsop_resnet", "gsop_preresnet", "gsop_densenet", "gsop_inception"]):
        size = timm.get_pretrained_cfg_value(f"{name}.untrained", "input_size")[-1]
        params, macs = measure(f"{name}.untrained")
        rows.append([f"`{name}`", f"{size}", f"{params / 1e6:.2f}", f"{macs / 1e9:.2f}", ERROR.get(name, "")])
    header = ["model", "image", "parameters (M)", "GMACs", "error % (top-1 / top-5), reported by the paper"]
    return markdown(header, rows)


def table_2(size: Sequence[int] = (1024, 14, 14)) -> Table:
    """Steps and totals of the blocks on conv4_x."""
    step_rows = [[label] for label in TABLE_2_STEPS]
    totals: list[list[str | Check]] = [[label] for label in TABLE_2_TOTALS]
    for gsop, (name, reported) in zip((ChannelGsop, PositionGsop), TABLE_2.items(), strict=True):
        with torch.device("meta"):
            block = GsopBlock(gsop(size[0])).eval()
        macs, shapes, parts = model_macs(block, size), output_shapes(block, size), terms(block, size)
        for row, (label, modules) in zip(step_rows, TABLE_2_STEPS.items(), strict=True):
            own = [p for module in modules for p in block.gsop.get_submodule(module).parameters()]
            weights = sum(p.numel() for p in own if p.ndim == 4)
            step = parts["covariance"] if "cov" in label else sum(macs[f"gsop.{module}"] for module in modules)
            output = shapes[f"gsop.{modules[0]}" if modules else ""]
            row += [times(output), f"{weights} + {sum(p.numel() for p in own) - weights}", f"{step / 1e6:.3f}"]
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 4)
        figures = (weights, macs[""], parts["as in Table 2"])
        for row, label, figure, printed in zip(totals, TABLE_2_TOTALS, figures, reported, strict=True):
            row += [f"{figure / 1e6:.3f}", printed, compare(f"Table 2, {name}, {label}", figure / 1e6, printed)]
    columns = ["output", "weights + BN and bias", "MMACs"]
    header = ["step", *(f"{name}: {column}" for name in TABLE_2 for column in columns)]
    compared = ["", *(c for name in TABLE_2 for c in (name, "reported by the paper", "difference"))]
    text, checks = markdown(compared, totals)
    return f"{table(header, step_rows)}\n\n{text}", checks


def describe(module: nn.Module) -> str:
    """What a layer of a ResNet is made of."""
    parts = module if isinstance(module, nn.Sequential) else [module]
    counts = Counter(type(part).__name__ for part in parts)
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in counts.items())


def table_3() -> Table:
    """Architecture of GSoP-Net with ResNet-26, and the sizes of its maps."""
    rows: list[list[str | Check]] = [[layer, f"{printed}×{printed}"] for layer, printed, _ in TABLE_3]
    rows += [["global pooling", "{}K, {}K".format(*TABLE_3_HEADS)]]
    for net, head in enumerate(TABLE_3_HEADS, 1):
        model = create(f"gsop_resnet26_net{net}")
        shapes = output_shapes(model, (3, 224, 224))
        for row, (layer, printed, module) in zip(rows, TABLE_3, strict=False):
            output = shapes[module]
            check = Check(f"Table 3, Net{net}, {layer}", output[-1], printed, tolerance=0)
            row += [describe(model.get_submodule(module)), times(output), check]
        (features,) = shapes["global_pool"]
        check = Check(f"Table 3, Net{net}, features", features / 1024, head)
        rows[-1] += [describe(model.get_submodule("global_pool")), f"{features}", check]
    header = ["layer", "output, reported by the paper"]
    return markdown([*header, *(f"Net{net}{c}" for net in (1, 2) for c in ("", ": output", ": difference"))], rows)


def table_5() -> Table:
    """Networks with ResNet-50's architecture, relative to it."""
    base = measure("resnet50")
    rows: list[list[str | Check]] = []
    for name, *reported, label, model, kwargs in TABLE_5:
        cells: list[str | Check] = [name, label]
        cost, relative = measure(model, **kwargs), bool(rows)
        for what, unit, figure, of, printed in zip(Cost._fields, (1e6, 1e9), cost, base, reported, strict=True):
            check = compare(f"Table 5, {name}, {what}", figure / (of if relative else unit), printed)
            cells += [f"{figure / unit:.2f}", f"{figure / of:.2f}×", f"{printed}×" if relative else printed, check]
        rows.append(cells)
    columns = ["to `resnet50`", "reported by the paper", "difference"]
    return markdown(["network", "measured", "parameters (M)", *columns, "GMACs", *columns], rows)


def table_6() -> Table:
    """Networks for CIFAR-100, and what the operations of those with covariances go to."""
    rows: list[list[str | Check]] = []
    for name, params, macs, label, model, kwargs in TABLE_6:
        cost = measure(model, **kwargs)
        row = [name, label, f"{cost.params / 1e6:.2f}", params, compare(f"Table 6, {name}", cost.params / 1e6, params)]
        check = compare(f"Table 6, {name}, macs", cost.macs / 1e9, macs)
        rows.append([*row, f"{cost.macs / 1e9:.3f}", macs, check])
    columns = ["reported by the paper", "difference"]
    text, checks = markdown(["network", "measured", "parameters (M)", *columns, "GMACs", *columns], rows)
    kinds = ["backbone", "reduction", "covariance", "excitation", "head", "as in Table 6"]
    split = []
    for name in ("isqrt_preresnet164", "gsop_preresnet164_net1", "gsop_preresnet164_net2"):
        parts = terms(create(name), (3, 32, 32))
        split.append([f"`{name}`", *(f"{parts[kind] / 1e9:.4f}" for kind in kinds)])
    labels = ["GMACs of", "backbone", *(f"blocks: {kind}" for kind in kinds[1:4]), "head", "all, without covariances"]
    return f"{text}\n\n{table(labels, split)}", checks


def tables() -> dict[str, Table]:
    """All of them, by the names of their markers in docs/cost.md."""
    return {"table 2": table_2(), "table 3": table_3(), "table 5": table_5(), "table 6": table_6(), "models": models()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, write them into a page, and say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables into this page")
    page = parser.parse_args(argv).update
    contents = tables()
    texts = {name: text for name, (text, _) in contents.items()}
    print("\n\n".join(f"## {name.capitalize()}\n\n{text}" for name, text in texts.items()))
    if page:
        page.write_text(update(page.read_text(encoding="utf-8"), texts), encoding="utf-8")
    wrong = problems([check for _, checks in contents.values() for check in checks])
    print(*wrong, sep="\n", file=sys.stderr, end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
