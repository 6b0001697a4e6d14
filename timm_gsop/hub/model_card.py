"""The model card: README.md of a repository on the Hugging Face Hub."""

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import ModelCardData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_gsop.hub.hub_folder import NO_LICENSE, HubFolder
from timm_gsop.layers import SecondOrderPool2d
from timm_gsop.layers.gsop import CovarianceExcitation
from timm_gsop.models.second_order import backbone_notes
from timm_gsop.viz.curves import read_summary

__all__ = ["count_macs", "model_card", "model_macs"]

NORMS = (torch.ops.aten._native_batch_norm_legit_no_training, torch.ops.aten.native_batch_norm)
"""Without products, but taken apart by PyTorch to look for some, which takes longer than everything else."""

HUB_DATASETS = {
    "ImageNet-1k": "ILSVRC/imagenet-1k",
    "CIFAR-10": "uoft-cs/cifar10",
    "Fashion-MNIST": "zalando-datasets/fashion_mnist",
}
RECIPE = (
    *("dataset", "pretrained", "epochs", "batch_size", "input_size", "opt", "lr", "momentum", "weight_decay", "sched"),
    *("warmup_epochs", "smoothing", "mixup", "cutmix", "aa", "reprob", "drop", "drop_path"),
    *("model_ema", "amp", "amp_dtype", "seed"),
)
"""What of train.py's arguments the card shows; args.yaml has all of them."""

REPOSITORY = "https://github.com/timm-gsop/timm-gsop"
"""Where strangers get this package: it is on no index."""

GSOP_CITATION = """\
@inproceedings{gao2019global,
  title     = {Global Second-order Pooling Convolutional Networks},
  author    = {Gao, Zilin and Xie, Jiangtao and Wang, Qilong and Li, Peihua},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2019}
}"""


def model_card(
    folder: HubFolder,
    repo_id: str,
    figure: str | None = None,
    license: str | None = None,
    permission: str | None = None,
) -> str:
    """Write the card from what is known: config.json, and what timm's train.py left.

    Args:
        folder: A checked folder.
        repo_id: The repository, ORG/NAME.
        figure: Name of the architecture's picture in the repository.
        license: Identifier of the weights' licence; None for the one that the folder states, if it does.
        permission: Who has permitted to publish weights whose authors state no licence, and where.

    Returns:
        Markdown with the Hub's YAML header.

    Raises:
        ValueError: If ``args.yaml`` or ``summary.csv`` is not what timm's train.py writes.
    """
    provenance = folder.config.get("provenance", {})
    notes = [note.partition(": ")[::2] for note in provenance.get("notes") or ()]
    data = [text for kind, text in notes if kind == "data"]
    recipe = [*(text for kind, text in notes if kind == "recipe"), *_recipe(folder.path)]
    metrics = [f"**{kind}**: {text}" for kind, text in notes if kind in ("measured", "reported")]
    results = [*metrics, *_results(folder.path)]
    no_license = provenance.get("license") == NO_LICENSE
    license = license or (None if no_license else provenance.get("license"))
    header = ModelCardData(
        license=license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "timm-gsop", "second-order-pooling"],
        datasets=[HUB_DATASETS[name] for name in data if name in HUB_DATASETS] or None,
        base_model=_base_model(provenance.get("origin_url")),
    )
    architecture = folder.config["architecture"]
    entrypoint = timm.model_entrypoint(architecture)
    what = (entrypoint.__doc__ or architecture).splitlines()[0]
    size = tuple(folder.model.pretrained_cfg["input_size"])
    macs = model_macs(folder.model, size)[""]
    facts = {
        "Architecture": f"`{architecture}`: {what}",
        "Weights": provenance.get("description"),
        "Origin": provenance.get("origin_url") and f"<{provenance['origin_url']}>",
        "Blocks": _neutral_blocks(folder.model),
        "Backbone": _backbone(folder),
        "Head": _head(folder.model),
        "Parameters": f"{sum(p.numel() for p in folder.model.parameters()) / 1e6:.2f} M (measured)",
        "Multiply-accumulates": f"{macs / 1e9:.2f} G for one image of {_times(size)} (measured)",
        "Classes": _classes(folder.config),
        "Licence": license or (f"{NO_LICENSE} by the authors of the weights" if no_license else "not stated"),
        "Permission to publish": permission,
    }
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# {repo_id.partition('/')[2]}",
        "A network with second-order (covariance) pooling or blocks, for timm with the package "
        f"[timm-gsop]({REPOSITORY}).",
        f"![Architecture]({figure})" if figure else "",
        _bullets(f"**{name}**: {value}" for name, value in facts.items() if value not in (None, "")),
        _section("Training data and recipe", [*data, *recipe]),
        _section("Results", results),
        _usage(repo_id, folder.config),
        f"## Citation\n\n```bibtex\n{_citations(folder.model)}\n```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(model: Any) -> str | None:
    """The head's name, what it does, its own options, and the features that the classifier reads."""
    pool = model.global_pool
    if not isinstance(pool, SecondOrderPool2d):
        return None
    options = ", ".join(f"{name}={value!r}" for name, value in (model.pool_kwargs or {}).items())
    what = (inspect.getdoc(type(getattr(pool, "head", pool))) or "").splitlines()[0]
    return f"`{pool.pool_type}`{f' ({options})' if options else ''}: {what} {pool.out_features} features"


