"""Time and memory of blocks, heads and networks: python -m benchmarks.speed WHAT.

``blocks``: a GSoP block after each stage of ResNet-50 at 224×224, the last one not down-sampled, and covariance
pooling, beside alternatives. ``networks``: ResNet-50s, relative to the twin: the same network, its last stage not
down-sampled either, without blocks. ``pieces``: the steps of GSoP-Net1's blocks and of GSoP-Net2's head. ``growth``:
time and operations against the size. ``recipes``: a step of the plan for Fashion-MNIST. ``heads``: second_order's.
``gpu``: networks with the package's kernels, without, and compiled, at 256 and 32 images, and blocks, in one go.

``--json`` keeps the figures. ``--against DIR`` compares blocks and networks with those of another checkout.
``--kernels both`` compares networks and blocks with and without the kernels for GPUs.
"""

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from timm.layers import create_attn
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks import ROOT, timing
from benchmarks.cost import measure as measure_cost
from benchmarks.textbook import TextbookChannelGsop, TextbookCovPool2d, exact_root
from benchmarks.timing import Checkout, Work, peak_bytes, run_of, saved_bytes, seconds
from experiments.plan import PLAN_FASHION_MNIST, load_plan
from timm_gsop.hub.model_card import count_macs
from timm_gsop.layers import (
    SECOND_ORDER_POOLS,
    ChannelGsop,
    GsopBlock,
    IsqrtCovPool2d,
    covariance_pool,
    newton_schulz_sqrt,
    triu_vectorize,
)

Groups = Iterator[tuple[dict[str, Any], dict[str, Work]]]
"""What is measured, and its alternatives; the first is the reference."""

BATCHES_GPU = (256, 32)
IMAGE = 224
SIDE, COPIED = 4096, 2**26  # of the product and the copy that give the machine's speed
POOLS = ("avg", *SECOND_ORDER_POOLS)
STAGES, HEAD = ((256, 56), (512, 28), (1024, 14), (2048, 14)), (2048, 14)
COV_DIM, HEAD_DIM = 128, 256
ATTENTION = ("se", "cbam", "eca", "gc")
WITHOUT = ", without kernels"
TWIN = ("gsop_resnet50_net1.untrained", dict(gsop_layers=()))
FEW = {name: (f"{name}.untrained", {}) for name in ("gsop_resnet50_net1", "gsop_resnet50_net2")}
ALL = {**FEW, "isqrt_resnet50": ("isqrt_resnet50.untrained", {}), "resnet50": ("resnet50", {})}
OURS = {*FEW, "isqrt_resnet50"}  # with layers of this package
RECOMPUTING = "gsop_resnet50_net1, covariances computed again for the gradient"
TRAINED = {**ALL, RECOMPUTING: FEW["gsop_resnet50_net1"]}
WAYS = {"inference": ALL, "training": TRAINED, "compiled": FEW, "compiled training": FEW}
PASSES = {False: "inference", True: "forward and backward"}
AGAINST = {  # public layers and models: name, arguments, shape of the input
    "blocks": [
        ("ChannelGsop", (256,), (256, 56, 56)),
        *((f"{kind}Gsop", (1024,), (1024, 14, 14)) for kind in ("Channel", "Position", "Fused")),
        ("FusedGsop", (1024, "concat"), (1024, 14, 14)),
        *((f"{kind}CovPool2d", (2048,), (2048, 14, 14)) for kind in ("Isqrt", "Mpn")),
        ("IsqrtCovPool2d", (2048,), (2048, 7, 7)),
    ],
    "networks": [("gsop_resnet50_net1", (), (3, 224, 224)), ("gsop_resnet50_net2", (), (3, 224, 224))],
}
SAMPLE_SECONDS = 0.25  # shorter runs are repeated until a sample takes this long


def features(batch: int, channels: int, size: int) -> torch.Tensor:
    """A map as it is after a ReLU."""
    return torch.randn(batch, channels, size, size).relu_()


def alternatives(kind: str, channels: int) -> dict[str, nn.Module]:
    """Ours, the textbook's, and what else a user would take: timm's first-order attention, or the exact root."""
    if kind == "block":
        ours, textbook = (GsopBlock(gsop(channels, COV_DIM)) for gsop in (ChannelGsop, TextbookChannelGsop))
        return dict(ours=ours, textbook=textbook, **{name: create_attn(name, channels) for name in ATTENTION})
    eigh = TextbookCovPool2d(channels, HEAD_DIM, covariance_pool, exact_root)
    return dict(ours=IsqrtCovPool2d(channels, HEAD_DIM), textbook=TextbookCovPool2d(channels, HEAD_DIM), eigh=eigh)


