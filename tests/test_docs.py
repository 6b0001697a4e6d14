"""What README and docs show: examples run, commands and links exist, figures are those of the kept results."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import timm
import yaml

import timm_gsop
from tests.fresh_process import run_fresh
from tests.test_probe import paint
from tests.versions import BEFORE_TORCH_2_6
from timm_gsop.pretrained.sources import SOURCES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "hub/README.md", ROOT / "train_configs/README.md"]
README = PAGES[0].read_text(encoding="utf-8")
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# In place of what would be downloaded, and of what would take long.
SMALL_PROBE = 'pretrained=False, img_size=32, levels=[-2], heads=["isqrt"], isqrt_dim=8, epochs=1, splits=1, '
SMALL_PROBE += 'cache="maps"'

# Writes the usage of commands, in one process: they import the same libraries.
USAGES = """
import contextlib, io, json, os, runpy, sys
os.chdir(ROOT)
usages = {}
for command in COMMANDS:
    module, *words = command.split()
    sys.argv = [module, *words, "--help"]
    out = io.StringIO()
    run = runpy.run_path if module.endswith(".py") else runpy.run_module
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        run(module, run_name="__main__")
    usages[command] = out.getvalue()
with open(RESULT, "w") as file:
    json.dump(usages, file)
"""


def run_program(folder: Path, code: str) -> str:
    """Run a program in a folder; its output, warnings first, if it succeeds."""
    program = folder / "program.py"
    program.write_text(code, encoding="utf-8")
    done = run_fresh(program, env=ENV, cwd=folder)
    output = done.stderr + done.stdout
    assert done.returncode == 0, output[-3000:]
    return output


def fences(page: Path, *languages: str) -> list[tuple[str, str]]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [(info, text) for info, text in found if info.partition(" ")[0] in languages]


def commands(page: Path) -> list[list[str]]:
    """Words of every command line that a page shows."""
    lines = "\n".join(text for _, text in fences(page, "")).replace("\\\n", " ").splitlines()
    plain = [line.removeprefix("$ ") for line in lines if line.count('"') % 2 == 0 and line.count("'") % 2 == 0]
    return [words for line in plain if (words := shlex.split(line, comments=True))]


def python_commands(page: Path) -> list[list[str]]:
    """What follows ``python``: a script or a module, and its arguments."""
    shown = []
    for words in commands(page):
        for launcher in ("python", "torchrun"):
            if launcher in words:
                rest = words[words.index(launcher) + 1 :]
                shown.append(
                    rest if launcher == "python" else rest[next(i for i, w in enumerate(rest) if w[0] != "-") :]
                )
    return [words for words in shown if words[0] != "-c"]


@pytest.mark.parametrize("page", [p for p in PAGES if fences(p, "python")], ids=lambda p: p.name)
def test_python_examples_run_as_pasted(page, tmp_path):
    """In order, in a process of their own, in a folder that has only the files of this repository that they name.

    Those marked ``network`` run without their download, those marked ``pictures`` on small generated ones.
    """
    blocks = [
        text.replace("pretrained=True", "pretrained=False") if "network" in info else text
        for info, text in fences(page, "python")
    ]
    if page.name == "deploy.md" and BEFORE_TORCH_2_6:
        pytest.skip("PyTorch's exporters are older than these ways to ask")
    code = "\n".join(blocks)
    if any(info == "python pictures" for info, _ in fences(page, "python")):
        paint(tmp_path / "pictures", 4)
        assert 'probe.run("pictures", "resnet18")' in code
        code = code.replace('"resnet18")', f'"test_resnet", {SMALL_PROBE})')
    for name in re.findall(r'"((?:docs|examples)/[^"]+)"', code):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    output = run_program(tmp_path, code)
    if page.name == "README.md":
        assert "By validation" in output
        assert "cat" in output.splitlines()


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    shown = {
        target for page in GUIDES for target in re.findall(r"(?:^|`)make ([\w-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"quickstart", "test", "docs"} <= shown <= set(targets)


def test_shown_commands_have_their_options(tmp_path):
    """Our own commands' options are in their usage, those of timm's train.py in the list of its options."""
    train_options = set(yaml.safe_load((ROOT / "tests/data/train_options.yaml").read_text()))
    ours: dict[str, set[str]] = {}
    for page in GUIDES:
        for script, *words in python_commands(page):
            options = {word.partition("=")[0].strip("[]") for word in words if word.strip("[").startswith("--")}
            if script == "-m":
                command = " ".join(words[: 1 + (words[1:2] == ["curves"])])
            elif Path(script).name == "train.py":
                assert {option[2:].replace("-", "_") for option in options} <= train_options, page.name
                continue
            elif Path(script).name in ("validate.py", "inference.py", "onnx_export.py"):  # timm's, not at hand
                continue
            else:
                assert (ROOT / script).is_file(), f"{page.name}: {script}"
                command = script
            ours.setdefault(command, set()).update(options)
    assert "timm_gsop.viz curves" in ours
    assert "hub/publish.py" in ours
    if BEFORE_TORCH_2_6:  # which today's torchao needs
        del ours["examples/quantize_int8.py"]
    result = tmp_path / "usages.json"
    run_program(tmp_path, f"ROOT, COMMANDS, RESULT = {str(ROOT)!r}, {list(ours)!r}, {str(result)!r}\n{USAGES}")
    for command, usage in json.loads(result.read_text()).items():
        assert usage.startswith("usage: "), command  # or it did its work, in our checkout
        assert ours[command] <= set(re.findall(r"--[\w-]+", usage)), f"{command}: {usage}"


def test_times_beside_resnet50_are_those_measured():
    rows = json.loads((ROOT / "benchmarks/results/performance/networks.json").read_text())["rows"]
    seconds = {row["way"]: {name: timing["seconds"] for name, timing in row["alternatives"].items()} for row in rows}
    names = {
        "the twin": "twin",
        **{f"`{n}`": n for n in ("isqrt_resnet50", "gsop_resnet50_net1", "gsop_resnet50_net2")},
    }
    for label, name in names.items():
        times = [f"{seconds[way][name] / seconds[way]['resnet50']:.2f}×" for way in ("inference", "training")]
        row = next(line for line in README.splitlines() if line.startswith(f"| {label} |"))
        assert [cell.strip() for cell in row.split("|")[4:6]] == times


def test_released_weights_are_those_that_the_package_knows():
    """What is downloaded by default has a licence; nothing is said to have been loaded."""
    page = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if "drive.google" in line]
    assert len(rows) == len({row[4] for row in rows}) == 29
    assert {row[7] for row in rows} == {"no"}
    assert {row[3] for row in rows} == {"MIT", "Apache-2.0", "none stated"}
    by_page = {re.findall(r"\[Drive\]\((\S+)\)", row[4])[0]: row for row in rows}
    for source in SOURCES:
        row = by_page[source.page]
        assert row[1] == (source.error or "not stated")
        assert row[3].lower() == source.license
        assert source.repository in row[2]
        assert source.url is None or source.url in row[4]
        cfg = timm.get_pretrained_cfg(source.model)
        assert source.url is None or (cfg.url == source.url and f" {source.error} %" in " ".join(cfg.notes))


def test_the_reference_has_every_public_name():
    reference = (ROOT / "docs/api.rst").read_text()
    names = set(timm_gsop.__all__) - {"__version__", "models"}
    assert {name for name in names if name not in reference} == set()
    assert names - {"insert_gsop"} <= set(timm_gsop.layers.__all__)
