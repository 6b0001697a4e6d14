"""Tables and pictures of what benchmarks/results keeps: python docs/measured.py, from the repository's root.

Writes the tables of docs/performance.md, results.md and backbones.md, and draws growth.png and sqrt_accuracy.png.
"""

import argparse
import inspect
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks import ROOT, table, update
from experiments.plan import PLAN_GPU, RESULTS_GPU
from experiments.tables import all_tables, statistics
from timm_gsop.hub.model_card import count_macs
from timm_gsop.layers import SECOND_ORDER_POOLS, accepted_arguments
from timm_gsop.viz.curves import read_summary
from timm_gsop.viz.figure import new_figure, save_figure

RESULTS = ROOT / "benchmarks/results"
PROBE = ROOT / "experiments/probe_results"
PASSES = {False: "inference", True: "forward and backward"}
LABELS = {"eigh": "`eigh`", "se": "SE", "cbam": "CBAM", "eca": "ECA", "gc": "GC"}
AIMS = {
    "inference": {"gsop_resnet50_net1": 1.06, "gsop_resnet50_net2": 1.11},
    "training": {"gsop_resnet50_net1": 1.07, "gsop_resnet50_net2": 1.13},
    "compiled": {"gsop_resnet50_net1": 1.05, "gsop_resnet50_net2": 1.10},
}
FASHION_MNIST = {
    "preresnet20": "vanilla",
    "preresnet20_stride1": "vanilla, no down-sampling in the last stage",
    "preresnet20_se": "SE",
    "preresnet20_isqrt": "iSQRT-COV",
    "gsop_preresnet20_net1": "GSoP-Net1",
    "gsop_preresnet20_net2": "GSoP-Net2",
}


