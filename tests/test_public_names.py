"""What the package offers: a list that is checked in, so that no name comes or goes unnoticed; each has an example."""

import inspect
from pathlib import Path
from types import ModuleType

import pytest
import timm

import timm_gsop
import timm_gsop.hub
import timm_gsop.layers
import timm_gsop.models
import timm_gsop.probe
import timm_gsop.viz

LIST = Path(__file__).parent / "data/public_names.txt"
MODULES = (timm_gsop, timm_gsop.layers, timm_gsop.models, timm_gsop.hub, timm_gsop.probe, timm_gsop.viz)


def public_names() -> list[str]:
    names = [f"{module.__name__}.{name}" for module in MODULES for name in module.__all__]
    models = [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm_gsop.")]
    return sorted(names) + sorted(models)


def test_names_are_those_of_the_list():
    """After a change that is meant: ``python -m tests.test_public_names`` writes the list."""
    assert public_names() == LIST.read_text().split()


@pytest.mark.parametrize("name", timm_gsop.__all__)
def test_what_the_package_exports_has_an_example(name):
    value = getattr(timm_gsop, name)
    if not isinstance(value, ModuleType | str):
        assert ">>>" in (inspect.getdoc(value) or "")


if __name__ == "__main__":
    LIST.write_text("\n".join(public_names()) + "\n")
