"""A torch zip file as a tree with places for its tensors.

``read_torch_file`` never runs what the pickle names and never reads tensor data.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.gc_pause import collector_paused
from sparkling_cli.formats.torchfile.archive import Archive, Window, open_window, read_archive
from sparkling_cli.formats.torchfile.objects import Call, Ordered, Storage, TensorNode, plain
from sparkling_cli.formats.torchfile.unpickle import Anything, read_tree
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, StoredTensor, is_contiguous

#: Objects that only wrap a tensor: the tensor inside goes by the wrapper's own path.
TRANSPARENT = frozenset({"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"})
#: Path of a value in the tree: dict keys and list indices as they are.
TreePath = tuple[Any, ...]


@dataclass(frozen=True)
class TorchFile:
    """An opened torch file.

    Attributes:
        path: the file.
        relative: its path relative to the checkpoint's root; starts every key and is every extent's path.
        tree: containers, numbers, text, and stand-ins; tensors are ``objects.TensorNode``.
        base: where the archive starts in the file.
        archive: the container's records.
        pickled: the pickle, as read.
        tensors: key ``<relative>:<dotted path in the tree>`` -> where the tensor lies (absolute offsets).
        paths: key -> path in the tree.
        nodes: key -> the tensor's node in the tree.
        aliases: key of a tensor that is the same view of the same storage as an earlier one -> that one.
        wrapped: key -> global that wraps the tensor in something that is no plain tensor.
    """

    path: Path
    relative: str
    tree: Any
    base: int
    archive: Archive
    pickled: bytes = field(repr=False)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    paths: dict[str, TreePath] = field(default_factory=dict)
    nodes: dict[str, TensorNode] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    wrapped: dict[str, str] = field(default_factory=dict)

    @cached_property
    def keys(self) -> dict[TreePath, str]:
        """Path in the tree -> key of the stored tensor (that of the first name, for shared ones)."""
        return {path: self.aliases.get(key, key) for key, path in self.paths.items()}

    @property
    def where(self) -> str:
        """Its name in messages."""
        return self.relative or self.path.name


@collector_paused()
def read_torch_file(
    path: Path,
    relative: str,
    *,
    offset: int = 0,
    length: int | None = None,
    allow: Collection[str] = (),
    without: Collection[str] = (),
) -> TorchFile:
    """Open a torch zip file, or an archive inside a bigger file.

    Args:
        path: the file.
        relative: its path in the checkpoint, for keys and extents.
        offset: where the archive starts in the file.
        length: its bytes; up to the file's end by default.
        allow: more globals (dotted names) that its pickle may name; they stay inert.
        without: entries of its dictionary whose tensors are not looked for, as the output has none of them.

    Raises:
        CheckpointError: missing, truncated, damaged, legacy or big-endian.
        UnsafePickleError: the pickle names a global that is not on the list.
    """
    where = relative or path.name
    with open_window(path, where, offset, length) as window:
        archive = read_archive(window)
        small = _check_records(archive, window)
        pickled = small["data.pkl"]
    tree = read_tree(pickled, where, allow)
    return collected(TorchFile(path, relative, tree, offset, archive, pickled), without)


def collected(file: TorchFile, without: Collection[str] = ()) -> TorchFile:
    """The file with the keys and places of all tensors in its tree, whatever it had of them.

    Args:
        file: the file.
        without: see :func:`read_torch_file`.

    Raises:
        CheckpointError: one lies in no record, or outside of it.
    """
    tree = file.tree
    found = TorchFile(file.path, file.relative, tree, file.base, file.archive, file.pickled)
    cut = without and isinstance(tree, dict)
    _Collector(found).collect({k: v for k, v in tree.items() if k not in without} if cut else tree)
    return found


def called(file: TorchFile, relative: str) -> TorchFile:
    """The file under another path in the output; its tensors are read where they lie.

    Args:
        file: the file.
        relative: to the checkpoint's root.
    """
    found = collected(replace(file, relative=relative))
    tensors = {
        key: stored._replace(extents=tuple(e._replace(path=file.relative) for e in stored.extents))
        for key, stored in found.tensors.items()
    }
    return replace(found, tensors=tensors)


def _check_records(archive: Archive, window: Window) -> dict[str, bytes]:
    """Read the records that are no storages; refuse other byte orders and TorchScript."""
    small = {r.name: window.read(r.start, r.size) for r in archive.records if not r.name.startswith("data/")}
    if "constants.pkl" in small:
        raise CheckpointError(
            f"{window.where}: a TorchScript archive, which holds code; no checkpoint of weights",
            hint="save the module's state_dict() with torch.save",
        )
    if "data.pkl" not in small:
        raise CheckpointError(f"{window.where}: the torch file has no record 'data.pkl'")
    if not small.get("version", b"3").strip().isdigit():
        raise CheckpointError(
            f"{window.where}: its version is {small['version'][:20]!r}, no number: the file is damaged",
            hint="copy or download it again",
        )
    order = small.get("byteorder", b"little")
    if order != b"little":
        raise CheckpointError(
            f"{window.where}: byte order {order.decode('ascii', 'replace')!r}; only 'little' is supported",
            hint="load and save it again on a little-endian machine",
        )
    return small


class _Collector:
    """Walks the tree of a file and puts every tensor's key and place into it."""

    def __init__(self, file: TorchFile) -> None:
        self.file = file
        self.where = file.where
        self.records = {r.name: r for r in file.archive.records}
        self._first: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()
        # Containers to be visited at most: a pickle can name one list over and over.
        self._left = 10_000 + 2 * len(file.pickled) + 20 * len(self.records)

    def collect(self, tree: Any) -> None:
        try:
            self._walk(tree, (), f"{self.file.relative}:", None)
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
        for name, item, inside in children(value):
            text = name if isinstance(name, (str, int, float, type(None))) else "<of a key>"
            deeper = key if name is None else f"{key}{text}" if key[-1] == ":" else f"{key}.{text}"
            self._walk(item, path if name is None else (*path, name), deeper, inside or wrapper)
        self._open.discard(id(value))

    def _tensor(self, node: TensorNode, path: TreePath, key: str, wrapper: str | None) -> None:
        file = self.file
        while key in file.paths:
            key += "~"
        view = (node.storage.key, node.offset, node.shape, node.stride)
        first = self._first.setdefault(view, key)
        file.paths[key] = path
        file.nodes[key] = node
        if first != key:
            file.aliases[key] = first
        else:
            file.tensors[key] = self._stored(node, key)
        if wrapper is not None:
            file.wrapped[key] = wrapper

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
        strides = None if is_contiguous(node.shape, node.stride) else node.stride
        at = self.file.base + record.start + node.offset * item
        box = Extent(self.file.relative, at, (0,) * len(node.shape), node.shape, strides)
        return StoredTensor(dtype, node.shape, (box,))