def floor(kind: str, channels: int, positions: int, training: bool, speed: Mapping[str, float]) -> float:
    """Seconds that an image takes at least: for each piece, arithmetic or memory, whichever takes longer."""
    d = COV_DIM if kind == "block" else HEAD_DIM
    # Multiply-accumulates, and float32 values moved: reduction, covariance; excitation, scaling; or root, triangle.
    pieces = [(channels * d * positions, (channels + d) * positions), (d * d * positions, d * positions + d * d)]
    if kind == "block":
        pieces += [(4 * d * d + 4 * d * channels, d * d + channels), (0, 2 * channels * positions)]
    else:
        products = (12 + 17) / 3 if training else 10  # the whole is tripled in training
        pieces += [(int(products * d**3), 2 * d * d), (0, d * d + d * (d + 1) // 2)]
    return (3 if training else 1) * sum(max(m / speed["macs"], 4 * v / speed["bytes"]) for m, v in pieces)


def with_kernels(work: Callable[[], Any], setting: str) -> Callable[[], Any]:
    """The same, run with the GPU's kernels, "on", or without, "off"."""

    def run() -> Any:
        os.environ["TIMM_GSOP_KERNELS"] = "0" if setting == "off" else "1"
        return work()

    return run


def with_and_without(works: dict[str, Any], names: Iterable[str], setting: str) -> dict[str, Any]:
    """Works with kernels as they are set; "both" adds those of ``names`` without."""
    found = {name: with_kernels(work, setting) for name, work in works.items()}
    if setting == "both":
        found.update({f"{name}{WITHOUT}": with_kernels(works[name], "off") for name in names})
    return found


def blocks(args: Namespace) -> Groups:
    """Blocks and heads, beside their peers and the least time by the machine's speed in a product and in a copy."""
    a, big = torch.randn(SIDE, SIDE), torch.randn(COPIED)
    copy = torch.empty_like(big)
    product, copying = (min(seconds(work) for _ in range(10)) for work in (lambda: a @ a, lambda: copy.copy_(big)))
    speed = dict(macs=SIDE**3 / product, bytes=8 * COPIED / copying)
    for kind, channels, size in [*(("block", *stage) for stage in STAGES), ("head", *HEAD)]:
        x = features(args.batch, channels, size)
        for training in PASSES:
            modules = alternatives(kind, channels)
            bfloat16 = args.what == "gpu"
            x.requires_grad_(training)
            works = {name: run_of(module, x, training, bfloat16) for name, module in modules.items()}
            works = with_and_without(works, ["ours"], args.kernels)
            what = dict(kind=kind, channels=channels, size=size, training=training)
            what["floor"] = args.batch * floor(kind, channels, size**2, training, speed)
            kept = {name: partial(saved_bytes, module, x) for name, module in modules.items() if training}
            kept = with_and_without(kept, ["ours"] if training else [], args.kernels)
            what["bytes"] = {name: count() for name, count in kept.items()}
            yield what, works


def networks(args: Namespace) -> Groups:
    """Networks in each way. With bfloat16, channels are last."""
    layout = torch.channels_last if args.dtype == "bfloat16" else torch.contiguous_format
    x = torch.randn(args.batch, 3, IMAGE, IMAGE).to(memory_format=layout)
    for way in args.ways:
        training, works, costs = "training" in way, {}, {}
        for name, (model_name, kwargs) in {"twin": TWIN, **WAYS[way]}.items():
            model = timm.create_model(model_name, **kwargs).to(memory_format=layout)
            for module in model.modules():
                if name == RECOMPUTING and isinstance(module, ChannelGsop):
                    module.squeeze = partial(checkpoint, module.squeeze, use_reentrant=False)
            works[name] = run_of(model, x, training, args.dtype == "bfloat16", way.startswith("compiled"))
            costs[name] = measure_cost(model_name, **kwargs)._asdict()
        compiled = way.startswith("compiled")  # without kernels anyway
        works = with_and_without(works, set(costs) & OURS, "on" if compiled else args.kernels)
        costs.update({name: costs[name.removesuffix(WITHOUT)] for name in works})
        memory = {name: peak_bytes(work) for name, work in works.items() if training}
        yield dict(way=way, dtype=args.dtype, costs=costs, bytes=memory), works


def pieces(args: Namespace) -> Groups:
    """A block after each stage, the head, and the row-wise convolution, each whole and in pieces."""
    for stage in STAGES:
        x = features(args.batch, *stage)
        block = GsopBlock(ChannelGsop(stage[0], COV_DIM)).eval()
        reduction, excitation = block.gsop.reduction, block.gsop.excitation
        cov = covariance_pool(reduced := reduction(x))
        centred = reduced.flatten(2) - reduced.flatten(2).mean(2, keepdim=True)
        works: dict[str, Work] = {
            "all of it": partial(block, x),
            "1×1 reduction": partial(reduction.conv, x),
            "batch normalization and ReLU": partial(nn.Sequential(reduction.bn, reduction.act), reduction.conv(x)),
            "covariance": partial(covariance_pool, reduced),
            "covariance: its product": partial(torch.bmm, centred, centred.mT),
            "excitation": partial(excitation, cov),
            "scaling, with the shortcut": partial(torch.mul, x, 1 + excitation(cov)),
        }
        yield dict(part="four blocks"), works
    x, head = features(args.batch, *HEAD), IsqrtCovPool2d(HEAD[0], HEAD_DIM).eval()
    cov = covariance_pool(reduced := head.reduction(x))
    works = {
        "all of it": partial(head, x),
        "reduction": partial(head.reduction, x),
        "covariance": partial(covariance_pool, reduced),
        "square root": partial(newton_schulz_sqrt, cov, 5),
        "triangle": partial(triu_vectorize, cov),
    }
    yield dict(part="head"), works
    grouped = nn.Conv2d(COV_DIM, 4 * COV_DIM, (COV_DIM, 1), groups=COV_DIM, bias=False)
    convs = {"row-wise convolution": ChannelGsop(4, COV_DIM).excitation.row_conv, "PyTorch's, grouped": grouped}
    rows = torch.randn(args.batch, COV_DIM, COV_DIM, 1)
    yield dict(part="excitation"), {name: partial(conv, rows) for name, conv in convs.items()}


DIMS, SIZES, ITERATIONS, BATCHES = (32, 64, 128, 256, 512), (7, 14, 28, 56), range(1, 11), (1, 2, 4, 8, 16, 32)


def growth(args: Namespace) -> Groups:
    """Each work for every value of what grows, with its multiply-accumulates."""

    def layer(kind: str, batch: int, dim: int, size: int) -> Work:
        module = {"block": GsopBlock(ChannelGsop(256, dim)).eval(), "head": IsqrtCovPool2d(256, dim).eval()}.get(kind)
        return partial(module or covariance_pool, features(batch, 256 if module else dim, size))

    def root(dim: int, num_iters: int) -> Work:
        return partial(newton_schulz_sqrt, covariance_pool(torch.randn(16, dim, 2 * dim)), num_iters)

    for by, of, values, create in (
        ("cov_dim", "covariance, 14×14", DIMS, lambda d: layer("cov", 16, d, 14)),
        ("cov_dim", "square root, 5 iterations", DIMS, lambda d: root(d, 5)),
        ("cov_dim", "block, 256×28×28", DIMS, lambda d: layer("block", 16, d, 28)),
        ("cov_dim", "head, 256×14×14", DIMS, lambda d: layer("head", 16, d, 14)),
        ("height and width", "covariance, 128 channels", SIZES, lambda s: layer("cov", 16, 128, s)),
        ("height and width", "block, 256 channels", SIZES, lambda s: layer("block", 16, 128, s)),
        ("height and width", "head, 256 channels", SIZES, lambda s: layer("head", 16, 256, s)),
        ("iterations", "square root, 256×256", ITERATIONS, lambda n: root(256, n)),
        ("batch", "block, 256×28×28", BATCHES, lambda b: layer("block", b, 128, 28)),
        ("batch", "head, 256×14×14", BATCHES, lambda b: layer("head", b, 256, 14)),
    ):
        works = {str(value): create(value) for value in values}
        yield dict(by=by, of=of, macs={value: count_macs(work)[""] for value, work in works.items()}), works


def recipes(args: Namespace) -> Groups:
    """A training step of every network of the plan for Fashion-MNIST, in bfloat16 with channels last."""
    works, costs = {}, {}
    for run in load_plan(PLAN_FASHION_MNIST):
        if run.seed:
            continue
        recipe = run.settings
        overlay = dict(input_size=tuple(recipe["input_size"]), num_classes=recipe["num_classes"])
        kwargs = dict(pretrained_cfg_overlay=overlay, **recipe.get("model_kwargs", {}))
        kwargs.update({"global_pool": recipe["gp"]} if "gp" in recipe else {})
        model = timm.create_model(f"{recipe['model']}.untrained", **kwargs).to(memory_format=torch.channels_last)
        works[run.row] = run_of(model, torch.randn(128, *recipe["input_size"]), training=True, bfloat16=True)
        costs[run.row] = measure_cost(f"{recipe['model']}.untrained", **kwargs)._asdict()
    yield dict(costs=costs), works


def heads(args: Namespace) -> Groups:
    """Networks that differ in their head, which has 200 classes: inference, and training with its memory."""
    x = torch.randn(args.batch, 3, 224, 224)
    for backbone in ("resnet50", "convnext_tiny", "vit_small_patch16_224"):
        create = partial(timm.create_model, "second_order", backbone=backbone, num_classes=200)
        for training in PASSES:
            works = {pool: run_of(create(global_pool=pool), x, training) for pool in POOLS}
            memory = {pool: peak_bytes(work) for pool, work in works.items()} if training else {}
            yield dict(backbone=backbone, training=training, bytes=memory), works


def against(args: Namespace) -> Groups:
    """Layers and networks of another checkout, and of this one."""
    checkouts = {"other": Checkout(args.against), "this": Checkout(ROOT)}
    for name, arguments, shape in AGAINST[args.what]:
        for training in PASSES:
            request = (name, arguments, (args.batch, *shape), training, args.dtype == "bfloat16", args.device)
            memory = {which: checkout.ask(*request) for which, checkout in checkouts.items()}
            repeats = math.ceil(SAMPLE_SECONDS / median(seconds(partial(checkouts["other"].ask, 1)) for _ in range(3)))
            works = {which: partial(checkout.ask, repeats) for which, checkout in checkouts.items()}
            what = f"{name}({', '.join(map(str, arguments))}), {'×'.join(map(str, shape))}, {PASSES[training]}"
            yield dict(what=what, repeats=repeats, bytes=memory), works


def gpu(args: Namespace) -> Groups:
    """What docs/performance.md says of a GPU, in one go; in bfloat16, networks with channels last."""
    args.kernels, args.dtype, args.ways = "both", "bfloat16", list(WAYS)
    for batch in BATCHES_GPU:
        for what, works in networks(Namespace(**{**vars(args), "batch": batch})):
            yield dict(what, batch=batch), works
    batch = BATCHES_GPU[0] // 4
    for what, works in blocks(Namespace(**{**vars(args), "batch": batch})):
        yield dict(what, batch=batch), works


MEASURES = {groups.__name__: groups for groups in (blocks, networks, pieces, growth, recipes, heads, gpu)}


def show(row: Mapping[str, Any]) -> None:
    """Print what was measured, a line for each alternative."""
    print("\n" + ", ".join(f"{key} {value}" for key, value in row.items() if not isinstance(value, (dict, float))))
    for name, found in row["alternatives"].items():
        ratio = f"{found['ratio']:.3f}× ({found['low']:.3f}–{found['high']:.3f})"
        memory = f"  {row['bytes'][name] / 1e6:.2f} MB" if row.get("bytes") else ""
        print(f"{name:32} {1e3 * found['seconds']:10.3f} ms  {ratio}{memory}", flush=True)


def main() -> None:
    """The command line."""
    options = timing.parser(__doc__)
    options.add_argument("what", choices=MEASURES)
    options.add_argument("--against", type=Path, metavar="DIR", help="another checkout, for blocks and networks")
    options.add_argument("--ways", nargs="+", default=["inference", "training"], choices=WAYS, help="of networks")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="of networks, or with --against")
    options.add_argument("--kernels", default="on", choices=("on", "off", "both"), help="in networks and blocks")
    options.add_argument("--batch", type=int, help="images (default: 16 on a CPU, 256 on a GPU)")
    args = options.parse_args()
    if args.against and args.what not in AGAINST:
        options.error(f"--against is for {' and '.join(AGAINST)}")
    args.batch = args.batch or (16 if args.device == "cpu" else 256)
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    timing.set_up(args.float32_products)
    groups, rows = against if args.against else MEASURES[args.what], []
    with torch.device(args.device), torch.set_grad_enabled(args.what not in ("pieces", "growth")):
        for what, works in groups(args):
            rows.append(dict(what, alternatives=timing.time_paired(works, args.rounds, what.get("repeats", 1))))
            show(rows[-1])
    if args.json:
        result = dict(machine=timing.machine(args.device), batch=args.batch, rows=rows)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
