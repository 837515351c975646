"""``python -m sparkling_cli`` and the ``sparkling`` command."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # ``signal`` itself takes a while to import
import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from sparkling_cli.errors import Interrupted


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    for number in (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP):
        if _signal.getsignal(number) is not _signal.SIG_IGN:  # nohup, or a job in the background
            _signal.signal(number, _end_at_once)
    gc.disable()  # modules and plans have no cycles; where models are built it runs (formats/gc_pause.py)
    from sparkling_cli.execute.signals import end_process

    end_process(_show)
    from sparkling_cli.cli.app import app
    from sparkling_cli.cli.console import run

    if "--json" in sys.argv[1:]:
        import sparkling_cli.results.commands  # noqa: F401 - an interrupt is printed as a document

    leave(run(app))


def _end_at_once(_number: int, _frame: object) -> None:
    """Nothing has begun yet, and nothing is loaded."""
    os.write(2, b"error: interrupted\n")
    os._exit(130)


def _show(error: Interrupted) -> None:
    """The message of an interrupted command, wherever the signal found it.

    The program may be inside a write to stderr or in the import of the console; so the text goes past all
    buffers, and only what is loaded is used.
    """
    hint = f"\n  hint: {error.hint}" if error.hint else ""
    text, place = f"error: {error.message}{hint}\n", 2
    if "--json" in sys.argv[1:]:
        if hasattr(sys.modules.get("sparkling_cli.results.commands"), "document"):
            from sparkling_cli.cli.console import error_text

            text, place = error_text(error), 1
    elif os.isatty(place):
        text = f"\r\x1b[2K\x1b[?25h{text}"  # a progress bar has hidden the cursor
    try:  # noqa: SIM105 - nothing is to be imported here
        os.write(place, text.encode(errors="replace"))
    except OSError:  # nobody listens
        pass


def leave(code: int) -> NoReturn:
    """End the process at once.

    To take down torch and a large plan object by object takes up to half a second, for memory that the
    system frees anyway. All files are closed and synced, all processes let go by then; what is left is to
    write out what stdout and stderr still hold.
    """
    from contextlib import suppress

    from sparkling_cli.errors import ExitCode

    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted
        pass
    except OSError as error:
        code = ExitCode.OUTPUT
        with suppress(OSError):
            sys.stderr.write(f"error: the output cannot be written: {error.strerror or error}\n")
    except ValueError:  # closed when an earlier write failed
        pass
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
