"""Publish a folder that hub/convert.py or timm's save_for_hf wrote on the Hugging Face Hub; see hub/README.md."""

import argparse
from pathlib import Path

from timm_gsop.hub.publishing import publish, stage
from timm_gsop.pretrained.digests import HUB_ORGANISATION

FIGURE = Path(__file__).parents[1] / "docs/figures/architecture.png"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dir", type=Path, help="the folder")
    parser.add_argument("--repo", required=True, metavar="ORG/NAME")
    parser.add_argument("--dry-run", action="store_true", help="only write what would be uploaded, into DIR-upload")
    parser.add_argument("--private", action="store_true", help="if the repository is created, make it private")
    parser.add_argument("--revision", help="branch to commit to")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--license", help="identifier of the weights' licence, where the folder does not state it")
    parser.add_argument(
        "--i-have-permission",
        metavar="TEXT",
        help="of weights whose authors state no licence: who has permitted it, and where; for the card",
    )
    args = parser.parse_args()
    try:
        if args.dry_run:
            upload = args.dir.with_name(f"{args.dir.name}-upload")
            stage(args.dir, args.repo, upload, FIGURE, args.license, replace=True, permission=args.i_have_permission)
            print(f"wrote {upload}: what would be uploaded to {args.repo}")
        else:
            options = dict(private=args.private, revision=args.revision, create_pr=args.create_pr)
            options["permission"] = args.i_have_permission
            published = publish(args.dir, args.repo, FIGURE, args.license, **options)
            print(f"published: {published.url}")
            if args.repo.partition("/")[0] == HUB_ORGANISATION and published.sums_line:
                print(f"for timm_gsop/pretrained/SHA256SUMS (see hub/README.md):\n{published.sums_line}")
    except (OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
