"""Download the released weights, convert and measure them, and report what came of it; see docs/weights.md."""

import argparse
import logging
import os
from pathlib import Path

from timm_gsop.hub.contact import make_contact


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where files, networks, report.json and report.md go")
    parser.add_argument("--imagenet", type=Path, metavar="DIR", help="ImageNet's images, val or validation in it")
    scripts = os.environ.get("TIMM_SCRIPTS", "")
    parser.add_argument("--timm-scripts", type=Path, metavar="DIR", default=scripts, help="has timm's validate.py")
    args = parser.parse_args()
    validate = Path(args.timm_scripts) / "validate.py"
    if args.imagenet is not None and not (args.imagenet.is_dir() and validate.is_file()):
        parser.error(f"--imagenet={args.imagenet} needs this folder, and timm's validate.py in --timm-scripts DIR.")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    rows = make_contact(args.folder, args.imagenet, validate)
    print((args.folder / "report.md").read_text(encoding="utf-8"))
    if any("error" in row for row in rows):
        parser.exit(1, f"error: not everything went well; see {args.folder / 'report.md'}\n")


if __name__ == "__main__":
    main()
