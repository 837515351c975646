"""Numbered tasks on a few threads; the main thread only waits, so that Ctrl-C reaches it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import TypeVar

T = TypeVar("T")
W = TypeVar("W")
_POLL = 0.1  # seconds between looks at the progress


class Stopped(Exception):
    """Work was broken off on request."""


def spread(
    take: Callable[[], int],
    count: int,
    work: Callable[[W, int], T],
    opened: Callable[[int, Callable[[], bool]], AbstractContextManager[W]],
    *,
    threads: int,
    done: Callable[[int, T], None] = lambda _number, _result: None,
    tick: Callable[[], None] = lambda: None,
) -> dict[int, T]:
    """Do ``work`` on all threads for the numbers that ``take`` gives, below ``count``; results by number.

    Args:
        take: the next number; called by all threads.
        count: numbers from here on end a thread.
        work: does one task, with what ``opened`` gave the thread; may raise :class:`Stopped`.
        opened: what a thread needs (open files, buffers), from the thread's own number and a function
            that says whether it shall stop.
        threads: how many.
        done: called with every result in the thread that has it, by one thread at a time.
        tick: called in this thread some times a second.

    Raises:
        Exception: the first that a thread met; the others are stopped.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    stop, lock = threading.Event(), threading.Lock()

    def thread(index: int) -> None:
        import numpy as np

        try:
            # NaN and Inf are looked for, not warned of
            with opened(index, stop.is_set) as tools, np.errstate(all="ignore"):
                while not stop.is_set() and (number := take()) < count:
                    result = work(tools, number)
                    with lock:
                        done(number, result)
                        results[number] = result
        except Stopped:
            return
        except BaseException as error:
            errors.append(error)
            stop.set()

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(thread, index) for index in range(threads)]
        try:
            while wait(running, timeout=_POLL).not_done:
                tick()
        finally:
            stop.set()
    tick()
    if errors:
        raise errors[0]
    return results


def processors() -> int:
    """Cores that this process may run on: a container or a job's slot may have fewer than its machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
