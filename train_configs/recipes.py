"""The recipes behind the YAML files of this folder: python train_configs/recipes.py writes them.

Settings are arguments of timm's train.py. A run is a recipe and its own settings; its comment says what it reproduces
and for how many GPUs it is.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parent
Settings = dict[str, Any]


class Run(NamedTuple):
    """One file.

    Attributes:
        comment: What it reproduces, the error that is reported for it, and for how many GPUs it is.
        settings: Arguments of train.py.
    """

    comment: str
    settings: Settings


def after(*epochs: int) -> list[int]:
    """Milestones that lower the rate after so many epochs: timm's multistep lowers it one epoch early."""
    return [epoch + 1 for epoch in epochs]


ALL: Settings = dict(device_modules=["timm_gsop"], workers=8, pin_mem=True, checkpoint_hist=2)

# timm's "momentum" is SGD without Nesterov; weight decay is on every parameter, as in PyTorch's SGD.
SGD: Settings = dict(opt="momentum", momentum=0.9, opt_kwargs=dict(filter_bias_and_bn=False), weight_decay=1e-4)
IMAGENET: Settings = dict(
    **ALL,
    num_classes=1000,
    input_size=[3, 224, 224],
    crop_pct=0.875,
    interpolation="bilinear",
    train_interpolation="bilinear",
    color_jitter=0.4,
    smoothing=0.0,
)
IMAGENET_PAPER: Settings = dict(
    **IMAGENET,
    **SGD,
    batch_size=160,
    lr=0.1,
    epochs=100,
    sched="step",
    decay_epochs=30,
    decay_rate=0.1,
    warmup_epochs=0,
)
IMAGENET_RELEASED: Settings = dict(
    **IMAGENET, **SGD, batch_size=256, lr=0.1, sched="multistep", decay_rate=0.1, warmup_epochs=0
)
RELEASED_NET1: Settings = dict(epochs=95, decay_milestones=after(30, 60, 90))
RELEASED_NET2: Settings = dict(epochs=65, decay_milestones=after(30, 45, 60))
FAST: Settings = dict(amp=True, amp_dtype="bfloat16", channels_last=True, torchcompile="inductor")
STRIKES_BACK: Settings = dict(
    **ALL,
    num_classes=1000,
    interpolation="bicubic",
    crop_pct=0.95,
    batch_size=256,
    opt="lamb",
    sched="cosine",
    warmup_epochs=5,
    warmup_lr=1e-6,
    min_lr=1e-6,
    cutmix=1.0,
    bce_loss=True,
    bce_target_thresh=0.2,
    amp=True,
    amp_dtype="bfloat16",
    channels_last=True,
)
A3: Settings = dict(
    input_size=[3, 160, 160],
    epochs=100,
    lr=8e-3,
    weight_decay=0.02,
    aa="rand-m6-mstd0.5-inc1",
    mixup=0.1,
    smoothing=0.0,
)
A1: Settings = dict(
    input_size=[3, 224, 224],
    epochs=600,
    lr=5e-3,
    weight_decay=0.01,
    aa="rand-m7-mstd0.5-inc1",
    mixup=0.2,
    smoothing=0.1,
    aug_repeats=3,
    drop_path=0.05,
)

PAPER = (
    "The paper's recipe (section 4: SGD, batch 160 in all, lr 0.1 divided by 10 every 30 epochs, 100 epochs; weight "
    "decay of the released code)."
)
ONE_GPU = " For one GPU, which takes the whole batch; README.md says what to change for more."
SMALL = " For one GPU or two CPU cores."
RELEASED = (
    "The released code's recipe and networks (flavor official): SGD, batch 256 in all, lr 0.1, weight decay 1e-4, "
)


def reported(error: str, where: str) -> str:
    """A figure of the paper's."""
    return f"Error reported by the paper, {where}: {error} % (top-1 / top-5)."


