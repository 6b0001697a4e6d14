"""Time and memory of alternatives, side by side in one process."""

import ctypes
import json
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any, NamedTuple

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

__all__ = ["Timing", "keep_freed_memory", "machine", "peak_bytes", "saved_bytes", "seconds", "time_paired"]

Work = Callable[[], Any]
CPU = torch.device("cpu")


class Timing(NamedTuple):
    """Median seconds of a run; median and quartiles of its ratio to the reference's run of the same round."""

    seconds: float
    ratio: float
    low: float
    high: float


def keep_freed_memory() -> None:
    """Ask the C library not to give memory back to the system, as jemalloc and tcmalloc do not either.

    What the system takes to hand out pages again is no property of what is compared, and varies from run to run. Only
    glibc has the setting; elsewhere nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for setting in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(setting, 2**31 - 1)


def time_paired(
    works: Mapping[str, Work], reference: str, rounds: int = 15, device: torch.device = CPU
) -> dict[str, Timing]:
    """Run the alternatives in turn, ``rounds`` times, in alternating order.

    A ratio is of two runs in the same round, so that what slows the machine for longer than a round cancels.

    Args:
        works: The alternatives by name.
        reference: The name of what the others are compared to.
        rounds: How often; two more warm up.
        device: Where they run.

    Returns:
        The timing of each.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(rounds + 2):
        for name in names if round_ % 2 else reversed(names):
            times[name].append(seconds(works[name], device))
    kept = {name: each[2:] for name, each in times.items()}
    timings = {}
    for name, each in kept.items():
        ratios = [own / its for own, its in zip(each, kept[reference], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        timings[name] = Timing(median(each), median(ratios), low, high)
    return timings


def seconds(work: Work, device: torch.device = CPU) -> float:
    """Time one run: on a GPU between two of its events, elsewhere by the clock."""
    if device.type != "cuda":
        start = perf_counter()
        work()
        return perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    work()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def saved_bytes(module: nn.Module, x: torch.Tensor) -> int:
    """Memory of what autograd keeps for the backward pass of ``module(x)``, besides ``x`` and the parameters."""
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
    """Most memory that PyTorch had allocated on ``device`` at a time during ``work``, beyond what it had before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
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
    """What the figures depend on, beside the code."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        found = [line for line in _cpuinfo() if line.startswith("model name")]
        name = found[0].partition(": ")[2] if found else platform.processor()
    return dict(
        device=name,
        threads=torch.get_num_threads(),
        float32_products=torch.get_float32_matmul_precision(),
        capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
