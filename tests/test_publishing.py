"""What is checked before publishing, and what the model card says; tests/test_hub.py uploads."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

from tests.test_conversion import NARROW
from timm_gsop.hub import publish, stage
from timm_gsop.hub.hub_folder import check_hub_folder, save_hub_folder

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs/figures/architecture.png"


def small(**kwargs) -> torch.nn.Module:
    return timm.create_model(
        "gsop_resnet50_net2", **{**NARROW, "cov_dim": 8, "isqrt_dim": 6, "num_classes": 7, **kwargs}
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    save_hub_folder(small(), tmp_path / "folder")
    return tmp_path / "folder"


def header_of(card: str) -> dict:
    return yaml.safe_load(card.split("---")[1])


def edit(folder: Path, **entries) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_card_of_weights_of_known_origin(tmp_path):
    cfg = timm.get_pretrained_cfg("gsop_resnet50_net2.isqrt_in1k")
    save_hub_folder(small(num_classes=1000), tmp_path / "folder", provenance=cfg)
    stage(tmp_path / "folder", "timm-gsop/gsop_resnet50_net2.isqrt_in1k", tmp_path / "staged", FIGURE)
    card = (tmp_path / "staged/README.md").read_text()
    assert header_of(card) == {
        "license": "mit",
        "library_name": "timm",
        "pipeline_tag": "image-classification",
        "datasets": ["ILSVRC/imagenet-1k"],
        "tags": ["image-classification", "timm", "timm-gsop", "second-order-pooling"],
    }
    assert "![Architecture](architecture.png)" in card
    assert "**reported**: top-1 / top-5 error 21.71 / 6.13 %" in card
    assert "**measured**" not in card
    assert "https://github.com/jiangtaoxie/fast-MPN-COV" in card
    assert 'timm.create_model("hf-hub:timm-gsop/gsop_resnet50_net2.isqrt_in1k", pretrained=True)' in card
    assert "features_only=True" in card
    assert "pip install timm-gsop" in card
    assert "gao2019global" in card
    assert "li2018towards" in card
    assert {path.name for path in (tmp_path / "staged").iterdir()} == {
        *("README.md", "architecture.png", "config.json", "model.safetensors")
    }


def test_card_of_ones_own_training(folder, tmp_path):
    """The recipe and figures that timm's train.py leaves; nothing of the origin of the name's default weights."""
    recipe = dict(dataset="torch/cifar100", epochs=110, lr=0.25, opt="sgd", mixup=0.0, drop=0.5, amp=False)
    (folder / "args.yaml").write_text(yaml.safe_dump(recipe))
    with (folder / "summary.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "train_loss", "eval_top1"])
        writer.writeheader()
        writer.writerows(dict(epoch=i, train_loss=1, eval_top1=top1) for i, top1 in enumerate((70.5, 79.25, 79.0)))
    stage(folder, "me/mine", tmp_path / "staged", license="cc-by-4.0")
    card = (tmp_path / "staged/README.md").read_text()
    assert header_of(card)["license"] == "cc-by-4.0"
    shown = "`dataset: torch/cifar100`, `epochs: 110`, `opt: sgd`, `lr: 0.25`, `drop: 0.5`"
    assert f"timm's `train.py -c args.yaml`: {shown}\n" in card
    assert "**measured**: top-1 79.00 % after epoch 2, the last, " in card
    assert "**measured**: top-1 79.25 % after epoch 1, the best, " in card
    assert "reported" not in card
    assert "fast-MPN-COV" not in card
    assert (tmp_path / "staged/args.yaml").exists()


@pytest.mark.parametrize("name", ["args.yaml", "summary.csv"])
def test_other_files_by_these_names_are_refused(name, folder, tmp_path):
    (folder / name).write_text("hello")
    with pytest.raises(ValueError, match=f"{name} (cannot be read|is not|has no)"):
        stage(folder, "me/mine", tmp_path / "staged")
    assert not (tmp_path / "staged").exists()


def test_card_measures_cost(folder, tmp_path):
    """As benchmarks.cost does."""
    from benchmarks.cost import measure

    stage(folder, "me/mine", tmp_path / "staged")
    cost = measure("gsop_resnet50_net2", **NARROW, cov_dim=8, isqrt_dim=6, num_classes=7)
    card = (tmp_path / "staged/README.md").read_text()
    assert f"{cost.params / 1e6:.2f} M (measured)" in card
    assert f"{cost.macs / 1e9:.2f} G for one image of 3×224×224 (measured" in card
    assert "**Licence**: not stated" in card


def test_what_was_downloaded_can_be_published_again(folder, tmp_path):
    stage(folder, "me/mine", tmp_path / "staged", FIGURE)
    stage(tmp_path / "staged", "me/other", tmp_path / "again", FIGURE)
    assert "# other" in (tmp_path / "again/README.md").read_text()


def spoil(kind: str, folder: Path) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if kind == "no weights":
        (folder / "model.safetensors").unlink()
    elif kind == "pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    elif kind == "unknown file":
        (folder / "notes.txt").touch()
    elif kind == "no json":
        (folder / "config.json").write_text("{")
    elif kind == "no architecture":
        (folder / "config.json").write_text("{}")
    elif kind == "stranger":
        edit(folder, architecture="resnet50")
    elif kind == "missing weight":
        weights.pop("fc.weight")
    elif kind == "shape":
        weights["fc.bias"] = torch.zeros(6)
    elif kind == "nan":
        weights["fc.bias"][0] = float("nan")
    elif kind == "truncated":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    elif kind == "classes":
        edit(folder, num_classes=6)
    elif kind == "label names":
        edit(folder, label_names=["a", "b"])
    elif kind == "same label":
        edit(folder, label_names=["a"] * 7)
    elif kind == "label descriptions":
        edit(folder, label_names=list("abcdefg"), label_descriptions={"h": "a stranger"})
    elif kind == "arguments":
        edit(folder, model_args={**config["model_args"], "cov_dim": 9})
    if kind in ("missing weight", "shape", "nan"):
        safetensors.torch.save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no weights", "has no model.safetensors"),
        ("pickle", "has pytorch_model.bin; accepted: .* and no pickles"),
        ("unknown file", "has notes.txt; accepted: "),
        ("no json", "config.json cannot be read: JSONDecodeError"),
        ("no architecture", "config.json cannot be read: KeyError"),
        ("stranger", "architecture='resnet50' in config.json is none of timm-gsop's"),
        ("missing weight", "does not load: .*fc.weight"),
        ("shape", "does not load: .*fc.bias"),
        ("nan", "not finite: fc.bias"),
        ("truncated", "does not load: SafetensorError"),
        ("classes", "does not load: .*fc"),
        ("label names", "label_names in config.json are 2 different ones; accepted: 7"),
        ("same label", "label_names in config.json are 1 different ones; accepted: 7"),
        ("label descriptions", "label_descriptions in config.json has 'h'"),
        ("arguments", "does not load: .*size mismatch"),
    ],
)
def test_an_unsound_folder_is_refused(kind, message, folder, tmp_path):
    spoil(kind, folder)
    with pytest.raises(ValueError, match=message):
        check_hub_folder(folder)
    with pytest.raises(ValueError, match=message):
        stage(folder, "me/mine", tmp_path / "staged", FIGURE)
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize("repo_id", ["gsop", "a/b/c", "me/", "me/what is this"])
def test_bad_repositories_are_named(repo_id, folder, tmp_path):
    with pytest.raises(ValueError, match=f"repo_id={repo_id!r} is not accepted"):
        stage(folder, repo_id, tmp_path / "staged")
    with pytest.raises(ValueError, match=f"repo_id={repo_id!r} is not accepted"):
        publish(folder, repo_id)


def test_a_full_disk_is_one_line(folder, tmp_path):
    """A process that may write no file of more than 100 kB."""
    import resource

    command = [sys.executable, "hub/publish.py", str(folder), "--repo", "me/mine", "--dry-run"]
    limit = dict(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **limit)
    assert done.returncode == 1
    assert done.stderr.startswith("error: [Errno 27] File too large")
    assert len(done.stderr.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}


def test_dry_run(folder, tmp_path):
    command = [sys.executable, "hub/publish.py", str(folder), "--repo", "me/mine", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    upload = tmp_path / "folder-upload"
    assert {path.name for path in upload.iterdir()} == {
        *("README.md", "architecture.png", "config.json", "model.safetensors")
    }
    assert (upload / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: folder=")
