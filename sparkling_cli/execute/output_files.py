"""Output files around their tensor data: allocated before it, sealed with checksums after it."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path

from sparkling_cli.errors import CheckpointError
from sparkling_cli.execute.job import RowJob
from sparkling_cli.formats.model import OutputFile
from sparkling_cli.storage.byte_ranges import Handles, span_of, write_range
from sparkling_cli.storage.crc import FileDigest, Span, combine, crc32, zeros

_PIECE = 1 << 19


def allocate(path: Path, size: int) -> None:
    """A new file of that many zero bytes, its room on the disk reserved.

    Raises:
        OSError: no room, or the file exists.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        try:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error


def tensor_spans(jobs: Iterable[tuple[RowJob, tuple[Span, ...]]], handles: Handles) -> dict[str, list[Span]]:
    """CRCs of all tensor data, by output file and in bytes of the file.

    Args:
        jobs: every row with the spans of its target.
        handles: the written output, for boxes that are no single range of the tensor: read again.
    """
    found: dict[str, list[Span]] = {}
    for job, spans in jobs:
        if not job.target.flat:
            for extent in job.target.extents:
                span = span_of(handles, extent.path, extent.offset, prod(extent.shape) * job.item)
                found.setdefault(extent.path, []).append(span)
            continue
        places = job.target.places
        starts = [place.start for place in places]
        for start, length, crc in spans:
            place = places[bisect_right(starts, start) - 1]
            moved = Span(place.offset + start - place.start, length, crc)
            found.setdefault(place.path, []).append(moved)
    return found


def seal(
    file: OutputFile,
    data: list[Span],
    handles: Handles,
    sealed: Collection[tuple[str, int]] = (),
    *,
    clean: bool,
) -> FileDigest:
    """Write all that is no tensor data, checksums filled in; the digest of the whole file.

    Args:
        file: the file.
        data: CRCs of its tensor data.
        handles: of the output.
        sealed: file and offset of literals that stand there already.
        clean: the file is new: what lies between tensors and literals is zero.

    Raises:
        CheckpointError: parts of the file overlap (a fault of the format).
        OSError: it cannot be written.
    """
    literals = sorted((offset, bytearray(content)) for offset, content in file.literals if content)
    try:
        covered = _Covered(file.size, sorted(data), literals)
        _fill_checksums(file, covered, literals)
        digest = FileDigest(file.size, covered.crc(0, file.size))
    except ValueError as error:
        raise CheckpointError(f"output file {file.path!r} is laid out wrongly: {error}") from error
    for offset, content in literals:
        if (file.path, offset) not in sealed:
            write_range(handles, file.path, offset, content)
    if not clean:
        for start, stop in covered.gaps():
            for at in range(start, stop, _PIECE):
                write_range(handles, file.path, at, bytes(min(_PIECE, stop - at)))
    return digest


def _fill_checksums(file: OutputFile, covered: _Covered, literals: list[tuple[int, bytearray]]) -> None:
    offsets = [literal[0] for literal in literals]
    for checksum in file.checksums:
        value = covered.crc(checksum.start, checksum.stop).to_bytes(4, "little")
        for at in checksum.at:
            index = bisect_right(offsets, at) - 1
            offset, content = literals[index] if index >= 0 else (0, bytearray())
            if index < 0 or at + 4 > offset + len(content):
                raise ValueError(f"no room for a checksum at byte {at}")
            content[at - offset : at - offset + 4] = value


class _Covered:
    """All bytes of a file in order: tensor data by CRC, literals by content, zeros between."""

    def __init__(self, size: int, data: list[Span], literals: list[tuple[int, bytearray]]) -> None:
        parts: list[tuple[int, int, int, bytearray | None]]
        parts = [(s.start, s.length, s.crc, None) for s in data]
        parts += [(offset, len(content), 0, content) for offset, content in literals]
        parts.sort(key=lambda part: part[0])
        at = 0
        for start, length, _, _ in parts:
            if start < at:
                raise ValueError(f"byte {start} is written twice")
            at = start + length
        if at > size:
            raise ValueError(f"it ends at byte {size}, its content at {at}")
        self._parts, self._size = parts, size
        self._whole = {(s.start, s.start + s.length): s.crc for s in data}
        self._starts = [part[0] for part in parts]

    def gaps(self) -> Iterator[tuple[int, int]]:
        """First byte and end of what is neither tensor data nor a literal, and so zero."""
        at = 0
        for start, length, _, _ in self._parts:
            if start > at:
                yield at, start
            at = start + length
        if at < self._size:
            yield at, self._size

    def crc(self, start: int, stop: int) -> int:
        """CRC-32 of ``start <= i < stop``; tensor data must lie wholly inside or outside."""
        known = self._whole.get((start, stop))
        if known is not None:
            return known
        index = max(bisect_right(self._starts, start) - 1, 0)
        found, at = 0, start
        for first, length, crc, content in islice(self._parts, index, None):
            if first >= stop:
                break
            last = first + length
            if last <= start or length == 0:
                continue
            if content is None and (first < start or last > stop):
                raise ValueError(f"a checksum's range {start}..{stop} cuts through tensor data")
            low, high = max(first, start), min(last, stop)
            if low > at:
                found = combine(found, zeros(low - at), low - at)
            part = crc if content is None else crc32(bytes(content[low - first : high - first]))
            found = combine(found, part, high - low)
            at = high
        return combine(found, zeros(stop - at), stop - at)


def copy_carried(source: Path, target: Path) -> FileDigest:
    """Copy a file; the digest of what was written.

    Every byte is read for its checksum, and the very bytes that were summed are written: a system call that
    copies by itself would read them anew, from a file that may have changed meanwhile.

    Raises:
        CheckpointError: the source cannot be read.
        OSError: the target cannot be written.
    """
    try:
        file = source.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read {source}: {error.strerror}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    with file, target.open("xb") as out:
        size = os.fstat(file.fileno()).st_size
        return FileDigest(size, _copy(file.fileno(), out.fileno(), size, (str(source), str(target))))


def _copy(source: int, target: int, size: int, names: tuple[str, str]) -> int:
    crc, at = 0, 0
    while at < size:
        try:
            data = os.pread(source, min(_PIECE, size - at), at)
        except OSError as error:
            raise CheckpointError(f"cannot read {names[0]}: {error.strerror}") from error
        if not data:
            raise CheckpointError(f"{names[0]} became shorter while it was copied")
        crc = combine(crc, crc32(data), len(data))
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(target, memoryview(data)[done:], at + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, names[1]) from error
        at += len(data)
    return crc


def digests_text(files: Mapping[str, FileDigest]) -> bytes:
    """Size and CRC-32 of files, one per line, with a last line that guards the others."""
    lines = "".join(f"{d.crc32:08x} {d.bytes} {path}\n" for path, d in sorted(files.items()))
    return f"{lines}{crc32(lines.encode()):08x} {len(lines.encode())} .\n".encode()