def load(name: str) -> dict[str, Any]:
    """Read figures that a command of benchmarks kept."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio(timing: Mapping[str, float], digits: int = 2) -> str:
    """Median, and quartiles."""
    return f"{timing['ratio']:.{digits}f}× ({timing['low']:.{digits}f}–{timing['high']:.{digits}f})"


def milliseconds(seconds: float, digits: int = 1) -> str:
    """Of seconds."""
    return f"{1e3 * seconds:.{digits}f}"


def blocks_table(result: Mapping[str, Any], kind: str, digits: int = 1) -> str:
    """Blocks or heads: time of ours, and of others relative to it."""
    lines = []
    rows = [row for row in result["rows"] if row["kind"] == kind]
    for row in rows:
        ours, *others = row["alternatives"].values()
        what = [f"{row['channels']}×{row['size']}×{row['size']}", PASSES[row["training"]]]
        times = [milliseconds(seconds, digits) for seconds in (row["floor"], ours["seconds"])]
        line = [*what, *times, *map(ratio, others), ""]
        if row["training"]:
            less = row["bytes"]["ours"] / row["bytes"]["textbook"]
            line[-1] = f"{row['bytes']['ours'] / 1e6:.0f} MB, {less:.2f}× the textbook's"
        lines.append(line)
    names = [f"{LABELS.get(name, name)} / ours" for name in rows[0]["alternatives"] if name != "ours"]
    return table(["map", "pass", "floor (ms)", "ours (ms)", *names, "kept for the gradient"], lines)


def networks_table(result: Mapping[str, Any], blocks: Mapping[str, Any]) -> str:
    """Networks: time and memory relative to the twin, beside arithmetic and the floors of their blocks and heads."""
    lines = []
    for row in (row for row in result["rows"] if row["way"] != "fused"):  # which the package no longer has
        *stages, head = [other["floor"] for other in blocks["rows"] if other["training"] == ("training" in row["way"])]
        least = dict(gsop_resnet50_net1=sum(stages), gsop_resnet50_net2=sum(stages[:3]) + head, isqrt_resnet50=head)
        twin, twin_cost = row["alternatives"]["twin"], row["costs"]["twin"]
        for name, timing in row["alternatives"].items():
            cost, aim, memory = row["costs"][name], AIMS.get(row["way"], {}).get(name), ""
            floor = f"{1 + least[name] / twin['seconds']:.3f}×" if name in least else ""
            if count := row["bytes"].get(name):
                extra = 4 * max(0, cost["params"] - twin_cost["params"])
                relative = (count - extra) / row["bytes"]["twin"]
                memory = f"{count / 1e6:.0f} MB, {relative:.3f}× without the extra parameters'"
            figures = [milliseconds(timing["seconds"]), f"{cost['macs'] / twin_cost['macs']:.3f}×", floor]
            lines.append([row["way"], name, *figures, ratio(timing, 3), f"≤ {aim:.2f}×" if aim else "", memory])
    header = ["way", "network", "ms", "arithmetic / twin's", "floor / twin's", "time / twin's", "aim", "peak memory"]
    return table(header, lines)


def bfloat16_table(exact: Mapping[str, Any], rounded: Mapping[str, Any]) -> str:
    """Time relative to the twin, with products in float32, and with their operands rounded."""
    setting = rounded["machine"]["float32_products"]
    lines = [
        [row["way"], name, milliseconds(timing["seconds"]), ratio(timing), ratio(other["alternatives"][name])]
        for row, other in zip(exact["rows"], rounded["rows"], strict=True)
        for name, timing in row["alternatives"].items()
    ]
    return table(["way", "network", "ms", "time / twin's", f'time / twin\'s, with `"{setting}"`'], lines)


def pieces_table(*results: Mapping[str, Any]) -> str:
    """Each piece by itself, summed over the stages; with float32 products, or also with their operands rounded."""
    sums: list[Counter[tuple[str, str]]] = [Counter() for _ in results]
    for result, total in zip(results, sums, strict=True):
        for row in result["rows"]:
            total.update({(row["part"], name): timing["seconds"] for name, timing in row["alternatives"].items()})
    lines = [[*key, *(milliseconds(total[key], 2) for total in sums)] for key in sums[0]]
    return table(["of", "piece", *["ms", 'ms, with `"medium"`'][: len(results)]], lines)


def heads_tables(result: Mapping[str, Any]) -> tuple[str, str]:
    """What each head is for; and its cost with 200 classes on each backbone, relative to average pooling."""
    what, cost = [], []
    backbones = list(dict.fromkeys(row["backbone"] for row in result["rows"]))
    passes = [[row for row in result["rows"] if row.get("training", False) == way] for way in PASSES]
    for pool in ("avg", *SECOND_ORDER_POOLS):
        figures = []
        for backbone in backbones:
            with torch.device("meta"):
                model = timm.create_model("second_order", backbone=backbone, num_classes=200, global_pool=pool)
                features = model.eval().forward_features(torch.empty(1, 3, 224, 224))
            params = sum(p.numel() for part in (model.global_pool, model.fc) for p in part.parameters())
            macs = count_macs(lambda head=model.forward_head, x=features: head(x))[""]
            figures.append([f"{model.head_hidden_size}", f"{params / 1e6:.2f}", f"{macs / 1e9:.3f}"])
        times = [[row["alternatives"].get(pool, {}).get("ratio") for row in rows] for rows in passes if rows]
        times += [[row["bytes"].get(pool, 0) / row["bytes"]["avg"] for row in passes[True]]] if passes[True] else []
        measured = [[f"{ratio:.2f}×" if ratio else "–" for ratio in column] for column in times]
        cost.append([f'`"{pool}"`', *(" / ".join(column) for column in [*zip(*figures, strict=True), *measured])])
        if pool != "avg":
            pool_class = SECOND_ORDER_POOLS[pool]
            doc = (inspect.getdoc(pool_class) or "").splitlines()[0].removesuffix(".")
            options = [f"`{name}`" for name in (*accepted_arguments(pool), *pool_class.options())]
            what.append([f'`"{pool}"`', doc, pool_class.take_when, ", ".join(options)])
    names = ["features", "parameters (M)", "GMACs", "inference", "training", "memory in training"]
    names = names if passes[True] else names[:4]
    return (
        table(["`global_pool`", "what it is", "take it when", "arguments, and options in `pool_kwargs`"], what),
        table(["`global_pool`", *(f"{name}, {' / '.join(backbones)}" for name in names)], cost),
    )


def about(result: Mapping[str, Any]) -> str:
    """The machine."""
    machine = result["machine"]
    device = f"{machine['device']}, {machine['threads']} threads, {machine['capability']}"
    return f"{device}; {versions(machine)}; batch {result['batch']}."


def versions(machine: Mapping[str, Any]) -> str:
    """Of what the figures depend on."""
    return f"Python {machine['python']}, torch {machine['torch']}, timm {machine['timm']}"


def fashion_mnist_runs(folder: str) -> dict[str, list[float]]:
    """Top-1 (%) of each recipe's runs, by seed: the last epoch's, so that no test image chose it."""
    found = {}
    for recipe in FASHION_MNIST:
        paths = sorted(RESULTS.glob(f"{folder}/{recipe}-?.csv"))
        found[recipe] = [read_summary(path)["eval_top1"][-1] for path in paths]
    return found


def fashion_mnist_table() -> str:
    """Every run, mean, standard deviation, number and spread."""
    (steps,) = load("fashion_mnist/step_times")["rows"]
    now, before = fashion_mnist_runs("fashion_mnist"), fashion_mnist_runs("fashion_mnist/xeon_amx")
    columns = ["network", "parameters (M)", "MMACs", "training step"]
    columns += ["top-1 (%) of each seed", "trained before", "mean of all", "std", "n", "spread of all"]
    lines = []
    for recipe, name in FASHION_MNIST.items():
        cost, runs = steps["costs"][recipe], now[recipe] + before[recipe]
        link = f"[{name}](../train_configs/fashion_mnist/{recipe}.yaml)"
        price = [f"{cost['params'] / 1e6:.3f}", f"{cost['macs'] / 1e6:.1f}"]
        step = f"{steps['alternatives'][recipe]['ratio']:.1f}×"
        each = (", ".join(f"{value:.2f}" for value in top1[recipe]) for top1 in (now, before))
        lines.append([link, *price, step, *each, *statistics(runs)])
    return table(columns, lines)


def cifar10_tables() -> dict[str, str]:
    """Groups of both plans of which runs have finished."""
    on_gpu = {f"{name}, GPU": found for name, found in all_tables(PLAN_GPU, RESULTS_GPU).items()}
    return {name: "\n".join(lines) for name, (_, lines) in {**all_tables(), **on_gpu}.items()}


def probe_tables() -> dict[str, str]:
    """What the probe found on each data set of its plan that has finished."""
    found = {path.parent.name: json.loads(path.read_text()) for path in sorted(PROBE.glob("*/results.json"))}
    return {f"probe {name}": probe_table(result) for name, result in found.items()}


def probe_table(result: Mapping[str, Any]) -> str:
    """Heads by level, with the interval of each one's difference to the first, and the sentence that concludes."""
    columns = ["level", "map", "head", "parameters of the head (M)", "top-1 (%) of each split", "mean", "balanced"]
    columns += ["minus `avg`, deepest level", "95 % interval", "one training (s)"]
    lines = []
    for row in result["rows"]:
        shape = f"{row['channels']}×{row['height']}×{row['width']}"
        each = ", ".join(f"{value:.2f}" for value in row["each"])
        line = [row["level"], shape, f"`{row['head']}`", f"{row['head_params'] / 1e6:.3f}", each, f"{row['top1']:.2f}"]
        difference = [f"{row['difference']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"] if lines else ["–", "–"]
        lines.append([*line, f"{row['balanced']:.2f}", *difference, f"{row['train_seconds']:.0f}"])
    return f"{table(columns, lines)}\n\n{result['conclusion']}"


