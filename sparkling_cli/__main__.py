"""``python -m sparkling_cli`` and the ``sparkling`` command."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and leave with its exit code."""
    from sparkling_cli.cli.app import app
    from sparkling_cli.cli.console import run

    leave(run(app))


def leave(code: int) -> NoReturn:
    """End the process at once.

    To take down torch and a large plan object by object takes up to half a second, for memory that the
    system frees anyway. All files are closed and synced, all processes let go by then; what is left is to
    say the last words.
    """
    from sparkling_cli.errors import ExitCode

    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has what it wanted
        pass
    except OSError as error:
        code = ExitCode.OUTPUT
        with suppress(OSError):
            sys.stderr.write(f"error: the output cannot be written: {error.strerror or error}\n")
    except ValueError:  # closed by who has handled its fault
        pass
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
