"""What the README shows, runs."""

import re
import shlex
from pathlib import Path

import pytest
import timm
import timm.data
import timm.optim
import torch

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_python_examples(tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(examples) >= 4
    monkeypatch.chdir(tmp_path)  # with the folder that make quickstart leaves
    model = timm.create_model("gsop_preresnet20_net2.untrained", num_classes=10, in_chans=1)
    timm.models.save_for_hf(model, "output/quickstart/model", safe_serialization=True)
    names: dict[str, object] = {}
    for example in examples:
        exec(example, names)


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="PyTorch's exporters are older than these ways to ask")
def test_examples_of_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), flags=re.DOTALL):
        exec(example, names)
    assert names["logits"].shape == (5, 10)


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    texts = README + (ROOT / "CONTRIBUTING.md").read_text()
    shown = {shlex.split(command)[1] for command in re.findall(r"\bmake [\w-]+", texts)}
    assert {"quickstart", "test"} <= shown <= set(targets)
