"""Tables and pictures of what benchmarks/results keeps: python docs/measured.py, from the repository's root.

Writes the tables of docs/performance.md, results.md, backbones.md and deploy.md. Draws growth.png and
sqrt_accuracy.png.
"""

import argparse
import csv
import inspect
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks import ROOT, table, update
from experiments.plan import PLAN, PLAN_FASHION_MNIST, PLAN_GPU, load_plan, read_runs, runs_beside, top1
from experiments.tables import all_tables, statistics
from timm_gsop.complete_file import replacing
from timm_gsop.hub.model_card import count_macs
from timm_gsop.layers import SECOND_ORDER_POOLS, accepted_arguments
from timm_gsop.viz.figure import new_figure, save_figure

RESULTS = ROOT / "benchmarks/results"
PROBE = ROOT / "experiments/probe_results.json"
PROBES = {
    "grades": "solar cells, four grades",
    "grades_lite2": "solar cells, four grades",
    "defect": "solar cells, defect or not",
    "cifar10_500": "CIFAR-10",
    "cifar10_4000_final": "CIFAR-10",
    "cifar10_50000_last": "CIFAR-10; level 4 alone",
    "fashion_500": "Fashion-MNIST",
    "grades_earlier": "solar cells, four grades; without levels 4 and 3",
    "grades_heads": "solar cells, four grades; all heads, level 4",
    "grades_all": "solar cells, four grades; all heads, level 3",
}
"""Runs of experiments/probe_plan.md by name, and their images."""
PASSES = {False: "inference", True: "forward and backward"}
LABELS = {"eigh": "`eigh`", "se": "SE", "cbam": "CBAM", "eca": "ECA", "gc": "GC"}
NETWORKS = ("resnet50", "twin", "isqrt_resnet50", "gsop_resnet50_net1", "gsop_resnet50_net2")
WITHOUT = ", without kernels"
NETWORKS_GPU = (*NETWORKS, *(f"{name}{WITHOUT}" for name in NETWORKS[2:]))
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


def ratio(timing: Mapping[str, float]) -> str:
    """The median of a time relative to another."""
    return f"{timing['ratio']:.2f}×"


def milliseconds(seconds: float) -> str:
    """Of seconds."""
    return f"{1e3 * seconds:.1f}"


def blocks_table(result: Mapping[str, Any], kind: str) -> str:
    """Blocks or heads, a line for each map: time of ours, and of others relative to it, in both passes."""
    lines = []
    rows = [row for row in result["rows"] if row["kind"] == kind]
    for passes in zip(*([row for row in rows if row["training"] == way] for way in PASSES), strict=True):
        columns = []
        for row in passes:
            ours, *others = row["alternatives"].values()
            columns.append([milliseconds(row["floor"]), milliseconds(ours["seconds"]), *map(ratio, others)])
        kept = passes[True]["bytes"]
        cells = [" / ".join(column) for column in zip(*columns, strict=True)]
        size = f"{passes[0]['channels']}×{passes[0]['size']}×{passes[0]['size']}"
        lines.append([size, *cells, f"{kept['ours'] / kept['textbook']:.2f}×"])
    names = [f"{LABELS.get(name, name)} / ours" for name in rows[0]["alternatives"] if name != "ours"]
    return table(["map", "floor (ms)", "ours (ms)", *names, "ours / textbook, memory"], lines)


def networks_table(*results: Mapping[str, Any], names: Iterable[str] = NETWORKS) -> str:
    """Time, operations and memory of networks, relative to the twin; results in several precisions of one machine."""
    rows = [(result, row) for result in results for row in result["rows"] if row["way"] != "fused"]  # which is gone
    ways = [f"{row['way']}, bfloat16" if result is not results[0] else row["way"] for result, row in rows]
    costs = rows[0][1]["costs"]
    training = next(row for _, row in rows if row["way"] == "training")
    lines = []
    for name in names:
        cells = [f"{costs[name]['macs'] / costs['twin']['macs']:.2f}×"]
        cells += [ratio(row["alternatives"][name]) if name in row["alternatives"] else "" for _, row in rows]
        extra = 4 * max(0, costs[name]["params"] - costs["twin"]["params"])
        memory = (training["bytes"][name] - extra) / training["bytes"]["twin"]
        shown = "twin" if name == "twin" else f"`{name.removesuffix(WITHOUT)}`{WITHOUT if WITHOUT in name else ''}"
        lines.append([shown, *cells, f"{memory:.2f}×"])
    return table(["network", "operations", *ways, "memory, training"], lines)


def pieces_table(*results: Mapping[str, Any]) -> str:
    """Each piece by itself, summed over the stages; with float32 products, or also with their operands rounded."""
    lines: dict[str, list[str]] = {}
    for result in results:
        sums: dict[str, Counter[str]] = {}
        for row in (row for row in result["rows"] if row["part"] != "excitation"):
            found = sums.setdefault(row["part"], Counter())
            found.update({name: timing["seconds"] for name, timing in row["alternatives"].items()})
        for part, found in sums.items():
            lines.setdefault(part, [part]).append("; ".join(f"{k} {milliseconds(v)}" for k, v in found.items()))
    return table(["of", *["ms", 'ms, with `"medium"`'][: len(results)]], list(lines.values()))


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