def contents() -> dict[str, dict[str, str]]:
    """What the pages show, by the names of their markers."""
    files = ("blocks", "networks", "networks_bfloat16", "networks_bfloat16_medium", "pieces", "pieces_medium")
    blocks, networks, bfloat16, medium, pieces, pieces_medium = (load(f"performance/{name}") for name in files)
    performance = {
        "blocks": f"{blocks_table(blocks, 'block')}\n\n{blocks_table(blocks, 'head')}",
        "blocks' machine": about(blocks),
        "models": networks_table(networks, blocks),
        "models' machine": about(networks),
        "bfloat16": bfloat16_table(bfloat16, medium),
        "pieces": pieces_table(pieces, pieces_medium),
    }
    heads = load("performance/heads")
    return {
        "docs/performance.md": performance,
        "docs/results.md": {**probe_tables(), **cifar10_tables(), "fashion_mnist": fashion_mnist_table()},
        "docs/backbones.md": dict(zip(("heads", "heads' cost"), heads_tables(heads), strict=True))
        | {"heads' machine": about(heads)},
    }


def exponent(values: Sequence[float], costs: Sequence[float]) -> float:
    """Slope between the two largest values, both axes logarithmic: the term that grows fastest shows most there."""
    return math.log(costs[-1] / costs[-2]) / math.log(values[-1] / values[-2])


