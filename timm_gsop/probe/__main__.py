"""Which pooling helps on your images? python -m timm_gsop.probe DATA_DIR --backbone NAME."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from timm_gsop.probe import HEADS, run
except ModuleNotFoundError as error:
    sys.exit(f'error: {error.name} is not installed: pip install "timm-gsop[probe]"')
from timm_gsop.probe.saving import fine_tune_command


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    fine_tune = given.pop("fine_tune")
    if fine_tune and given["save"] is None:
        parser.error("--fine-tune goes on from a saved network: pass --save too")
    try:
        table = run(**given)
    except KeyboardInterrupt:
        print("\ninterrupted: maps and heads so far are kept, and the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table)
    print(f"\nwrote {given['output']}/results.csv, results.json and differences.png")
    if given["save"]:
        saved = table.about["saved"]
        what = f"{saved['head']} on level {saved['level']}, {saved['top1']:.2f} % on the test images"
        print(f"wrote {given['output']}/model: {what}")
    if fine_tune:
        folder = Path(given["output"]) / "model"
        size, classes = table.best.img_size, len(table.about["images"])
        print("\nto fine-tune the whole network, with timm's train.py:")
        print(fine_tune_command(folder, given["data_dir"], given["dataset"], classes, size))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m timm_gsop.probe",
        description="Compare heads on the feature maps of a frozen backbone. It runs once over every image; each head "
        "gets the same search of learning rate and weight decay on validation images; test images decide nothing.",
    )
    add = parser.add_argument
    add("data_dir", metavar="DATA_DIR", help="class folders, or train, validation and test with class folders in each")
    add("--backbone", required=True, metavar="NAME", help="a network of timm, with or without the tag of its weights")
    add("--checkpoint", type=Path, metavar="FILE", help="weights of the backbone, in place of those of its name")
    add(
        "--levels",
        nargs="+",
        type=_level,
        default=(-1, -2),
        metavar="N",
        help="feature levels, indices into the backbone's feature_info, or final for what comes after its last one "
        "(default: -1 -2)",
    )
    add("--heads", nargs="+", choices=HEADS, metavar="HEAD", help=f"of {', '.join(HEADS)} (default: all)")
    add("--img-size", type=int, metavar="N", help="height and width of the images (default: the backbone's)")
    add("--isqrt-dim", type=int, default=64, metavar="N", help="channels after reduction in the heads (default: 64)")
    add("--dataset", default="", metavar="NAME", help="as in timm's train.py: torch/… or hfds/…")
    add("--dataset-download", action="store_true", help="let torchvision download it")
    add("--train-images", type=int, metavar="N", help="use so many images for training and validation (default: all)")
    add("--test-images", type=int, metavar="N", help="use so many test images (default: all)")
    add("--splits", type=int, default=3, metavar="N", help="train every head so often, with other seeds (default: 3)")
    add("--epochs", type=int, metavar="N", help="of each training (default: 12, and at least 300 steps)")
    add("--seed", type=int, default=0, metavar="N", help="of the first split (default: 0)")
    add("--device", metavar="NAME", help="cuda, mps or cpu (default: the best one there is)")
    add("--batch-size", type=int, default=64, metavar="N", help="images in a batch of the backbone (default: 64)")
    add("--workers", type=int, default=0, metavar="N", help="processes that read images (default: none but this one)")
    add("--cache", type=Path, metavar="DIR", help="where maps are kept (default: timm-gsop/probe in the user's cache)")
    add("--cache-size", type=float, metavar="GIB", help="the most that the cache may hold (default: no limit)")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    add("--output", type=Path, default=Path("output/probe"), metavar="DIR", help="(default: output/probe)")
    add("--save", metavar="HEAD|best", help="write the backbone with this head, or with the best by validation, to "
        "OUTPUT/model")  # fmt: skip
    add("--fine-tune", action="store_true", help="print the train.py command that goes on from what --save wrote")
    return parser


def _level(word: str) -> int | None:
    return None if word == "final" else int(word)


if __name__ == "__main__":
    main()
