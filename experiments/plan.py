"""A plan, such as plan.yaml, as a list of runs of timm's train.py, and what its runs left, plan.runs.csv."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from timm_gsop.complete_file import replacing
from timm_gsop.viz.curves import Summary, read_summary

FOLDER = Path(__file__).parent
PLAN, PLAN_GPU, PLAN_FASHION_MNIST = (FOLDER / f"plan{name}.yaml" for name in ("", "_gpu", "_fashion_mnist"))
ABOUT = ("run", "seed", "commit", "resumed")
METRICS = ("train_loss", "eval_loss", "eval_top1", "eval_top5", "lr")
CONFIGS = FOLDER.parent / "train_configs"
ROW_KEYS = {"recipe", "epochs", "seeds", "seconds", "options", "lrs", "same_time_as"}
GROUP_KEYS = ROW_KEYS - {"same_time_as"} | {"what", "rows", "milestones", "lr_from", "references"}


@dataclass(frozen=True)
class Run:
    """One run of train.py.

    Attributes:
        group: Its group in the plan.
        row: Its row in the group; runs of a row differ in their seed only.
        seed: train.py's seed.
        recipe: The file in train_configs, without suffix.
        epochs: How many.
        seconds: What an epoch takes, with all jobs running: measured, or the plan's estimate.
        options: Further options of train.py.
        lr_from: The runs that decide on the learning rate, by their validation accuracy; ``()`` for the recipe's.
    """

    group: str
    row: str
    seed: int
    recipe: str
    epochs: int
    seconds: float
    options: dict[str, Any] = field(default_factory=dict)
    lr_from: "tuple[Run, ...]" = ()

    @property
    def name(self) -> str:
        """Group, row and seed."""
        return f"{self.group}/{self.row}-{self.seed}"

    @property
    def settings(self) -> dict[str, Any]:
        """All settings: those of the recipe and the run's own."""
        return {**yaml.safe_load((CONFIGS / f"{self.recipe}.yaml").read_text()), **self.options, "epochs": self.epochs}


def measured_beside(plan: Path) -> Path:
    """Where ``--measure`` writes the speeds for a plan: plan.measured.json for plan.yaml."""
    return plan.with_suffix(".measured.json")


def load_plan(path: Path = PLAN, measured: Path | None = None) -> list[Run]:
    """Read the plan.

    Args:
        path: The file.
        measured: What ``--measure`` wrote, seconds of an epoch by row; by default the file beside the plan.

    Returns:
        All runs, in the order in which they are started.

    Raises:
        ValueError: If the plan has an unknown key, or names a recipe or row that does not exist.
    """
    measured = measured_beside(path) if measured is None else measured
    times = json.loads(measured.read_text()) if measured.exists() else {}
    groups: dict[str, list[Run]] = {}
    for name, group in yaml.safe_load(path.read_text())["groups"].items():
        if unknown := set(group) - GROUP_KEYS:
            raise ValueError(f"group {name!r} of {path} has {sorted(unknown)}; accepted: {sorted(GROUP_KEYS)}.")
        groups[name] = list(_runs(name, group, times, groups))
    return [run for runs in groups.values() for run in runs]


