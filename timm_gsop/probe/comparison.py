"""The comparison: maps once, every head with the same search and the same splits, differences with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import balanced_accuracy_score
from tqdm import tqdm

from timm_gsop.checks import check_choice, check_positive_int
from timm_gsop.hub.hub_folder import check_new_folder
from timm_gsop.layers import SECOND_ORDER_POOLS
from timm_gsop.probe.head_cache import Found, cache_file, cached
from timm_gsop.probe.heads import HEADS, Options, Trained, create_head, inputs_of, mlp_width, search, train_head
from timm_gsop.probe.images import Images, read_images
from timm_gsop.probe.maps import cached_maps, unreadable_images
from timm_gsop.probe.network import Extractor, level_name
from timm_gsop.probe.processes import in_processes
from timm_gsop.probe.report import write_report
from timm_gsop.probe.saving import Choice, save_network
from timm_gsop.probe.splits import Split, draw_splits, keep_readable, take_some
from timm_gsop.probe.statistics import Difference, paired_difference
from timm_gsop.probe.table import Row, Table
from timm_gsop.probe.threads import default_cache, default_device, free_cores, threads

__all__ = ["run"]


def run(
    data_dir: str | Path,
    backbone: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    levels: Sequence[int | None] = (-1, -2),
    heads: Sequence[str] | None = None,
    img_size: int | None = None,
    isqrt_dim: int = 64,
    dataset: str = "",
    dataset_download: bool = False,
    train_images: int | None = None,
    test_images: int | None = None,
    splits: int = 3,
    epochs: int | None = None,
    seed: int = 0,
    device: str | None = None,
    batch_size: int = 64,
    workers: int = 0,
    cache: str | Path | None = None,
    cache_size: float | None = None,
    skip_unreadable: bool = False,
    output: str | Path | None = None,
    save: str | None = None,
    progress: bool = True,
) -> Table:
    """Find out which pooling helps on your images: heads on the maps of a frozen backbone, compared on test images.

    Every head gets the same search of learning rate and weight decay, on validation images, and is then trained once
    for each split. Test images decide nothing: not the options, not which head is called the best, not what is saved.

    Args:
        data_dir: Class folders, or folders train, validation (or val) and test with class folders in each. Where there
            is no test folder the validation images test; where there are no parts a quarter of the images does.
        backbone: A network of timm, with or without the tag of its weights.
        checkpoint: File with weights of the backbone, in place of those that its name stands for.
        pretrained: Whether the backbone has weights at all; random ones otherwise.
        levels: Feature levels, as indices into the backbone's ``feature_info``; negative ones count from the end, None
            is what its ``forward_features`` returns.
        heads: Some of ``HEADS``, None for all; ``"avg"``, to which all are compared, is always there. Heads that read
            a class token are left out for backbones that have one, because maps do not have it.
        img_size: Height and width of the images; None for the backbone's own.
        isqrt_dim: Channels after reduction, of heads that reduce.
        dataset: Data set as timm's ``--dataset`` names it, ``"torch/cifar10"`` for one; ``""`` for folders.
        dataset_download: Whether torchvision may download it.
        train_images: How many of the images outside the test part to use; None for all.
        test_images: How many of the test part to use; None for all.
        splits: How often every head is trained, each time with another seed and, where no validation part is given,
            with other validation images.
        epochs: Passes over the training images in each training; None for 12, and more where these would be fewer than
            300 steps.
        seed: Seed of the first split, and of everything that is drawn.
        device: Where the backbone runs and heads are trained; None for the best one there is.
        batch_size: Images in a batch of the backbone.
        workers: Processes that read images.
        cache: Where maps are kept; None for ``timm-gsop/probe`` in the user's cache folder.
        cache_size: The most GiB that it may have; None for any number.
        skip_unreadable: Whether to leave out images that cannot be read.
        output: Where to write ``results.csv``, ``results.json``, ``differences.png`` and, with ``save``, ``model``;
            None for nowhere.
        save: A head, or ``"best"``, the best by validation of all but ``"mlp"``, which is no head of ``second_order``.
            The network of its best split by validation is written to ``output/model``.
        progress: Whether to show progress.

    Returns:
        The table: a row for each head and level, and one sentence that concludes.

    Raises:
        ValueError: If an argument, or an image, is not accepted.
        RuntimeError: If the backbone's weights cannot be loaded.
        OSError: If there is no space for the maps.
    """
    counts = dict(splits=splits, epochs=epochs, isqrt_dim=isqrt_dim, batch_size=batch_size, img_size=img_size)
    for name, value in counts.items():
        if value is not None:
            check_positive_int(name, value)
    for head in heads or ():
        check_choice("heads", head, HEADS)
    heads = [head for head in HEADS if heads is None or head in {"avg", *heads}]
    folder = _check_save(save, output, heads)
    images = take_some(read_images(data_dir, dataset, dataset_download), train_images, test_images, seed)
    parts = draw_splits(images, splits, seed)
    device = device or default_device()
    cores = free_cores()  # before this run is itself what the cores are busy with
    extractor = Extractor(backbone, levels, checkpoint, pretrained, img_size, device, dict(isqrt_dim=isqrt_dim))
    heads = _without_token(heads, extractor, save)
    with threads(cores):
        maps = cached_maps(
            images,
            extractor,
            Path(cache) if cache is not None else default_cache(),
            limit=None if cache_size is None else cache_size * 2**30,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
        )
    unreadable = unreadable_images(maps[0])
    _report_unreadable(images, unreadable, skip_unreadable)
    parts = keep_readable(images, parts, unreadable)
    task = _Task(images.targets, len(images.class_names), parts, seed, extractor.device, epochs)
    workers = cores if extractor.device.type == "cpu" else 1
    entries = _compare(extractor, maps, heads, task, workers, progress)
    table = _table(entries, extractor, images, parts)
    if save is not None:
        chosen = _choose(entries, None if save == "best" else save, without=("mlp",))
        row = table.row(chosen.head, level_name(chosen.level))
        top1 = row.each[chosen.best]
        table.about["saved"] = dict(head=row.head, level=row.level, top1=top1)
        state, options = chosen.trained[chosen.best].state, extractor.options
        choice = Choice(backbone, chosen.level, chosen.head, state, top1, checkpoint, pretrained, options)
        save_network(choice, folder, extractor.data_config, images.class_names, row, str(data_dir), len(parts[0].test))
    if output is not None:
        write_report(table, Path(output))
    return table


@dataclass(frozen=True)
class _Task:
    """What all heads have in common."""

    targets: np.ndarray
    num_classes: int
    splits: list[Split]
    seed: int
    device: torch.device
    epochs: int | None

    def parts(self) -> list[str | np.ndarray]:
        """What the result of a training depends on."""
        splits = [part for split in self.splits for part in (split.train, split.validation, split.test)]
        sizes = [len(part) for part in splits]
        return [f"{self.num_classes} {self.seed} {self.epochs} {sizes}", self.targets, *splits]


@dataclass(frozen=True, eq=False)
class _Entry:
    """A head on a level, after the search and all splits."""

    level: int | None
    head: str
    features: int
    head_params: int
    backbone_params: int
    options: Options
    trained: list[Trained]

    @property
    def validation(self) -> float:
        return float(np.mean([found.validation for found in self.trained]))

    @property
    def best(self) -> int:
        """The split that is best by validation."""
        scores = [(found.validation, -found.validation_loss) for found in self.trained]
        return scores.index(max(scores))

    def correct(self, targets: np.ndarray, best: int = 1) -> np.ndarray:
        """(splits, test images): whether the true class is among the ``best`` ones."""
        logits = torch.from_numpy(np.stack([found.logits for found in self.trained]))
        among = logits.topk(min(best, logits.shape[-1])).indices.numpy()
        return (among == targets[:, None]).any(-1)


def _compare(
    extractor: Extractor, maps: Sequence[np.ndarray], heads: Sequence[str], task: _Task, workers: int, progress: bool
) -> list[_Entry]:
    """Search, and train on every split, each of the heads on the maps of each level.

    Several heads at a time, of one thread each: the matrices are small, so that more threads for one head gain little,
    and lose much on a busy machine.
    """
    levels = list(zip(extractor.levels, maps, strict=True))
    jobs = [(level, level_maps, head) for level, level_maps in levels for head in heads]
    hidden = {level: _mlp_width(extractor.networks[level], heads, task) for level in extractor.levels}

    def work(index: int) -> _Entry:
        level, level_maps, head = jobs[-1 - index]  # the last heads take longest, and so come first
        return _compare_one(extractor.networks[level], level, level_maps, head, hidden[level], task)

    with threads(1):
        found = in_processes(work, len(jobs), workers)
        entries = list(tqdm(found, desc="heads", total=len(jobs), unit="head", disable=not progress))
    return entries[::-1]


def _mlp_width(network: Any, heads: Sequence[str], task: _Task) -> int:
    sizes = [_count(create_head(network, head, task.num_classes, task.seed)) for head in heads if head != "mlp"]
    return mlp_width(network.num_features, task.num_classes, max(sizes))


def _compare_one(network: Any, level: int | None, maps: np.ndarray, head: str, hidden: int, task: _Task) -> _Entry:
    def new(split: int) -> Any:
        return create_head(network, head, task.num_classes, task.seed + split, hidden)

    def search_and_train() -> Found:
        inputs = inputs_of(first, maps, task.device)

        def train(options: Options, split: int) -> Trained:
            about = (options, task.seed + split, task.device, task.epochs)
            return train_head(new(split), inputs, task.targets, task.splits[split], *about)

        options, found = search(lambda options: train(options, 0))
        return options, [found, *(train(options, split) for split in range(1, len(task.splits)))]

    first = new(0)
    features, parameters = first.fc.in_features, _count(first)
    options, trained = cached(cache_file(maps, head, first, task.parts()), search_and_train)
    return _Entry(level, head, features, parameters, _count(network.backbone), options, trained)


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _table(entries: list[_Entry], extractor: Extractor, images: Images, splits: list[Split]) -> Table:
    test = splits[0].test
    targets = images.targets[test]
    reference = next(entry for entry in entries if entry.head == "avg")
    shapes = dict(zip(extractor.levels, extractor.shapes, strict=True))
    rows = []
    for entry in entries:
        right, right5 = entry.correct(targets), entry.correct(targets, 5)
        each = tuple(100 * right.mean(1))
        difference = paired_difference(right, reference.correct(targets))
        predicted = [found.logits.argmax(1) for found in entry.trained]
        channels, height, width = shapes[entry.level]
        config = extractor.data_config
        rows.append(
            Row(
                model=f"{extractor.backbone}/{level_name(entry.level)}/{entry.head}",
                top1=float(np.mean(each)),
                top1_err=100 - float(np.mean(each)),
                top5=100 * float(right5.mean()),
                top5_err=100 - 100 * float(right5.mean()),
                param_count=(entry.backbone_params + entry.head_params) / 1e6,
                img_size=config["input_size"][-1],
                crop_pct=config["crop_pct"],
                interpolation=config["interpolation"],
                level=level_name(entry.level),
                head=entry.head,
                channels=channels,
                height=height,
                width=width,
                features=entry.features,
                head_params=entry.head_params,
                lr=entry.options.lr,
                weight_decay=entry.options.weight_decay,
                validation=entry.validation,
                spread=float(np.std(each, ddof=1)) if len(each) > 1 else 0.0,
                difference=difference.mean,
                low=difference.low,
                high=difference.high,
                balanced=100 * float(np.mean([balanced_accuracy_score(targets, p) for p in predicted])),
                train_seconds=float(np.mean([found.train_seconds for found in entry.trained])),
                infer_seconds=1000 / len(test) * float(np.mean([found.infer_seconds for found in entry.trained])),
                each=tuple(map(float, each)),
            )
        )
    best = rows[entries.index(_choose(entries))]
    counts = np.bincount(images.targets, minlength=len(images.class_names))
    about = dict(
        backbone=extractor.backbone,
        weights=extractor.weights,
        images=dict(zip(images.class_names, counts.tolist(), strict=True)),
        train=len(splits[0].train),
        validation=len(splits[0].validation),
        test=len(test),
        splits=len(splits),
        torch=torch.__version__,
    )
    if not (images.parts == "test").any() and not (images.parts == "validation").any():
        about["test_images"] = [images.names[i] for i in test]
    reference_row = rows[entries.index(reference)]
    note = _left_out(extractor)
    return Table(tuple(rows), _conclude(best, reference_row), best, reference_row, _is_uneven(counts), about, note)


def _is_uneven(counts: np.ndarray) -> bool:
    return counts.max() > 1.5 * max(1, counts.min())


def _choose(entries: list[_Entry], head: str | None = None, without: Sequence[str] = ()) -> _Entry:
    """The entry that is best by validation; of equal ones the smallest."""
    candidates = [entry for entry in entries if head in (None, entry.head) and entry.head not in without]
    return max(candidates, key=lambda entry: (entry.validation, -entry.head_params))


def _conclude(best: Row, reference: Row) -> str:
    what = f"By validation {best.head} on level {best.level} is best, with {best.top1:.2f} % on the test images"
    base = f"{reference.head} on level {reference.level}"
    if best is reference:
        return f"{what}: that is average pooling, and no other head is better by validation."
    difference = Difference(best.difference, best.low, best.high)
    interval = f"{difference.low:+.2f} to {difference.high:+.2f}"
    if difference.is_none:
        return f"{what}: no difference to {base} ({difference.mean:+.2f} points, 95 % interval {interval}, holds zero)."
    word = "above" if difference.mean > 0 else "below"
    return f"{what}, {abs(difference.mean):.2f} points {word} {base} (95 % interval {interval})."


def _left_out(extractor: Extractor) -> str:
    """What to say where the maps were not compared that everybody who takes the backbone as it is uses."""
    if extractor.left_out is None:
        return ""
    shape, levels = "×".join(map(str, extractor.left_out)), " ".join(map(level_name, extractor.levels))
    return (
        f"Not compared: level final, {shape}, which the backbone's own head reads. "
        f"--levels final {levels} compares it too."
    )


def _report_unreadable(images: Images, unreadable: np.ndarray, skip: bool) -> None:
    if not len(unreadable):
        return
    shown = [f"{images.names[i]}: {images.problem(i)}" for i in unreadable[:5]]
    text = f"{len(unreadable)} of {len(images)} images cannot be used: {'; '.join(shown)}"
    text += f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    if not skip:
        raise ValueError(f"{text}. Mend or remove them, or pass --skip-unreadable.")
    print(f"{text}. They are skipped.")


def _without_token(heads: Sequence[str], extractor: Extractor, save: str | None) -> list[str]:
    """Leave out heads that would read a class token, which is not in the maps."""
    if not extractor.network.has_class_token:
        return list(heads)
    out = [head for head in heads if head in SECOND_ORDER_POOLS and SECOND_ORDER_POOLS[head].takes_token]
    if save in out:
        raise ValueError(f"save={save!r} is not accepted for {extractor.backbone}: it reads the class token as well.")
    if out:
        print(f"Left out for {extractor.backbone}, whose class token they would read: {', '.join(out)}.")
    return [head for head in heads if head not in out]


def _check_save(save: str | None, output: str | Path | None, heads: Sequence[str]) -> Path:
    folder = Path(output or ".") / "model"
    if save is not None:
        accepted = ["best", *(head for head in heads if head != "mlp")]
        check_choice("save", save, accepted)
        if output is None:
            raise ValueError("save needs output, the folder to write to.")
        check_new_folder(folder)
    return folder
