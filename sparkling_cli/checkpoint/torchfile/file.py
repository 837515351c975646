"""A torch zip file as a tree with places for its tensors, and the way back to a file.

``read_torch_file`` never runs what the pickle names and never reads tensor data; ``lay_out`` gives the
output file of the same content with other tensor shapes or other plain values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from sparkling_cli.checkpoint.model import ITEM_BYTES, Extent, OutputFile, StoredTensor
from sparkling_cli.checkpoint.torchfile.archive import Archive, Record, Window, open_window, read_archive
from sparkling_cli.checkpoint.torchfile.objects import Call, Ordered, Storage, TensorNode, make_global
from sparkling_cli.checkpoint.torchfile.opcodes import check_opcodes
from sparkling_cli.checkpoint.torchfile.repickle import Placement, write_tree
from sparkling_cli.checkpoint.torchfile.unpickle import read_tree
from sparkling_cli.checkpoint.torchfile.writer import Part, Slot, lay_out_archive
from sparkling_cli.errors import CheckpointError

#: Objects that only wrap a tensor: the tensor inside goes by the wrapper's own path.
_TRANSPARENT = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
#: More nodes than this are no checkpoint (a pickle can name one list over and over).
_MOST_NODES = 20_000_000

#: Path of a value in the tree: dict keys and list indices as they are.
TreePath = tuple[Any, ...]


@dataclass(frozen=True)
class TorchFile:
    """An opened torch file.

    Attributes:
        path: the file.
        relative: its path relative to the checkpoint's root; starts every key and is every extent's path.
        tree: containers, numbers, text, and stand-ins; tensors are ``objects.TensorNode``.
        tensors: key ``<relative>:<dotted path in the tree>`` -> where the tensor lies (absolute offsets).
        paths: key -> path in the tree.
        nodes: key -> the tensor's node in the tree.
        aliases: key of a tensor that is the same view of the same storage as an earlier one -> that one.
        wrapped: key -> global that wraps the tensor in something that is no plain tensor.
        base: where the archive starts in the file.
        archive: the container's records.
        pickled: the pickle, as read.
    """

    path: Path
    relative: str
    tree: Any
    tensors: Mapping[str, StoredTensor]
    paths: Mapping[str, TreePath]
    nodes: Mapping[str, TensorNode]
    aliases: Mapping[str, str]
    wrapped: Mapping[str, str]
    base: int
    archive: Archive
    pickled: bytes = field(repr=False)


def read_torch_file(
    path: Path, relative: str, *, offset: int = 0, length: int | None = None, allow: Collection[str] = ()
) -> TorchFile:
    """Open a torch zip file, or an archive inside a bigger file.

    Args:
        path: the file.
        relative: its path in the checkpoint, for keys and extents.
        offset: where the archive starts in the file.
        length: its bytes; up to the file's end by default.
        allow: more globals (dotted names) that its pickle may name; they stay inert.

    Raises:
        CheckpointError: missing, truncated, damaged, legacy or big-endian.
        UnsafePickleError: the pickle names a global that is not on the list.
    """
    where = relative or path.name
    with open_window(path, where, offset, length) as window:
        archive = read_archive(window)
        small = _check_records(archive, window)
        pickled = small["data.pkl"]
    check_opcodes(pickled, where)
    tree = read_tree(pickled, where, allow)
    found = _Collector(where, relative, offset, archive)
    found.collect(tree)
    return TorchFile(
        path, relative, tree, found.tensors, found.paths, found.nodes, found.aliases, found.wrapped, offset,
        archive, pickled,
    )  # fmt: skip


def _check_records(archive: Archive, window: Window) -> dict[str, bytes]:
    """Read the records that are no storages; refuse other byte orders and TorchScript."""
    names = {record.name: record for record in archive.records}
    if "constants.pkl" in names:
        raise CheckpointError(
            f"{window.where}: a TorchScript archive, which holds code; no checkpoint of weights",
            hint="save the module's state_dict() with torch.save",
        )
    archive.record("data.pkl", window.where)
    small = {r.name: window.read(r.start, r.size) for r in archive.records if not r.name.startswith("data/")}
    order = small.get("byteorder", b"little")
    if order != b"little":
        raise CheckpointError(
            f"{window.where}: byte order {order.decode('ascii', 'replace')!r}; only 'little' is supported",
            hint="load and save it again on a little-endian machine",
        )
    return small


class _Collector:
    """Walks the tree and finds every tensor's key and place."""

    def __init__(self, where: str, relative: str, base: int, archive: Archive) -> None:
        self.where = where
        self.relative = relative
        self.base = base
        self.records = {r.name: r for r in archive.records}
        self.tensors: dict[str, StoredTensor] = {}
        self.paths: dict[str, TreePath] = {}
        self.nodes: dict[str, TensorNode] = {}
        self.aliases: dict[str, str] = {}
        self.wrapped: dict[str, str] = {}
        self._first: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()
        self._left = _MOST_NODES

    def collect(self, tree: Any) -> None:
        try:
            self._walk(tree, (), f"{self.relative}:", None)
        except RecursionError as error:
            raise CheckpointError(f"{self.where}: its content is nested too deeply") from error

    def _walk(self, value: Any, path: TreePath, key: str, wrapper: str | None) -> None:
        if isinstance(value, TensorNode):
            self._tensor(value, path, key, wrapper)
            return
        if isinstance(value, Storage):
            raise CheckpointError(
                f"{self.where}: {key!r} is a bare storage or belongs to a tensor subclass; only plain "
                "tensors can be carried"
            )
        if not isinstance(value, (dict, list, tuple, Call)):
            return
        self._left -= 1
        if id(value) in self._open or self._left < 0:
            raise CheckpointError(f"{self.where}: {key!r} contains itself, or far too much")
        self._open.add(id(value))
        for name, item, inside in _children(value):
            deeper = key if name is None else f"{key}{name}" if key[-1] == ":" else f"{key}.{name}"
            self._walk(item, path if name is None else (*path, name), deeper, inside or wrapper)
        self._open.discard(id(value))

    def _tensor(self, node: TensorNode, path: TreePath, key: str, wrapper: str | None) -> None:
        while key in self.paths:
            key += "~"
        view = (node.storage.key, node.offset, node.shape, node.stride)
        first = self._first.setdefault(view, key)
        self.paths[key] = path
        self.nodes[key] = node
        if first != key:
            self.aliases[key] = first
        else:
            self.tensors[key] = self._stored(node, key)
        if wrapper is not None:
            self.wrapped[key] = wrapper

    def _stored(self, node: TensorNode, key: str) -> StoredTensor:
        dtype = node.dtype
        item = ITEM_BYTES.get(dtype)
        record = self.records.get(f"data/{node.storage.key}")
        if item is None:
            raise CheckpointError(f"{self.where}: {key!r} has dtype {dtype!r}, which is not supported")
        if record is None:
            raise CheckpointError(f"{self.where}: {key!r} lies in storage {node.storage.key!r}: missing")
        untyped = node.function.qualname == "_rebuild_tensor_v3"
        expected = node.storage.entries * (1 if untyped else item)
        if record.size != expected:
            raise CheckpointError(
                f"{self.where}: storage {node.storage.key!r} of {key!r} should have {expected} bytes, "
                f"it has {record.size}"
            )
        if 0 not in node.shape:
            last = node.offset + sum((n - 1) * s for n, s in zip(node.shape, node.stride, strict=True))
            if (last + 1) * item > record.size:
                raise CheckpointError(
                    f"{self.where}: {key!r} with shape {node.shape} and strides {node.stride} from entry "
                    f"{node.offset} runs out of its storage of {record.size} bytes"
                )
        return StoredTensor(dtype, node.shape, (self._extent(node, record, item),))

    def _extent(self, node: TensorNode, record: Record, item: int) -> Extent:
        strides = None if is_contiguous(node.shape, node.stride) else node.stride
        start = (0,) * len(node.shape)
        at = self.base + record.start + node.offset * item
        return Extent(self.relative, at, start, node.shape, strides)