def _runs(name: str, group: dict[str, Any], times: dict[str, Any], groups: dict[str, list[Run]]) -> Iterator[Run]:
    rows: dict[str, dict[str, Any]] = {}
    for row, own in group["rows"].items():
        if unknown := set(own or {}) - ROW_KEYS:
            raise ValueError(f"row {name}/{row} has {sorted(unknown)}; accepted: {sorted(ROW_KEYS)}.")
        rows[row] = {"seeds": 1, **group, **(own or {}), "options": _merge(group, own or {})}
        first = f"_lr{rows[row]['lrs'][0]}" if "lrs" in rows[row] else ""
        rows[row]["seconds"] = times.get(f"{name}/{row}{first}", {}).get("epoch", rows[row]["seconds"])
        if not (CONFIGS / f"{rows[row]['recipe']}.yaml").exists():
            raise ValueError(f"recipe={rows[row]['recipe']!r} of {name}/{row} is not a file of train_configs.")
    for row in rows.values():
        if "same_time_as" in row:
            longer = rows[row["same_time_as"]]
            row["epochs"] = round(longer["epochs"] * longer["seconds"] / row["seconds"])
    # Seed by seed, so that a plan that is cut short has whole seeds.
    for seed in range(max(row["seeds"] for row in rows.values())):
        for row_name, row in rows.items():
            if seed >= row["seeds"]:
                continue
            options, epochs = dict(row["options"]), row["epochs"]
            if "milestones" in group:
                # timm's multistep lowers the rate one epoch early.
                options["decay_milestones"] = [round(part * epochs) + 1 for part in group["milestones"]]
            options = {
                key: value.format(seed=seed) if key.endswith("split") else value for key, value in options.items()
            }
            lr_from: tuple[Run, ...] = ()
            if "lr_from" in group:
                lr_from = tuple(
                    run for run in groups.get(group["lr_from"], []) if run.row.rpartition("_lr")[0] == row_name
                )
                if not lr_from:
                    raise ValueError(f"lr_from={group['lr_from']!r} has no runs for {name}/{row_name}.")
            common = (seed, row["recipe"], epochs, row["seconds"])
            for lr in row.get("lrs", [None]):
                if lr is None:
                    yield Run(name, row_name, *common, options, lr_from)
                else:
                    yield Run(name, f"{row_name}_lr{lr}", *common, {**options, "lr": lr})


def _merge(group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Options of a row over those of its group, arguments of the model one by one."""
    outer, inner = group.get("options", {}), own.get("options", {})
    merged = {**outer, **inner}
    if "model_kwargs" in outer and "model_kwargs" in inner:
        merged["model_kwargs"] = {**outer["model_kwargs"], **inner["model_kwargs"]}
    return merged


def epochs_done(summary: Path) -> int:
    """How many epochs a summary.csv of train.py has; 0 if there is none yet."""
    try:
        return int(max(read_summary(summary)["epoch"])) + 1
    except (FileNotFoundError, ValueError):  # none, or a header without an epoch, as after a kill
        return 0


def runs_beside(plan: Path) -> Path:
    """Where the runs of a plan are kept: plan.runs.csv for plan.yaml."""
    return plan.with_suffix(".runs.csv")


def read_runs(path: Path) -> dict[str, Summary]:
    """Every finished run's epochs, as :func:`read_summary` returns them, by the run's name."""
    found: dict[str, Summary] = {}
    if path.exists():
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                run = found.setdefault(f"{line['run']}-{line['seed']}", {name: [] for name in ("epoch", *METRICS)})
                for name, values in run.items():
                    values.append(float(line[name]))
    return found


def keep_run(run: Run, summary: Path, commit: str, path: Path) -> None:
    """Append what a finished run left to the runs that are kept."""
    kept = path.read_text() if path.exists() else ",".join((*ABOUT, "epoch", *METRICS)) + "\n"
    given, resumed = read_summary(summary), summary.read_text().count("epoch,") - 1  # a header each time
    with replacing(path) as partial, partial.open("w", newline="") as file:
        file.write(kept)
        writer = csv.writer(file, lineterminator="\n")
        for i, epoch in enumerate(given["epoch"]):
            values = (given[name][i] for name in METRICS)
            writer.writerow([f"{run.group}/{run.row}", run.seed, commit, resumed, int(epoch), *values])


def top1(run: Run, results: dict[str, Summary]) -> float | None:
    """Accuracy (%) of a finished run after its last epoch; None without results of so many epochs as the plan says."""
    if run.name not in results or results[run.name]["epoch"][-1] + 1 != run.epochs:
        return None
    return results[run.name]["eval_top1"][-1]


def chosen_lr(run: Run, results: dict[str, Summary]) -> float | None:
    """The learning rate with the best validation accuracy; None while a run that decides on it is not finished."""
    found = [(top1(other, results), other.options["lr"]) for other in run.lr_from]
    if any(accuracy is None for accuracy, _ in found):
        return None
    return max(found)[1]
