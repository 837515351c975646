"""Writes a tree back as a protocol-2 pickle, as Python's own pickler would write the real objects.

The same objects come out in the same order with the same memo numbers, so a tree that was not changed gives
the bytes that it was read from.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.torchfile.objects import Call, GlobalType, Ordered, Storage, TensorNode

_BATCH = 1000


class StorageView(NamedTuple):
    """How a tensor lies in its (new) storage, in entries."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_U32 = struct.Struct("<I").pack
_TUPLES = (b")", b"\x85", b"\x86", b"\x87")


@lru_cache(maxsize=65536)
def _int(value: int) -> bytes:
    """The opcode of an integer."""
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return struct.pack("<cH", b"M", value)
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return struct.pack("<ci", b"J", value)
    # One byte longer than needed is cut again, as Python's encode_long does.
    data = value.to_bytes((value.bit_length() >> 3) + 1, "little", signed=True)
    if value < 0 and len(data) > 1 and data[-1] == 0xFF and data[-2] & 0x80:
        data = data[:-1]
    if len(data) > 255:
        raise CheckpointError(f"an integer of {len(data)} bytes cannot be written to a torch file")
    return b"\x8a%c" % len(data) + data


def write_tree(
    tree: Any, placements: Mapping[int, StorageView], entries: Mapping[str, int], where: str
) -> bytes:
    """Pickle ``tree``.

    Args:
        tree: as ``unpickle.read_tree`` gives it, or made of the same kinds of objects.
        placements: ``id(node)`` -> where the tensor lies now; nodes that are not in it stay.
        entries: storage key -> new number of entries (bytes for untyped storages).
        where: for messages.

    Raises:
        CheckpointError: an object that cannot be written, or nesting too deep.
    """
    try:
        return _Writer(placements, entries).write(tree)
    except RecursionError as error:
        raise CheckpointError(f"{where}: its content is nested too deeply to be written") from error


