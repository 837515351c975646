"""The zip container of a torch file: where each record's bytes lie, checked before anything is trusted.

Torch writes every record stored (never compressed), aligned to 64 bytes, with a data descriptor behind it
and a zip64 end of directory. Offsets in this module are relative to the archive's first byte, which need
not be the file's first (a DCP item is a whole archive inside a bigger file).
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sparkling_cli.errors import CheckpointError

LOCAL = struct.Struct("<IHHHHHIIIHH")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_LOCATOR = struct.Struct("<IIQI")
_END64 = struct.Struct("<IQHHIIQQQQ")
U32 = 0xFFFFFFFF
#: First bytes of a file written by torch.save before 1.6 (or with the old serialization switched on).
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


class Record(NamedTuple):
    """One record: its name inside the archive's folder, where its bytes lie, and their CRC-32."""

    name: str
    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class Archive:
    """A checked archive: the folder that all records lie in, and the records in directory order."""

    prefix: str
    records: tuple[Record, ...]
    length: int


class Window:
    """A part of a file that can be read at offsets relative to its start; short reads are errors."""

    def __init__(self, descriptor: int, where: str, offset: int, length: int) -> None:
        self.descriptor = descriptor
        self.where = where
        self.offset = offset
        self.length = length

    def read(self, start: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``start``."""
        if start < 0 or size < 0 or start + size > self.length:
            raise CheckpointError(
                f"{self.where}: truncated: bytes {start}..{start + size} are needed, it has {self.length}",
                hint="copy or download the file again",
            )
        try:
            data = os.pread(self.descriptor, size, self.offset + start)
        except OSError as error:
            raise CheckpointError(f"{self.where}: cannot be read: {error.strerror}") from error
        if len(data) != size:
            raise CheckpointError(f"{self.where}: {size} bytes expected at {start}, {len(data)} read")
        return data

    def expect(self, starts: Iterable[int], size: int) -> None:
        """So many bytes from each of these places will be read soon: a disk is faster with many at once."""
        if hasattr(os, "posix_fadvise"):
            for start in (start for start in starts if 0 <= start < self.length):
                os.posix_fadvise(self.descriptor, self.offset + start, size, os.POSIX_FADV_WILLNEED)


@contextmanager
def open_window(path: Path, where: str, offset: int = 0, length: int | None = None) -> Iterator[Window]:
    """Open ``length`` bytes of a file from ``offset`` on (all of it by default), read-only.

    Raises:
        CheckpointError: the file is missing or shorter than that.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be opened: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{where}: expected a regular file", hint="put the file in its place")
        size = status.st_size
        if length is None:
            length = size - offset
        if offset < 0 or length < 0 or offset + length > size:
            raise CheckpointError(
                f"{where}: truncated: {offset + length} bytes expected, {size} found",
                hint="copy or download the file again",
            )
        yield Window(descriptor, where, offset, length)
    finally:
        os.close(descriptor)


def read_archive(window: Window) -> Archive:
    """Parse and check the archive's directory and every local header.

    Raises:
        CheckpointError: it is no torch zip file, or is truncated, compressed, encrypted, inconsistent.
    """
    _check_kind(window)
    count, start, size = _end_of_directory(window)
    entries = _central_directory(window, count, start, size)
    prefix = entries[0][0].split("/", 1)[0] + "/" if entries and "/" in entries[0][0] else ""
    entries.sort(key=lambda entry: entry[1])
    window.expect([header for _, header, _, _ in entries], LOCAL.size)
    records = []
    seen = set()
    previous_end = 0
    for name, header, length, crc in entries:
        if not name.startswith(prefix) or name in seen:
            kind = "is there twice" if name in seen else f"lies outside the folder {prefix!r}"
            raise CheckpointError(f"{window.where}: record {name!r} {kind}")
        seen.add(name)
        if header < previous_end:
            raise CheckpointError(f"{window.where}: record {name!r} overlaps the one before it")
        data = _data_start(window, name, header)
        previous_end = data + length
        if previous_end > start:
            raise CheckpointError(f"{window.where}: record {name!r} runs into the directory")
        records.append(Record(name[len(prefix) :], data, length, crc))
    return Archive(prefix, tuple(records), window.length)


def _check_kind(window: Window) -> None:
    """Refuse what is not a zip, with what it is instead where that can be told."""
    head = window.read(0, min(len(_LEGACY), window.length))
    if head == _LEGACY:
        raise CheckpointError(
            f"{window.where}: written in torch's old format (before 1.6), which stores no offsets",
            hint="save it again: torch.save(torch.load(FILE, weights_only=True), NEW_FILE)",
        )
    if head[:4] != b"PK\x03\x04":
        raise CheckpointError(
            f"{window.where}: not a torch file: it should start with b'PK\\x03\\x04', "
            f"it starts with {head[:4]!r}"
        )


def _end_of_directory(window: Window) -> tuple[int, int, int]:
    """Return (records, start, size) of the central directory."""
    if window.length < _END.size:
        raise CheckpointError(f"{window.where}: truncated: {window.length} bytes are no archive")
    at = window.length - _END.size
    magic, disk, _, _, count, size, start, comment = _END.unpack(window.read(at, _END.size))
    if magic != 0x06054B50 or comment != 0 or disk != 0:
        raise CheckpointError(
            f"{window.where}: no end of archive in its last 22 bytes: the file is truncated or has "
            "something behind it",
            hint="copy or download the file again",
        )
    end = at
    if at >= _LOCATOR.size:
        locator, disk, end64, disks = _LOCATOR.unpack(window.read(at - _LOCATOR.size, _LOCATOR.size))
        if locator == 0x07064B50:
            fields = _END64.unpack(window.read(end64, _END64.size))
            whole = end64 + _END64.size == at - _LOCATOR.size and (disk, disks) == (0, 1)
            if fields[0] != 0x06064B50 or not whole or fields[4:6] != (0, 0) or fields[6] != fields[7]:
                raise CheckpointError(f"{window.where}: its zip64 end of archive is damaged")
            count, size, start, end = fields[7], fields[8], fields[9], end64
    if start + size != end:
        raise CheckpointError(
            f"{window.where}: its directory should end at byte {end}, it ends at {start + size}",
            hint="the file is damaged, or was made by another program than torch",
        )
    return count, start, size


def _central_directory(window: Window, count: int, start: int, size: int) -> list[tuple[str, int, int, int]]:
    """Return (name, local header's offset, size, CRC) of every record."""
    data = window.read(start, size)
    entries: list[tuple[str, int, int, int]] = []
    at = 0
    for _ in range(count):
        if at + CENTRAL.size > size:
            break
        fields = CENTRAL.unpack_from(data, at)
        magic, flags, method, crc = fields[0], fields[3], fields[4], fields[7]
        packed, plain, name_size, extra_size, comment_size = fields[8:13]
        header = fields[16]
        after = at + CENTRAL.size
        name = data[after : after + name_size].decode("utf-8", "replace")
        if magic != 0x02014B50:
            raise CheckpointError(f"{window.where}: its directory is damaged at entry {len(entries)}")
        if U32 in (packed, plain, header):
            extra = data[after + name_size : after + name_size + extra_size]
            packed, plain, header = _zip64(window.where, name, extra, packed, plain, header)
        if method != 0 or flags & 1 or packed != plain:
            raise CheckpointError(
                f"{window.where}: record {name!r} is compressed or encrypted, which torch.save never does",
                hint="is it a TorchScript archive? Save the module's state_dict() with torch.save",
            )
        entries.append((name, header, plain, crc))
        at = after + name_size + extra_size + comment_size
    if len(entries) != count or at != size:
        raise CheckpointError(
            f"{window.where}: its directory should hold {count} records in {size} bytes, "
            f"{len(entries)} were found in {at}"
        )
    return entries


def _zip64(where: str, name: str, extra: bytes, packed: int, plain: int, header: int) -> tuple[int, int, int]:
    """Replace 32-bit placeholders by the 64-bit values of the extra field, in the standard's order."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            values = iter(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
            try:
                plain = next(values) if plain == U32 else plain
                packed = next(values) if packed == U32 else packed
                header = next(values) if header == U32 else header
            except StopIteration:
                break
            return packed, plain, header
        at += 4 + size
    raise CheckpointError(f"{where}: record {name!r} needs 64-bit sizes and has none")


def _data_start(window: Window, name: str, header: int) -> int:
    """Where a record's bytes start, from its local header, whose name must agree with the directory."""
    raw_name = name.encode()
    raw = window.read(header, LOCAL.size + len(raw_name))
    fields = LOCAL.unpack_from(raw)
    if fields[0] != 0x04034B50 or raw[LOCAL.size :] != raw_name or fields[9] != len(raw_name):
        raise CheckpointError(f"{window.where}: record {name!r} and its header at {header} disagree")
    return header + LOCAL.size + int(fields[9]) + int(fields[10])
