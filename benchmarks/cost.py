"""What the networks cost, checked against the paper's Tables 2, 3, 5 and 6, as Markdown: python -m benchmarks.cost.

``--update docs/cost.md`` writes the tables into that page. The exit code is 1 if a figure is further from the paper's
than its tolerance, or over 3 % from it without a reason.
"""

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import SEModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import timm_gsop.models  # noqa: F401
from benchmarks import paper
from benchmarks.page import table, update
from timm_gsop.layers import ChannelGsop, GsopBlock, IsqrtCovPool2d, MpnCovPool2d, PositionGsop

EXPLAINED_ABOVE = 0.03


class Cost(NamedTuple):
    """Parameters, and multiply-accumulates of one image at the network's own size."""

    params: int
    macs: int


class Profile(NamedTuple):
    """Multiply-accumulates and output shapes (without the batch) of a network's modules by name, "" for the whole."""

    macs: Counter[str]
    shapes: dict[str, tuple[int, ...]]


class Check(NamedTuple):
    """A figure of ours beside the paper's."""

    name: str
    measured: float
    reported: paper.Reported

    @property
    def difference(self) -> float:
        """How far ours is from the paper's, relative to it."""
        return self.measured / float(self.reported.printed) - 1


class Table(NamedTuple):
    """Markdown, and what in it was checked."""

    text: str
    checks: list[Check]


class Peer(NamedTuple):
    """A network to measure: one of timm's, its arguments, and how a table names it."""

    label: str
    model: str
    kwargs: Mapping[str, Any] = {}


