"""Whether source files are still as they were when they were opened."""

from __future__ import annotations

import os
from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.plan.model import Plan


def source_paths(plan: Plan) -> set[str]:
    """Every source file that is read."""
    return {extent.path for row in plan.rows for extent in row.source.extents} | set(plan.source.carried)


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """As ``source_state``, of every file of a checkpoint that is about to be opened."""
    if not root.is_dir():
        return source_state(root, {""})
    paths = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    return source_state(root, {path.relative_to(root).as_posix() for path in paths if path.exists()})


def source_state(root: Path, paths: set[str]) -> dict[str, tuple[int, int, int]]:
    """Size, time of change and inode of source files.

    Raises:
        CheckpointError: one is missing.
    """
    found = {}
    for path in sorted(paths):
        try:
            info = (root / path if path else root).stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {root / path}: {error.strerror}") from error
        found[path] = (info.st_size, info.st_mtime_ns, info.st_ino)
    return found
