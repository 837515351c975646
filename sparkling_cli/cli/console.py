"""The one place where commands write: people, machines or nobody; and the table of exit codes.

Facts go to stdout, everything else (progress, notes, errors) to stderr. ``--json`` prints one JSON
document on stdout and nothing for people; without a terminal there are no escape codes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import ExitCode, Interrupted, OutputError, SparklingError, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console, RenderableType

#: columns where the output is no terminal
UNLIMITED = 1 << 16


@dataclass
class Output:
    """How this invocation speaks; made once from the global options."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def reset(self) -> None:
        """Forget an earlier invocation's options."""
        self.as_json = self.quiet = self.verbose = False

    def console(self, *, stderr: bool = False) -> Console:
        """A rich console on stdout or stderr; colour only on a terminal and without NO_COLOR."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        if isinstance(stream, TextIOWrapper):  # bars and ellipses are no reason to fail in a C locale
            stream.reconfigure(errors="replace")
        console = Console(stderr=stderr, highlight=False, soft_wrap=False)
        if not console.is_terminal and "COLUMNS" not in os.environ:
            # a log or a pipe has no width: a wrapped path or command could not be used again
            console.width = UNLIMITED
        return console

    def show(self, renderable: RenderableType, *, whole: bool = False) -> None:
        """A fact for people; ``whole`` for paths and commands, which are not broken at the edge."""
        if not self.as_json and not self.quiet:
            self.console().print(renderable, soft_wrap=whole)

    def note(self, text: str, *, style: str = "dim") -> None:
        """A remark for people, on stderr."""
        if not self.as_json and not self.quiet:
            self.say(text, style)

    def warn(self, text: str) -> None:
        """Something that the user has to act on; also with --quiet."""
        if not self.as_json:
            self.say(f"warning: {text}", "yellow")

    def say(self, text: str, style: str | None = None) -> None:
        """A message on stderr; see ``report.wrap`` for where its lines end."""
        from sparkling_cli.report.wrap import wrapped

        console = self.console(stderr=True)
        lines = "\n".join(wrapped(line, console.width) for line in text.split("\n"))
        console.print(lines, style=style, markup=False, soft_wrap=True)

    def data(self, result: BaseModel) -> None:
        """The same facts for machines: a command's result as its JSON document."""
        if self.as_json:
            from sparkling_cli.results.commands import document

            sys.stdout.write(json.dumps(document(result), indent=2, allow_nan=False) + "\n")

    def progress(self, title: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """A stage of a long command, of so many bytes: a bar on a terminal, else lines of a log on stderr."""
        from sparkling_cli.report import progress

        if self.as_json or self.quiet:
            return nullcontext(progress.silent)
        return progress.shown(title, total, self.console(stderr=True))


#: set by the app's callback; commands read it.
output = Output()


def error_text(error: SparklingError) -> str:
    """An error as the document that ``--json`` prints."""
    from sparkling_cli.results.commands import Failure, document

    kind, code = type(error).__name__, int(error.exit_code)
    failure = Failure(error=kind, exit_code=code, message=error.message, hint=error.hint)
    return json.dumps(document(failure), indent=2, allow_nan=False) + "\n"


def fail(error: SparklingError) -> int:
    """Print an error where this invocation expects it; the exit code to leave with."""
    if output.as_json:
        sys.stdout.write(error_text(error))
    else:
        output.say(f"error: {error.message}", "red")
        if error.hint:
            output.say(f"  hint: {error.hint}")
    return int(error.exit_code)


def run(app: Callable[..., Any]) -> int:
    """Run the command line; every user-facing failure becomes a message and an exit code."""
    import typer

    try:
        result = app(standalone_mode=False, prog_name="sparkling")
        if result == ExitCode.INTERRUPTED:  # typer makes a silent exit of Ctrl-C
            raise KeyboardInterrupt
        return result if isinstance(result, int) else int(ExitCode.OK)
    except SparklingError as error:
        return fail(error)
    except typer.Exit as stop:
        return int(stop.exit_code)
    except _usage_error() as error:
        return fail(_misread(error))
    except (KeyboardInterrupt, typer.Abort):
        return fail(Interrupted("interrupted: no unfinished output was left under its final name"))
    except BrokenPipeError:
        sys.stderr.close()
        return int(ExitCode.OK)
    except OSError as error:  # the surroundings' fault: a full disk under stdout, a folder taken away, ...
        where = f"{error.filename}: " if error.filename else ""
        output.as_json = False  # it may be stdout itself that cannot be written
        return fail(OutputError(f"the system refused: {where}{error.strerror or error}"))


def _misread(error: Exception) -> UsageError:
    """A usage error of the parser; no option was read then, so --json is looked for."""
    from sparkling_cli.cli.help import usage_error

    output.as_json = "--json" in sys.argv[1:]
    return usage_error(error, sys.argv[1:])


def _usage_error() -> type[Exception]:
    """ClickException; newer versions of typer carry click inside, older ones import it."""
    import typer

    return next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
