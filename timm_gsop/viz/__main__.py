"""The command line: python -m timm_gsop.viz MODEL IMAGE OUT.png, or curves SUMMARY.csv -o OUT.png after its name."""

import sys

from timm_gsop.viz import blocks, curves


def main(argv: list[str] | None = None) -> None:
    """Draw blocks, or curves if that is the first word."""
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["curves"]:
        curves.main(given[1:])
    else:
        blocks.main(given)


if __name__ == "__main__":
    main()
