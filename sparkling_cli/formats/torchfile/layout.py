"""The way back: an opened torch file as an output file with other shapes and other plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.gc_pause import collector_paused
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.formats.torchfile.archive import open_window
from sparkling_cli.formats.torchfile.file import TorchFile, TreePath, walk
from sparkling_cli.formats.torchfile.objects import FIELDS, Call, TensorNode, copied_call, like, step_into
from sparkling_cli.formats.torchfile.repickle import StorageView, write_tree
from sparkling_cli.formats.torchfile.subclass import INSIDE, REBUILD
from sparkling_cli.formats.torchfile.writer import NewRecord, Slot, lay_out_archive
from sparkling_cli.storage.tensors import ITEM_BYTES, row_major

REMOVED: Any = object()


@collector_paused()
def lay_out(
    file: TorchFile,
    new: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    *,
    edits: Mapping[TreePath, Any] | None = None,
    values: Mapping[str, bytes] | None = None,
) -> OutputFile:
    """The same file with other tensor shapes and other plain values.

    Tensors come out contiguous; tensors that shared a storage still share it. Offsets in the result are
    relative to the archive's start, whatever ``file.base`` is.

    Args:
        file: the source.
        new: key -> (dtype, shape) of tensors that change; the others keep theirs.
        edits: path in the tree -> value that is put there (``REMOVED`` takes the entry out).
        values: key -> bytes of tensors that are written as literals and need no executor.

    Raises:
        CheckpointError: a dtype changes, tensors overlap in a storage without being the same view, or one
            that grows is part of a tensor subclass of which no edit changes the size.
    """
    where = file.where
    shapes: dict[int, tuple[int, ...]] = {}
    for key, (dtype, shape) in (new or {}).items():
        node = file.nodes[key]
        if node.dtype != dtype:
            raise CheckpointError(f"{where}: {key!r} is {node.dtype}; it cannot be written as {dtype}")
        shapes[id(node)] = tuple(shape)
        around = (*file.paths[key][: -len(INSIDE) - 1], INSIDE[0])
        alone = file.wrapped.get(key) == REBUILD and around not in (edits or {})
        if alone and shapes[id(node)] != node.shape:
            raise CheckpointError(f"{where}: {key!r} is part of a tensor subclass, and cannot grow by itself")
    tree = edited(file.tree, edits or {})
    kept = {id(value) for _, value in walk(tree)} if edits else None
    plan = _plan_storages(where, file.nodes, file.aliases, shapes, kept, values or {})
    pickled = write_tree(tree, plan.placements, plan.entries, where)
    return lay_out_archive(file.relative, file.archive.prefix, list(_parts(file, plan, pickled)))


@dataclass(frozen=True)
class _StoragePlan:
    """New places of all tensors and the content of all storages."""

    placements: dict[int, StorageView]
    entries: dict[str, int]
    content: dict[str, list[bytes | Slot]]


def _plan_storages(
    where: str,
    nodes: Mapping[str, TensorNode],
    aliases: Mapping[str, str],
    shapes: Mapping[int, tuple[int, ...]],
    kept: set[int] | None,
    values: Mapping[str, bytes],
) -> _StoragePlan:
    """Give every distinct view its room in its storage, in the order of the old offsets."""
    groups: dict[str, list[tuple[str, TensorNode]]] = {}
    for key, node in nodes.items():
        if kept is None or id(node) in kept:
            groups.setdefault(node.storage.key, []).append((key, node))
    plan = _StoragePlan({}, {}, {})
    for storage, members in groups.items():
        offset, end = 0, 0
        placed: dict[str, tuple[int, tuple[int, ...]]] = {}
        content: list[bytes | Slot] = []
        for key, node in sorted(members, key=lambda m: m[1].offset) if len(members) > 1 else members:
            first = aliases.get(key, key)
            shape = shapes.get(id(node), shapes.get(id(nodes[first]), node.shape))
            if first in placed:
                if placed[first][1] != shape:
                    raise CheckpointError(f"{where}: {first!r} and {key!r} share memory: one shape")
            else:
                end = _after(where, key, node, end)
                placed[first] = (offset, shape)
                content.append(_content(where, first, node.dtype, shape, values))
                offset += prod(shape)
            at = placed[first][0]
            plan.placements[id(node)] = StorageView(at, shape, row_major(shape))
        untyped = members[0][1].function.qualname == "_rebuild_tensor_v3"
        plan.entries[storage] = offset * (ITEM_BYTES[members[0][1].dtype] if untyped else 1)
        plan.content[storage] = content
    return plan


def _after(where: str, key: str, node: TensorNode, end: int) -> int:
    """The first entry behind ``node``'s view; it must start at ``end`` or later."""
    if 0 in node.shape:
        return end
    if node.offset < end:
        raise CheckpointError(
            f"{where}: {key!r} overlaps another tensor in storage {node.storage.key!r} without being "
            "the same view; it cannot be told how both should grow",
            hint="save clones of the tensors",
        )
    return node.offset + 1 + sum((n - 1) * s for n, s in zip(node.shape, node.stride, strict=True))


