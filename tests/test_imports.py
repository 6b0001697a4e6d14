"""The house rules of imports: downwards only, and of timm only what it makes public."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "timm_gsop").rglob("*.py"))

# Each part of the package, and the parts that it may import.
ALLOWED = {
    "__init__": {"insert", "layers", "models"},
    "__main__": {"__version__", "layers", "pretrained"},
    "attach": {"layers"},
    "checks": set(),
    "complete_file": set(),
    "data": {"checks"},
    "hub": {"checks", "complete_file", "hub", "layers", "models", "pretrained", "viz"},
    "insert": {"attach", "checks", "layers"},
    "layers": {"checks", "layers"},
    "models": {"attach", "checks", "insert", "layers", "models", "pretrained"},
    "pretrained": {"checks", "complete_file", "layers", "pretrained"},
    "probe": {"checks", "complete_file", "hub", "layers", "models", "probe", "viz"},
    "viz": {"complete_file", "insert", "layers", "viz"},
}


def imports(path: Path) -> set[str]:
    """Modules and names that a file imports, wherever it does, as dotted paths."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downwards(path):
    part = path.relative_to(ROOT / "timm_gsop").parts[0].removesuffix(".py")
    imported = {name.split(".")[1] for name in imports(path) if name.startswith("timm_gsop.")}
    assert imported <= ALLOWED[part]
    assert not any(name.startswith("timm_gsop_autoload") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_of_timm_only_what_is_public(path):
    of_timm = {name for name in imports(path) if name.split(".")[0] == "timm"}
    assert not any(part.startswith("_") for name in of_timm for part in name.split("."))
    if "layers" in path.parts:
        assert all(name.startswith("timm.layers.") for name in of_timm)


def test_module_names_of_models_are_not_timms():
    """timm's registry goes by the last part of a module's name."""
    import timm.models

    theirs = {path.stem for path in Path(timm.models.__file__).parent.glob("*.py")} - {"__init__"}
    assert not theirs & {path.stem for path in (ROOT / "timm_gsop/models").glob("*.py")}
