"""What an installed wheel must do on its own: ``make dist`` runs this with the Python of a clean environment."""

import subprocess
import sys
import tempfile
from importlib.metadata import distribution
from pathlib import Path

import timm
import torch

FOLDERS = ("timm_gsop", "timm_gsop_autoload.py", "__pycache__", "timm_gsop-")


def check_files() -> None:
    """The package, its weights and its licence; nothing for tests."""
    names = [str(file) for file in distribution("timm-gsop").files or ()]
    assert all(name.startswith(FOLDERS) for name in names), names
    assert not [name for name in names if "test" in name or "golden" in name]
    assert [name for name in names if name.endswith("LICENSE")]
    assert "timm_gsop/py.typed" in names


def check_models() -> None:
    """Registered without an import of ours, with weights, and answering."""
    assert "gsop_resnet50_net2" in timm.list_models()
    for name in timm.list_pretrained("gsop_preresnet20*"):
        with torch.inference_mode():
            logits = timm.create_model(name, pretrained=True).eval()(torch.zeros(1, 3, 32, 32))
        assert logits.shape == (1, 10)
        assert logits.std() > 0.1, "these weights know nothing"


def check_pictures() -> None:
    """The command that draws."""
    import matplotlib.image
    from sklearn.datasets import load_sample_images

    with tempfile.TemporaryDirectory() as folder:
        image, picture = Path(folder, "image.png"), Path(folder, "picture.png")
        matplotlib.image.imsave(image, load_sample_images().images[1])
        command = [sys.executable, "-m", "timm_gsop.viz", "gsop_preresnet20_net1", str(image), str(picture)]
        subprocess.run(command, check=True, cwd=folder)
        assert picture.stat().st_size > 10_000


if __name__ == "__main__":
    assert Path.cwd() / "timm_gsop" not in map(Path, sys.path)
    check_files()
    check_models()
    check_pictures()
    print("the wheel works")
