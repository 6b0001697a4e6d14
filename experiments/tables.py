"""Tables of the runs that have finished: python -m experiments.tables, for docs/results.md.

``--csv FILE`` writes every run in the format of timm's results; ``--figure FILE`` draws accuracy against time, each row
a point; ``--curves FILE`` draws error and loss against the epoch. A run that has not finished is in none of them.
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import timm
import yaml

import timm_gsop  # noqa: F401  # registers the networks
from benchmarks import table as markdown_table
from experiments.plan import PLAN, Run, load_plan, measured_beside, read_runs, runs_beside, top1
from experiments.run import network
from timm_gsop.complete_file import replacing
from timm_gsop.viz.curves import Summary, draw_curves
from timm_gsop.viz.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LABELS = {
    "scratch": {
        "vanilla": "vanilla",
        "stride1": "vanilla, last stage not down-sampled",
        "net1": "GSoP-Net1",
        "net2": "GSoP-Net2",
        "net2_nodrop": "GSoP-Net2 without dropout",
        "se": "SE",
        "isqrt": "iSQRT-COV",
        "isqrt_nodrop": "iSQRT-COV without dropout",
        "vanilla_net1_time": "vanilla, in Net1's time",
        "vanilla_net2_time": "vanilla, in Net2's time",
        "stride1_net1_time": "not down-sampled, in Net1's time",
        "stride1_net2_time": "not down-sampled, in Net2's time",
    },
    "transfer": {
        "avg": "average pooling",
        **{f"isqrt{size}": f"iSQRT-COV pooling, {size} channels" for size in (64, 128, 256)},
        "bilinear64": "bilinear pooling, 64 channels",
        "neutral": "average pooling; blocks, neutral start",
        "random": "average pooling; blocks, random start",
        "both": "iSQRT-COV pooling, 128 channels; blocks, neutral start",
    },
    "ablation": {
        **{f"channel{size}": f"blocks by channel, covariance of {size}" for size in (32, 64, 128)},
        **{f"position{size}": f"blocks by position, covariance of {size}" for size in (16, 36, 64)},
        **{name: f"both kinds of blocks, fused by {name}" for name in ("avg", "max", "concat")},
        **{f"stage{i}": f"blocks by channel in stage {i} alone" for i in (1, 2, 3)},
        **{f"iterations{n}": f"iSQRT-COV, {n} iteration{'s' * (n > 1)}" for n in (1, 3, 5, 10)},
        "mpn": "MPN-COV, the exact root",
    },
}
"""What the tables say of a row, by the first word of its group."""
COLUMNS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")


def parameters(run: Run) -> float:
    """Millions of parameters of a run's network."""
    settings = run.settings
    kwargs: dict[str, Any] = dict(settings.get("model_kwargs", {}), num_classes=settings["num_classes"])
    if "gp" in settings:
        kwargs["global_pool"] = settings["gp"]
    name = settings["model"]
    model = timm.create_model(name if name == "second_order" else f"{name}.untrained", **kwargs)
    return sum(p.numel() for p in model.parameters()) / 1e6


def statistics(values: Sequence[float]) -> list[str]:
    """Mean, sample standard deviation, number, and spread of accuracies, as a table shows them."""
    several = [f"{stdev(values):.2f}", f"{max(values) - min(values):.2f}"] if len(values) > 1 else ["–", "–"]
    return [f"{mean(values):.2f}", several[0], str(len(values)), several[1]]


def table(
    runs: Sequence[Run],
    results: dict[str, Summary],
    references: Sequence[str] = (),
    speeds: Mapping[str, Mapping[str, float]] | None = None,
) -> list[str]:
    """A group of the plan as a table in Markdown: accuracy by seed, statistics, differences to other rows.

    Args:
        runs: Those of the group.
        results: The finished runs, as :func:`experiments.plan.read_runs` returns them.
        references: Rows from which differences are taken, seed by seed; times are relative to the first.
        speeds: Images a second in training and in test by row, as ``--measure`` found.
    """
    speeds = speeds or {}
    rows: dict[str, dict[int, float]] = {}
    first: dict[str, Run] = {}
    labels = LABELS.get(runs[0].group.partition("_")[0], {})
    planned = Counter(run.row for run in runs)
    for run in runs:
        first.setdefault(run.row, run)
        if (accuracy := top1(run, results)) is not None:
            rows.setdefault(run.row, {})[run.seed] = accuracy
    kinds = dict(train="training", test="inference") if any(f"{run.group}/{run.row}" in speeds for run in runs) else {}
    heads = ["row", "network", "epochs", "parameters (M)", *kinds.values(), "top-1 (%) of each seed"]
    heads += ["mean", "std", "n", "spread", *[f"minus {name}, each seed" for name in references]]
    lines = []
    for row, found in rows.items():
        run, values = first[row], list(found.values())
        seeds = ", ".join(f"{value:.2f}" for value in values)
        if missing := planned[row] - len(values):
            seeds += f" ({missing} to come)"
        link, label = f"[{row}](../train_configs/{run.recipe}.yaml)", labels.get(row, "")
        cells = [link, label, str(run.epochs), f"{parameters(run):.3f}"]
        own, unit = (speeds.get(f"{run.group}/{name}") for name in (row, references[0] if references else row))
        cells += [f"{unit[kind] / own[kind]:.1f}×" if own and unit else "–" for kind in kinds]
        cells += [seeds, *statistics(values)]
        for name in references:
            pairs = [found[seed] - rows[name][seed] for seed in found if seed in rows.get(name, {}) and name != row]
            cells.append(", ".join(f"{pair:+.2f}" for pair in pairs) or "–")
        lines.append(cells)
    return markdown_table(heads, lines).splitlines()


