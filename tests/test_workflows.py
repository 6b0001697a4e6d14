"""GitHub's workflows: they only call make, and run nothing that can change under its name."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

import timm_gsop

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
CHANGELOG = """# Changelog

## Unreleased

- d

## 0.4.0 - unreleased

- c

## 0.2.0 - 2026-11-24

### Added

- b

## 0.1.0

- a
"""


def load_release_notes():
    spec = importlib.util.spec_from_file_location("release_notes", ROOT / ".github/release_notes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.release_notes


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_every_step_is_a_make_target_or_a_pinned_action(path):
    text = path.read_text()
    jobs = yaml.safe_load(text)["jobs"]
    for job in jobs.values():
        assert "timeout-minutes" in job
        matrix = job.get("strategy", {}).get("matrix", {})
        targets = [entry["target"] for entry in matrix.get("include", ())]
        for step in job["steps"]:
            if "run" in step:
                command, target = step["run"].split(maxsplit=1)
                assert command == "make"
                assert {target} <= TARGETS if "matrix" not in target else targets and set(targets) <= TARGETS
            else:
                assert re.search(rf"uses: {re.escape(step['uses'])} # v\d+\.\d+\.\d+$", text, re.MULTILINE)
                assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"])


def test_rights_are_the_least():
    for path in WORKFLOWS:
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"}
    publish = yaml.safe_load((ROOT / ".github/workflows/release.yml").read_text())["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"


def test_the_citation_has_the_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == timm_gsop.__version__


def test_release_notes_are_the_section_of_the_version():
    release_notes = load_release_notes()
    assert release_notes("v0.2.0", CHANGELOG, "0.2.0") == "### Added\n\n- b\n"
    assert release_notes("v0.1.0", CHANGELOG, "0.1.0") == "- a\n"


@pytest.mark.parametrize(
    ("tag", "version", "message"),
    [
        ("v0.2.1", "0.2.0", "must be 'v0.2.0'"),
        ("0.2.0", "0.2.0", "must be 'v0.2.0'"),
        ("v0.3.0", "0.3.0", "no section '## 0.3.0'"),
        ("v0.4.0", "0.4.0", "calls 0.4.0 unreleased"),
    ],
)
def test_no_release_without_its_notes(tag, version, message):
    with pytest.raises(ValueError, match=message):
        load_release_notes()(tag, CHANGELOG, version)
