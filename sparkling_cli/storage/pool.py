"""Numbered tasks on a few threads; the main thread only waits, so that Ctrl-C reaches it."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

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
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    lock = threading.Lock()

    def thread(index: int) -> None:
        import numpy as np

        try:
            # NaN and Inf are looked for, not warned of
            with opened(index, stop.is_set) as tools, np.errstate(all="ignore"):
                while not stop.is_set():
                    number = take()
                    if number >= count:
                        break
                    result = work(tools, number)
                    with lock:
                        done(number, result)
                    news.put(("result", (number, result)))
            news.put(("done", None))
        except Stopped:
            news.put(("done", None))
        except BaseException as error:
            stop.set()
            news.put(("error", error))

    running = [threading.Thread(target=thread, args=(i,), daemon=True) for i in range(threads)]
    for one in running:
        one.start()
    try:
        return _listen(news, threads, tick)
    finally:
        stop.set()
        for one in running:
            one.join()


def _listen(
    news: queue.SimpleQueue[tuple[str, Any]],
    running: int,
    tick: Callable[[], None],
) -> dict[int, Any]:
    results: dict[int, Any] = {}
    first: BaseException | None = None
    while running:
        try:
            kind, value = news.get(timeout=_POLL)
        except queue.Empty:
            kind, value = "", None
        if kind == "result":
            results[value[0]] = value[1]
        elif kind:
            running -= 1
            first = first or value
        tick()
    if first is not None:
        raise first
    return results


def processors() -> int:
    """Cores that this process may run on: a container or a job's slot may have fewer than its machine."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
