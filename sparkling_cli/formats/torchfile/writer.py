"""Lays out a torch zip file: every byte that is no tensor data, and slots for tensor data and CRCs.

The structure is the one that torch's own writer makes (stored records, 64-byte alignment by an ``FB`` extra
field, data descriptors, zip64 where needed and always at the end), so an unchanged file comes out as it was.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from sparkling_cli.formats.model import Checksum, OutputFile
from sparkling_cli.formats.torchfile.archive import CENTRAL, LOCAL, U32
from sparkling_cli.storage.tensors import Extent

ALIGNMENT = 64


class Slot(NamedTuple):
    """Room for a tensor (or a box of one) inside a record: row-major, contiguous."""

    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    size: int


class NewRecord(NamedTuple):
    """A record to write: its name and its content, in order: bytes, or room for tensors."""

    name: str
    content: Sequence[bytes | Slot]

    @property
    def size(self) -> int:
        """Bytes of the record."""
        return sum([len(piece) if isinstance(piece, bytes) else piece.size for piece in self.content])


class _Layout:
    """Collects literals; bytes that follow each other become one literal."""

    def __init__(self) -> None:
        self.cursor = 0
        self.literals: list[tuple[int, bytes]] = []
        self.run = bytearray()
        self.run_start = 0

    def add(self, data: bytes) -> None:
        if not self.run:
            self.run_start = self.cursor
        self.run += data
        self.cursor += len(data)

    def skip(self, size: int) -> None:
        self.flush()
        self.cursor += size

    def flush(self) -> None:
        if self.run:
            self.literals.append((self.run_start, bytes(self.run)))
            self.run = bytearray()


def lay_out_archive(path: str, prefix: str, parts: Sequence[NewRecord]) -> OutputFile:
    """The whole file.

    Args:
        path: of the output file.
        prefix: folder of the records inside the archive, with its slash.
        parts: the records in order.
    """
    layout = _Layout()
    directory = bytearray()
    # Per record with tensors: start, stop, where its descriptor's CRC is, where in the directory.
    pending: list[tuple[int, int, int, int]] = []
    tensors: list[tuple[str, Extent]] = []
    for part in parts:
        name = (prefix + part.name).encode()
        size, header = part.size, layout.cursor
        layout.add(_local_header(name, header, size))
        start = layout.cursor
        crc: int | None = 0
        for piece in part.content:
            if isinstance(piece, bytes):
                layout.add(piece)
                crc = None if crc is None else zlib.crc32(piece, crc)
            else:
                tensors.append((piece.key, Extent(path, layout.cursor, piece.start, piece.shape)))
                if piece.size:
                    layout.skip(piece.size)
                    crc = None
        if crc is None:
            pending.append((start, layout.cursor, layout.cursor + 4, len(directory) + 16))
        if size:
            layout.add(_descriptor(crc or 0, size, header))
        directory += _directory_entry(name, crc or 0, size, header)
    start = layout.cursor
    layout.add(bytes(directory))
    layout.add(_end(len(parts), start, len(directory)))
    layout.flush()
    checksums = tuple(Checksum(a, b, (at, start + entry)) for a, b, at, entry in pending)
    return OutputFile(path, layout.cursor, tuple(layout.literals), tuple(tensors), checksums)


def _flags(size: int) -> int:
    """UTF-8 names; a data descriptor behind every record that is not empty."""
    return 0x0808 if size else 0x0800


def _local_header(name: bytes, cursor: int, size: int) -> bytes:
    """Local header with padding, so that the record's data is aligned."""
    # The stored size stands in the descriptor behind the data; torch leaves it 0 here.
    wide = _wide(size, 0, cursor)
    padding = -(cursor + 30 + len(name) + len(wide) + 4) % ALIGNMENT
    extra = wide + b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    fixed = LOCAL.pack(0x04034B50, 0, _flags(size), 0, 0, 0, 0, 0, 0, len(name), len(extra))
    return fixed + name + extra


def _wide(size: int, stored: int, cursor: int) -> bytes:
    """The zip64 extra field, where 32 bits do not do."""
    if size < U32 and cursor < U32:
        return b""
    wide = struct.pack("<QQ", size, stored) if size >= U32 else b""
    if cursor >= U32:
        wide += struct.pack("<Q", cursor)
    return struct.pack("<HH", 1, len(wide)) + wide


def _descriptor(crc: int, size: int, cursor: int) -> bytes:
    if size >= U32 or cursor >= U32:
        return struct.pack("<4sIQQ", b"PK\x07\x08", crc, size, size)
    return struct.pack("<4sIII", b"PK\x07\x08", crc, size, size)


def _directory_entry(name: bytes, crc: int, size: int, cursor: int) -> bytes:
    wide = _wide(size, size, cursor)
    small = min(size, U32)
    fixed = CENTRAL.pack(0x02014B50, 0, 0, _flags(size), 0, 0, 0, crc, small, small, len(name),
        len(wide), 0, 0, 0, 0, min(cursor, U32),
    )  # fmt: skip
    return fixed + name + wide


def _end(count: int, start: int, size: int) -> bytes:
    """Both ends of the directory; torch always writes the 64-bit one."""
    end64 = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count, size, start)
    locator = struct.pack("<IIQI", 0x07064B50, 0, start + size, 1)
    few = min(count, 0xFFFF)
    end = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, few, few, min(size, U32), min(start, U32), 0)
    return end64 + locator + end
