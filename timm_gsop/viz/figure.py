"""Figures of matplotlib: made without a screen, written whole or not at all."""

from pathlib import Path
from typing import TYPE_CHECKING

from timm_gsop.complete_file import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_output", "new_figure", "save_figure"]


def check_output(path: Path) -> None:
    """Raise ``ValueError`` if there is no folder to write a figure into."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"out={str(path)!r} is in no folder that exists; accepted: a file in an existing one.")


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure; sizes are inches.

    Raises:
        ModuleNotFoundError: Without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install timm-gsop[demo] brings it", name=error.name) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: "Figure", path: Path, dpi: int = 80) -> None:
    """Write a figure; the ending of the path decides the format, PNG without one.

    Raises:
        OSError: If it cannot be written.
        ValueError: If matplotlib does not know the format, or there is no such folder.
    """
    check_output(path)
    with replacing(path) as partial:
        figure.savefig(partial, format=path.suffix[1:] or "png", dpi=dpi)
