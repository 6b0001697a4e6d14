"""What a comparison leaves in its output folder: CSV, JSON and one figure, each complete or absent."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from timm_gsop.complete_file import replacing
from timm_gsop.probe.table import Table
from timm_gsop.viz.figure import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_differences", "write_report"]


def write_report(table: Table, folder: Path) -> None:
    """Write ``results.csv`` in timm's format with further columns, ``results.json`` and ``differences.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "results.csv", lambda path: _write_csv(table, path))
    found = dict(conclusion=table.conclusion, note=table.note, best=table.best.model, **table.about)
    found["rows"] = [row.as_dict() for row in table.rows]
    text = json.dumps(found, indent=2, ensure_ascii=False) + "\n"
    _write(folder / "results.json", lambda path: path.write_text(text, encoding="utf-8"))
    save_figure(draw_differences(table), folder / "differences.png", dpi=120)


def draw_differences(table: Table) -> "Figure":
    """Difference of every head to average pooling on the deepest level, with its 95 % interval."""
    rows = [row for row in table.rows if row is not table.reference]
    figure = new_figure(8, 1.2 + 0.28 * len(rows))
    axes = figure.subplots()
    levels = list(dict.fromkeys(row.level for row in table.rows))
    for i, row in enumerate(rows):
        spans = [[row.difference - row.low], [row.high - row.difference]]
        color = f"C{levels.index(row.level)}"
        axes.errorbar(row.difference, i, xerr=spans, fmt="o", color=color, capsize=3, markersize=5)
    axes.axvline(0, color="grey", linewidth=1)
    axes.set_yticks(range(len(rows)), [f"{row.head}, level {row.level}, {row.height}×{row.width}" for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    reference = table.reference
    axes.set_xlabel(f"points above {reference.head} on level {reference.level} ({reference.top1:.2f} %), 95 % interval")
    return figure


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table.rows[0].as_dict())
        writer.writeheader()
        for row in table.rows:
            values = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.as_dict().items()}
            writer.writerow({**values, "lr": row.lr, "each": " ".join(f"{v:.2f}" for v in row.each)})


def _write(path: Path, write: Callable[[Path], object]) -> None:
    with replacing(path) as partial:
        write(partial)
