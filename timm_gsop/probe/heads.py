"""The heads that are compared, and the training of one of them on maps that are fixed."""

import os
import tempfile
import time
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from timm_gsop.checks import check_choice
from timm_gsop.layers import SECOND_ORDER_POOLS
from timm_gsop.probe.splits import Split

__all__ = ["HEADS", "Inputs", "Options", "Trained", "create_head", "inputs_of", "mlp_width", "search", "train_head"]

HEADS: ChainMap[str, Any] = ChainMap(SECOND_ORDER_POOLS, dict.fromkeys(("avg", "mlp")))
"""The heads by name: these two, then whatever the registry has."""
BATCH_SIZE, EPOCHS, MIN_STEPS, MAX_EPOCH_STEPS = 32, 12, 300, 250
"""Batches are larger where an epoch would have more steps: with many images, it is not their number that counts."""
RATE, DECAY = 1e-3, 0.1
"""Where the search for the learning rate and the weight decay starts."""
RATE_FACTOR, DECAY_FACTOR = 3.0, 10.0
MAX_TRIALS = 12
IN_MEMORY = 2**28
"""Bytes of pooled features that are kept in memory; more are kept in a file."""


class Options(NamedTuple):
    """What the search chooses."""

    lr: float
    weight_decay: float


class Trained(NamedTuple):
    """A trained head, in NumPy's arrays, which go from process to process.

    Attributes:
        logits: Logits of the test images.
        validation: Accuracy on the validation images, in percent.
        validation_loss: Cross entropy there.
        state: Its weights and buffers.
        train_seconds: Time to train it.
        infer_seconds: Time for the test images.
    """

    logits: np.ndarray
    validation: float
    validation_loss: float
    state: dict[str, np.ndarray]
    train_seconds: float
    infer_seconds: float


class Mlp(nn.Sequential):
    """Average pooling and a perceptron with one hidden layer, the strongest head without second-order statistics."""

    def __init__(self, in_features: int, hidden: int, num_classes: int) -> None:
        super().__init__(
            OrderedDict(
                global_pool=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                fc1=nn.Linear(in_features, hidden),
                act=nn.GELU(),
                fc=nn.Linear(hidden, num_classes),
            )
        )


def mlp_width(in_features: int, num_classes: int, parameters: int) -> int:
    """Hidden width with which :class:`Mlp` has about so many parameters."""
    return max(1, round((parameters - num_classes) / (in_features + 1 + num_classes)))


