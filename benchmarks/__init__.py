"""What the networks cost and reach: ``python -m benchmarks.cost``, ``.speed`` and ``.accuracy``, from the root."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def update(page: str, contents: Mapping[str, str]) -> str:
    """Put texts between their markers, ``<!-- name -->`` and ``<!-- end -->``, and return the page."""
    for name, text in contents.items():
        begin, end = f"<!-- {name} -->\n", "<!-- end -->"
        page = re.sub(f"(?s){begin}.*?{end}", lambda _, new=f"{begin}{text}\n{end}": new, page)
    return page