def imagenet_1k() -> dict[str, Run]:
    """Tables 3 and 5, on ImageNet-1k."""
    rows = {
        "resnet50": ("resnet50", {}, "Vanilla ResNet-50", "23.85 / 7.13"),
        "seresnet50": ("seresnet50", {}, "SE-Net-50, timm's", "23.29 / 6.62"),
        "isqrt_resnet50": ("isqrt_resnet50", {}, "iSQRT-COV on ResNet-50", "22.14 / 6.22"),
        "mpncov_resnet50": ("mpncov_resnet50", {}, "MPN-COV on ResNet-50", "22.74 / 6.54"),
        "gsop_resnet50_net1": ("gsop_resnet50_net1", {}, "GSoP-Net1 on ResNet-50", "22.32 / 6.02"),
        "gsop_resnet50_net2": ("gsop_resnet50_net2", {}, "GSoP-Net2 on ResNet-50", "21.19 / 5.64"),
        "resnet101": ("resnet101", {}, "Vanilla ResNet-101", None),
        "isqrt_resnet101": ("isqrt_resnet101", {}, "iSQRT-COV on ResNet-101", None),
        "gsop_resnet101_net1": ("gsop_resnet101_net1", {}, "GSoP-Net1 on ResNet-101", None),
        "gsop_resnet101_net2": ("gsop_resnet101_net2", {}, "GSoP-Net2 on ResNet-101", None),
    }
    runs = {}
    for name, (model, settings, what, error) in rows.items():
        comment = f"{what}, ImageNet-1k. {PAPER}"
        comment += f" {reported(error, 'Table 5')}" if error else " The paper reports no error for this depth."
        runs[f"imagenet_1k/paper/{name}"] = Run(comment + ONE_GPU, dict(model=model, **IMAGENET_PAPER, **settings))
    for depth in (50, 101):
        for net, schedule in ((1, RELEASED_NET1), (2, RELEASED_NET2)):
            name = f"gsop_resnet{depth}_net{net}"
            falls = ", ".join(str(milestone - 1) for milestone in schedule["decay_milestones"])
            epochs = f"{schedule['epochs']} epochs, lr divided by 10 after {falls}."
            comment = f"GSoP-Net{net} on ResNet-{depth}, ImageNet-1k. {RELEASED}{epochs}"
            if (depth, net) == (50, 1):
                comment += " Error reported by its authors' README: 22.02 / 5.88 % (top-1 / top-5)."
            settings = dict(model=name, model_kwargs=dict(flavor="official"), **IMAGENET_RELEASED, **schedule)
            runs[f"imagenet_1k/released/{name}"] = Run(comment + ONE_GPU, settings)
    for net in (1, 2):
        name = f"gsop_resnet50_net{net}"
        what = f"GSoP-Net{net} on ResNet-50, ImageNet-1k"
        fast = f"{what}. {PAPER} With bfloat16, channels_last and torch.compile, for recent GPUs. Nothing is reported."
        runs[f"imagenet_1k/fast/{name}"] = Run(fast + ONE_GPU, dict(model=name, **IMAGENET_PAPER, **FAST))
        for letter, recipe in (("a3", A3), ("a1", A1)):
            size = "160 px, to be validated at 224; " if letter == "a3" else ""
            comment = (
                f"{what}. Procedure {letter.upper()} of ResNet strikes back (arXiv:2110.00476): {size}"
                f"batch 2048 in all, {recipe['epochs']} epochs. Nothing is reported for this network. For eight GPUs, "
                "each of which takes 256 images."
            )
            runs[f"imagenet_1k/strikes_back_{letter}/{name}"] = Run(comment, dict(model=name, **STRIKES_BACK, **recipe))
    return runs