def proportion_table(result: Mapping[str, Any]) -> str:
    """Heads and widths by backbone: sizes, and time relative to timm's own network, of which it is in ms."""
    lines = []
    for row in result["rows"]:
        for name, size in row["sizes"].items():
            params = size["params"]
            megabytes = 4 * params["1000"] / 1e6
            figures = [f"{size['features']}", *(f"{params[n] / 1e6:.2f}" for n in ("10", "1000")), f"{megabytes:.1f}"]
            for way in ("eager", "onnxruntime", "openvino"):
                timing = row["alternatives"][way].get(name)
                is_first = name == next(iter(row["sizes"]))
                time = f"{milliseconds(timing['seconds'])} ms" if is_first else timing and f"{timing['ratio']:.2f}×"
                figures.append(time or "wrong")
            lines.append([f"`{row['backbone']}`", name, *figures])
    sizes = ["features", "parameters (M), 10 classes", "1 000 classes", "MB, 1 000 classes"]
    return table(["backbone", "head", *sizes, "eager", "ONNX Runtime", "OpenVINO"], lines)


def runtimes_table(result: Mapping[str, Any]) -> str:
    """Runtimes: time of the first network of a family, of the others relative to it, and their accuracy."""
    lines = []
    for row in result["rows"]:
        first, *others = row["alternatives"].items()
        ratios = [f"{timing['ratio']:.2f}×" for _, timing in others]
        found = row["accuracy"].values()
        accuracy = [" / ".join(f"{each[key]:.1f}" for each in found) or "–" for key in ("top1", "same")]
        time = f"{1e3 * first[1]['seconds'] / row['batch']:.2f}"
        lines.append([f"`{row['family']}`", row["way"], f"{row['batch']}", time, " / ".join(ratios), *accuracy])
    columns = ["without blocks", "runtime", "batch", "ms an image", "Net1 / Net2, time", "top-1 (%)"]
    return table([*columns, "answers as PyTorch's (%)"], lines)


def requests_table(result: Mapping[str, Any]) -> str:
    """What a server meets, by network and runtime."""
    lines = []
    for row in result["rows"]:
        start, _, half, end = row["memory"].values()
        growth = f"{half - start:+.0f}, then {end - half:+.0f}"
        what = [row["nan"], *(row[key].partition(":")[0] for key in ("uint8", "without_batch"))]
        lines.append([f"`{row['network']}`", row["way"], f"{row['invariance']:.0e}", growth, *what])
    columns = ["network", "runtime", "alone and in a batch", "memory (MB), first half of the requests and second half"]
    return table([*columns, "an image with a NaN", "uint8", "an image without its batch"], lines)


def about_serving(*results: Mapping[str, Any]) -> str:
    """The machine, and how busy it was."""
    machine = results[0]["machine"]
    runtimes = f"ONNX Runtime {machine['onnxruntime']}, OpenVINO {machine['openvino']}"
    device = f"{machine['device']}, 1 thread, {machine['capability']}"
    load = f"load average {min(r['load'] for r in results):.1f} to {max(r['load'] for r in results):.1f}"
    return f"{device}; {versions(machine)}, {runtimes}; {load}."


def about(result: Mapping[str, Any]) -> str:
    """The machine."""
    machine = result["machine"]
    device = f"{machine['device']}, {machine['threads']} threads, {machine['capability']}"
    return f"{device}; {versions(machine)}; batch {result['batch']}."


def versions(machine: Mapping[str, Any]) -> str:
    """Of what the figures depend on."""
    return f"Python {machine['python']}, torch {machine['torch']}, timm {machine['timm']}"


def trained_before(name: str, epochs: int) -> list[float]:
    """Top-1 (%) after the last epoch of a row's runs on Fashion-MNIST with an older version, on the Xeon, by seed."""
    with (RESULTS / "fashion_mnist/before.csv").open(newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["run"] == name and line["machine"].startswith("Intel")]
    return [float(line["eval_top1"]) for line in lines if int(line["epoch"]) + 1 == epochs]


