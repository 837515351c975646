"""What the shell offers after Tab: checkpoints, axes of the checkpoint on the line, choices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import typer

#: axes that nearly every model has, offered while no checkpoint is on the line
USUAL_AXES = ("ffn", "hidden", "heads", "kv_heads")
_FILES = (".pt", ".pth", ".ckpt", ".bin", ".json")


def choices_of(values: Iterable[str]) -> Callable[[str], list[str]]:
    """A completion that offers fixed values."""
    every = tuple(values)

    def complete(incomplete: str) -> list[str]:
        return [value for value in every if value.startswith(incomplete)]

    return complete


def checkpoints(incomplete: str) -> list[str]:
    """Directories, and files that may be checkpoints or configs.

    Behind the only one that is left the shell writes a space. If that is a folder of folders, they are
    offered with it, so that the next Tab goes on.
    """
    found = _entries(incomplete)
    inside = _entries(found[0]) if len(found) == 1 and found[0].endswith("/") else []
    return found + inside if all(path.endswith("/") for path in inside) else found


def _entries(incomplete: str) -> list[str]:
    folder, _, start = incomplete.rpartition("/")
    root = Path(f"{folder}/" if "/" in incomplete else ".").expanduser()
    try:
        found = sorted(root.iterdir())
    except OSError:
        return []
    before = f"{folder}/" if "/" in incomplete else ""
    return [
        f"{before}{path.name}" + ("/" if path.is_dir() else "")
        for path in found
        if path.name.startswith(start)
        and (start.startswith(".") or not path.name.startswith("."))
        and (path.is_dir() or path.suffix in _FILES)
    ]


def axes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Axes of the checkpoint on the line, as far as they are known without building a model."""
    names: Iterable[str] = USUAL_AXES
    # behind an option whose value is being typed, arguments are not assigned yet
    source: Any = ctx.params.get("source") or next(iter(ctx.args), None)
    if source is not None:
        with suppress(Exception):  # a shell that asks for words is no place for a message
            from sparkling_cli.formats.detect import open_checkpoint
            from sparkling_cli.manifest import manifest_of
            from sparkling_cli.models.locate import packaged_layout
            from sparkling_cli.plan.resolve import offered_axes

            previous = manifest_of(Path(source))
            found = previous.model_layout() if previous else packaged_layout(open_checkpoint(Path(source)))
            names = offered_axes(found) if found is not None else names
    return [name for name in names if name.startswith(incomplete)]
