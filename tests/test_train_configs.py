"""Every row of the table in train_configs/README.md, a file and options: train.py accepts it, and a step can be made.

With TIMM_SCRIPTS=DIR, a folder that has timm's train.py, its own parser reads them; else one of the same options does.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Callable
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
from timm.utils import ParseKwargs, dispatch_clip_grad

FOLDER = Path(__file__).parents[1] / "train_configs"
OPTIONS = Path(__file__).parent / "data/train_options.yaml"
ROW = re.compile(r"^\| (\w+/[\w/]+) \| .+ \| \[\w+\]\((.+)\.yaml\) \| (?:`(.+)`)? \| .+ \|$", re.MULTILINE)
ROWS = {name: (file, options) for name, file, options in ROW.findall((FOLDER / "README.md").read_text())}
FILES = sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml"))


def timms_parser() -> argparse.ArgumentParser:
    """That of train.py, or one with its options and defaults."""
    if folder := os.environ.get("TIMM_SCRIPTS"):
        spec = importlib.util.spec_from_file_location("timm_train", Path(folder) / "train.py")
        sys.modules["timm_train"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.parser
    parser = argparse.ArgumentParser()
    for name, default in yaml.safe_load(OPTIONS.read_text()).items():
        how: dict[str, Any] = dict(type=yaml.safe_load, default=default)
        if isinstance(default, bool):
            how = dict(action="store_true", default=default)
        elif isinstance(default, dict):
            how = dict(nargs="*", action=ParseKwargs, default=default)
        parser.add_argument(f"--{name.replace('_', '-')}", **how)
    return parser


Read = Callable[[str], argparse.Namespace]


@pytest.fixture(scope="session")
def read() -> Read:
    """What train.py makes of a row: its defaults, the file over them, the options over both."""
    parser = timms_parser()
    defaults = vars(parser.parse_args([]))

    def read_row(name: str) -> argparse.Namespace:
        file, options = ROWS[name]
        given = yaml.safe_load((FOLDER / f"{file}.yaml").read_text())
        assert set(given) <= set(defaults), name
        parser.set_defaults(**{**defaults, **given})
        return parser.parse_args(shlex.split(options))

    return read_row


def test_the_table_has_every_file():
    assert {file for file, _ in ROWS.values()} == set(FILES)
    assert {name for name, (_, options) in ROWS.items() if not options} == set(FILES)


def test_no_two_rows_are_the_same_run(read):
    assert len({str(sorted(vars(read(name)).items())) for name in ROWS}) == len(ROWS)


def small_network(args: argparse.Namespace) -> torch.nn.Module:
    """A row's network by timm.create_model, cheap, with all its parts."""
    if args.model == "second_order" and args.model_kwargs["backbone"].startswith("vit"):
        small: dict[str, Any] = dict(backbone="test_vit", img_size=48)
    elif args.model == "second_order":
        small = dict(backbone="test_efficientnet")
    elif "preresnet" in args.model:
        small = dict(depth=2)
    else:
        official = args.model_kwargs.get("flavor") == "official"
        small = dict(layers=(1, 1, 1, 1), channels=(64, 64, 64, 64) if official else (16, 16, 32, 32))
    return timm.create_model(  # as train.py
        args.model,
        in_chans=args.input_size[0],
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        global_pool=args.gp,
        **{**args.model_kwargs, **small},
    )


class Training:
    """What train.py makes of a file: the same calls of timm, in the same order, on one device.

    Args:
        args: The file's options, and train.py's defaults.
        backend: Compiler in place of the file's.
    """

    def __init__(self, args: argparse.Namespace, backend: str | None = None) -> None:
        self.args = args
        model = small_network(args)
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


def take_a_step(args: argparse.Namespace, backend: str | None = None) -> None:
    """Images are small; the options are the row's."""
    torch.compiler.reset()
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


@pytest.mark.parametrize("name", sorted(set(ROWS) - set(FILES)))
def test_a_row_has_a_network(name, read):
    args = read(name)
    size = min(args.input_size[-1], 48)
    output = small_network(args).eval()(torch.randn(2, args.input_size[0], size, size))
    assert output.shape == (2, args.num_classes)
    assert output.isfinite().all()


@pytest.mark.parametrize("name", FILES)
def test_a_step(name, read):
    take_a_step(read(name), backend="aot_eager")


def test_a_frozen_backbone_with_batch_normalization_keeps_its_statistics(read):
    args = read("heads/moment_vit_frozen")
    backbone = dict(backbone="resnet18", channels=(8, 8, 16, 16))
    model = timm.create_model("second_order", global_pool=args.gp, num_classes=1000, **backbone)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(cfg=args))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert {key.partition(".")[0] for key in changed} == {"global_pool", "fc"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FILES if "torchcompile:" in (FOLDER / f"{name}.yaml").read_text()])
def test_a_step_with_the_files_own_compiler(name, read):
    take_a_step(read(name))


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("fine_grained/")])
def test_fine_grained_recipes_train_on_a_folder_of_images(name, read, tmp_path):
    """Two steps; the head is five times as fast; images are not cropped at random."""
    args = read(name)
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


@pytest.mark.parametrize("name", [name for name in FILES if re.match("cifar100|imagenet_(?!.*strikes_back)", name)])
def test_the_learning_rate_falls_where_the_paper_says(name, read):
    args = read(name)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=1)
    rates = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    falls = [i for i in range(1, epochs) if rates[i] < rates[i - 1]]
    if name.startswith("cifar100"):
        assert falls == [60, 90]
        assert rates[-1] == pytest.approx(0.0025)
    else:
        assert falls == ([30, 45, 60] if name == "imagenet_1k/released/gsop_resnet50_net2" else [30, 60, 90])
        assert rates[0] == 0.1
