"""Every file in train_configs: it says what the table says, train.py knows its options, and a step with it can be made.

With TIMM_SCRIPTS=DIR, a folder that has timm's train.py, its own parser reads them; else a list of its options does.
"""

import argparse
import contextlib
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
from PIL import Image
from timm.data import Mixup, create_dataset, create_loader, resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad

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
    assert len(RUNS) == 81


@pytest.mark.parametrize("name", RUNS)
def test_a_file_says_what_the_table_says(name):
    content = (FOLDER / f"{name}.yaml").read_text()
    assert content == text(RUNS[name])
    assert settings_of(name) == RUNS[name].settings
    header = " ".join(line.removeprefix("# ") for line in content.splitlines() if line.startswith("#"))
    assert re.search(r"For (one GPU|eight GPUs)", header)
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


COMPILED = [name for name, run in RUNS.items() if run.settings.get("torchcompile")]


def small_network(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments that make a network cheap, its parts all there."""
    if args.model == "second_order" and args.model_kwargs["backbone"].startswith("vit"):
        return dict(args.model_kwargs, backbone="test_vit", img_size=48)
    if args.model == "second_order":
        return dict(args.model_kwargs, backbone="test_efficientnet")
    if "preresnet" in args.model:
        return dict(args.model_kwargs, depth=2)
    widths = (64, 64, 64, 64) if args.model_kwargs.get("flavor") == "official" else (16, 16, 32, 32)
    return dict(args.model_kwargs, layers=(1, 1, 1, 1), channels=widths)


class Training:
    """What train.py makes of a file: the same calls of timm, in the same order, on one device.

    Args:
        args: The file's options, and train.py's defaults.
        backend: Compiler in place of the file's.
    """

    def __init__(self, args: argparse.Namespace, backend: str | None = None) -> None:
        self.args = args
        model = timm.create_model(
            args.model,
            in_chans=args.input_size[0],
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            global_pool=args.gp,
            **small_network(args),
        )
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        self.task = ClassificationTask(model, criterion=self.loss_fn(), device=torch.device("cpu"), verbose=False)
        self.optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
        if args.model_ema:
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
        if args.torchcompile:
            self.task.compile(backend=backend or args.torchcompile, mode=args.torchcompile_mode)
        kwargs = scheduler_kwargs(args)
        self.scheduler, self.epochs = create_scheduler_v2(self.optimizer, **kwargs, updates_per_epoch=10)
        self.model = model

    @property
    def mixes(self) -> bool:
        return self.args.mixup > 0 or self.args.cutmix > 0

    def loss_fn(self) -> torch.nn.Module:
        args = self.args
        if args.bce_loss:
            smoothing = {} if self.mixes else dict(smoothing=args.smoothing)
            return BinaryCrossEntropy(target_threshold=args.bce_target_thresh, sum_classes=args.bce_sum, **smoothing)
        if self.mixes:
            return SoftTargetCrossEntropy()
        return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else torch.nn.CrossEntropyLoss()

    def step(self, x: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        args = self.args
        self.task.get_trainable_module().train()
        if self.mixes:
            mixup = Mixup(args.mixup, args.cutmix, label_smoothing=args.smoothing, num_classes=args.num_classes)
            x, target = mixup(x, target)
        if args.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        autocast = torch.autocast("cpu", getattr(torch, args.amp_dtype)) if args.amp else contextlib.nullcontext()
        with autocast:
            result = self.task(x, target)
        result["loss"].backward()
        if args.clip_grad is not None:
            dispatch_clip_grad(self.task.get_clip_parameters(), value=args.clip_grad, mode=args.clip_mode)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.task.update_ema(step=1)
        return result


def take_a_step(name: str, defaults: dict[str, Any], backend: str | None = None) -> None:
    """Large networks are narrow and shallow, images small; the options are the file's."""
    torch.compiler.reset()
    args = argparse.Namespace(**{**defaults, **settings_of(name)})
    training = Training(args, backend)
    assert training.epochs == args.epochs + args.cooldown_epochs
    training.scheduler.step(args.warmup_epochs)
    training.scheduler.step_update(args.warmup_epochs * 10)
    assert max(group["lr"] for group in training.optimizer.param_groups) <= args.lr * (1 + 1e-9)
    if "preresnet" in args.model and "isqrt" in (args.gp, training.model.global_pool.pool_type):
        # Though train.py passes a dropout of 0.
        assert training.model.head_drop_rate == args.model_kwargs.get("isqrt_drop", 0.5)
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    size = min(args.input_size[-1], 48)
    result = training.step(torch.randn(2, args.input_size[0], size, size), torch.tensor([1, 2]))
    assert result["loss"].isfinite()
    assert result["output"].shape == (2, args.num_classes)
    parameters = [key for key, _ in training.model.named_parameters()]
    changed = [key for key, value in training.model.state_dict().items() if not torch.equal(value, before[key])]
    if args.layer_decay_no_opt_scale:  # what is frozen keeps its statistics too
        assert {key.partition(".")[0] for key in changed} == {"global_pool", "fc"}
    else:
        assert len(set(changed) & set(parameters)) > len(parameters) / 2
    assert all(value.isfinite().all() for value in training.model.parameters())


def skip_unknown(name: str) -> None:
    if not timm.is_model(RUNS[name].settings["model"]):
        pytest.skip(f"there is no {RUNS[name].settings['model']} yet")


@pytest.mark.parametrize("name", RUNS)
def test_a_step(name, defaults):
    skip_unknown(name)
    take_a_step(name, defaults, backend="aot_eager")


def test_a_frozen_backbone_with_batch_normalization_keeps_its_statistics(defaults):
    args = argparse.Namespace(**{**defaults, **settings_of("heads/moment_vit_frozen")})
    backbone = dict(backbone="resnet18", channels=(8, 8, 16, 16))
    model = timm.create_model("second_order", global_pool=args.gp, num_classes=1000, **backbone)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.partition(".")[0] for key in changed} == {"global_pool", "fc"}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_step_with_the_files_own_compiler(name, defaults):
    take_a_step(name, defaults)


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("fine_grained/")])
def test_fine_grained_recipes_train_on_a_folder_of_images(name, defaults, tmp_path):
    """Two steps; the head is five times as fast; images are not cropped at random."""
    skip_unknown(name)
    args = argparse.Namespace(**{**defaults, **settings_of(name)})
    args.input_size, args.batch_size = [3, 64, 64], 2
    for i in range(4):
        folder = tmp_path / f"train/class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 60 + i), (60 * i, 99, 30)).save(folder / f"{i}.png")
    training = Training(args)
    if args.sched == "constant":
        rates = {group["lr"] for group in training.optimizer.param_groups}
        assert sorted(rates) == pytest.approx([0.0012, 0.006])
    data = resolve_data_config(vars(args), model=training.model)
    loader = create_loader(  # as train.py
        create_dataset("", root=tmp_path, split="train", is_training=True),
        input_size=data["input_size"],
        batch_size=args.batch_size,
        is_training=True,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        color_jitter=args.color_jitter,
        interpolation=args.train_interpolation,
        mean=data["mean"],
        std=data["std"],
        num_workers=0,
        use_prefetcher=False,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    assert "RandomResizedCrop" not in str(loader.dataset.transform)
    losses = [training.step(x, target)["loss"] for x, target in loader]
    assert len(losses) == 2
    assert torch.stack(losses).isfinite().all()


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith(("imagenet", "cifar100"))])
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
    if name.startswith("cifar100"):
        assert falls == [60, 90]
        assert rates[-1] == pytest.approx(0.0025)
    else:
        assert falls == (released.get(args.model, [30, 60, 90]) if "/released/" in name else [30, 60, 90])
        assert rates[0] == 0.1