def imagenet_250() -> dict[str, Run]:
    """Table 4: every row of its three parts, ResNet-26 on a subset of 250 classes."""
    rows: dict[str, tuple[str, Settings, str, str]] = {
        "resnet26": ("resnet26", {}, "vanilla ResNet-26, timm's", "19.18 / 5.62"),
        "isqrt_resnet26": ("isqrt_resnet26", {}, "Table 4(c), iSQRT-COV alone", "17.43 / 4.71"),
    }
    channel = {
        1: {64: "18.00 / 4.99", 128: "17.42 / 4.53", 256: "17.61 / 4.64"},
        2: {64: "16.84 / 4.58", 128: "16.68 / 4.36", 256: "16.67 / 4.18"},
    }
    position = {
        1: {36: "19.21 / 5.46", 64: "18.37 / 5.05", 144: "18.41 / 5.08"},
        2: {36: "17.34 / 4.80", 64: "17.18 / 4.80", 144: "17.51 / 4.63"},
    }
    fusion = {
        1: {"avg": "17.90 / 4.73", "max": "17.48 / 4.52", "concat": "17.58 / 4.61"},
        2: {"avg": "16.77 / 4.36", "max": "16.80 / 4.39", "concat": "16.49 / 4.35"},
    }
    single = {2: "18.45 / 5.22", 3: "18.72 / 5.33", 4: "18.85 / 5.24", 5: "18.33 / 5.12"}
    for net in (1, 2):
        model = f"gsop_resnet26_net{net}"
        for size, error in channel[net].items():
            also = ", and 4(c), all blocks" if size == 128 else ""
            what = f"Table 4(a){also}: GSoP-Net{net}, channel covariance of size {size}"
            rows[f"net{net}_channel{size}"] = (model, dict(cov_dim=size), what, error)
        for size, error in position[net].items():
            what = f"Table 4(a): GSoP-Net{net}, position covariance of size {size}"
            rows[f"net{net}_position{size}"] = (
                model,
                dict(gsop_type="position", spatial_size=int(size**0.5)),
                what,
                error,
            )
        for kind, error in fusion[net].items():
            what = f"Table 4(b): GSoP-Net{net}, fusion by {kind}"
            rows[f"net{net}_{kind}"] = (model, dict(gsop_type=kind), what, error)
    for stage, error in single.items():
        what = f"Table 4(c): one block, after conv{stage}_x"
        rows[f"net1_s{stage}"] = ("gsop_resnet26_net1", dict(gsop_layers=[stage - 1]), what, error)
    runs = {}
    for name, (model, model_kwargs, what, error) in rows.items():
        comment = f"ImageNet-250, {what}. {PAPER} {reported(error, 'Table 4')} The classes: --class-map, see README.md."
        comment += ONE_GPU
        settings = {**IMAGENET_PAPER, "num_classes": 250}
        if model_kwargs:
            settings["model_kwargs"] = model_kwargs
        runs[f"imagenet_250/{name}"] = Run(comment, dict(model=model, **settings))
    return runs


def cifar100() -> dict[str, Run]:
    """Table 6: pre-activation ResNet-164 on CIFAR-100."""
    base: Settings = dict(
        **ALL,
        dataset="torch/cifar100",
        num_classes=100,
        input_size=[3, 32, 32],
        mean=[0.5071, 0.4867, 0.4408],
        std=[0.2675, 0.2565, 0.2761],
        crop_pct=1.0,
        interpolation="bilinear",
        train_interpolation="bilinear",
        train_crop_mode="rkrr",
        scale=[0.8, 1.25],
        ratio=[1.0, 1.0],
        color_jitter=0.0,
        smoothing=0.0,
        **SGD,
        batch_size=128,
        lr=0.25,
        epochs=110,
        sched="multistep",
        decay_milestones=after(60, 90),
        decay_rate=0.1,
        warmup_epochs=0,
    )
    rows: dict[str, tuple[str, Settings, str, str]] = {
        "preresnet164": ("preresnet164", {}, "He et al., vanilla", "24.33"),
        "preresnet164_se": ("preresnet164", dict(model_kwargs=dict(attn_layer="se")), "SE-Net", "21.31"),
        # The table's row "MPN-COV [21]" is iSQRT-COV: that is its reference 21, and what section 4.3 calls it.
        "preresnet164_isqrt": ("isqrt_preresnet164", {}, "iSQRT-COV", "19.95"),
        "preresnet164_mpn": ("isqrt_preresnet164", dict(gp="mpn"), "MPN-COV, not in the table", ""),
        "gsop_preresnet164_net1": ("gsop_preresnet164_net1", {}, "GSoP-Net1", "20.86"),
        "gsop_preresnet164_net2": ("gsop_preresnet164_net2", {}, "GSoP-Net2", "18.58"),
    }
    recipe = (
        "The paper's recipe (SGD, batch 128, weight decay 1e-4, lr 0.25 divided by 10 twice, 110 epochs). Its text "
        "does not say at which two epochs: 60 and 90 here. timm cannot shift images by padding: it shrinks or "
        "enlarges them, then crops or pads them at random."
    )
    runs = {}
    for name, (model, settings, what, error) in rows.items():
        figure = f" Error reported by the paper, Table 6: {error} % (top-1)." if error else ""
        runs[f"cifar100/{name}"] = Run(
            f"CIFAR-100, {what}. {recipe}{figure}{ONE_GPU}", dict(model=model, **base, **settings)
        )
    return runs


