"""Training curves, as the paper's Figure 3: python -m timm_gsop.viz curves out/*/summary.csv -o curves.png."""

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from timm_gsop.viz.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Summary", "draw_curves", "plot_errors", "read_summary"]

Summary = dict[str, list[float]]


def read_summary(path: Path) -> Summary:
    """Read the figures of every epoch that timm's train.py leaves in summary.csv.

    Args:
        path: The file.

    Returns:
        Columns by name, ``epoch`` and ``eval_top1`` (%) among them, a value an epoch. If an epoch is there twice, as
        after a resumed training, the later row counts.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such file, or has no epoch.
    """
    with path.open(newline="") as file:
        try:
            given = (
                row for row in csv.DictReader(file) if row["epoch"] != "epoch"
            )  # resumed, train.py repeats its header
            rows = {row["epoch"]: {name: float(row[name]) for name in row} for row in given}
        except (KeyError, TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path} is not a summary of timm's train.py: {type(error).__name__}: {error}") from error
    if not rows or not all("eval_top1" in row for row in rows.values()):
        raise ValueError(f"{path} has no epoch with eval_top1; accepted: summary.csv of timm's train.py.")
    names = next(iter(rows.values()))
    return {name: [row[name] for row in rows.values()] for name in names}


def plot_errors(axes: Any, runs: Mapping[str, Summary]) -> None:
    """Draw the validation error of runs against the epoch, into axes of matplotlib."""
    for i, (name, summary) in enumerate(runs.items()):
        errors = [100 - top1 for top1 in summary["eval_top1"]]
        epochs = [epoch + 1 for epoch in summary["epoch"]]
        axes.plot(epochs, errors, marker=".", color=f"C{i % 10}", label=f"{name}, {errors[-1]:.2f} %")
    axes.set(xlabel="epoch", ylabel="validation error, top-1 (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def draw_curves(runs: Mapping[str, Summary]) -> "Figure":
    """Draw runs: validation error, and loss in training (dashed) and validation, against the epoch.

    Args:
        runs: What :func:`read_summary` returned, by the name that the legend gives it.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    figure = new_figure(10, 4)
    error, loss = figure.subplots(1, 2)
    plot_errors(error, runs)
    for i, summary in enumerate(runs.values()):
        epochs = [epoch + 1 for epoch in summary["epoch"]]
        for column, style in (("train_loss", "--"), ("eval_loss", "-")):
            if column in summary:
                loss.plot(epochs, summary[column], style, color=f"C{i % 10}")
    loss.plot([], [], "--", color="grey", label="training, with augmentation")
    loss.plot([], [], "-", color="grey", label="validation")
    loss.set(xlabel="epoch", ylabel="loss")
    loss.grid(alpha=0.3)
    loss.legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: ``SUMMARY.csv [SUMMARY.csv …] -o OUT.png``."""
    parser = argparse.ArgumentParser(prog="python -m timm_gsop.viz curves", description=__doc__)
    parser.add_argument("summaries", nargs="+", type=Path, metavar="SUMMARY.csv", help="runs, named by their folders")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the picture to write")
    args = parser.parse_args(argv)
    try:
        runs = {_name(path, args.summaries): read_summary(path) for path in args.summaries}
        save_figure(draw_curves(runs), args.out, dpi=120)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        parser.error(str(error))
    print(f"wrote {args.out}")


def _name(path: Path, paths: Sequence[Path]) -> str:
    """The folder that train.py made for a run, or the file's own name; the whole path where two have the same."""

    def short(path: Path) -> str:
        return path.absolute().parent.name if path.stem == "summary" else path.stem

    return short(path) if [short(p) for p in paths].count(short(path)) == 1 else str(path)