class _Writer:
    def __init__(self, placements: Mapping[int, StorageView], entries: Mapping[str, int]) -> None:
        self.placements = placements
        self.entries = entries
        self.out = bytearray(b"\x80\x02")
        self.memo: dict[int, int] = {}
        self.count = 0
        # Objects made while writing stay alive here, so that their ids stay theirs.
        self.kept: list[Any] = []
        # Globals are known by name: an OrderedDict in the tree does not keep its stand-in.
        self.globals: dict[tuple[str, str], int] = {}

    def write(self, tree: Any) -> bytes:
        self.save(tree)
        self.out += b"."
        return bytes(self.out)

    def save(self, value: Any) -> None:
        kind = type(value)
        if kind is int:
            self.save_int(value)
            return
        if value is None or kind is bool:
            self.out += b"N" if value is None else (b"\x88" if value else b"\x89")
            return
        if kind is float:
            self.out += struct.pack(">cd", b"G", value)
            return
        if kind is tuple and not value:
            self.out += b")"
            return
        if kind is Storage:
            self.save_storage(value)
            return
        known = self.memo.get(id(value))
        if known is not None:
            self.get(known)
            return
        writer = _WRITERS.get(kind)
        if writer is None and isinstance(value, Call):
            writer = _Writer.save_call
        elif writer is None and isinstance(value, GlobalType):
            self.save_global(value.module, value.qualname)
            return
        if writer is None:
            raise CheckpointError(f"a {kind.__name__} cannot be written to a torch file: {value!r}")
        writer(self, value)

    def put(self, value: Any) -> None:
        number = self.count
        self.count += 1
        self.memo[id(value)] = number
        self.out += b"q%c" % number if number < 256 else b"r" + _U32(number)

    def get(self, number: int) -> None:
        self.out += b"h%c" % number if number < 256 else b"j" + _U32(number)

    def save_int(self, value: int) -> None:
        self.out += _int(value)

    def save_str(self, value: str) -> None:
        data = value.encode("utf-8", "surrogatepass")
        self.out += b"X" + _U32(len(data)) + data
        self.put(value)

    def save_bytes(self, value: bytes) -> None:
        self.save_reduce("_codecs", "encode", (value.decode("latin1"), "latin1"))
        self.put(value)

    def save_set(self, value: set[Any] | frozenset[Any]) -> None:
        name = "set" if isinstance(value, set) else "frozenset"
        self.save_reduce("__builtin__", name, (list(value),))
        self.put(value)

    def save_complex(self, value: complex) -> None:
        self.save_reduce("__builtin__", "complex", (value.real, value.imag))
        self.put(value)

    def save_tuple(self, value: tuple[Any, ...]) -> None:
        if len(value) <= 3:
            for item in value:
                self.save(item)
            self.out += (b"\x85", b"\x86", b"\x87")[len(value) - 1]
        else:
            self.out += b"("
            for item in value:
                self.save(item)
            self.out += b"t"
        self.put(value)

    def save_list(self, value: list[Any]) -> None:
        self.out += b"]"
        self.put(value)
        self.save_batches([(item,) for item in value], b"ae", plain=True)

    def save_dict(self, value: dict[Any, Any]) -> None:
        self.out += b"}"
        self.put(value)
        self.save_batches(list(value.items()), b"su", plain=True)

    def save_batches(self, items: Sequence[tuple[Any, ...]], codes: bytes, *, plain: bool = False) -> None:
        """What a container holds, some at a time, each with the opcode for one alone or for several.

        Of a plain list or dict Python marks the last batch as several even if it is one, and of a dict it
        writes an empty last batch if the size is a multiple of the batch; so this does too.
        """
        several = plain and len(items) > 1
        for start in range(0, len(items) + (several and codes == b"su"), _BATCH):
            batch = items[start : start + _BATCH]
            marked = several or len(batch) > 1
            if marked:
                self.out += b"("
            for item in batch:
                for part in item:
                    self.save(part)
            self.out += codes[marked : marked + 1]

    def save_global(self, module: str, name: str) -> None:
        known = self.globals.get((module, name))
        if known is not None:
            self.get(known)
            return
        self.globals[module, name] = self.count
        self.out += f"c{module}\n{name}\n".encode()
        self.put(None)

    def save_reduce(self, module: str, name: str, args: tuple[Any, ...]) -> None:
        self.kept.append(args)
        self.save_global(module, name)
        self.save(args)
        self.out += b"R"

    def save_call(self, value: Call) -> None:
        self.save(value.function)
        self.save(value.args)
        self.out += b"\x81" if value.new else b"R"
        self.put(value)
        self.save_batches([(item,) for item in value.items], b"ae")
        self.save_batches(value.pairs, b"su")
        self.save_state(value.state)

    def save_ordered(self, value: Ordered) -> None:
        self.save_global("collections", "OrderedDict")
        self.out += b")R"
        self.put(value)
        self.save_batches(list(value.items()), b"su")
        self.save_state(value.state)

    def save_state(self, state: Any) -> None:
        if state is not None:
            self.save(state[0])
            self.out += b"b"

    def save_storage(self, value: Storage) -> None:
        self.out += b"("
        self.save(value.tag)
        self.save_global(value.kind.module, value.kind.qualname)
        self.save(value.key)
        self.save(value.location)
        self.out += _int(self.entries.get(value.key, value.entries)) + b"t"
        self.put(_Unshared)
        self.out += b"Q"

    def save_sizes(self, sizes: tuple[int, ...]) -> None:
        """A shape or strides; torch makes a new tuple for each."""
        if len(sizes) > 3:
            self.out += b"(" + b"".join(map(_int, sizes)) + b"t"
        else:
            self.out += b"".join(map(_int, sizes)) + _TUPLES[len(sizes)]
        if sizes:
            self.put(_Unshared)

    def save_tensor(self, value: TensorNode) -> None:
        place = self.placements.get(id(value)) or StorageView(value.offset, value.shape, value.stride)
        self.save_global(value.function.module, value.function.qualname)
        self.out += b"("
        self.save_storage(value.storage)
        self.out += _int(place.offset)
        self.save_sizes(place.shape)
        self.save_sizes(place.stride)
        if value.function.qualname != "_rebuild_tensor":
            self.out += b"\x88" if value.requires_grad else b"\x89"
            for item in value.rest:
                self.save(item)
        self.out += b"t"
        self.put(_Unshared)
        self.out += b"R"
        self.put(value)


class _Unshared:
    """Stands in the memo for what is written once and never referred to again."""


_WRITERS: dict[type, Callable[[_Writer, Any], None]] = {
    str: _Writer.save_str,
    bytes: _Writer.save_bytes,
    tuple: _Writer.save_tuple,
    list: _Writer.save_list,
    dict: _Writer.save_dict,
    set: _Writer.save_set,
    frozenset: _Writer.save_set,
    complex: _Writer.save_complex,
    Ordered: _Writer.save_ordered,
    TensorNode: _Writer.save_tensor,
}