def _citations(model: Any) -> str:
    """BibTeX of the papers of blocks and head; of the blocks' for a network that has neither."""
    pool = model.global_pool
    of_head = inspect.cleandoc(pool.citation) if isinstance(pool, SecondOrderPool2d) else ""
    has_blocks = any(isinstance(module, CovarianceExcitation) for module in model.modules())
    of_blocks = GSOP_CITATION if has_blocks or not of_head else ""
    return "\n".join(filter(None, (of_blocks, of_head)))


def _classes(config: dict[str, Any]) -> str:
    """Number of classes, and the first of their names where these are words."""
    names = config.get("label_names") or ()
    if not names or config.get("label_descriptions"):
        return str(config["num_classes"])
    shown = list(names.values() if isinstance(names, dict) else names)
    return f"{config['num_classes']}: {', '.join(map(str, shown[:10]))}{', …' if len(shown) > 10 else ''}"


def _base_model(origin_url: Any) -> str | None:
    """Id of the repository on the Hub that the weights come from, for the card's header."""
    found = re.fullmatch(r"https://huggingface\.co/([^/]+/[^/]+)", str(origin_url))
    return found[1] if found else None


def _neutral_blocks(model: nn.Module) -> str | None:
    """What is said of blocks that still are as ``neutral_start`` leaves them: their last convolution is zero."""
    neutral = [
        name.removesuffix(".excitation")
        for name, module in model.named_modules()
        if isinstance(module, CovarianceExcitation)
        and not any(p.count_nonzero() for p in module.expand_conv.parameters())
    ]
    if not neutral:
        return None
    return (
        f"{len(neutral)} are untrained and neutral ({', '.join(f'`{name}`' for name in neutral)}): they scale every "
        "channel alike, and the layers around them compensate for that, so the network computes what its base did. "
        "Fine-tune it to make use of them."
    )


def _backbone(folder: HubFolder) -> str | None:
    """Of a ``second_order``: its backbone and, if it started from their weights, these weights' licence and origin."""
    name = folder.config.get("model_args", {}).get("backbone")
    if folder.config["architecture"] != "second_order" or name is None:
        return None
    notes = folder.config.get("pretrained_cfg", {}).get("notes") or ()
    if not notes and _training_arguments(folder.path).get("pretrained"):
        notes = backbone_notes(name)
    known = dict(note.partition(": ")[::2] for note in notes)
    if "backbone" not in known:
        return f"timm's `{name}`; it is not recorded whether training started from pretrained weights"
    return (
        f"timm's `{known['backbone']}`, whose pretrained weights training started from "
        f"(licence: {known['backbone licence']}; origin: {known['backbone origin']})"
    )