def _children(value: Any) -> Iterator[tuple[Any, Any, str | None]]:
    """Yield (name, value, wrapping global) of what a container holds; name None keeps the path."""
    if isinstance(value, dict):
        yield from ((k, v, None) for k, v in value.items())
        if isinstance(value, Ordered) and value.state is not None:
            yield "__state__", value.state[0], None
    elif isinstance(value, (list, tuple)):
        yield from ((i, v, None) for i, v in enumerate(value))
    elif value.function.path in _TRANSPARENT:
        yield None, value.args[0] if value.args else None, None
        yield "__rest__", value.args[1:], None
    else:
        inside = value.function.path
        parts = (value.args, value.items, value.pairs, value.state)
        yield from ((f"__{i}__", part, inside) for i, part in enumerate(parts) if part)


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides as torch gives them to a new tensor (a size of 0 counts as 1)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether entries lie row-major without gaps; strides of dims of size 1 do not matter."""
    step = 1
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if found != step and 0 not in shape:
                return False
            step *= size
    return True


def read_values(file: TorchFile, keys: Iterable[str]) -> dict[str, bytes]:
    """Bytes of small contiguous tensors (counters and the like), by key.

    Raises:
        CheckpointError: one is not contiguous or larger than a mebibyte.
    """
    values = {}
    with open_window(file.path, file.relative or file.path.name) as window:
        for key in keys:
            stored = file.tensors[file.aliases.get(key, key)]
            extent = stored.extents[0]
            if extent.strides is not None or stored.nbytes > 1 << 20:
                raise CheckpointError(
                    f"{window.where}: {key!r} of shape {stored.shape} is neither a counter nor widened with "
                    "a parameter, and too large to be carried along"
                )
            values[key] = window.read(extent.offset, stored.nbytes)
    return values


def lay_out(
    file: TorchFile,
    new: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
    *,
    edits: Mapping[TreePath, Any] | None = None,
    values: Mapping[str, bytes] | None = None,
    path: str | None = None,
) -> OutputFile:
    """The same file with other tensor shapes and other plain values.

    Tensors come out contiguous; tensors that shared a storage still share it. Offsets in the result are
    relative to the archive's start, whatever ``file.base`` is.

    Args:
        file: the source.
        new: key -> (dtype, shape) of tensors that change; the others keep theirs.
        edits: path in the tree -> value that is put there (``REMOVED`` takes the entry out).
        values: key -> bytes of tensors that are written as literals and need no executor.
        path: of the output file; the source's by default.

    Raises:
        CheckpointError: a dtype changes, or tensors overlap in a storage without being the same view.
    """
    where = file.relative or file.path.name
    shapes: dict[int, tuple[int, ...]] = {}
    for key, (dtype, shape) in (new or {}).items():
        node = file.nodes[key]
        if node.dtype != dtype:
            raise CheckpointError(f"{where}: {key!r} is {node.dtype}; it cannot be written as {dtype}")
        shapes[id(node)] = tuple(shape)
    tree = _edited(file.tree, edits or {})
    kept = {id(n) for n in tensor_nodes(tree)} if edits else None
    plan = _plan_storages(where, file.nodes, file.aliases, shapes, kept, values or {})
    pickled = write_tree(tree, plan.placements, plan.entries, where)
    return lay_out_archive(
        file.relative if path is None else path, file.archive.prefix, list(_parts(file, plan, pickled))
    )


REMOVED: Any = object()


@dataclass(frozen=True)
class _StoragePlan:
    """New places of all tensors and the content of all storages."""

    placements: dict[int, Placement]
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
            plan.placements[id(node)] = Placement(at, shape, contiguous_strides(shape))
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


def _parts(file: TorchFile, plan: _StoragePlan, pickled: bytes) -> Iterator[Part]:
    """All records in the source's order; storages that no tensor uses any more are left out."""
    with open_window(file.path, file.relative or file.path.name, file.base, file.archive.length) as window:
        for record in file.archive.records:
            if record.name == "data.pkl":
                yield Part(record.name, (pickled,))
            elif record.name.startswith("data/"):
                content = plan.content.get(record.name.removeprefix("data/"))
                if content is not None:
                    yield Part(record.name, content)
            elif record.name == ".data/serialization_id" and pickled != file.pickled:
                yield Part(record.name, (serialization_id(pickled),))
            else:
                yield Part(record.name, (window.read(record.start, record.size),))