def _content(
    where: str, key: str, dtype: str, shape: tuple[int, ...], values: Mapping[str, bytes]
) -> bytes | Slot:
    size = prod(shape) * ITEM_BYTES[dtype]
    value = values.get(key)
    if value is None:
        return Slot(key, (0,) * len(shape), shape, size)
    if len(value) != size:
        raise CheckpointError(f"{where}: {key!r} takes {size} bytes, {len(value)} were given")
    return value


def _parts(file: TorchFile, plan: _StoragePlan, pickled: bytes) -> Iterator[NewRecord]:
    """All records in the source's order; storages that no tensor uses any more are left out."""
    with open_window(file.path, file.where, file.base, file.archive.length) as window:
        for record in file.archive.records:
            if record.name == "data.pkl":
                yield NewRecord(record.name, (pickled,))
            elif record.name.startswith("data/"):
                content = plan.content.get(record.name.removeprefix("data/"))
                if content is not None:
                    yield NewRecord(record.name, content)
            elif record.name == ".data/serialization_id" and pickled != file.pickled:
                yield NewRecord(record.name, (serialization_id(pickled),))
            else:
                yield NewRecord(record.name, (window.read(record.start, record.size),))


def serialization_id(pickled: bytes) -> bytes:
    """Forty digits that differ between files of different content; readers only compare them."""
    number = int.from_bytes(hashlib.sha256(pickled).digest(), "big")
    return b"%040d" % (number % 10**40)


def edited(tree: Any, edits: Mapping[TreePath, Any]) -> Any:
    """A tree with other values; containers on the way are copied, all else is shared with the old one."""
    copies: dict[int, Any] = {}
    root = [tree]
    for path, value in edits.items():
        holder: Any = root
        for step in (0, *path[:-1]) if path else ():
            child = step_into(holder, step)
            if id(child) not in copies:
                fresh = _shallow(child, path)
                copies[id(child)] = copies[id(fresh)] = fresh
                # Keep the old container alive: its id must not be given to another.
                copies[-id(child)] = child
            _put(holder, step, copies[id(child)])
            holder = copies[id(child)]
        last = path[-1] if path else 0
        if value is REMOVED:
            del holder[last]
        else:
            _put(holder, last, value)
    return root[0]


def _put(holder: Any, step: Any, value: Any) -> None:
    if isinstance(holder, Call):
        setattr(holder, FIELDS[step], value)
    else:
        holder[step] = value


def _shallow(value: Any, path: TreePath) -> Any:
    if isinstance(value, dict):
        return like(value, value)
    if isinstance(value, list):
        return value.copy()
    if isinstance(value, Call):
        return copied_call(value)
    place = ".".join(map(str, path))
    raise CheckpointError(f"{place!r} cannot be changed: it lies in a {type(value).__name__}")
