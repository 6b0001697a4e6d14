"""timm's source release, of the installed version: its wheel does not have its test-suite.

``python -m tests.timm_source`` downloads it with pip, if it is not there yet.
"""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(__file__).parents[1] / ".cache"


def timm_source() -> Path:
    """Folder of the source release."""
    return CACHE / f"timm-{version('timm')}"


def download() -> None:
    target = timm_source()
    if target.exists():
        return
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as tmp:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "timm", "--dest", tmp]
        subprocess.run([*pip, f"timm=={version('timm')}"], check=True)
        (archive,) = Path(tmp).glob("timm-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(tmp, filter="data")
        (Path(tmp) / target.name).rename(target)


if __name__ == "__main__":
    download()