def search_table(runs: Sequence[Run], results: dict[str, Summary]) -> list[str]:
    """A search for learning rates as a table in Markdown: validation accuracy of each, the best in bold."""
    rows: dict[str, dict[float, float]] = {}
    to_come: dict[str, set[float]] = {}
    for run in runs:
        row, rate = run.row.rpartition("_lr")[0], run.options["lr"]
        if (accuracy := top1(run, results)) is not None:
            rows.setdefault(row, {})[rate] = accuracy
        else:
            to_come.setdefault(row, set()).add(rate)
    rates = sorted({run.options["lr"] for run in runs})
    lines = []
    for row, found in rows.items():
        best = max((accuracy, rate) for rate, accuracy in found.items())[1]
        missing = dict.fromkeys(to_come.get(row, ()), "to come")
        cells = [f"{found[rate]:.2f}" if rate in found else missing.get(rate, "–") for rate in rates]
        lines.append([row, *[f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells, strict=True)]])
    return markdown_table(["row", *[f"lr {rate:g}" for rate in rates]], lines).splitlines()


def timm_rows(runs: Sequence[Run], results: dict[str, Summary]) -> list[dict[str, str]]:
    """Finished runs in the format of timm's results; ``model`` is group, row and seed."""
    rows, counts = [], {}
    for run in runs:
        if top1(run, results) is None:
            continue
        key = network(run)
        if key not in counts:
            counts[key] = parameters(run)
        summary, settings = results[run.name], run.settings
        best1, best5 = summary["eval_top1"][-1], summary["eval_top5"][-1]
        figures = (best1, 100 - best1, best5, 100 - best5)
        row = [run.name, settings["input_size"][-1], *[f"{figure:.3f}" for figure in figures], f"{counts[key]:.3f}"]
        values = [*row, f"{settings['crop_pct']:.3f}", settings["interpolation"]]
        rows.append(dict(zip(COLUMNS, map(str, values), strict=True)))
    return sorted(rows, key=lambda row: -float(row["top1"]))


def draw_time(runs: Sequence[Run], results: dict[str, Summary], speeds: Mapping[str, Mapping[str, float]]) -> "Figure":
    """Draw mean, lowest and highest accuracy against minutes of training; rows without speeds are left out.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    found: dict[str, list[float]] = {}
    for run in runs:
        if (accuracy := top1(run, results)) is not None and f"{run.group}/{run.row}" in speeds:
            found.setdefault(run.row, []).append(accuracy)
    rows = {run.row: run for run in runs}
    for row, values in found.items():
        minutes = rows[row].epochs * speeds[f"{rows[row].group}/{row}"]["epoch"] / 60
        reach = [[mean(values) - min(values)], [max(values) - mean(values)]]
        axes.errorbar(minutes, mean(values), yerr=reach, marker="o", capsize=3)
        axes.annotate(row, (minutes, max(values)), xytext=(0, 5), textcoords="offset points", fontsize=8, ha="center")
    axes.set(xlabel="training (minutes, one thread)", ylabel="top-1 accuracy (%)")
    axes.grid(alpha=0.3)
    axes.margins(x=0.2, y=0.12)  # room for the names
    return figure


def load_speeds(plan: Path = PLAN) -> dict[str, dict[str, float]]:
    """What ``--measure`` found, by group and row."""
    measured = measured_beside(plan)
    return json.loads(measured.read_text()) if measured.exists() else {}


def all_tables(plan: Path, results: Path | None = None) -> dict[str, tuple[str, list[str]]]:
    """What each group of the plan is about, and its table; without groups of which nothing is finished."""
    found, runs, speeds = {}, load_plan(plan), load_speeds(plan)
    given = read_runs(results or runs_beside(plan))
    for name, group in yaml.safe_load(plan.read_text())["groups"].items():
        own = [run for run in runs if run.group == name]
        is_search = "lrs" in group
        lines = search_table(own, given) if is_search else table(own, given, group.get("references", ()), speeds)
        if len(lines) > 2:
            found[name] = group["what"], lines
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, default=PLAN)
    parser.add_argument("--results", type=Path, help="the file of the finished runs, beside the plan by default")
    parser.add_argument("--csv", type=Path, help="all finished runs, in the format of timm's results")
    parser.add_argument("--figure", type=Path, help="accuracy against time, of --group")
    parser.add_argument("--curves", type=Path, help="error and loss against the epoch, of seed 0 of --group")
    parser.add_argument("--group", default="scratch", help="the group that the figures show")
    args = parser.parse_args(argv)
    runs, speeds, results = (
        load_plan(args.plan),
        load_speeds(args.plan),
        read_runs(args.results or runs_beside(args.plan)),
    )
    for what, lines in all_tables(args.plan, args.results).values():
        print(f"**{what}**\n\n" + "\n".join(lines) + "\n")
    shown = [run for run in runs if run.group == args.group]
    if args.figure:
        save_figure(draw_time(shown, results, speeds), args.figure, dpi=120)
    if args.curves:
        # Not the rows of equal time: they have more epochs.
        seed_0 = [run for run in shown if run.seed == 0 and run.epochs == shown[0].epochs and run.name in results]
        save_figure(draw_curves({run.row: results[run.name] for run in seed_0}), args.curves, dpi=120)
    if args.csv:
        with replacing(args.csv) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(timm_rows(runs, results))


if __name__ == "__main__":
    main()