def cifar10() -> dict[str, Run]:
    """CIFAR-10: the small networks, and a head or blocks on ImageNet weights (experiments/plan.yaml)."""
    base: Settings = dict(
        device_modules=["timm_gsop"],
        num_classes=10,
        input_size=[3, 32, 32],
        mean=[0.4914, 0.4822, 0.4465],
        std=[0.247, 0.2435, 0.2616],
        crop_pct=1.0,
        interpolation="bilinear",
        train_interpolation="bilinear",
        train_crop_mode="rkrr",
        scale=[0.8, 1.25],
        ratio=[1.0, 1.0],
        color_jitter=0.0,
        smoothing=0.0,
        **SGD,
        batch_size=128,
        validation_batch_size=500,
        lr=0.25,
        epochs=7,
        sched="multistep",
        decay_milestones=after(4, 6),
        decay_rate=0.1,
        warmup_epochs=0,
        amp=True,
        amp_dtype="bfloat16",
        channels_last=True,
        torchcompile="inductor",
        workers=1,
        log_interval=100,
        checkpoint_hist=1,
    )
    isqrt: Settings = dict(last_stride=1)
    rows: dict[str, tuple[str, Settings, str]] = {
        "preresnet20": ("preresnet20", {}, "vanilla"),
        "preresnet20_stride1": (
            "preresnet20",
            dict(model_kwargs=dict(last_stride=1)),
            "no down-sampling in the last stage, as in the networks with second-order pooling",
        ),
        "preresnet20_se": ("preresnet20", dict(model_kwargs=dict(attn_layer="se")), "timm's SE in every bottleneck"),
        "preresnet20_isqrt": ("preresnet20", dict(gp="isqrt", model_kwargs=isqrt), "iSQRT-COV pooling"),
        "preresnet20_isqrt_nodrop": (
            "preresnet20",
            dict(gp="isqrt", model_kwargs=dict(isqrt, isqrt_drop=0.0)),
            "iSQRT-COV pooling without its dropout",
        ),
        "gsop_preresnet20_net1": ("gsop_preresnet20_net1", {}, "GSoP-Net1"),
        "gsop_preresnet20_net2": ("gsop_preresnet20_net2", {}, "GSoP-Net2"),
        "gsop_preresnet20_net2_nodrop": (
            "gsop_preresnet20_net2",
            dict(model_kwargs=dict(isqrt_drop=0.0)),
            "GSoP-Net2 without its dropout",
        ),
    }
    data = "Data: the folder that examples/cifar10_folder.py writes, or --dataset torch/cifar10 --dataset-download."
    recipe = (
        "The schedule of the paper's CIFAR-100 recipe (SGD, batch 128, weight decay 1e-4, lr 0.25 divided by 10 "
        "twice), scaled from 110 epochs to what two CPU cores can do."
    )
    runs = {}
    for name, (model, settings, what) in rows.items():
        comment = f"CIFAR-10, pre-activation ResNet-20, {what}. {recipe} {data}"
        runs[f"cifar10/{name}"] = Run(comment + SMALL, dict(model=model, **base, **settings))
    transfer: Settings = dict(
        device_modules=["timm_gsop"],
        model="second_order",
        model_kwargs=dict(backbone="tf_efficientnet_lite0", isqrt_dim=128),
        gp="isqrt",
        pretrained=True,
        num_classes=10,
        input_size=[3, 96, 96],
        crop_pct=1.0,
        interpolation="bicubic",
        train_interpolation="bicubic",
        train_crop_mode="rkrr",
        scale=[0.8, 1.25],
        ratio=[1.0, 1.0],
        color_jitter=0.0,
        smoothing=0.0,
        opt="momentum",
        momentum=0.9,
        weight_decay=1e-4,
        batch_size=32,
        validation_batch_size=250,
        lr=0.01,
        epochs=15,
        sched="cosine",
        sched_on_updates=True,
        warmup_epochs=0,
        min_lr=0.0,
        channels_last=True,
        workers=1,
        log_interval=100,
        checkpoint_hist=1,
    )
    comment = (
        "CIFAR-10 at 96 px, iSQRT-COV pooling on EfficientNet-Lite0 with its ImageNet weights. Our own recipe; "
        "in float32, because CPUs without AMX compute its depthwise convolutions slowly in bfloat16. "
        f"Offline, --pretrained-path takes the weights that experiments/prepare.py writes. {data}"
    )
    runs["cifar10/second_order"] = Run(comment + SMALL, transfer)
    return runs


