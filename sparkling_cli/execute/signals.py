"""Signals that end a process: whenever they come, everything half-made is removed.

In a user's own program they arrive as Ctrl-C does, as an exception. The ``sparkling`` command ends on the
spot instead (:func:`end_process`): an exception can be swallowed where a signal finds the program in
``__del__``, in the import of a package or in a callback of C code, or turn into an abort there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sparkling_cli.errors import Interrupted

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class _Process:
    """What signals do in this process. Handlers run in the main thread, between two operations of Python.

    Attributes:
        show: prints the message of an interrupted command; None where signals raise.
        work: the output that is being made.
        held: how many blocks of :func:`held` the main thread is in.
        waiting: the signal that came meanwhile, and its handler.
        ending: the process is about to end: nothing else counts.
    """

    show: Callable[[Interrupted], None] | None = None
    work: Raised | None = None
    held = 0
    waiting: tuple[Callable[[int, FrameType | None], None], int] | None = None
    ending = False


_process = _Process()


@contextmanager
def held() -> Iterator[None]:
    """Signals that come inside wait until its end: for steps that must be done wholly or not at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _process.held += 1
    try:
        yield
    finally:
        _process.held -= 1
        if not _process.held and _process.waiting is not None:
            (handler, number), _process.waiting = _process.waiting, None
            handler(number, None)


def end_process(show: Callable[[Interrupted], None]) -> None:
    """From now on Ctrl-C, SIGTERM and SIGHUP end this process with exit code 130, its output removed.

    Once an output has appeared they come too late, and the process ends as it would have.

    Args:
        show: prints the message. It is called anywhere, so it may use neither buffers nor imports.
    """

    def handler(number: int, _: FrameType | None) -> None:
        work = _process.work
        if _process.ending or (work is not None and work.settled):
            return
        if _process.held:
            _process.waiting = (handler, number)
            return
        _process.ending = True
        error = Interrupted("interrupted: no unfinished output was left under its final name")
        if work is not None:
            work.note(signal.Signals(number))
            work.discard()
            error = work.error()
        show(error)
        os._exit(error.exit_code)

    _process.show = show
    for number in (signal.SIGINT, *_ENDING):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, or a job in the background
            signal.signal(number, handler)


@contextmanager
def as_ctrl_c(note: Callable[[signal.Signals], bool]) -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt inside; as it was afterwards.

    Only the main thread may decide this; in others nothing changes. A signal that is ignored (``nohup``)
    stays ignored.

    Args:
        note: is given a signal when it comes, Ctrl-C's too; True if nothing shall be raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, _: FrameType | None) -> None:
        if _process.held:
            _process.waiting = (handler, number)
        elif not note(signal.Signals(number)):
            raise KeyboardInterrupt

    heard = [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        heard.append(signal.SIGINT)  # who handles Ctrl-C in another way, goes on doing so
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Raised:
    """What broke in on the making of an output.

    Attributes:
        settled: the output is about to appear, or has appeared: it is too late to break in.
        discard: removes what is half-made.
    """

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self._name = "Ctrl-C"
        self.settled = False
        self.discard: Callable[[], None] = lambda: None

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
    if _process.show is not None:
        _process.work = raised  # for good: once it has appeared, no signal says that it has not
        yield raised
        return
    with as_ctrl_c(raised.note):
        yield raised