def serialization_id(pickled: bytes) -> bytes:
    """Forty digits that differ between files of different content; readers only compare them."""
    number = int.from_bytes(hashlib.sha256(pickled).digest(), "big")
    return b"%040d" % (number % 10**40)


def tensor_nodes(tree: Any) -> Iterator[TensorNode]:
    """Every tensor in a tree."""
    stack = [tree]
    seen: set[int] = set()
    while stack:
        value = stack.pop()
        if isinstance(value, TensorNode):
            yield value
        elif isinstance(value, (dict, list, tuple, Call)) and id(value) not in seen:
            seen.add(id(value))
            stack.extend(item for _, item, _ in _children(value))


def _edited(tree: Any, edits: Mapping[TreePath, Any]) -> Any:
    """A tree with other values; containers on the way are copied, all else is shared with the old one."""
    copies: dict[int, Any] = {}
    root = [tree]
    for path, value in edits.items():
        holder: Any = root
        for step in (0, *path[:-1]) if path else ():
            child = holder[step]
            if id(child) not in copies:
                fresh = _shallow(child, path)
                copies[id(child)] = copies[id(fresh)] = fresh
                # Keep the old container alive: its id must not be given to another.
                copies[-id(child)] = child
            holder[step] = copies[id(child)]
            holder = holder[step]
        last = path[-1] if path else 0
        if value is REMOVED:
            del holder[last]
        else:
            holder[last] = value
    return root[0]


def _shallow(value: Any, path: TreePath) -> Any:
    if isinstance(value, Ordered):
        fresh = Ordered(value)
        fresh.state = value.state
        return fresh
    if isinstance(value, (dict, list)):
        return value.copy()
    place = ".".join(map(str, path))
    raise CheckpointError(f"{place!r} cannot be changed: it lies in a {type(value).__name__}")


__all__ = [
    "REMOVED", "TorchFile", "TreePath", "contiguous_strides", "is_contiguous", "lay_out", "make_global",
    "read_torch_file", "read_values", "serialization_id", "tensor_nodes",
]  # fmt: skip
