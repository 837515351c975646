"""Lays out a torch file with a new state dict, in the form that ``torch.save`` gives it."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from sparkling_cli.formats.model import OutputFile
from sparkling_cli.formats.torchfile.layout import serialization_id
from sparkling_cli.formats.torchfile.objects import (
    STORAGE_DTYPES,
    GlobalType,
    Ordered,
    Storage,
    TensorNode,
    make_global,
)
from sparkling_cli.formats.torchfile.repickle import write_tree
from sparkling_cli.formats.torchfile.writer import ALIGNMENT, NewRecord, Slot, lay_out_archive
from sparkling_cli.storage.tensors import ITEM_BYTES, row_major

_STORAGES = {dtype: name for name, dtype in STORAGE_DTYPES.items()}


def lay_out_state_dict(
    path: str, tensors: Iterable[tuple[str, str, str, tuple[int, ...]]], *, prefix: str = "archive/"
) -> OutputFile:
    """A file with an ``OrderedDict`` of tensors, each in a storage of its own.

    Args:
        path: of the output file.
        tensors: (key, name, dtype, shape) in the order of the dictionary.
        prefix: folder of the records in the archive.
    """
    parts = _Parts()
    tree = Ordered()
    for key, name, dtype, shape in tensors:
        tree[name] = parts.tensor(key, dtype, shape)
    return parts.laid_out(path, prefix, tree)


def lay_out_tensor(path: str, key: str, dtype: str, shape: tuple[int, ...]) -> OutputFile:
    """A file with one tensor, arguments as of :func:`lay_out_state_dict`."""
    parts = _Parts()
    return parts.laid_out(path, "archive/", parts.tensor(key, dtype, shape))


class _Parts:
    """The storages of a new file, each with one tensor."""

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str], GlobalType] = {}
        self.records: list[NewRecord] = []

    def _known(self, module: str, name: str) -> GlobalType:
        return self.kinds.setdefault((module, name), make_global(module, name))

    def tensor(self, key: str, dtype: str, shape: tuple[int, ...]) -> TensorNode:
        """A tensor in a storage of its own, for the tree."""
        number, size = str(len(self.records)), prod(shape) * ITEM_BYTES[dtype]
        self.records.append(NewRecord(f"data/{number}", (Slot(key, (0,) * len(shape), shape, size),)))
        kind = _STORAGES.get(dtype)
        rest: tuple[Any, ...] = (Ordered(),)
        if kind is not None:
            storage = Storage("storage", self._known("torch", kind), number, "cpu", prod(shape))
        else:
            storage = Storage("storage", self._known("torch.storage", "UntypedStorage"), number, "cpu", size)
            rest = (*rest, self._known("torch", dtype))
        rebuild = self._known("torch._utils", "_rebuild_tensor_v2" if kind else "_rebuild_tensor_v3")
        return TensorNode(rebuild, storage, 0, shape, row_major(shape), False, rest)

    def laid_out(self, path: str, prefix: str, tree: Any) -> OutputFile:
        """The file with a tree of its tensors."""
        pickled = write_tree(tree, {}, {}, path)
        head = [
            NewRecord("data.pkl", (pickled,)),
            NewRecord(".format_version", (b"1",)),
            NewRecord(".storage_alignment", (b"%d" % ALIGNMENT,)),
            NewRecord("byteorder", (b"little",)),
        ]
        tail = [
            NewRecord("version", (b"3\n",)),
            NewRecord(".data/serialization_id", (serialization_id(pickled),)),
        ]
        return lay_out_archive(path, prefix, [*head, *self.records, *tail])
