"""Work in several processes of one thread each, which do not wait for each other as threads do."""

import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

import torch

__all__ = ["in_processes"]

Result = TypeVar("Result")
_work: Callable[[int], Any]


def in_processes(work: Callable[[int], Result], count: int, workers: int) -> Iterator[Result]:
    """``work(0)``, ``work(1)``, … in order, from processes that are forks of this one.

    PyTorch computes no gradients in a fork of a process in which its engine has started threads, as the first backward
    pass does on a machine with a GPU. There the work is done in this process.

    Args:
        work: What to do; it is inherited, and its results are sent back.
        count: How often.
        workers: How many processes; with one, and where forks are not safe, it is done in this process.
    """
    if min(workers, count) < 2 or sys.platform != "linux":
        yield from map(work, range(count))
        return
    pool = ProcessPoolExecutor(min(workers, count), get_context("fork"), initializer=_start, initargs=(work,))
    others = active_children()
    try:
        if pool.submit(_can_differentiate).result():
            yield from pool.map(_call, range(count))
        else:
            print("PyTorch has computed gradients in this process, so heads are trained one after the other.")
            yield from map(work, range(count))
    except BaseException:
        for process in active_children():
            if process not in others:
                process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start(work: Callable[[int], Any]) -> None:
    global _work
    _work = work
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its processes


def _call(index: int) -> Any:
    return _work(index)


def _can_differentiate() -> bool:
    try:
        torch.ones(1, requires_grad=True).backward()
    except RuntimeError:
        return False
    return True
