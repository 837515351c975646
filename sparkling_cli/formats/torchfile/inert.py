"""The attributes of an arbitrary pickled object (``training_args.bin``), without running any of it.

Every global becomes a stand-in and every call a record of itself, so nothing that the pickle names is
imported. What comes back is plain data.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile.archive import open_window, read_archive
from sparkling_cli.formats.torchfile.objects import GlobalType, Storage, plain
from sparkling_cli.formats.torchfile.opcodes import check_opcodes
from sparkling_cli.formats.torchfile.unpickle import Anything, TreeUnpickler

_LARGEST = 64 << 20


class InertUnpickler(TreeUnpickler):
    """Accepts every global, as a stand-in, and every storage, of which nothing is read."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, "", Anything())

    def persistent_load(self, pid: Any) -> Any:
        """A storage; before torch 1.6 its name had six parts."""
        if isinstance(pid, tuple) and len(pid) in (5, 6) and isinstance(pid[1], GlobalType):
            return Storage("storage", pid[1], str(pid[2]), str(pid[3]), 0)
        return Storage("storage", self.find_class("torch", "ByteStorage"), "", "", 0)


def read_attributes(path: Path, relative: str = "") -> dict[str, Any]:
    """The attributes of the object in a torch file, as plain data.

    Args:
        path: the file.
        relative: its name in messages.

    Raises:
        CheckpointError: it is no torch file, is damaged, or holds no object with attributes.
    """
    where = relative or path.name
    with open_window(path, where) as window:
        record = read_archive(window).record("data.pkl", where)
        if record.size > _LARGEST:
            raise CheckpointError(f"{where}: {record.size} bytes are no set of arguments")
        data = window.read(record.start, record.size)
    check_opcodes(data, where)
    try:
        value = plain(InertUnpickler(io.BytesIO(data)).load())
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}") from error
    except Exception as error:
        # The decoder raises whatever a damaged stream leads to.
        raise CheckpointError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object with attributes, found {type(value).__name__}")
    return value
