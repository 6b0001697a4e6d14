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
    parser.add_argument("src", help="the checkpoint; from timm, also a saved folder, or a pretrained name")
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--model", help="the network to make; blocks that the checkpoint lacks start neutral")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    parser.add_argument("--input-size", type=int, nargs=3, metavar=("C", "H", "W"), help="what it was trained on,")
    parser.add_argument("--mean", type=float, nargs="+", metavar="M", help="where no args.yaml beside the file says it")
    parser.add_argument("--std", type=float, nargs="+", metavar="S")
    parser.add_argument("--interpolation")
    parser.add_argument("--crop-pct", type=float)
    parser.add_argument("--label-names", type=Path, metavar="DIR-OR-FILE", help="folder of images, or a name a line")
    args = parser.parse_args()
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    data_config = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        convert(args.source, args.src, args.out_dir, args.model, args.model_kwargs, data_config, args.label_names)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f'wrote {args.out_dir}; timm.create_model("local-dir:{args.out_dir}", pretrained=True) loads it')


if __name__ == "__main__":
    main()