def _training_arguments(path: Path) -> dict[str, Any]:
    """What timm's train.py was given, if it left that."""
    if not (path / "args.yaml").exists():
        return {}
    try:
        return dict(yaml.safe_load((path / "args.yaml").read_text()))
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path / 'args.yaml'} cannot be read; accepted: what timm's train.py writes.") from error


def _recipe(path: Path) -> list[str]:
    given = _training_arguments(path)
    if not given:
        return []
    shown = [f"`{name}: {given[name]}`" for name in RECIPE if given.get(name) not in (None, "", False, 0, 0.0)]
    return [f"timm's `train.py -c args.yaml`: {', '.join(shown)}"]


def _results(path: Path) -> list[str]:
    if not (path / "summary.csv").exists():
        return []
    summary = read_summary(path / "summary.csv")
    epochs, top1 = summary["epoch"], summary["eval_top1"]
    return [
        f"**measured**: top-1 {top1[i]:.2f} % after epoch {epochs[i]:.0f}, the {which}, on the recipe's validation "
        "split, by timm's `train.py -c args.yaml` (`summary.csv`)"
        for which, i in {"last": -1, "best": top1.index(max(top1))}.items()
    ]


def _usage(repo_id: str, config: dict[str, Any]) -> str:
    return f"""## Use

```
pip install git+{REPOSITORY}
```

Without the package, timm and transformers do not know `{config["architecture"]}`, and upgrading them does not help.

```python
import timm
from PIL import Image

model = timm.create_model("hf-hub:{repo_id}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
probabilities = model(transform(Image.open("image.jpg").convert("RGB"))[None]).softmax(dim=1)
```

Feature maps of every stage:

```python
backbone = timm.create_model("hf-hub:{repo_id}", pretrained=True, features_only=True)
```"""


def _section(title: str, lines: list[str]) -> str:
    return f"## {title}\n\n{_bullets(lines)}" if lines else ""


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _times(size: tuple[int, ...]) -> str:
    return "×".join(map(str, size))


def count_macs(work: Callable[[], Any]) -> Counter[str]:
    """Count the multiply-accumulates of a call: its convolutions and matrix products, as PyTorch counts them.

    Args:
        work: Anything to call without arguments.

    Returns:
        Multiply-accumulates by the name of the module that runs them, with those of its children; ``""`` for all.

    Examples:
        >>> a = torch.ones(2, 3)
        >>> count_macs(lambda: a @ a.T)[""]
        12
    """
    with FlopCounterMode(display=False, custom_mapping=dict.fromkeys(NORMS, _nothing)) as counter:
        work()
    # It counts two operations for a multiply-accumulate, and its names begin with the class of the module called.
    counts = {name: sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    of_modules = {name.partition(".")[2]: macs for name, macs in counts.items() if "." in name}
    return Counter({"": counts["Global"], **of_modules})


def _nothing(*args: Any, **kwargs: Any) -> int:
    return 0


def model_macs(model: nn.Module, size: Sequence[int]) -> Counter[str]:
    """Count the multiply-accumulates of a model for one image; the meta device, where nothing is computed, will do.

    Args:
        model: The model, in evaluation.
        size: Shape of the image, (C, H, W).

    Returns:
        As :func:`count_macs`.

    Examples:
        >>> model_macs(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1)), (3, 4, 4))
        Counter({'': 512, '0': 384, '1': 128})
    """
    x = torch.zeros(1, *size, device=next(model.parameters()).device)
    # Without gradients, the square root takes two matrix products fewer than the iteration as the paper writes it.
    with torch.enable_grad():
        return count_macs(partial(model, x))