def draw_growth(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each quantity: curves, and dashed, multiply-accumulates at the speed of the largest value."""
    panels = list(dict.fromkeys(row["by"] for row in result["rows"]))
    figure = new_figure(16, 4)
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    for row in result["rows"]:
        values, macs = [int(value) for value in row["macs"]], list(row["macs"].values())
        times = [1e3 * timing["seconds"] for timing in row["alternatives"].values()]
        label = f"{row['of']}: {exponent(values, times):.1f}, predicted {exponent(values, macs):.1f}"
        axis = axes[row["by"]]
        (line,) = axis.plot(values, times, "o-", label=label)
        axis.plot(values, [times[-1] * m / macs[-1] for m in macs], "--", color=line.get_color(), alpha=0.5)
        axis.set(xscale="log", yscale="log", xlabel=row["by"], ylabel="inference (ms)")
        axis.set_xticks(values, [str(value) for value in values], minor=False)
        axis.set_xticks([], minor=True)
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def draw_sqrt_accuracy(result: Mapping[str, Any], path: Path) -> None:
    """Both errors of the square root against the condition number."""
    figure = new_figure(12, 4.5)
    left, right = figure.subplots(1, 2)
    for n, errors in result["truncation"].items():
        left.plot(result["conditions"], errors, "o-", label=f"{n} iterations")
    left.set(title="truncation: to the exact root", ylim=(1e-8, 2))
    for style, (name, errors_by_n) in zip(("-", "--", ":"), result["rounding"].items(), strict=True):
        for n, color in zip(("3", "5", "10", "15"), ("C1", "C2", "C4", "C5"), strict=True):
            right.plot(result["conditions"], errors_by_n[n], style, color=color, label=f"{name}, {n} iterations")
    right.set(title="rounding: to the same iterations in float64", ylim=(1e-8, 2))
    for axis in (left, right):
        axis.set(xscale="log", yscale="log", xlabel="condition number", ylabel="relative error")
        axis.legend(fontsize=7, ncol=3, loc="lower right")
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=100)


def main() -> None:
    """Write the tables into the pages, and draw the pictures."""
    argparse.ArgumentParser(description=__doc__).parse_args()  # so that --help only says what it does
    for page, texts in contents().items():
        (ROOT / page).write_text(update((ROOT / page).read_text(encoding="utf-8"), texts), encoding="utf-8")
    draw_growth(load("performance/growth"), ROOT / "docs/figures/growth.png")
    draw_sqrt_accuracy(load("performance/sqrt_accuracy"), ROOT / "docs/figures/sqrt_accuracy.png")


if __name__ == "__main__":
    main()
