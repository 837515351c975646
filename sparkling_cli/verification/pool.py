"""Tasks on a few threads, each with open files of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sparkling_cli.errors import SparklingError
from sparkling_cli.execute.pool import processors
from sparkling_cli.storage.places import Handles

T = TypeVar("T")
Pair = tuple[Handles, Handles | None]


def spread(
    tasks: Sequence[T], handles: Callable[[], Pair], work: Callable[[Pair, T], Any], done: Callable[[T], None]
) -> list[Any]:
    """Results in the tasks' order; a :class:`SparklingError` stands where a task raised one.

    Args:
        tasks: what to do.
        handles: opens files for one thread.
        work: does one task.
        done: called in this thread's stead after each, one at a time.

    Raises:
        Exception: anything else that a task raised.
    """
    results: list[Any] = [None] * len(tasks)
    unexpected: list[BaseException] = []
    lock = threading.Lock()
    numbers = iter(range(len(tasks)))
    stop = threading.Event()

    def thread() -> None:
        import numpy as np

        opened = handles()
        try:
            with np.errstate(all="ignore"):
                while not stop.is_set():
                    with lock:
                        number = next(numbers, None)
                    if number is None:
                        return
                    try:
                        results[number] = work(opened, tasks[number])
                    except SparklingError as error:
                        results[number] = error
                    with lock:
                        done(tasks[number])
        except BaseException as error:
            unexpected.append(error)
            stop.set()
        finally:
            for one in opened:
                if one is not None:
                    one.close()

    threads = [threading.Thread(target=thread, daemon=True) for _ in range(min(processors(), 4))]
    try:
        for one in threads:
            one.start()
        for one in threads:
            while one.is_alive():
                one.join(0.1)
    finally:
        stop.set()
        for one in threads:
            one.join()
    if unexpected:
        raise unexpected[0]
    return results
