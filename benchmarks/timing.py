"""Time and memory of alternatives, side by side. As a command, the process that runs the modules of a checkout."""

import argparse
import ctypes
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import timm
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks import ROOT

WARM_UP = 2
Work = Callable[[], Any]


def time_paired(works: Mapping[str, Work], rounds: int, repeats: int = 1) -> dict[str, dict[str, float]]:
    """Time alternatives in turn, in alternating order, for ``rounds`` rounds after two to warm up.

    Returns the median seconds of each, by its ``repeats`` when called; and the median and quartiles of its ratio
    to the first alternative in the same round, where whatever slows the machine for longer than a round cancels out.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for round_ in range(WARM_UP + rounds):
        for name in names if round_ % 2 else reversed(names):
            times[name].append(seconds(works[name]))
    timings = {}
    for name, each in times.items():
        ratios = [own / reference for own, reference in zip(each, times[names[0]], strict=True)][WARM_UP:]
        low, _, high = quantiles(ratios, n=4)
        timings[name] = dict(seconds=median(each[WARM_UP:]) / repeats, ratio=median(ratios), low=low, high=high)
    return timings


def seconds(work: Work) -> float:
    """Time one run, from an idle GPU to an idle GPU if there is one."""
    synchronize()
    start = perf_counter()
    work()
    synchronize()
    return perf_counter() - start


def synchronize() -> None:
    """Wait for the GPU, if one is in use."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def run_of(module: nn.Module, x: torch.Tensor, training: bool, bfloat16: bool = False, compiled: bool = False) -> Work:
    """Return what is timed of a module: a forward pass in inference, or a forward and backward pass in training."""
    autocast = partial(torch.autocast, x.device.type, torch.bfloat16, enabled=bfloat16)
    with torch.no_grad(), autocast():
        gradient = torch.randn_like(module.train()(x))  # and batch normalization has statistics
    module.train(training)
    run = torch.compile(module) if compiled else module

    def work() -> None:
        with torch.inference_mode(not training), autocast():
            output = run(x)
        if training:
            output.backward(gradient)
            module.zero_grad()
            x.grad = None

    return work


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


def peak_bytes(work: Work) -> int:
    """Most memory that PyTorch has allocated at a time during ``work``, beyond what it had before."""
    if torch.cuda.is_initialized():
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
    allocated = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def machine(device: str) -> dict[str, Any]:
    """What the figures depend on, besides the code."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = re.findall("model name.*: (.*)", cpuinfo) or [platform.processor()]
    return dict(
        device=cpu[0] if device == "cpu" else torch.cuda.get_device_name(),
        threads=torch.get_num_threads(),
        float32_products=torch.get_float32_matmul_precision(),
        capability=torch.backends.cpu.get_cpu_capability(),
        python=platform.python_version(),
        torch=torch.__version__,
        timm=timm.__version__,
    )


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that the commands share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--json", type=Path, help="keep the figures in this file")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--rounds", type=int, default=15, help="how often each alternative is timed")
    products = dict(default="highest", choices=("highest", "high", "medium"))
    options.add_argument("--float32-products", **products, help="torch.set_float32_matmul_precision")
    return options


def set_up(float32_products: str = "highest") -> None:
    """Prepare the process: seed, precision of products, and freed memory that stays with the process.

    jemalloc and tcmalloc keep freed memory by default, glibc on request. Getting it back takes a varying time.
    """
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(float32_products)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for setting in (-1, -3) if mallopt else ():  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(setting, 2**31 - 1)


def write(result: Mapping[str, Any], path: Path | None) -> None:
    """Write figures as JSON, if there is a path to write them to."""
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n")


class Checkout:
    """A process that imports ``timm_gsop`` from a checkout of this repository, and ends with this object."""

    def __init__(self, folder: Path) -> None:
        if not (folder / "timm_gsop/__init__.py").exists():
            raise ValueError(f"folder={str(folder)!r} has no timm_gsop; accepted: a checkout of this repository.")
        # Only the package comes from there; this code comes from here.
        self.links = tempfile.TemporaryDirectory()
        Path(self.links.name, "timm_gsop").symlink_to(folder.resolve() / "timm_gsop")
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([self.links.name, str(ROOT)])}
        command = [sys.executable, "-m", "benchmarks.timing"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, cwd=self.links.name, env=env, text=True, **pipes)

    def ask(self, *request: Any) -> Any:
        """Call :func:`create` there and return the peak memory of a run; or, with a number, run it so often."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("The process that runs the other checkout ended; its error is above.")
        return json.loads(answer)


def serve() -> None:
    """Answer the requests of a :class:`Checkout` until it closes the pipe."""
    set_up()
    for line in sys.stdin:
        what, *options = json.loads(line)
        if options:
            work = create(what, *options)
            print(peak_bytes(work), flush=True)
        else:
            for _ in range(what):
                work()
            synchronize()
            print(0, flush=True)


def create(name: str, args: list[Any], shape: list[int], training: bool, bfloat16: bool, device: str) -> Work:
    """Create a layer of ``timm_gsop``, or else a model, to run on random input of this shape."""
    import timm_gsop

    torch.manual_seed(0)
    module = getattr(timm_gsop, name)(*args) if hasattr(timm_gsop, name) else timm.create_model(name, *args)
    x = torch.randn(*shape, device=device, requires_grad=training and hasattr(timm_gsop, name))
    return run_of(module.to(device), x, training, bfloat16)


if __name__ == "__main__":
    serve()
