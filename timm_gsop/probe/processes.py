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
        yield from pool.map(_call, range(count))
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