def create_head(network: Any, name: str, num_classes: int, seed: int, hidden: int = 512) -> nn.Sequential:
    """A new head, with the names of parameters that it has in a ``second_order`` network.

    Args:
        network: The ``second_order`` network, whose head is replaced.
        name: One of ``HEADS``.
        num_classes: Number of classes.
        seed: Seed of its initial weights.
        hidden: Hidden width of ``"mlp"``.

    Raises:
        ValueError: If the name is not accepted.
    """
    check_choice("heads", name, HEADS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return Mlp(network.num_features, hidden, num_classes)
        network.reset_classifier(0, "avg")  # a pool of the same type would be kept, with its weights
        network.reset_classifier(num_classes, name)
    parts = {part: getattr(network, part) for part in ("global_pool", "fc")}
    return nn.Sequential(OrderedDict(parts))


class Inputs(NamedTuple):
    """What a head is trained on: maps, or, where its pooling has no parameters, what the pooling makes of them.

    Attributes:
        values: (N, C, H, W), or (N, features); a tensor if they are on a GPU.
        pooled: Whether the pooling is done.
    """

    values: np.ndarray | torch.Tensor
    pooled: bool

    def batch(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """Some of them, in float32."""
        if isinstance(self.values, torch.Tensor):
            return self.values[torch.from_numpy(indices).to(self.values.device)].to(device, torch.float32)
        return torch.from_numpy(self.values[indices]).to(device, torch.float32)


def inputs_of(head: nn.Sequential, maps: np.ndarray, device: torch.device) -> Inputs:
    """Inputs for a head: a pooling without parameters runs once, and not in every epoch."""
    pool: nn.Module = head.global_pool  # type: ignore[assignment]
    if any(True for _ in pool.parameters()):
        return Inputs(_on_gpu(maps, device), pooled=False)
    pool = pool.eval().to(device)
    pooled: Any = None
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(maps)), -(-len(maps) // BATCH_SIZE)):
            found = pool(torch.from_numpy(maps[rows]).to(device, torch.float32)).cpu().numpy()
            if pooled is None:
                pooled = _new_array((len(maps), found.shape[1]))
            pooled[rows] = found
    return Inputs(_on_gpu(pooled, device), pooled=True)


def _on_gpu(values: np.ndarray, device: torch.device) -> np.ndarray | torch.Tensor:
    """A copy on the GPU, if it takes at most half of its free memory: a training step is shorter than a transfer."""
    if device.type != "cuda" or 2 * values.nbytes > torch.cuda.mem_get_info(device)[0]:
        return values
    found = torch.from_numpy(values[:0].copy()).new_empty(values.shape, device=device)
    for first in range(0, len(values), 4096):
        found[first : first + 4096] = torch.from_numpy(values[first : first + 4096].copy())
    return found


def _new_array(shape: tuple[int, int]) -> np.ndarray:
    if 4 * shape[0] * shape[1] <= IN_MEMORY:
        return np.empty(shape, np.float32)
    with tempfile.TemporaryFile() as file:  # it goes with the array
        if hasattr(os, "posix_fallocate"):  # a full disk is an error now, and not a crash when the array is written
            os.posix_fallocate(file.fileno(), 0, 4 * shape[0] * shape[1])
        return np.memmap(file, np.float32, shape=shape)


def train_head(
    head: nn.Sequential,
    inputs: Inputs,
    targets: np.ndarray,
    split: Split,
    options: Options,
    seed: int,
    device: torch.device,
    epochs: int | None = None,
) -> Trained:
    """Train a head with AdamW and a cosine schedule, and run it on the validation and test images.

    Args:
        head: As :func:`create_head` makes it.
        inputs: Inputs of all images.
        targets: Classes of all images.
        split: Which images are for what.
        options: Learning rate and weight decay.
        seed: Seed of the order of the images, and of dropout.
        device: Where it is trained.
        epochs: Passes over the training images; None for 12, and more where these would be fewer than 300 steps.
    """
    if inputs.pooled:
        head = nn.Sequential(OrderedDict((name, part) for name, part in head.named_children() if name != "global_pool"))
    head.to(device)
    labels = torch.from_numpy(targets).to(device)
    steps = min(max(1, len(split.train) // BATCH_SIZE), MAX_EPOCH_STEPS)
    epochs = epochs or max(EPOCHS, -(-MIN_STEPS // steps))
    optimizer = create_optimizer_v2(head, "adamw", lr=options.lr, weight_decay=options.weight_decay)
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", num_epochs=epochs, updates_per_epoch=steps, step_on_epochs=False
    )
    started = time.perf_counter()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        head.train()
        updates = 0
        for _ in range(epochs):
            order = split.train[torch.randperm(len(split.train)).numpy()]
            for batch in np.array_split(order, steps):
                scheduler.step_update(updates)
                loss = F.cross_entropy(head(inputs.batch(batch, device)), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                updates += 1
    train_seconds = time.perf_counter() - started
    head.eval()
    validation = _logits(head, inputs, split.validation, device)
    started = time.perf_counter()
    logits = _logits(head, inputs, split.test, device)
    infer_seconds = time.perf_counter() - started
    true = labels.cpu()[split.validation]
    accuracy = 100 * (validation.argmax(1) == true).double().mean().item()
    state = {name: value.detach().cpu().numpy().copy() for name, value in head.state_dict().items()}
    return Trained(
        logits.numpy(), accuracy, F.cross_entropy(validation, true).item(), state, train_seconds, infer_seconds
    )


@torch.inference_mode()
def _logits(head: nn.Module, inputs: Inputs, indices: np.ndarray, device: torch.device) -> torch.Tensor:
    batches = np.array_split(indices, -(-len(indices) // BATCH_SIZE))
    return torch.cat([head(inputs.batch(batch, device)).cpu() for batch in batches])


def search(trial: Callable[[Options], Trained]) -> tuple[Options, Trained]:
    """Find the learning rate and weight decay that are best on the validation images.

    Rates first: three are tried, and a step further as long as the best is at the edge. Then weight decays at the best
    rate, in the same way: so the best is inside of what was tried. At most ``MAX_TRIALS`` points are tried.

    Args:
        trial: Trains a head with given options.

    Returns:
        The best options, and what was trained with them.
    """
    best = (0, 0)
    results = {best: trial(_options(best))}
    for axis in (0, 1):
        while points := [point for point in _neighbours(best, axis) if point not in results]:
            for point in points[: MAX_TRIALS - len(results)]:
                results[point] = trial(_options(point))
            best = max(results, key=lambda point: results[point].validation)  # of equal ones the first
            if len(results) == MAX_TRIALS:
                break
    return _options(best), results[best]


def _options(point: tuple[int, int]) -> Options:
    return Options(RATE * RATE_FACTOR ** point[0], DECAY * DECAY_FACTOR ** point[1])


def _neighbours(point: tuple[int, int], axis: int) -> Iterator[tuple[int, int]]:
    for step in (-1, 1):
        yield (point[0] + step, point[1]) if axis == 0 else (point[0], point[1] + step)
