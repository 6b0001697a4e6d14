"""Threads, device and cache folder that are sensible on the machine at hand."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["default_cache", "default_device", "free_cores", "threads"]


def free_cores() -> int:
    """Cores that this process may use and that others leave idle, at least one; ``OMP_NUM_THREADS`` if it is set.

    A thread that waits for a busy core holds up all others: two threads on one free core are slower than one.
    """
    if os.environ.get("OMP_NUM_THREADS", "").isdigit():
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return max(1, min(torch.get_num_threads(), cores - round(load)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device() -> str:
    """The best device there is."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_cache() -> Path:
    """``timm-gsop/probe`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-gsop/probe"