def small() -> dict[str, Run]:
    """Fashion-MNIST and scikit-learn's digits, for laptops."""
    fashion_mnist: Settings = dict(
        device_modules=["timm_gsop"],
        dataset="torch/fashion_mnist",
        num_classes=10,
        input_size=[1, 28, 28],
        mean=[0.286],
        std=[0.353],
        interpolation="bilinear",
        train_interpolation="bilinear",
        crop_pct=1.0,
        scale=[0.75, 1.0],
        ratio=[0.9, 1.1],
        hflip=0.5,
        color_jitter=0.0,
        smoothing=0.1,
        epochs=6,
        batch_size=128,
        validation_batch_size=500,
        opt="sgd",
        momentum=0.9,
        weight_decay=5e-4,
        lr=0.1,
        sched="cosine",
        sched_on_updates=True,
        warmup_epochs=1,
        warmup_lr=0.01,
        min_lr=0.0,
        amp=True,
        amp_dtype="bfloat16",
        channels_last=True,
        torchcompile="inductor",
        workers=1,
        log_interval=100,
        checkpoint_hist=1,
    )
    stride_1: Settings = dict(model_kwargs=dict(last_stride=1))
    rows: dict[str, tuple[str, Settings, str]] = {
        "preresnet20": ("preresnet20", {}, "vanilla"),
        "preresnet20_stride1": ("preresnet20", stride_1, "no down-sampling in the last stage, as in those below"),
        "preresnet20_se": ("preresnet20", dict(model_kwargs=dict(attn_layer="se")), "timm's SE in every bottleneck"),
        "preresnet20_isqrt": ("preresnet20", dict(gp="isqrt", **stride_1), "iSQRT-COV pooling"),
        "gsop_preresnet20_net1": ("gsop_preresnet20_net1", {}, "GSoP-Net1"),
        "gsop_preresnet20_net2": ("gsop_preresnet20_net2", {}, "GSoP-Net2"),
    }
    runs = {}
    for name, (model, settings, what) in rows.items():
        comment = f"Fashion-MNIST, pre-activation ResNet-20, {what}. Our own recipe, the same for all: docs/results.md."
        comment += SMALL
        runs[f"fashion_mnist/{name}"] = Run(comment, dict(model=model, **fashion_mnist, **settings))
    left_out = ("dataset", "amp", "amp_dtype", "torchcompile")
    digits = {
        **{name: value for name, value in fashion_mnist.items() if name not in left_out},
        **dict(mean=[0.5], std=[0.5], hflip=0.0, epochs=8, batch_size=32, validation_batch_size=60, input_img_mode="L"),
    }
    for name in ("gsop_preresnet20_net1", "gsop_preresnet20_net2"):
        comment = "scikit-learn's digits, as a folder of images that examples/digits_folder.py writes. Our own recipe."
        runs[f"digits/{name}"] = Run(comment + SMALL, dict(model=name, **digits))
    return runs


def fine_tune() -> dict[str, Run]:
    """Fine-grained data, from pretrained weights."""
    settings = {
        **IMAGENET,
        **dict(model="gsop_resnet50_net2", pretrained=True, num_classes=200, input_size=[3, 448, 448], crop_pct=1.0),
        **dict(opt="momentum", momentum=0.9, weight_decay=1e-4, batch_size=32, lr=0.05, layer_decay=0.7),
        **dict(epochs=50, sched="cosine", warmup_epochs=2, smoothing=0.1, amp=True, amp_dtype="bfloat16"),
    }
    comment = (
        "Fine-grained classification (200 classes, as CUB-200), 448 px, from pretrained weights. The new classifier "
        "learns with lr 0.05, each layer before it with 0.7 times the rate of the next: down to 1e-4 and less. Our own "
        "recipe, not measured. The released one is in fine_grained/."
    )
    return {"fine_tune/gsop_resnet50_net2": Run(comment + ONE_GPU, settings)}