class GatherExcite(SEModule):
    """GE-θ+ (NeurIPS 2018): squeeze-and-excitation whose squeeze is a depth-wise convolution as large as the map.

    timm's own ``GatherExcite`` cannot be created: its constructor raises a TypeError in timm 1.0.31.
    """

    def __init__(self, channels: int, **kwargs: Any) -> None:
        super().__init__(channels, **kwargs)
        size = {256: 56, 512: 28, 1024: 14, 2048: 7}[channels]  # ResNet's maps at 224×224
        conv = nn.Conv2d(channels, channels, size, groups=channels, bias=False)
        self.gather = nn.Sequential(conv, nn.BatchNorm2d(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale the channels of ``x``."""
        return x * super().forward(self.gather(x))


TABLE_5_NETWORKS = {
    "He et al.": Peer("`resnet50`", "resnet50"),
    "MPN-COV": Peer("`mpncov_resnet50`", "mpncov_resnet50"),
    "iSQRT-COV": Peer("`isqrt_resnet50`", "isqrt_resnet50"),
    "SE-Net": Peer("`seresnet50`", "seresnet50"),
    "GENet": Peer("`resnet50`, GE-θ+", "resnet50", dict(block_args=dict(attn_layer=GatherExcite))),
    "CBAM": Peer("`resnet50`, CBAM", "resnet50", dict(block_args=dict(attn_layer="cbam"))),
    "GSoP-Net1": Peer("`gsop_resnet50_net1`", "gsop_resnet50_net1"),
    "GSoP-Net2": Peer("`gsop_resnet50_net2`", "gsop_resnet50_net2"),
    "ResNeXt": Peer("`resnext50_32x4d`", "resnext50_32x4d"),
    "DropBlock": Peer("`resnet50`, `drop_block_rate=0.1`", "resnet50", dict(drop_block_rate=0.1)),
    "DRN-A-50": Peer("`resnet50`, `output_stride=8`", "resnet50", dict(output_stride=8)),
}

TABLE_6_NETWORKS = {
    "He et al.": [Peer("`preresnet164`", "preresnet164")],
    "MPN-COV": [
        Peer("`isqrt_preresnet164`", "isqrt_preresnet164"),
        Peer('`isqrt_preresnet164`, `global_pool="mpn"`', "isqrt_preresnet164", dict(global_pool="mpn")),
    ],
    "GSoP-Net1": [Peer("`gsop_preresnet164_net1`", "gsop_preresnet164_net1")],
    "GSoP-Net2": [Peer("`gsop_preresnet164_net2`", "gsop_preresnet164_net2")],
}


def create(model_name: str, **kwargs: Any) -> nn.Module:
    """Create a network on the meta device, for inference."""
    with torch.device("meta"):
        return timm.create_model(model_name, **kwargs).eval()


def profile(model: nn.Module, size: Sequence[int]) -> Profile:
    """Count with PyTorch's ``FlopCounterMode`` (two operations a multiply-accumulate), for an image (C, H, W)."""
    shapes: dict[str, tuple[int, ...]] = {}

    def record(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        shapes[name] = tuple(output.shape[1:])

    handles = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules()]
    # With gradients: without, the square root takes two products of matrices fewer than the iteration as it is written.
    with torch.enable_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *size, device="meta"))
    for handle in handles:
        handle.remove()
    # The counter's names begin with the network's class.
    counts = {name.partition(".")[2]: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return Profile(Counter(counts), shapes)


def measure(model_name: str, **kwargs: Any) -> Cost:
    """Count a network's parameters and multiply-accumulates."""
    model = create(model_name, **kwargs)
    macs = profile(model, model.pretrained_cfg["input_size"]).macs[""]
    return Cost(sum(p.numel() for p in model.parameters()), macs)


def terms(model: nn.Module, size: Sequence[int]) -> Counter[str]:
    """Multiply-accumulates by purpose: backbone; reduction, covariance and excitation of all blocks; head.

    Two more are sums as the paper seems to count them. ``as in Table 2``: of covariances, which are symmetric, a
    triangle with its diagonal; and one for each element that a block scales. ``as in Table 6``: without any covariance.
    """
    macs, shapes = profile(model, size)
    parts: Counter[str] = Counter()
    covariances = mirrored = scaled = 0
    for name, module in model.named_modules():
        if isinstance(module, (ChannelGsop, PositionGsop)):
            reduction, excitation = macs[f"{name}.reduction"], macs[f"{name}.excitation"]
            covariance = macs[name] - reduction - excitation
            parts.update(reduction=reduction, covariance=covariance, excitation=excitation)
            rows = module.excitation.cov_bn.num_features
            covariances += covariance
            mirrored += covariance * (rows - 1) // (2 * rows)
            scaled += math.prod(shapes[name])
        elif isinstance(module, (IsqrtCovPool2d, MpnCovPool2d)):
            parts["head"] += macs[name]
            rows, *positions = shapes[f"{name}.reduction"]
            covariances += rows**2 * math.prod(positions)
            mirrored += rows * (rows - 1) // 2 * math.prod(positions)
    parts["head"] += macs["fc"]
    parts["backbone"] = macs[""] - parts.total()
    parts["as in Table 2"] = macs[""] - mirrored + scaled
    parts["as in Table 6"] = macs[""] - covariances
    return parts


def markdown(header: Sequence[str], rows: Sequence[Sequence[str | Check]]) -> Table:
    """Lay out a table; a check in a cell is shown as the difference, with its reason below the table."""
    checks = [cell for row in rows for cell in row if isinstance(cell, Check)]
    reasons = list(dict.fromkeys(check.reported.reason for check in checks if check.reported.reason))

    def show(cell: str | Check) -> str:
        if isinstance(cell, str):
            return cell
        percent, reason = round(100 * cell.difference, 1), cell.reported.reason
        text = f"{percent:+.1f} %".replace("-", "−") if percent else "0 %"
        return f"{text} ({reasons.index(reason) + 1})" if reason else text

    text = table(header, [[show(cell) for cell in row] for row in rows])
    notes = [f"\n({i}) {reason}" for i, reason in enumerate(reasons, 1)]
    return Table("\n".join([text, *notes]), checks)


def problems(checks: Sequence[Check]) -> list[str]:
    """Say what is wrong: a figure out of its tolerance, or a difference over 3 % without a reason, or the reverse."""
    found = []
    for check in checks:
        apart, reported = abs(check.difference), check.reported
        figures = f"{check.name}: {check.measured:.4g}, the paper reports {reported.printed}"
        if not apart <= reported.tolerance:  # NaN too
            found.append(f"{figures}; tolerance {reported.tolerance:.0%}.")
        if (apart > EXPLAINED_ABOVE) != bool(reported.reason):
            found.append(f"{figures}; over 3 % and without a reason, or the reverse.")
    return found


def millions(number: int, digits: int = 2) -> str:
    """In millions."""
    return f"{number / 1e6:.{digits}f}"


def billions(number: int, digits: int = 2) -> str:
    """In billions."""
    return f"{number / 1e9:.{digits}f}"


def shape(sizes: Sequence[int]) -> str:
    """As 128×14×14, without trailing ones."""
    return re.sub("(×1)+$", "", "×".join(map(str, sizes)))


def models() -> Table:
    """Every registered network."""
    rows = []
    for name in timm.list_models(module=["gsop_resnet", "gsop_preresnet", "gsop_zoo"]):
        size = timm.get_pretrained_cfg_value(f"{name}.untrained", "input_size")[-1]
        cost = measure(f"{name}.untrained")
        rows.append([f"`{name}`", f"{size}", millions(cost.params), billions(cost.macs), paper.ERROR.get(name, "")])
    header = ["model", "image", "parameters (M)", "GMACs", "error % (top-1 / top-5), reported by the paper"]
    return markdown(header, rows)


def table_2(size: Sequence[int] = (1024, 14, 14)) -> Table:
    """Steps and totals of the blocks on conv4_x."""
    steps = {
        "1×1 convolution, BN, ReLU": ["reduction"],
        "covariance (by position: of the map pooled to 8×8), BN": ["excitation.cov_bn"],
        "row-wise convolution, BN, LeakyReLU(0.1)": ["excitation.row_conv", "excitation.row_conv_bn"],
        "1×1 convolution, sigmoid": ["excitation.expand_conv"],
        "scaling (by position: by the map interpolated to 14×14)": [],
    }
    step_rows = [[label] for label in steps]
    totals: list[list[str | Check]] = [
        ["weights of convolutions (M)"],
        ["MMACs, as PyTorch counts"],
        ["MMACs, of the covariance a triangle, and the scaling"],
    ]
    for gsop, (name, reported) in zip((ChannelGsop, PositionGsop), paper.TABLE_2.items(), strict=True):
        with torch.device("meta"):
            block = GsopBlock(gsop(size[0])).eval()
        macs, shapes = profile(block, size)
        parts = terms(block, size)
        for row, (label, modules) in zip(step_rows, steps.items(), strict=True):
            own = [p for module in modules for p in block.gsop.get_submodule(module).parameters()]
            weights = sum(p.numel() for p in own if p.ndim == 4)
            step_macs = parts["covariance"] if "cov" in label else sum(macs[f"gsop.{module}"] for module in modules)
            output = shapes[f"gsop.{modules[0]}" if modules else "gsop"]
            row += [shape(output), f"{weights} + {sum(p.numel() for p in own) - weights}", millions(step_macs, 3)]
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 4)
        figures = (weights, macs[""], parts["as in Table 2"])
        plain = paper.Reported(reported.macs.printed)
        for row, figure, its in zip(totals, figures, (*reported, plain), strict=True):
            row += [millions(figure, 3), its.printed, Check(f"Table 2, {name}, {row[0]}", figure / 1e6, its)]
    columns = ["output", "weights + BN and bias", "MMACs"]
    header = ["step", *(f"{name}: {column}" for name in paper.TABLE_2 for column in columns)]
    compared = ["", *(c for name in paper.TABLE_2 for c in (name, "reported by the paper", "difference"))]
    bottom = markdown(compared, totals)
    return Table(f"{markdown(header, step_rows).text}\n\n{bottom.text}", bottom.checks)


