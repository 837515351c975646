"""One item of a ``.distcp`` file: a whole ``torch.save`` archive at an offset.

A tensor item's inner directory says where its raw bytes lie. A bytes item is a pickled Python object.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from sparkling_cli.errors import CheckpointError
from sparkling_cli.formats.model import Checksum, OutputFile
from sparkling_cli.formats.statedict import packed
from sparkling_cli.formats.torchfile import TorchFile, lay_out, lay_out_tensor, read_torch_file
from sparkling_cli.formats.torchfile.archive import open_window, read_archive
from sparkling_cli.storage.tensors import Extent

#: the end of an archive's directory lies in so many last bytes
_END_OF_ARCHIVE = 22 + 65535


class Item(NamedTuple):
    """Where an item lies: the file (relative to the checkpoint's root), its first byte, its length."""

    root: Path
    file: str
    offset: int
    length: int

    def read(self, allow: Collection[str] = ()) -> TorchFile:
        """The item as a tree; tensor data is not read, and nothing of the pickle is executed.

        Args:
            allow: more globals that its pickle may name.

        Raises:
            CheckpointError: the file is missing or too short, or the item is damaged.
            UnsafePickleError: its pickle names something that is not harmless.
        """
        path = self.root / self.file
        return read_torch_file(path, self.file, offset=self.offset, length=self.length, allow=allow)

    def start(self, size: int) -> bytes:
        """Its first bytes."""
        with (self.root / self.file).open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(size)

    def carried(self, name: str) -> bytes:
        """All bytes of an item that is carried over, which must be whole.

        torch saves every object as an archive with a checksum of each record; an item that looks like one
        and does not agree with its own checksums was damaged, and nobody could load the output. An item that
        never was an archive is a planner's own matter.

        Raises:
            CheckpointError: the file is missing or too short, or the item is damaged.
        """
        where = f"{self.file}: item {name!r}"
        with open_window(self.root / self.file, where, self.offset, self.length) as window:
            data = window.read(0, self.length)
            if not data.startswith(b"PK\x03\x04") and b"PK\x05\x06" not in data[-_END_OF_ARCHIVE:]:
                return data
            records = read_archive(window).records
        for _, start, size, crc in records if any(record.crc for record in records) else ():
            if crc32(data[start : start + size]) != crc:
                raise CheckpointError(
                    f"{where} is damaged: its CRC-32 is another", hint="copy the checkpoint again"
                )
        return data


def tensor_key(item: TorchFile, name: str) -> str:
    """The key of the one tensor that a tensor item holds.

    Raises:
        CheckpointError: it holds something else.
    """
    if len(item.tensors) != 1 or item.wrapped or any(item.paths.values()):
        kind = "a tensor subclass" if item.wrapped else f"{len(item.tensors)} tensors"
        raise CheckpointError(f"{item.relative}: item {name!r} holds {kind}, expected one dense tensor")
    return next(iter(item.tensors))


def number(item: TorchFile, name: str, value: Any) -> OutputFile:
    """The item of a one-entry tensor, or of a plain value, with another value."""
    if not item.tensors:
        return lay_out(item, edits={(): value})
    key = tensor_key(item, name)
    return lay_out(item, values={key: packed(item.tensors[key].dtype, value)})


def box(item: TorchFile, name: str, key: str, start: tuple[int, ...], shape: tuple[int, ...]) -> OutputFile:
    """The item with room for another box of a tensor.

    Args:
        item: the source's item; everything but the tensor is kept.
        name: its fully qualified name.
        key: the output tensor's key.
        start: the box's first index in the whole tensor.
        shape: the box's size.
    """
    own = tensor_key(item, name)
    file = lay_out(item, {own: (item.tensors[own].dtype, shape)})
    return replace(file, tensors=tuple((key, extent._replace(start=start)) for _, extent in file.tensors))


def new_box(file: str, key: str, dtype: str, start: tuple[int, ...], shape: tuple[int, ...]) -> OutputFile:
    """An item that the source has not, with room for a box of a tensor.

    Args:
        file: that the item lies in.
        key: the output tensor's key.
        dtype: of the tensor.
        start: the box's first index in the whole tensor.
        shape: the box's size.
    """
    laid = lay_out_tensor(file, key, dtype, shape)
    return replace(laid, tensors=tuple((key, extent._replace(start=start)) for _, extent in laid.tensors))


def joined(path: str, items: Iterable[OutputFile]) -> OutputFile:
    """A ``.distcp`` file of items, one behind the other.

    Args:
        path: of the file.
        items: each laid out by itself.
    """
    size = 0
    literals: list[tuple[int, bytes]] = []
    tensors: list[tuple[str, Extent]] = []
    checksums: list[Checksum] = []
    for item in items:
        literals += ((size + at, data) for at, data in item.literals)
        tensors += ((key, extent._replace(offset=size + extent.offset)) for key, extent in item.tensors)
        checksums += (
            Checksum(size + c.start, size + c.stop, tuple(size + at for at in c.at)) for c in item.checksums
        )
        size += item.size
    return OutputFile(path, size, tuple(literals), tuple(tensors), tuple(checksums))
