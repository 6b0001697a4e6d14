"""Take a release's section out of CHANGELOG.md: python .github/release_notes.py v0.2.0 writes .cache/release_notes.md.

It fails unless the tag is the package's version, and the changelog has a section for it that says something.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def release_notes(tag: str, changelog: str, version: str) -> str:
    """Return the section of a version.

    Args:
        tag: ``"v"`` and the version.
        changelog: The whole file, with a heading ``## VERSION`` for each release.
        version: The package's.

    Raises:
        ValueError: If the tag is another one, or there is no such section, or it is empty or called unreleased.
    """
    if tag != f"v{version}":
        raise ValueError(
            f"tag={tag!r} is not accepted; the package's version is {version}, so it must be 'v{version}'."
        )
    heading = rf"^## \[?{re.escape(version)}\]?([^\n]*)\n"
    section = re.search(rf"{heading}(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if not section or not section[2].strip():
        raise ValueError(f"CHANGELOG.md has no section '## {version}' with something in it.")
    if "unreleased" in section[1].lower():
        raise ValueError(f"CHANGELOG.md calls {version} unreleased; put the date there.")
    return section[2].strip() + "\n"


def main() -> None:
    """The command line."""
    init = (ROOT / "timm_gsop/__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', init, re.MULTILINE)
    try:
        notes = release_notes(
            "".join(sys.argv[1:]), (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version[1] if version else ""
        )
    except ValueError as error:
        sys.exit(str(error))
    out = ROOT / ".cache/release_notes.md"
    out.parent.mkdir(exist_ok=True)
    out.write_text(notes, encoding="utf-8")
    print(notes)


if __name__ == "__main__":
    main()