def fine_grained() -> dict[str, Run]:
    """iSQRT-COV's fine-tuning on birds, aircraft and cars, as released; and the same data with a modern backbone."""
    data = {
        "cub": ("CUB-200-2011", 200, "88.0", "https://www.vision.caltech.edu/datasets/cub_200_2011/"),
        "aircraft": ("FGVC-Aircraft", 100, "90.3", "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
        "cars": ("Stanford Cars", 196, "92.3", "Krause et al., 2013; copies are on the Hugging Face Hub"),
    }
    # Resize, centre crop and flip: rkrc at scale 1 does not change the size at random.
    images: Settings = dict(
        input_size=[3, 448, 448], crop_pct=1.0, train_crop_mode="rkrc", scale=[1.0, 1.0], ratio=[1.0, 1.0]
    )
    head: Settings = dict(layer_decay=0.2, layer_decay_min_scale=0.2)
    released: Settings = {
        **{**IMAGENET, **images, "color_jitter": 0.0, "pretrained": True},
        **SGD,
        **dict(batch_size=10, lr=6e-3, epochs=100, sched="constant", warmup_epochs=0),
        **head,
    }
    modern: Settings = {
        **ALL,
        **dict(images, color_jitter=0.0, smoothing=0.1, drop_path=0.1, pretrained=True),
        **dict(opt="adamw", weight_decay=0.05, batch_size=32, lr=5e-4, epochs=50, sched="cosine", warmup_epochs=5),
        **dict(warmup_lr=1e-6, min_lr=1e-6, amp=True, amp_dtype="bfloat16", channels_last=True),
        **head,
        "gp": "isqrt",
        "model_kwargs": dict(backbone="convnext_tiny.in12k_ft_in1k", isqrt_dim=128),
    }
    networks = {
        "isqrt_resnet50": ("iSQRT-COV on ResNet-50", released),
        "gsop_resnet50_net2": ("GSoP-Net2 on ResNet-50", released),
        "second_order": ("iSQRT-COV pooling on ConvNeXt-Tiny", modern),
    }
    runs = {}
    for folder, (what, classes, accuracy, source) in data.items():
        for model, (network, settings) in networks.items():
            comment = f"{what}, {network}, from pretrained weights, 448 px. "
            if settings is released:
                comment += (
                    "The fine-tuning recipe of fast MPN-COV (SGD, batch 10, lr 1.2e-3, five times that for the head, "
                    "100 epochs; resize, centre crop and flip). "
                )
            else:
                comment += "Our own recipe; the head learns five times as fast as the backbone. "
            if model == "isqrt_resnet50":
                comment += f"Accuracy reported by its authors: {accuracy} %; not measured by us. "
            else:
                comment += "Nothing is reported for this network, and we have not measured it. "
            comment += f"Data: {source}, as folders train/CLASS and val/CLASS."
            runs[f"fine_grained/{folder}/{model}"] = Run(
                comment + ONE_GPU, {"model": model, **settings, "num_classes": classes}
            )
    return runs


def heads() -> dict[str, Run]:
    """Heads that came after iSQRT-COV: on a frozen transformer, from scratch, and fine-tuned."""
    # Every rate but the head's is below the scale from which on parameters are trained at all.
    frozen: Settings = dict(layer_decay=0.2, layer_decay_no_opt_scale=0.5)
    probing: Settings = {
        **ALL,
        **dict(model="second_order", pretrained=True, num_classes=1000, input_size=[3, 224, 224]),
        **dict(opt="adamw", weight_decay=0.05, batch_size=256, lr=1e-4, drop_path=0.1),
        **dict(epochs=30, cooldown_epochs=10, sched="cosine", warmup_epochs=5, warmup_lr=1e-7, min_lr=1e-8),
        **dict(model_ema=True, model_ema_decay=0.99992, amp=True),
        **frozen,
    }
    vit = "vit_base_patch16_224.augreg_in21k"
    mp = (
        "the recipe of moment probing (AdamW, batch 256 in all, lr 1e-4, 30 epochs and 10 to cool down). The backbone "
        "is frozen: of layer_decay's rates, only the head's is used."
    )
    dropcov: Settings = {
        **{**IMAGENET, "color_jitter": 0.0},
        **SGD,
        **dict(model="isqrt_resnet50", gp="dropcov", model_kwargs=dict(isqrt_dim=128), batch_size=256, lr=0.1),
        **dict(epochs=100, sched="step", decay_epochs=30, decay_rate=0.1, warmup_epochs=0),
    }
    bdc: Settings = {
        **ALL,
        **dict(model="second_order", pretrained=True, num_classes=200, input_size=[3, 224, 224], gp="bdc", drop=0.5),
        **dict(model_kwargs=dict(backbone="resnet18.a1_in1k", isqrt_dim=128, output_stride=16)),
        **dict(opt="sgd", momentum=0.9, weight_decay=5e-4, batch_size=64, lr=0.05, epochs=100, sched="multistep"),
        **dict(decay_milestones=after(60, 80), decay_rate=0.1, warmup_epochs=0),
        **dict(layer_decay=0.2, layer_decay_min_scale=0.2),
    }
    runs = {
        "moment_vit_frozen": (
            f"Moment probing of ViT-B/16, ImageNet-1k, {mp} Accuracy reported by its authors: 83.15 %, where linear "
            "probing has 82.04 %; not measured by us.",
            dict(probing, gp="moment", model_kwargs=dict(backbone=vit)),
        ),
        "svpn_vit_frozen": (
            f"svPN (SoT's head) on a frozen ViT-B/16, ImageNet-1k, {mp} Our own combination: nothing is reported, and "
            "we have not measured it. SoT's authors train the whole network.",
            dict(
                probing,
                gp="svpn",
                model_kwargs=dict(backbone=vit, pool_kwargs=dict(num_heads=6, head_dim=24, drop=0.5)),
            ),
        ),
        "dropcov_resnet50": (
            "DropCov on ResNet-50, ImageNet-1k, its authors' recipe (SGD, batch 256 in all, lr 0.1 divided by 10 every "
            "30 epochs, 100 epochs, crop and flip), with the 128 channels of their table. Accuracy reported by its "
            "authors: 78.19 %; not measured by us.",
            dropcov,
        ),
        "bdc_resnet18": (
            "DeepBDC on ResNet-18, CUB-200-2011, fine-tuned from ImageNet weights; optimizer, weight decay and dropout "
            "are those of its authors' pretraining. The head learns five times as fast as the backbone. Our own recipe "
            "otherwise; nothing is reported for it, and we have not measured it. train.py cannot give the temperature "
            "the rate of its own that its authors give it: docs/backbones.md shows how. Data: "
            "https://www.vision.caltech.edu/datasets/cub_200_2011/, as folders train/CLASS and val/CLASS.",
            bdc,
        ),
    }
    return {f"heads/{name}": Run(comment + ONE_GPU, settings) for name, (comment, settings) in runs.items()}


RUNS: dict[str, Run] = {
    **imagenet_1k(),
    **imagenet_250(),
    **cifar100(),
    **cifar10(),
    **small(),
    **fine_tune(),
    **fine_grained(),
    **heads(),
}
"""Every file, by its path without suffix."""


def text(run: Run) -> str:
    """The file of a run."""
    words, lines = run.comment.split(), ["#"]
    for word in words:
        if len(lines[-1]) + len(word) >= 118:
            lines.append("#")
        lines[-1] += f" {word}"
    settings = yaml.safe_dump(run.settings, default_flow_style=None, sort_keys=False)
    return "\n".join(lines) + f"\n# Written by train_configs/recipes.py.\n\n{settings}"


def main() -> None:
    """Write every file."""
    for name, run in RUNS.items():
        path = FOLDER / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(run))
    print(f"wrote {len(RUNS)} files")


if __name__ == "__main__":
    main()
