"""Record the SHA-256 of a file that its authors published, after its first download; see hub/README.md."""

import argparse
from pathlib import Path

from timm_gsop.pretrained.digests import SUMS, record_origin


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="under its own name, mpncovresnet50-15991845.pth for one")
    args = parser.parse_args()
    try:
        digest = record_origin(args.file)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote into {SUMS}, and demanded from now on:\n{digest}  origin/{args.file.name}")


if __name__ == "__main__":
    main()
