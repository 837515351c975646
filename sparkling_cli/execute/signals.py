"""Signals that end a process: they arrive as Ctrl-C does, so that everything half-made is removed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparkling_cli.errors import Interrupted

_ENDING = (signal.SIGTERM, signal.SIGHUP)


@contextmanager
def as_ctrl_c(note: Callable[[signal.Signals], bool] | None = None) -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside; as it was afterwards.

    Only the main thread may decide this; in others nothing changes. A signal that is ignored (``nohup``)
    stays ignored.

    Args:
        note: told a signal when it comes, Ctrl-C's too; True if nothing shall be raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: FrameType | None) -> None:
        if note is None or not note(signal.Signals(number)):
            raise KeyboardInterrupt

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    if note is not None and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        heard.append(signal.SIGINT)  # who handles Ctrl-C in another way, goes on doing so
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Raised:
    """What broke in.

    Attributes:
        settled: the output is about to appear, or has appeared: it is too late to break in.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._name = "Ctrl-C"
        self.settled = False

    def note(self, number: signal.Signals) -> bool:
        """Remember it for the message, unless it is too late."""
        if not self.settled and number is not signal.SIGINT:
            self._name = number.name
        return self.settled

    def error(self) -> Interrupted:
        """What to tell the user."""
        return Interrupted(
            f"interrupted by {self._name}: the source is unchanged, nothing was left at {self._destination}",
            hint="run the same command again",
        )


@contextmanager
def interrupts(destination: Path) -> Iterator[Raised]:
    """Signals while an output is made: what comes is remembered for the message."""
    raised = Raised(destination)
    with as_ctrl_c(raised.note):
        yield raised
