"""Every file in train_configs: it says what the table says, train.py knows its options, and a step with it can be made.

With TIMM_SCRIPTS=DIR, a folder that has timm's train.py, its own parser reads them; else a list of its options does.
"""

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.models.resnet import ResNet
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

from train_configs.recipes import FOLDER, RUNS, text

OPTIONS = Path(__file__).parent / "data/train_options.yaml"


@pytest.fixture(scope="session")
def defaults() -> dict[str, Any]:
    """train.py's options and their defaults."""
    if folder := os.environ.get("TIMM_SCRIPTS"):
        spec = importlib.util.spec_from_file_location("timm_train", Path(folder) / "train.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules["timm_train"] = module
        spec.loader.exec_module(module)
        return vars(module.parser.parse_args([]))
    return yaml.safe_load(OPTIONS.read_text())


def settings_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def test_files_are_those_of_the_table():
    assert {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")} == set(RUNS)
    assert len(RUNS) == 59


@pytest.mark.parametrize("name", RUNS)
def test_a_file_says_what_the_table_says(name):
    content = (FOLDER / f"{name}.yaml").read_text()
    assert content == text(RUNS[name])
    assert settings_of(name) == RUNS[name].settings
    assert content.startswith("# ")
    assert settings_of(name)["device_modules"] == ["timm_gsop"]


def test_every_row_of_table_4_has_its_file():
    """A part is rows × networks; the figures stand in the comments, and differ from file to file."""
    rows = {name: run for name, run in RUNS.items() if name.startswith("imagenet_250/")}
    figures = [re.search(r"Table 4: ([\d.]+ / [\d.]+) %", run.comment).group(1) for run in rows.values()]
    assert len(figures) == len(set(figures)) == 24
    for net in (1, 2):
        for cov_dim in (64, 128, 256):
            assert settings_of(f"imagenet_250/net{net}_channel{cov_dim}")["model_kwargs"] == dict(cov_dim=cov_dim)
        for size in (36, 64, 144):
            kwargs = settings_of(f"imagenet_250/net{net}_position{size}")["model_kwargs"]
            assert kwargs == dict(gsop_type="position", spatial_size=int(size**0.5))
        for kind in ("avg", "max", "concat"):
            assert settings_of(f"imagenet_250/net{net}_{kind}")["model_kwargs"] == dict(gsop_type=kind)
    for stage in (2, 3, 4, 5):  # conv2_x is layer1
        assert settings_of(f"imagenet_250/net1_s{stage}")["model_kwargs"] == dict(gsop_layers=[stage - 1])


@pytest.mark.parametrize("name", RUNS)
def test_the_readme_leads_to_it(name):
    """Beside the link, the reported error that the file states."""
    readme = (FOLDER / "README.md").read_text()
    assert f"({name}.yaml)" in readme
    if reported := re.search(r"reported by the paper, Table \d: ([\d. /]+) %", RUNS[name].comment):
        line = next(line for line in readme.splitlines() if f"({name}.yaml)" in line)
        assert f"({name}.yaml) | {reported.group(1)} |" in line


@pytest.mark.parametrize("name", RUNS)
def test_train_py_knows_the_options(name, defaults):
    assert set(settings_of(name)) <= set(defaults)


@pytest.mark.parametrize("name", RUNS)
def test_a_step(name, defaults):
    """Network, optimizer and scheduler by timm's factories; large networks narrow, and on small images."""
    settings = settings_of(name)
    args = argparse.Namespace(**{**defaults, **settings})
    channels = args.input_size[0]
    small = "preresnet" in args.model
    size = min(args.input_size[-1], 48 if "preresnet164" in args.model or not small else 32)
    narrow = {} if small else dict(channels=(16, 16, 32, 32))
    if settings.get("model_kwargs", {}).get("flavor") == "official":
        narrow = dict(channels=(64, 64, 64, 64))
    model = timm.create_model(  # the arguments that train.py passes
        args.model,
        in_chans=channels,
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
        **narrow,
        **args.model_kwargs,
    ).train()
    assert isinstance(model, ResNet) or small
    if (small and args.model.endswith("_net2")) or args.gp == "isqrt":
        assert model.drop_rate == 0.5  # train.py's own default would turn it off
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=10)
    assert epochs == args.epochs
    x, target = torch.randn(2, channels, size, size), torch.tensor([1, 2])
    loss_fn = torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing)
    if args.mixup or args.cutmix:
        mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes)
        x, target = mixup(x, target)
    if args.bce_loss:
        loss_fn = BinaryCrossEntropy(smoothing=args.smoothing, target_threshold=args.bce_target_thresh)
    scheduler.step(args.warmup_epochs)
    scheduler.step_update(args.warmup_epochs * 10)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert max(rates) <= args.lr * (1 + 1e-9)
    before = {key: value.clone() for key, value in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=args.amp):
        logits = model(x)
    loss = loss_fn(logits.float(), target)
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    assert logits.shape == (2, args.num_classes)
    changed = [key for key, value in model.named_parameters() if not torch.equal(value, before[key])]
    assert len(changed) > len(before) / 2
    assert all(value.isfinite().all() for value in model.parameters())


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("imagenet", "cifar"))])
def test_the_learning_rate_falls_where_the_paper_says(name, defaults):
    args = argparse.Namespace(**{**defaults, **settings_of(name)})
    if args.sched == "cosine":
        return
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    falls = [i for i in range(1, epochs) if rates[i] < rates[i - 1]]
    released = {"gsop_resnet50_net2": [30, 45, 60], "gsop_resnet101_net2": [30, 45, 60]}
    if name.startswith("cifar"):
        assert falls == [60, 90]
        assert rates[-1] == pytest.approx(0.0025)
    else:
        assert falls == (released.get(args.model, [30, 60, 90]) if "/released/" in name else [30, 60, 90])
        assert rates[0] == 0.1
