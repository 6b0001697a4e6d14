"""Convert a checkpoint into a folder for timm and the Hugging Face Hub; see hub/README.md."""

import argparse
import logging
from pathlib import Path

from timm.utils import ParseKwargs

from timm_gsop.hub.conversion import SOURCES, convert


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source", choices=SOURCES, required=True, help="what made the checkpoint")
    parser.add_argument("src", help="the checkpoint; from timm, also the name of a pretrained model")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--model", help="the network to make; blocks that the checkpoint lacks start neutral")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        convert(args.source, args.src, args.out_dir, args.model, args.model_kwargs)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f'wrote {args.out_dir}; timm.create_model("local-dir:{args.out_dir}", pretrained=True) loads it')


if __name__ == "__main__":
    main()
