"""How long work is followed: a bar on a terminal or in a notebook, lines in a log."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

#: seconds between two lines of a log
EVERY = 30.0


def silent(_count: int) -> None:
    """Progress that nobody sees."""


def shown(
    title: str, total: int | None, console: Console | None = None
) -> AbstractContextManager[Callable[[int], None]]:
    """A stage of so many bytes (None: not known): a bar where there is a screen, else a log on stderr.

    It is what ``progress=True`` stands for, and an example of ``api.Progress``.
    """
    from rich.console import Console as Screen

    screen = console or Screen(stderr=True)
    live = screen.is_terminal or screen.is_jupyter
    return bar(screen, title, total) if live else log(title, total)


@contextmanager
def bar(console: Console, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar by bytes with rate and time left; a moving one without a total."""
    from rich import progress as bars

    sizes: list[bars.ProgressColumn] = [
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    ]
    with bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        *(sizes if total is not None else [bars.TimeElapsedColumn()]),
        console=console,
        transient=True,
    ) as display:
        task = display.add_task(title, total=total)
        yield lambda count: display.advance(task, count)


@contextmanager
def log(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A line on stderr when the stage begins, and one every half minute, whether it moves or not.

    Of several processes of one job, the first one speaks.
    """
    if os.environ.get("RANK", "0") != "0":
        yield silent
        return
    done, began, ended = 0, time.monotonic(), threading.Event()

    def advance(count: int) -> None:
        nonlocal done
        done += count

    def speak() -> None:
        while not ended.wait(EVERY):
            _line(_state(title, done, total, time.monotonic() - began))

    _line(_state(title, 0, total, 0.0))
    speaker = threading.Thread(target=speak, name="log", daemon=True)
    speaker.start()
    try:
        yield advance
    finally:
        ended.set()
        speaker.join()


def _line(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _state(title: str, done: int, total: int | None, seconds: float) -> str:
    """``writing 512 MiB of 1.3 GiB (39%), 20 s gone, 31 s left``."""
    from sparkling_cli.results.numbers import nbytes

    if total is None:
        return f"{title}, {seconds:.0f} s gone" if seconds else title
    if not seconds:
        return f"{title} {nbytes(total)}"
    if done >= total:
        return f"{title} {nbytes(total)} done, {seconds:.0f} s gone, finishing"
    left = f", {seconds * (total - done) / done:.0f} s left" if done else ""
    return f"{title} {nbytes(done)} of {nbytes(total)} ({done / total:.0%}), {seconds:.0f} s gone{left}"
