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


def lay_out_state_dict(
    path: str, tensors: Iterable[tuple[str, str, str, tuple[int, ...]]], *, prefix: str = "archive/"
) -> OutputFile:
    """A file with an ``OrderedDict`` of tensors, each in a storage of its own.

    Args:
        path: of the output file.
        tensors: (key, name, dtype, shape) in the order of the dictionary.
        prefix: folder of the records in the archive.
    """
    kinds: dict[tuple[str, str], GlobalType] = {}

    def known(module: str, name: str) -> GlobalType:
        return kinds.setdefault((module, name), make_global(module, name))

    storages = {dtype: name for name, dtype in STORAGE_DTYPES.items()}
    tree = Ordered()
    parts = []
    for number, (key, name, dtype, shape) in enumerate(tensors):
        size = prod(shape) * ITEM_BYTES[dtype]
        strides = row_major(shape)
        if dtype in storages:
            storage = Storage("storage", known("torch", storages[dtype]), str(number), "cpu", prod(shape))
            rebuild = known("torch._utils", "_rebuild_tensor_v2")
            rest: tuple[Any, ...] = (Ordered(),)
        else:
            storage = Storage("storage", known("torch.storage", "UntypedStorage"), str(number), "cpu", size)
            rebuild = known("torch._utils", "_rebuild_tensor_v3")
            rest = (Ordered(), known("torch", dtype))
        tree[name] = TensorNode(rebuild, storage, 0, shape, strides, False, rest)
        parts.append(NewRecord(f"data/{number}", (Slot(key, (0,) * len(shape), shape, size),)))
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
    return lay_out_archive(path, prefix, [*head, *parts, *tail])
