"""The documentation site: make docs. Pages are Markdown that GitHub shows too; the API comes from the docstrings."""

import importlib
import os
import pkgutil
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import timm_gsop

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = "https://github.com/timm-gsop/timm-gsop/blob/main"

project = "timm-gsop"
author = "The timm-gsop authors"
project_copyright = author
release = timm_gsop.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["figures"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# Every cross-reference must lead somewhere, except to libraries: their inventories are on the network.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|timm|matplotlib|PIL|huggingface_hub|collections|pathlib|argparse|typing)\..*"),
    ("py:.*", r"(Figure|Image|Path|Any|Sequence|Mapping|optional|Tensor|module|Module)"),
    ("py:.*", r"timm_gsop\.layers\.second_order_pool\.Pool"),  # a variable of types
]

highlight_language = "text"
html_theme = "furo"
html_title = f"timm-gsop {release}"
html_copy_source = False
copybutton_exclude = ".linenos, .gp, .go"


def resolve_links(text: str, folder: Path) -> str:
    """Links of a page in ``folder``: to other pages relative to docs/, to the rest of the repository on GitHub."""

    def resolve(match: re.Match[str]) -> str:
        target, hash_, anchor = match[1].partition("#")
        path = Path(os.path.normpath(folder / target))
        if not path.exists():
            return match[0]  # Sphinx says so
        inside = path.is_relative_to(ROOT / "docs") and path.suffix != ".py"
        there = os.path.relpath(path, ROOT / "docs") if inside else f"{REPOSITORY}/{path.relative_to(ROOT)}"
        return f"]({there}{hash_}{anchor})"

    return re.sub(r"\]\((?!https?:|#)([^)\s]+)\)", resolve, text)


def find_by_last_name(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """A docstring names a neighbour by its last name: the public one of that name, or, if it is private, plain text."""
    name = node["reftarget"].rpartition(".")[2]
    found = [item for item in env.domains.python_domain.objects.items() if item[0].rpartition(".")[2] == name]
    if len(found) == 1:
        ((target, entry),) = found
        return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, target)
    modules = [
        info.name for info in pkgutil.walk_packages(timm_gsop.__path__, "timm_gsop.") if "__main__" not in info.name
    ]
    private = any(callable(getattr(importlib.import_module(module), name, None)) for module in modules)
    return content if private else None


def setup(app: Sphinx) -> None:
    """Resolve links and references. README is the first page; docs/index.md only has the navigation."""

    def read(app: Sphinx, name: str, source: list[str]) -> None:
        source[0] = resolve_links(source[0], ROOT / "docs")
        if name == "index":
            source[0] = resolve_links((ROOT / "README.md").read_text(encoding="utf-8"), ROOT) + source[0]

    app.connect("source-read", read)
    app.connect("missing-reference", find_by_last_name)
