"""Room on the disk: asked for before anything is written, told when it runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError, OutputError, SparklingError
from sparkling_cli.execute.commit import Staging, standing

if TYPE_CHECKING:
    from sparkling_cli.execute.job import Job

#: for small files and folders
_RESERVE = 1 << 20


def needed(job: Job) -> int:
    """Bytes of the whole output."""
    root = job.plan.source.root
    carried = sum((root / path).stat().st_size for path in job.plan.source.carried)
    return sum(file.size for file in job.files) + carried + _RESERVE


def check_room(job: Job, staging: Staging) -> None:
    """The disk has room for all files.

    Raises:
        OutputError: with the bytes needed and free.
    """
    parent = staging.destination.parent
    if needed(job) > free_bytes(parent):
        raise OutputError(
            f"{parent} has {free_bytes(parent):,} bytes free, the output needs {needed(job):,}",
            hint="make room, or choose a place on another disk",
        )


def disk_error(error: OSError, job: Job, staging: Staging) -> SparklingError:
    """What to tell of a failed write."""
    where = error.filename or staging.partial
    return OutputError(
        f"cannot write {where}: {error.strerror or error}; the output needs {needed(job):,} bytes, "
        f"{free_bytes(staging.destination.parent):,} are free on its disk",
        hint="nothing was left behind; make room or choose another disk, and run the command again",
    )


@contextmanager
def reading_back(root: Path) -> Iterator[None]:
    """What was written is opened again; that it cannot be is not the source's fault.

    Raises:
        OutputError: instead of CheckpointError.
    """
    try:
        yield
    except CheckpointError as error:
        raise OutputError(
            f"the output cannot be read back from {root}: {error.message}",
            hint="nothing was left behind; the disk may be failing: choose another and run it again",
        ) from error


def free_bytes(folder: Path) -> int:
    """Free space on the disk that a folder lies on, or would lie on."""
    state = os.statvfs(standing(folder))
    return state.f_bavail * state.f_frsize
