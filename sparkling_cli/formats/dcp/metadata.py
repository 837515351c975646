"""The ``.metadata`` file of a ``torch.distributed.checkpoint`` directory: read without executing it.

PyTorch itself loads this pickle without restriction. Here every global must be on a short list of plain
data classes, and nothing else is ever looked up.
"""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparkling_cli.errors import CheckpointError, UnsafePickleError
from sparkling_cli.formats.torchfile.opcodes import CheckedUnpickler

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"

_META = "torch.distributed.checkpoint.metadata"
_FILESYSTEM = "torch.distributed.checkpoint.filesystem"

#: Globals that a ``.metadata`` may name: data classes, enums, sizes, paths. None has a side effect.
ALLOWED: Mapping[str, frozenset[str]] = {
    _META: frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    _FILESYSTEM: frozenset({"_StorageInfo"}),
    # Megatron keeps the plans that it saved by.
    "torch.distributed.checkpoint.planner": frozenset(
        {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"}
    ),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath"}),
    "pathlib._local": frozenset({"Path", "PosixPath", "PurePath", "PurePosixPath"}),
}


#: a trainer's own copy of a data class of PyTorch's, field by field -> PyTorch's
EQUAL: Mapping[tuple[str, str], tuple[str, str]] = {
    ("olmo_core.distributed.checkpoint.filesystem", "_StorageInfo"): (_FILESYSTEM, "_StorageInfo"),
}


def _pure_path(*parts: str) -> str:
    # A path in a checkpoint is only a remark. As text it means the same on every Python version.
    return "/".join(parts).replace("//", "/")


class _Reader(CheckedUnpickler):
    """An unpickler that looks up nothing but what :data:`ALLOWED` lists."""

    def __init__(self, data: bytes, where: Path) -> None:
        super().__init__(io.BytesIO(data), str(where))
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        module, name = EQUAL.get((module, name), (module, name))
        if module.startswith("pathlib") and name in ALLOWED.get(module, ()):
            return _pure_path
        if name in ALLOWED.get(module, ()):
            return getattr(importlib.import_module(module), name)
        if module == "torch":
            import torch

            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype):
                return found
        raise UnsafePickleError(
            f"{self.where} names {module}.{name}, which is not on the list of plain data classes; "
            f"the file was not executed",
            hint="save the checkpoint again with torch.distributed.checkpoint alone",
        )

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError(f"{self.where} refers to an object outside itself ({pid!r:.60})")


def read_metadata(directory: Path) -> Metadata:
    """The parsed ``.metadata`` of a directory.

    Raises:
        CheckpointError: it is missing or damaged, or is no ``Metadata``.
        UnsafePickleError: it names anything but plain data classes; nothing of it was executed.
    """
    from torch.distributed.checkpoint.metadata import Metadata

    path = directory / METADATA
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}",
            hint="the file is written last: without it, saving was not finished",
        ) from None
    try:
        found = _Reader(data, path).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            f"{path} is damaged: {type(error).__name__}: {error}", hint="copy the checkpoint again"
        ) from None
    if not isinstance(found, Metadata) or not isinstance(getattr(found, "state_dict_metadata", None), dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, expected DCP's Metadata")
    if not isinstance(found.storage_data, dict):
        raise CheckpointError(
            f"{path} has no storage data (found {type(found.storage_data).__name__})",
            hint="only the file-system storage of torch.distributed.checkpoint can be read",
        )
    return found


def dump_metadata(metadata: Metadata) -> bytes:
    """The bytes of a ``.metadata``, as PyTorch writes it; every Python that torch runs on reads them."""
    return pickle.dumps(metadata, protocol=4)
