"""Registration without an import, each case in a process of its own."""

import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CREATE = "import timm; timm.create_model('gsop_preresnet20_net2')"
IS_REGISTERED = "import timm; print(timm.is_model('gsop_preresnet20_net2'))"


def run(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *args, "-c", code]
    # Not from the repository's root, where Python would find the package before any other copy of it.
    return subprocess.run(
        command, env={**os.environ, **env}, cwd=ROOT.anchor, capture_output=True, text=True, timeout=120
    )


def succeed(code: str, *args: str, **env: str) -> str:
    result = run(code, *args, **env)
    assert result.returncode == 0, result.stderr
    assert "timm-gsop" not in result.stderr
    return result.stdout.strip()


def test_the_package_is_installed_with_its_entry_point():
    (entry_point,) = entry_points(group="torch.backends", name="timm_gsop")
    assert entry_point.value == "timm_gsop_autoload:register_when_timm_is_imported"


ORDERS = ("import timm", "import timm_gsop", "import timm.layers", "from timm.models import resnet")
MORE_ORDERS = (
    *("import torch, timm", "import timm, torch", "import timm_gsop, timm", "import timm, timm_gsop"),
    *("import timm.models", "import torch, timm_gsop", "import timm_gsop.layers.covariance"),
    "from timm_gsop.models.gsop_resnet import GsopResNet",
)


@pytest.mark.parametrize("imports", [*ORDERS, *(pytest.param(order, marks=pytest.mark.slow) for order in MORE_ORDERS)])
def test_every_import_order(imports):
    succeed(f"{imports}\n{CREATE}", "-W", "error::RuntimeWarning:timm_gsop_autoload")


def test_importing_torch_alone_imports_neither_timm_nor_us():
    loaded = succeed("import sys, torch; print([m for m in sys.modules if m.split('.')[0] in ('timm', 'timm_gsop')])")
    assert loaded == "[]"


@pytest.mark.parametrize("variable", ["TORCH_DEVICE_BACKEND_AUTOLOAD", "TIMM_GSOP_AUTOLOAD"])
def test_autoload_can_be_turned_off(variable):
    """And ``import timm_gsop`` still registers."""
    assert succeed(f"{IS_REGISTERED}\nimport timm_gsop\n{CREATE}", **{variable: "0"}) == "False"


def broken_copy(folder: Path, broken_file: str, fault: str) -> dict[str, str]:
    """Environment in which a copy of our package with a fault in it comes before the installed one."""
    shutil.copytree(ROOT / "timm_gsop", folder / "timm_gsop", dirs_exist_ok=True)
    (folder / broken_file).parent.mkdir(parents=True, exist_ok=True)
    (folder / broken_file).write_text(fault)
    return {"PYTHONPATH": str(folder)}


FAULTS = [
    ("timm_gsop/__init__.py", "raise OSError('broken on purpose')"),
    ("timm_gsop/__init__.py", "this is 'broken on purpose'"),
    ("timm_gsop/models/gsop_resnet.py", "import broken_on_purpose"),
    ("wrapt/__init__.py", "raise OSError('broken on purpose')"),
]


@pytest.mark.parametrize(("broken_file", "fault"), FAULTS)
def test_our_faults_are_a_warning_that_names_the_cause(tmp_path, broken_file, fault):
    result = run("import torch, timm; print(timm.is_model('resnet50'))", **broken_copy(tmp_path, broken_file, fault))
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True"
    assert "RuntimeWarning: timm-gsop could not register its models with timm: " in result.stderr
    assert "broken" in result.stderr


@pytest.mark.parametrize(("broken_file", "fault"), [FAULTS[0], FAULTS[-1]])
def test_our_faults_do_not_break_torch_where_warnings_are_errors(tmp_path, broken_file, fault):
    env = broken_copy(tmp_path, broken_file, fault)
    result = run("import torch, timm; print(torch.ones(1).item())", "-W", "error::RuntimeWarning", **env)
    assert result.returncode == 0, result.stderr
    assert "timm-gsop could not register" in result.stderr


@pytest.mark.parametrize("fault", ["raise ModuleNotFoundError(\"No module named 'timm'\")", "import half_installed"])
def test_torch_imports_where_timm_is_missing_or_half_installed(tmp_path, fault):
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm/__init__.py").write_text(fault)
    assert succeed("import torch; print(torch.ones(1).item())", PYTHONPATH=str(tmp_path)) == "1.0"
    result = run("import timm_gsop", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert fault.split()[-1].strip("\"')") in result.stderr


def test_the_cost_at_import_of_torch():
    """Under 20 ms: what the entry point takes, in processes that have imported torch (median of three)."""
    code = """
import torch, sys, time, importlib.metadata
for name in ("timm_gsop_autoload", *[m for m in sys.modules if m.split(".")[0] == "wrapt"]):
    sys.modules.pop(name, None)
(entry_point,) = importlib.metadata.entry_points(group="torch.backends", name="timm_gsop")
start = time.perf_counter()
entry_point.load()()
print(time.perf_counter() - start)
"""
    seconds = [float(succeed(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")) for _ in range(3)]
    assert statistics.median(seconds) < 0.020


def test_data_loader_workers_under_spawn(tmp_path):
    (tmp_path / "spawned.py").write_text(
        """
import timm
import torch


class IsRegistered(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(timm.is_model("gsop_preresnet20_net2"))


if __name__ == "__main__":
    loader = torch.utils.data.DataLoader(IsRegistered(), num_workers=2, multiprocessing_context="spawn")
    print(all(bool(batch) for batch in loader))
"""
    )
    result = subprocess.run([sys.executable, tmp_path / "spawned.py"], capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "True", result.stderr
    assert "timm-gsop" not in result.stderr
