"""The figures of every epoch that timm's train.py leaves: summary.csv."""

import csv
from pathlib import Path

__all__ = ["Summary", "read_summary"]

Summary = dict[str, list[float]]


def read_summary(path: Path) -> Summary:
    """Read the figures of every epoch that timm's train.py leaves in summary.csv.

    Args:
        path: The file.

    Returns:
        Columns by name, ``epoch`` and ``eval_top1`` (%) among them, a value an epoch. If an epoch is there
        twice, as after a resumed training, the later row counts.

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
