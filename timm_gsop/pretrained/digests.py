"""SHA-256 of the files that we publish or ship: SHA256SUMS, in the format of ``sha256sum``.

A line is a digest and a file: ``shipped/NAME.safetensors`` in this package, on the Hugging Face Hub
``timm-gsop/NAME@COMMIT/model.safetensors``, as ``hub/publish.py`` prints it, or ``origin/FILE`` for one of its authors'
own, as ``hub/digest.py`` writes it. A repository of ours that has no line here
is never asked for weights, so that nobody else can serve them under a name that we have not published yet.
"""

import hashlib
import re
from functools import cache
from pathlib import Path

from timm_gsop.complete_file import replacing

__all__ = [
    "HUB_ORGANISATION",
    "SHIPPED",
    "digest_in_name",
    "known_digest",
    "origin_digest",
    "published_id",
    "record_origin",
    "record_shipped",
    "sha256_of",
    "sums_line",
]

HUB_ORGANISATION = "timm-gsop"
"""Owner of our repositories on the Hub."""

SUMS = Path(__file__).with_name("SHA256SUMS")
SHIPPED = Path(__file__).with_name("shipped")
WEIGHTS = "model.safetensors"


@cache
def _digests() -> dict[str, str]:
    lines = SUMS.read_text(encoding="ascii").splitlines()
    found = [re.fullmatch(r"([0-9a-f]{64})  (\S+)", line) for line in lines]
    return {match[2]: match[1] for match in found if match}


def known_digest(file: Path | str) -> str:
    """The SHA-256 that a file must have, or "" where none is known.

    Args:
        file: A file of this package, or an id on the Hub, for that repository's weights.
    """
    if isinstance(file, Path):
        return _digests().get(f"{SHIPPED.name}/{file.name}", "") if file.parent == SHIPPED else ""
    return _digests().get(f"{file}/{WEIGHTS}", "")


def published_id(model: str) -> str | None:
    """Id on the Hub, with its commit, of one of our models with its tag; None if we have not published it."""
    pattern = re.compile(rf"({re.escape(f'{HUB_ORGANISATION}/{model}')}(@[0-9a-f]+)?)/{re.escape(WEIGHTS)}")
    found = [match[1] for match in map(pattern.fullmatch, _digests()) if match]
    return found[-1] if found else None  # the latest line holds


def sums_line(repo_id: str, commit: str, weights: Path) -> str:
    """The line for SHA256SUMS of weights that were published.

    Args:
        repo_id: The repository, ORG/NAME.
        commit: The commit that has them.
        weights: The file.
    """
    return f"{sha256_of(weights)}  {repo_id}@{commit}/{WEIGHTS}"


def digest_in_name(file: str) -> str:
    """The head of the SHA-256 in a file's name or address, as PyTorch's hub writes it: ``name-15991845.pth``."""
    found = re.search(r"-([0-9a-f]{8,})\.\w+$", file)
    return found[1] if found else ""


def origin_digest(file: str) -> str:
    """The SHA-256 that a file of its authors must have: all of it where it is recorded, or the head in its name.

    Args:
        file: Its name.
    """
    return _digests().get(f"origin/{file}", "") or digest_in_name(file)


def record_origin(file: Path) -> str:
    """Write the digest of a file that was downloaded from its authors into SHA256SUMS, and return it.

    Raises:
        ValueError: If it is not the one in its name, or the one that is recorded already.
    """
    digest, expected = sha256_of(file), origin_digest(file.name)
    if not digest.startswith(expected):
        raise ValueError(f"{file} is damaged or another file: its SHA-256 is {digest}, and {expected} is expected.")
    _record(f"origin/{file.name}", digest)
    return digest


def record_shipped(file: Path) -> None:
    """Write the digest of a file of this package into SHA256SUMS, in place of a former one."""
    _record(f"{file.parent.name}/{file.name}", sha256_of(file))


def _record(name: str, digest: str) -> None:
    lines = [line for line in SUMS.read_text(encoding="ascii").splitlines() if not line.endswith(f"  {name}")]
    with replacing(SUMS) as partial:
        partial.write_text("\n".join([*lines, f"{digest}  {name}"]) + "\n", encoding="ascii")
    _digests.cache_clear()


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    sha256 = hashlib.sha256()
    with file.open("rb") as content:
        while part := content.read(1 << 20):
            sha256.update(part)
    return sha256.hexdigest()