def fashion_mnist_table() -> str:
    """Every run, mean, standard deviation, number and spread: of the last epoch, so that no test image chose it."""
    (steps,) = load("fashion_mnist/step_times")["rows"]
    plan, results = load_plan(PLAN_FASHION_MNIST), read_runs(runs_beside(PLAN_FASHION_MNIST))
    columns = ["network", "parameters (M)", "MMACs", "training step"]
    columns += ["top-1 (%) of each seed", "trained before", "mean of all", "std", "n", "spread of all"]
    lines = []
    for row, name in FASHION_MNIST.items():
        own, cost = [run for run in plan if run.row == row], steps["costs"][row]
        now = [accuracy for run in own if (accuracy := top1(run, results)) is not None]
        before = trained_before(f"{own[0].group}/{row}", own[0].epochs)
        link = f"[{name}](../train_configs/{own[0].recipe}.yaml)"
        price = [f"{cost['params'] / 1e6:.3f}", f"{cost['macs'] / 1e6:.1f}"]
        step = f"{steps['alternatives'][row]['ratio']:.1f}×"
        each = (", ".join(f"{value:.2f}" for value in accuracies) for accuracies in (now, before))
        lines.append([link, *price, step, *each, *statistics(now + before)])
    return table(columns, lines)


def cifar10_tables() -> dict[str, str]:
    """Groups of both plans of which runs have finished."""
    on_gpu = {f"{name}, GPU": found for name, found in all_tables(PLAN_GPU).items()}
    return {name: "\n".join(lines) for name, (_, lines) in {**all_tables(PLAN), **on_gpu}.items()}


def probe_tables() -> dict[str, str]:
    """What the probe found on each data set of its plan that has finished, and all of them in short."""
    results = json.loads(PROBE.read_text(encoding="utf-8"))
    found = {name: results[name] for name in PROBES}
    tables = {f"probe {name}": probe_table(result) for name, result in found.items()}
    return {"probe": probe_summary(found), **tables}


def add_probe_results(folders: Iterable[Path]) -> None:
    """Add what the probe wrote to some folders, by their names. The list of test images follows from the seed."""
    results = json.loads(PROBE.read_text(encoding="utf-8"))
    for folder in folders:
        found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        results[folder.name] = {name: value for name, value in found.items() if name != "test_images"}
    with replacing(PROBE) as partial:
        partial.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def probe_summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A line for each data set: what validation chose, beside average pooling on the deepest level."""
    columns = ["images", "backbone", "trained on", "`avg`, deepest level (%)", "by validation", "top-1 (%)"]
    columns += ["difference", "95 % interval", "one training (s)"]
    lines = []
    for name, result in found.items():
        average = result["rows"][0]
        best = next(row for row in result["rows"] if row["model"] == result["best"])
        numbers = [f"{best['top1']:.2f}", f"{best['difference']:+.2f}", f"{best['low']:+.2f} to {best['high']:+.2f}"]
        lines.append(
            [
                PROBES[name],
                result["backbone"].removeprefix("tf_efficientnet_"),
                f"{result['train']:,} images".replace(",", " "),
                f"{average['top1']:.2f}",
                f"`{best['head']}`, " + ("`final`" if best["level"] == "final" else f"level {best['level']}"),
                *numbers,
                f"{best['train_seconds']:.0f}",
            ]
        )
    return table(columns, lines)


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
    files = ("blocks", "networks", "networks_bfloat16", "pieces", "pieces_medium", "gpu/networks")
    blocks, networks, bfloat16, pieces, pieces_medium, gpu = (load(f"performance/{name}") for name in files)
    performance = {
        "networks": networks_table(networks, bfloat16),
        "networks' machine": about(networks),
        "blocks": blocks_table(blocks, "block"),
        "blocks' heads": blocks_table(blocks, "head"),
        "pieces": pieces_table(pieces, pieces_medium),
        "networks, GPU": networks_table(gpu, names=NETWORKS_GPU),
        "networks' machine, GPU": about(gpu),
    }
    heads = load("performance/heads")
    proportion, runtimes, requests = (load(f"serving/{part}") for part in ("proportion", "runtimes", "requests"))
    citations = [inspect.cleandoc(pool.citation) for pool in SECOND_ORDER_POOLS.values() if pool.citation]
    return {
        "docs/citing.md": {"citations": "```bibtex\n" + "\n".join(citations) + "\n```"},
        "docs/performance.md": performance,
        "docs/results.md": {**probe_tables(), **cifar10_tables(), "fashion_mnist": fashion_mnist_table()},
        "docs/backbones.md": dict(zip(("heads", "heads' cost"), heads_tables(heads), strict=True))
        | {"heads' machine": about(heads)}
        | {"proportion": proportion_table(proportion), "proportion's machine": about_serving(proportion)},
        "docs/deploy.md": {
            "runtimes": runtimes_table(runtimes),
            "requests": requests_table(requests),
            "serving's machine": about_serving(runtimes, requests),
        },
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--probe", nargs="+", type=Path, default=(), metavar="DIR", help="add the results in these folders of the probe"
    )
    if folders := parser.parse_args().probe:
        add_probe_results(folders)
    for page, texts in contents().items():
        (ROOT / page).write_text(update((ROOT / page).read_text(encoding="utf-8"), texts), encoding="utf-8")
    draw_growth(load("performance/growth"), ROOT / "docs/figures/growth.png")
    draw_sqrt_accuracy(load("performance/sqrt_accuracy"), ROOT / "docs/figures/sqrt_accuracy.png")


if __name__ == "__main__":
    main()
