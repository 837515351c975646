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
from sparkling_cli.formats.torchfile.objects import Call, GlobalType, Storage, TensorNode
from sparkling_cli.formats.torchfile.opcodes import check_opcodes
from sparkling_cli.formats.torchfile.unpickle import Anything, TreeUnpickler

_LARGEST = 64 << 20
_PATHS = ("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath")


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

    Enumerations become their values, paths text, objects of other classes dictionaries with their class
    under ``__class__``.

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
        value = _plain(InertUnpickler(io.BytesIO(data)).load(), 0)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}") from error
    except Exception as error:
        # The decoder raises whatever a damaged stream leads to.
        raise CheckpointError(f"{where}: cannot be decoded: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object with attributes, found {type(value).__name__}")
    return value


def _plain(value: Any, depth: int) -> Any:
    if depth > 20:
        return repr(type(value))
    if isinstance(value, dict):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v, depth + 1) for v in value)
    if isinstance(value, Call):
        return _plain_call(value, depth)
    if isinstance(value, GlobalType):
        return value.path
    if isinstance(value, (TensorNode, Storage)):
        return f"<{type(value).__name__}>"
    return value


def _plain_call(value: Call, depth: int) -> Any:
    """An enumeration's value, a path, or an object's attributes."""
    state = value.state[0] if value.state is not None else None
    if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
        state = {**(state[0] or {}), **state[1]}
    if isinstance(state, dict):
        attributes = {str(k): _plain(v, depth + 1) for k, v in state.items()}
        return {"__class__": value.function.path, **attributes}
    if value.pairs:
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.pairs}
    args = [_plain(arg, depth + 1) for arg in value.args]
    if value.function.path in _PATHS:
        return "/".join(map(str, args)).replace("//", "/")
    if len(args) == 1 and isinstance(args[0], (str, int, float, list, tuple)):
        return args[0]
    return {"__class__": value.function.path, "args": args}