def children(value: Any) -> Iterator[tuple[Any, Any, str | None]]:
    """Yield (name, value, wrapping global) of what a container holds; name None keeps the path."""
    if isinstance(value, dict):
        for number, (name, item) in enumerate(value.items()):
            if not isinstance(name, (str, int)):  # a tensor may be a key
                yield f"<key {number}>", name, None
            yield name, item, None
        if isinstance(value, Ordered) and value.state is not None:
            yield "__state__", value.state[0], None
    elif isinstance(value, (list, tuple)):
        yield from ((i, v, None) for i, v in enumerate(value))
    elif value.function.path in TRANSPARENT:
        yield None, value.args[0] if value.args else None, None
        yield "__rest__", value.args[1:], None
    else:
        inside = value.function.path
        parts = (value.args, value.items, value.pairs, value.state)
        yield from ((f"__{i}__", part, inside) for i, part in enumerate(parts) if part)


def walk(tree: Any) -> Iterator[tuple[str, TensorNode | Call]]:
    """Every tensor and recorded call of a tree with its dotted place; what is named twice comes once."""
    stack: list[tuple[tuple[str, ...], Any]] = [((), tree)]
    seen: set[int] = set()
    while stack:
        where, value = stack.pop()
        if isinstance(value, (TensorNode, Call)):
            yield ".".join(where), value
        if isinstance(value, (dict, list, tuple, Call)) and id(value) not in seen:
            seen.add(id(value))
            stack += [((*where, str(name)), item) for name, item, _ in children(value)]


def read_attributes(path: Path, relative: str = "") -> dict[str, Any]:
    """The attributes of an arbitrary pickled object (``training_args.bin``) as plain data; nothing is run.

    Args:
        path: a torch file.
        relative: its name in messages.

    Raises:
        CheckpointError: it is no torch file, is damaged, or holds no object with attributes.
    """
    where = relative or path.name
    value = plain(read_torch_file(path, where, allow=Anything()).tree)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object with attributes, found {type(value).__name__}")
    return value


def read_values(file: TorchFile, keys: Iterable[str]) -> dict[str, bytes]:
    """Bytes of contiguous tensors (counters and the like), by key.

    Raises:
        CheckpointError: one is not contiguous.
    """
    values = {}
    wanted = {key: file.tensors[file.aliases.get(key, key)] for key in keys}
    with open_window(file.path, file.where) as window:
        window.expect([stored.extents[0].offset for stored in wanted.values()], 8)
        for key, stored in wanted.items():
            extent = stored.extents[0]
            if extent.strides is not None:
                raise CheckpointError(f"{window.where}: {key!r} of shape {stored.shape} is not contiguous")
            values[key] = window.read(extent.offset, stored.nbytes)
    return values
