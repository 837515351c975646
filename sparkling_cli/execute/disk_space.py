"""Room on the disk: asked for before anything is written, told when it runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sparkling_cli.errors import CheckpointError, OutputError, SparklingError
from sparkling_cli.execute.commit import Staging, standing
from sparkling_cli.execute.source_state import source_state

if TYPE_CHECKING:
    from sparkling_cli.execute.job import Job

#: for small files and folders
_RESERVE = 1 << 20


def needed(job: Job) -> int:
    """Bytes of the whole output.

    Raises:
        CheckpointError: a file that is carried over is missing in the source.
    """
    carried = source_state(job.plan.source.root, set(job.plan.source.carried))
    sizes = (*(file.size for file in job.files), *(size for size, _, _ in carried.values()))
    return sum(sizes) + _RESERVE


def check_room(job: Job, staging: Staging) -> None:
    """The disk has room for all files.

    Raises:
        OutputError: with the bytes needed and free.
        CheckpointError: see :func:`needed`.
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
    try:
        free = free_bytes(staging.destination.parent)
        room = f"; the output needs {needed(job):,} bytes, {free:,} are free on its disk"
    except (OSError, CheckpointError):  # the source, or the disk as a whole, is gone too
        room = ""
    return OutputError(
        f"cannot write {where}: {error.strerror or error}{room}",
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
