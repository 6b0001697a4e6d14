"""Time and memory of alternatives, measured side by side, and of two checkouts of this package.

``python -m benchmarks.timing`` is the process in which benchmarks.speed runs the modules of one checkout.
"""

import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WARM_UP = 2

Work = Callable[[], Any]


class Timing(NamedTuple):
    """Median seconds of a run; median and quartiles of its ratio to the reference's run in the same round."""

    seconds: float
    ratio: float
    low: float
    high: float


def keep_freed_memory() -> None:
    """Ask glibc not to return freed memory to the system, as jemalloc and tcmalloc do by default.

    Getting the pages back takes a time that varies from run to run and has nothing to do with the alternatives.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(setting, 2**31 - 1)


def seconds(work: Work, device: torch.device = CPU) -> float:
    """Time one run, waiting for the device to finish."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for a GPU to finish its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_paired(
    works: Mapping[str, Work], reference: str, rounds: int = 15, device: torch.device = CPU
) -> dict[str, Timing]:
    """Time the alternatives in turn, in alternating order.

    Each ratio is of two runs in the same round, so whatever slows the machine for longer than a round cancels out.

    Args:
        works: The alternatives by name.
        reference: The alternative that the others are compared with.
        rounds: The number of rounds, after two to warm up.
        device: Where they run.

    Returns:
        The timing of each alternative.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(WARM_UP + rounds):
        for name in names if round_ % 2 else reversed(names):
            times[name].append(seconds(works[name], device))
    timings = {}
    for name, each in times.items():
        ratios = [own / other for own, other in zip(each[WARM_UP:], times[reference][WARM_UP:], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        timings[name] = Timing(median(each[WARM_UP:]), median(ratios), low, high)
    return timings


def run_of(module: nn.Module, x: torch.Tensor, training: bool, bfloat16: bool = False) -> Work:
    """Return what is timed of a module: a forward pass in inference, or a forward and backward pass in training."""
    module.train(training)
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=bfloat16)

    def infer() -> None:
        with torch.inference_mode(), autocast():
            module(x)

    if not training:
        return infer
    with autocast():
        gradient = torch.randn_like(module(x))

    def train() -> None:
        with autocast():
            output = module(x)
        output.backward(gradient)
        module.zero_grad()
        x.grad = None

    return train


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Memory that autograd keeps for the backward pass of ``module(x)``, besides ``x`` and the parameters."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        module(x)
    for existing in (x, *module.parameters(), *module.buffers()):
        kept.pop(existing.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(work: Work, device: torch.device = CPU) -> int:
    """Most memory that PyTorch has allocated on ``device`` at a time during ``work``, beyond what it had before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    allocations = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    allocated = peak = 0
    for event in allocations:
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def machine(device: torch.device = CPU) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
        name = next(names, platform.processor())
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        float32_products=torch.get_float32_matmul_precision(),
        capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


class Checkout:
    """A process that imports ``timm_gsop`` from another folder, and runs its modules when asked.

    Args:
        folder: A checkout of this repository.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "timm_gsop/__init__.py").exists():
            raise ValueError(f"folder={str(folder)!r} has no timm_gsop; accepted: a checkout of this repository.")
        # Only the package comes from there; this code comes from here.
        self.links = tempfile.TemporaryDirectory()
        Path(self.links.name, "timm_gsop").symlink_to(folder.resolve() / "timm_gsop")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.timing"],
            cwd=self.links.name,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([self.links.name, str(ROOT)])},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *request: Any) -> Any:
        """Call a method of the process's :class:`Modules`: its name, then its arguments."""
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("The process that runs the other checkout ended; its error is above.")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.communicate()
        self.links.cleanup()


class Modules:
    """What a :class:`Checkout` answers: the module that was created last, run and measured."""

    def create(
        self, name: str, args: Sequence[Any], shape: Sequence[int], training: bool, bfloat16: bool, device: str
    ) -> int:
        """Create a layer of ``timm_gsop``, or else a model, and return its peak memory in bytes."""
        import timm_gsop

        torch.manual_seed(0)
        self.device = torch.device(device)
        module = getattr(timm_gsop, name)(*args) if hasattr(timm_gsop, name) else timm.create_model(name, *args)
        x = torch.randn(*shape, device=self.device).requires_grad_(training and shape[1] != 3)
        self.work = run_of(module.to(self.device), x, training, bfloat16)
        self.work()
        return peak_bytes(self.work, self.device)

    def run(self, times: int) -> None:
        """Run it so often."""
        for _ in range(times):
            self.work()
        synchronize(self.device)


def answer_requests() -> None:
    """Answer what :meth:`Checkout.ask` writes, until it closes the pipe."""
    keep_freed_memory()
    modules = Modules()
    for line in sys.stdin:
        method, *args = json.loads(line)
        print(json.dumps(getattr(modules, method)(*args)), flush=True)


if __name__ == "__main__":
    answer_requests()
