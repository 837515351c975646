"""Every error that a user can meet, each with the exit code of its kind.

A message says where, what was expected, what was found, and what to do next. The command line prints
it without a traceback; the Python API raises it as it is.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command (documented in ``docs/reference/exit-codes.md``)."""

    OK = 0
    BUG = 1
    USAGE = 2
    SPEC = 3
    CHECKPOINT = 4
    LAYOUT = 5
    UNSAFE = 6
    OUTPUT = 7
    VERIFY = 8
    ENVIRONMENT = 9
    INTERRUPTED = 130


class SparklingError(Exception):
    """Base of all errors that are the input's or the surroundings' fault, not a bug.

    Args:
        message: what is wrong, and where.
        hint: what to do next, if there is something.
    """

    exit_code: ExitCode = ExitCode.BUG

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  hint: {self.hint}"


class UsageError(SparklingError):
    """The command line itself is not understood: an unknown option, a missing argument, no number."""

    exit_code = ExitCode.USAGE


class SpecError(SparklingError, ValueError):
    """What was asked for is malformed or cannot be had for this model."""

    exit_code = ExitCode.SPEC


class CheckpointError(SparklingError):
    """The source checkpoint is missing, damaged, contradictory or of no known format."""

    exit_code = ExitCode.CHECKPOINT


class LayoutError(SparklingError, ValueError):
    """A layout does not parse, does not fit the tensors, or could not be inferred."""

    exit_code = ExitCode.LAYOUT


class NoModelError(CheckpointError):
    """A file that can be read and has no model in it."""


class UnsafePickleError(CheckpointError):
    """A pickle names something outside the allow-list; it was not executed."""

    exit_code = ExitCode.UNSAFE


class OutputError(SparklingError):
    """The output cannot be written: it exists, lies inside the source, the disk is full, ..."""

    exit_code = ExitCode.OUTPUT


class VerificationError(SparklingError):
    """An output does not keep what its manifest promises, or `inspect --against` says no-go."""

    exit_code = ExitCode.VERIFY


class MissingDependencyError(SparklingError):
    """An optional package is needed for this command and is not installed."""

    exit_code = ExitCode.ENVIRONMENT


class Interrupted(SparklingError):
    """Ctrl-C or SIGTERM: everything half-made was removed."""

    exit_code = ExitCode.INTERRUPTED