def describe(module: nn.Module) -> str:
    """What a layer of a ResNet is made of."""
    if isinstance(module, nn.Sequential):
        kinds = Counter(type(child).__name__ for child in module)
        return ", ".join(kind if count == 1 else f"{count} {kind}" for kind, count in kinds.items())
    if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
        kernel, stride = ((size if isinstance(size, int) else size[0]) for size in (module.kernel_size, module.stride))
        return f"{type(module).__name__} {kernel}×{kernel}, stride {stride}"
    return type(module).__name__


def table_3() -> Table:
    """Architecture of GSoP-Net with ResNet-26, and the sizes of its maps."""
    modules = dict(zip(paper.TABLE_3, ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"), strict=True))
    rows: list[list[str | Check]] = [[layer, f"{its.printed}×{its.printed}"] for layer, its in paper.TABLE_3.items()]
    rows += [["global pooling", "{}K, {}K".format(*(its.printed for its in paper.TABLE_3_HEADS))]]
    for net, head in enumerate(paper.TABLE_3_HEADS, 1):
        model = create(f"gsop_resnet26_net{net}")
        shapes = profile(model, (3, 224, 224)).shapes
        for row, (layer, its) in zip(rows, paper.TABLE_3.items(), strict=False):
            output, name = shapes[modules[layer]], f"Table 3, Net{net}, {layer}"
            row += [describe(model.get_submodule(modules[layer])), shape(output), Check(name, output[-1], its)]
        (features,) = shapes["global_pool"]
        check = Check(f"Table 3, Net{net}, features", features / 1024, head)
        rows[-1] += [describe(model.get_submodule("global_pool")), f"{features}", check]
    header = ["layer", "output, reported by the paper"]
    return markdown([*header, *(f"Net{net}{c}" for net in (1, 2) for c in ("", ": output", ": difference"))], rows)


def table_5() -> Table:
    """Networks with ResNet-50's architecture, relative to it."""
    base = measure("resnet50")
    rows: list[list[str | Check]] = []
    for name, peer in TABLE_5_NETWORKS.items():
        cost, reported = measure(peer.model, **peer.kwargs), paper.TABLE_5[name]
        row: list[str | Check] = [name, peer.label]
        for what, unit, figure, of, its in zip(cost._fields, (1e6, 1e9), cost, base, reported, strict=True):
            measured = figure / unit if not rows else figure / of
            printed = its.printed if not rows else f"{its.printed}×"
            check = Check(f"Table 5, {name}, {what}", measured, its)
            row += [f"{figure / unit:.2f}", f"{figure / of:.2f}×", printed, check]
        rows.append(row)
    columns = ["to `resnet50`", "reported by the paper", "difference"]
    return markdown(["network", "measured", "parameters (M)", *columns, "GMACs", *columns], rows)


def table_6() -> Table:
    """Networks for CIFAR-100, and what the operations of those with covariances go to."""
    rows: list[list[str | Check]] = []
    for name, peers in TABLE_6_NETWORKS.items():
        reported = paper.TABLE_6[name]
        for peer in peers:
            cost = measure(peer.model, **peer.kwargs)
            params = Check(f"Table 6, {peer.label}, parameters", cost.params / 1e6, reported.params)
            macs = Check(f"Table 6, {peer.label}, GMACs", cost.macs / 1e9, reported.macs)
            left = [name, peer.label, millions(cost.params), reported.params.printed, params]
            rows.append([*left, billions(cost.macs, 3), reported.macs.printed, macs])
    columns = ["reported by the paper", "difference"]
    top = markdown(["network", "measured", "parameters (M)", *columns, "GMACs", *columns], rows)
    kinds = ["backbone", "reduction", "covariance", "excitation", "head", "as in Table 6"]
    split = []
    for name in ("isqrt_preresnet164", "gsop_preresnet164_net1", "gsop_preresnet164_net2"):
        parts = terms(create(name), (3, 32, 32))
        split.append([f"`{name}`", *(billions(parts[kind], 4) for kind in kinds)])
    labels = ["GMACs of", "backbone", *(f"blocks: {kind}" for kind in kinds[1:4]), "head", "all, without covariances"]
    return Table(f"{top.text}\n\n{markdown(labels, split).text}", top.checks)


def tables() -> dict[str, Table]:
    """All of them, by the names of their markers in docs/cost.md."""
    return {"table 2": table_2(), "table 3": table_3(), "table 5": table_5(), "table 6": table_6(), "models": models()}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, or write them into a page; then say what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, metavar="PAGE", help="write the tables into this page")
    page = parser.parse_args(argv).update
    contents = tables()
    texts = {name: content.text for name, content in contents.items()}
    if page:
        page.write_text(update(page.read_text(encoding="utf-8"), texts), encoding="utf-8")
    else:
        print("\n\n".join(f"## {name.capitalize()}\n\n{text}" for name, text in texts.items()))
    wrong = problems([check for content in contents.values() for check in content.checks])
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
