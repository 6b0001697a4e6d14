"""What is checked before publishing, and what the model card says; tests/test_hub.py uploads."""

import csv
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import yaml

from tests.fresh_process import run_fresh
from tests.test_conversion import NARROW, in_their_names, isqrt_resnet
from timm_gsop.hub import convert, publish, stage
from timm_gsop.hub.hub_folder import check_hub_folder, save_hub_folder
from timm_gsop.layers import SECOND_ORDER_POOLS

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
    repository = yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"]
    assert f"\npip install git+{repository}\n" in card
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


@pytest.mark.parametrize(
    ("pool", "stages"), [*((pool, ()) for pool in ("avg", *SECOND_ORDER_POOLS)), ("avg", (2,)), ("isqrt", (2,))]
)
def test_card_cites_the_papers_of_blocks_and_head(pool, stages, tmp_path):
    kwargs = dict(backbone="test_resnet", num_classes=2, global_pool=pool, gsop_stages=stages)
    save_hub_folder(timm.create_model("second_order", **kwargs), tmp_path / "folder")
    stage(tmp_path / "folder", "me/mine", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    own = inspect.cleandoc(SECOND_ORDER_POOLS[pool].citation) if pool in SECOND_ORDER_POOLS else ""
    assert own.startswith("@") or pool in ("avg", "cov")
    assert own in card
    assert card.count("  title     =") + card.count("  title   =") == (1 if own else 0) + bool(stages or not own)
    assert ("gao2019global" in card) == bool(stages or not own)


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
    """With what the Hub's client leaves beside it."""
    stage(folder, "me/mine", tmp_path / "staged", FIGURE)
    (tmp_path / "staged/.gitattributes").write_text("*.safetensors filter=lfs")
    (tmp_path / "staged/.cache/huggingface/download").mkdir(parents=True)
    stage(tmp_path / "staged", "me/other", tmp_path / "again", FIGURE)
    assert "# other" in (tmp_path / "again/README.md").read_text()
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        *("README.md", "architecture.png", "config.json", "model.safetensors")
    }
    check_hub_folder(tmp_path / "staged")


def test_card_of_a_converted_network(tmp_path):
    """It says what the network was built upon, and that its blocks are neutral until they are trained."""
    torch.save(in_their_names(isqrt_resnet()), tmp_path / "mpncov.pth")
    given = dict(NARROW, cov_dim=8)
    model = convert("fast-mpn-cov", str(tmp_path / "mpncov.pth"), tmp_path / "folder", "gsop_resnet50_net2", given)
    stage(tmp_path / "folder", "me/mine", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    assert (
        "Built upon a checkpoint of fast MPN-COV (iSQRT-COV), mpncov.pth, with GSoP blocks that are untrained." in card
    )
    assert "**Origin**: <https://github.com/jiangtaoxie/fast-MPN-COV>" in card
    assert "**Blocks**: 3 are untrained and neutral (`layer1.3.gsop`, `layer2.4.gsop`, `layer3.6.gsop`)" in card
    torch.nn.init.normal_(model.layer2[-1].gsop.excitation.expand_conv.weight)
    save_hub_folder(model, tmp_path / "tuned")
    stage(tmp_path / "tuned", "me/tuned", tmp_path / "staged-tuned")
    assert "2 are untrained and neutral" in (tmp_path / "staged-tuned/README.md").read_text()


def test_card_links_the_base(folder, tmp_path):
    cfg = timm.get_pretrained_cfg("gsop_resnet50_net1.a1_in1k")
    save_hub_folder(small(), tmp_path / "converted", provenance=cfg)
    stage(tmp_path / "converted", "me/mine", tmp_path / "staged")
    card = (tmp_path / "staged/README.md").read_text()
    assert header_of(card)["base_model"] == "timm/resnet50.a1_in1k"
    assert "<https://huggingface.co/timm/resnet50.a1_in1k>" in card
    assert "last_stride=2 gives the function of timm's network" in card


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
    elif kind == "pool":  # which loading adapts, leaving the head out
        edit(folder, model_args={**config["model_args"], "isqrt_dim": 5})
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
        ("arguments", "does not load: ValueError: cov_dim=9 is not accepted .* accepted: cov_dim=8"),
        ("pool", "does not load: model.safetensors and config.json differ in fc.bias"),
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
    command = ["hub/publish.py", folder, "--repo", "me/mine", "--dry-run"]
    done = run_fresh(*command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    upload = tmp_path / "folder-upload"
    assert {path.name for path in upload.iterdir()} == {
        *("README.md", "architecture.png", "config.json", "model.safetensors")
    }
    assert (upload / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    save_hub_folder(small(num_classes=5), tmp_path / "other")
    shutil.rmtree(folder)
    (tmp_path / "other").rename(folder)
    again = run_fresh(*command, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert "**Classes**: 5" in (upload / "README.md").read_text()  # it takes the place of the first
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder-upload"}
    (upload / "notes.txt").touch()  # of the user's own
    refused = run_fresh(*command, cwd=ROOT)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: folder=")
