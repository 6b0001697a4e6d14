"""What is reported of the heads."""

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Row", "Table"]


@dataclass(frozen=True)
class Row:
    """A head on a feature level: the columns of timm's results first, then what only a probe has.

    Attributes:
        model: Backbone, level and head.
        top1: Accuracy on the test images in percent, the mean over the splits.
        top1_err: 100 − top1.
        top5: As top1, with the true class among the five best.
        top5_err: 100 − top5.
        param_count: Parameters of backbone and head together, in millions.
        img_size: Height of the images.
        crop_pct: Crop ratio of timm's data configuration.
        interpolation: Interpolation of timm's data configuration.
        level: Feature level.
        head: Name of the head.
        channels: Channels of the level's maps.
        height: Height of the level's maps.
        width: Width of the level's maps.
        features: What the classifier reads.
        head_params: Parameters of the head.
        lr: Learning rate, by the search.
        weight_decay: Weight decay, by the search.
        validation: Accuracy on the validation images, the mean over the splits.
        spread: Standard deviation of the splits' accuracies.
        difference: To ``avg`` on the deepest level, in points, paired.
        low: Lower end of its 95 % interval.
        high: Upper end.
        balanced: Balanced accuracy: the mean over the classes.
        train_seconds: Time of one training.
        infer_seconds: Time of the head for 1 000 images, without a pooling that has no parameters, which runs once.
        each: Accuracy of each split.
    """

    model: str
    top1: float
    top1_err: float
    top5: float
    top5_err: float
    param_count: float
    img_size: int
    crop_pct: float
    interpolation: str
    level: str
    head: str
    channels: int
    height: int
    width: int
    features: int
    head_params: int
    lr: float
    weight_decay: float
    validation: float
    spread: float
    difference: float
    low: float
    high: float
    balanced: float
    train_seconds: float
    infer_seconds: float
    each: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Columns and values."""
        return asdict(self)


@dataclass(frozen=True)
class Table:
    """What :func:`timm_gsop.probe.run` returns; ``print`` shows it.

    Attributes:
        rows: A row for each level and head, the deepest level first.
        conclusion: One sentence.
        best: The row that is best by validation.
        reference: The row to which the others are compared.
        uneven: Whether the classes differ much in size, so that balanced accuracy matters.
        about: Images, classes, parts, versions.
        note: What was not compared, though it should have been; "" if nothing.
    """

    rows: tuple[Row, ...]
    conclusion: str
    best: Row
    reference: Row
    uneven: bool
    about: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def row(self, head: str, level: str) -> Row:
        """The row of a head on a level."""
        return next(row for row in self.rows if (row.head, row.level) == (head, level))

    def __str__(self) -> str:
        titles = ["level", "map", "head", "features", "params", "top-1 %", "spread", "difference", "95 % interval"]
        lines = [[*titles, *(["balanced %"] if self.uneven else []), "train s"]]
        for row in self.rows:
            is_reference = row is self.reference
            lines.append(
                [
                    *(row.level, f"{row.channels}×{row.height}×{row.width}", row.head, str(row.features)),
                    *(_short(row.head_params), f"{row.top1:.2f}", f"{row.spread:.2f}"),
                    "" if is_reference else f"{row.difference:+.2f}",
                    "" if is_reference else f"{row.low:+.2f} to {row.high:+.2f}",
                    *([f"{row.balanced:.2f}"] if self.uneven else []),
                    f"{row.train_seconds:.1f}",
                ]
            )
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 2) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        return "\n".join([*shown, "", self.conclusion, *([self.note] if self.note else [])])


def _short(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count / 1e3:.1f} k"
