"""Ctrl-C and SIGTERM while an output is made: stop, clean up, say so."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparkling_cli.errors import Interrupted


class Raised:
    """What broke in."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.name = "Ctrl-C"

    def error(self) -> Interrupted:
        """What to tell the user."""
        return Interrupted(
            f"interrupted by {self.name}: the source is unchanged, nothing was left at {self._destination}",
            hint="run the same command again",
        )


@contextmanager
def interrupts(destination: Path) -> Iterator[Raised]:
    """SIGTERM and SIGHUP arrive as KeyboardInterrupt, like Ctrl-C (in the main thread only)."""
    raised = Raised(destination)
    if threading.current_thread() is not threading.main_thread():
        yield raised
        return

    def handler(number: int, _: FrameType | None) -> None:
        raised.name = signal.Signals(number).name
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield raised
    finally:
        for number, old in before.items():
            signal.signal(number, old)
