"""What came of train_configs/fashion_mnist: python -m benchmarks.fashion_mnist [--runs OUTPUT] [--ship] [--time].

``--runs`` is the folder that timm's train.py wrote, a sub-folder ``RECIPE-SEED`` a run; its summaries are kept in
benchmarks/results/fashion_mnist. ``--ship`` puts the better seed of the two GSoP networks into the package, and what
they answer to the stored test images beside them. ``--time`` measures a training step of each network, side by side.
The table of docs/results.md is written each time.
"""

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import timm
import torch
import yaml
from timm.models import adapt_input_conv, load_state_dict
from torch import nn

from benchmarks.command_line import keep
from benchmarks.cost import Cost, measure
from benchmarks.page import table, update
from benchmarks.paired import keep_freed_memory, machine, time_paired
from timm_gsop.viz.summary import read_summary

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/fashion_mnist"
RECIPES = ROOT / "train_configs/fashion_mnist"
PAGE = ROOT / "docs/results.md"
TIMES = RESULTS / "step_times.json"
SAMPLE = ROOT / "tests/data/fashion_mnist_test.npz"
SHIPPED = ROOT / "timm_gsop/pretrained/shipped"
NETWORKS = {
    "preresnet20": "vanilla",
    "preresnet20_stride1": "vanilla, no down-sampling in the last stage",
    "preresnet20_se": "SE",
    "preresnet20_isqrt": "iSQRT-COV",
    "gsop_preresnet20_net1": "GSoP-Net1",
    "gsop_preresnet20_net2": "GSoP-Net2",
}
SHIP = ("gsop_preresnet20_net1", "gsop_preresnet20_net2")


class Result(NamedTuple):
    """Runs of a recipe, in the order of their seeds: top-1 (%) on the test images after the last epoch."""

    recipe: str
    top1: dict[int, float]


def results() -> list[Result]:
    """What is kept of the runs."""
    found = []
    for recipe in NETWORKS:
        paths = {int(path.stem.rpartition("-")[2]): path for path in RESULTS.glob(f"{recipe}-*.csv")}
        if paths:
            # The last epoch's, which no choice by the test images has favoured.
            top1 = {seed: read_summary(paths[seed])["eval_top1"][-1] for seed in sorted(paths)}
            found.append(Result(recipe, top1))
    return found


def network(recipe: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a recipe's network."""
    settings = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())
    pool = {"global_pool": settings["gp"]} if "gp" in settings else {}
    overlay = dict(input_size=tuple(settings["input_size"]), num_classes=10)
    kwargs = dict(pretrained_cfg_overlay=overlay, **settings.get("model_kwargs", {}), **pool)
    return f"{settings['model']}.untrained", kwargs


def time_steps(batch_size: int = 128) -> dict[str, dict[str, float]]:
    """Time a training step of each network beside the vanilla one's: bfloat16, channels_last."""
    x, target = torch.randn(batch_size, 1, 28, 28), torch.randint(0, 10, (batch_size,))

    def step(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(x).float(), target)
        loss.backward()
        model.zero_grad()

    works = {}
    for recipe in NETWORKS:
        name, kwargs = network(recipe)
        model = timm.create_model(name, **kwargs).train().to(memory_format=torch.channels_last)
        works[recipe] = partial(step, model)
    return {recipe: timing._asdict() for recipe, timing in time_paired(works, "preresnet20").items()}


def cost(recipe: str) -> Cost:
    """Parameters and multiply-accumulates of a recipe's network."""
    name, kwargs = network(recipe)
    return measure(name, **kwargs)


def results_table() -> str:
    """Markdown: every run, mean and spread."""
    timings = json.loads(TIMES.read_text())["timings"]
    columns = ["network", "parameters (M)", "MMACs", "training step", "top-1 (%) of each seed", "mean", "spread"]
    lines = []
    for result in results():
        params, macs = cost(result.recipe)
        top1 = list(result.top1.values())
        name = f"[{NETWORKS[result.recipe]}](../train_configs/fashion_mnist/{result.recipe}.yaml)"
        step = f"{timings[result.recipe]['ratio']:.1f}×"
        each = ", ".join(f"{value:.2f}" for value in top1)
        size = [f"{params / 1e6:.3f}", f"{macs / 1e6:.1f}"]
        lines.append([name, *size, step, each, f"{mean(top1):.2f}", f"{max(top1) - min(top1):.2f}"])
    return table(columns, lines)


def keep_summaries(runs: Path) -> None:
    """Copy the summaries of complete runs."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    for recipe in NETWORKS:
        epochs = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["epochs"]
        for summary in sorted(runs.glob(f"{recipe}-[0-9]*/summary.csv")):
            if len(summary.read_text().splitlines()) == epochs + 1:
                shutil.copyfile(summary, RESULTS / f"{summary.parent.name}.csv")


@torch.inference_mode()
def ship(runs: Path, recipe: str) -> None:
    """Put the better seed's weights into the package, and its answers to the stored test images beside them."""
    (result,) = (result for result in results() if result.recipe == recipe)
    seed = max(result.top1, key=result.top1.__getitem__)
    weights = load_state_dict(str(runs / f"{recipe}-{seed}/last.pth.tar"), use_ema=False)
    weights["stem.conv.weight"] = adapt_input_conv(3, weights["stem.conv.weight"], base_chans=1)
    model = timm.create_model(f"{recipe}.untrained", num_classes=10).eval()
    model.load_state_dict(weights)
    safetensors.torch.save_file(model.state_dict(), SHIPPED / f"{recipe}.fashion_mnist.safetensors")
    logits = model(sample()[0])
    safetensors.torch.save_file({"logits": logits}, SHIPPED / f"{recipe}.fashion_mnist.golden.safetensors")


def sample() -> tuple[torch.Tensor, torch.Tensor]:
    """The stored test images, normalized, (B, 3, 28, 28), and their labels."""
    stored = np.load(SAMPLE)
    images = torch.tensor(stored["images"], dtype=torch.float32).div(255).sub(0.286).div(0.353)
    return images[:, None].expand(-1, 3, -1, -1), torch.tensor(stored["labels"], dtype=torch.long)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, help="what train.py wrote")
    parser.add_argument("--time", action="store_true", help="measure training steps")
    parser.add_argument("--ship", action="store_true", help="put the better seeds into the package")
    args = parser.parse_args()
    if args.ship and not args.runs:
        parser.error("--ship needs --runs")
    if args.runs:
        keep_summaries(args.runs)
    if args.time:
        keep_freed_memory()
        keep(dict(machine=machine(), batch=128, timings=time_steps()), TIMES)
    if args.ship:
        for recipe in SHIP:
            ship(args.runs, recipe)
    text = results_table()
    PAGE.write_text(update(PAGE.read_text(), {"table": text}))
    print(text)


if __name__ == "__main__":
    main()
