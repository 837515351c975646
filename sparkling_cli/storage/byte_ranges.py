"""Where a tensor's entries lie in files, and how bytes get there and back.

A range of a tensor's row-major bytes is nearly always one range of one file. Where it is not (a box that
is sharded on an inner dim, a transposed storage), the file is mapped and boxes are copied through a
strided view of it, and the pages are given back at once.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.errors import CheckpointError
from sparkling_cli.storage.crc import Span, combine, crc32
from sparkling_cli.storage.tensors import ITEM_BYTES, Extent, is_contiguous, row_major

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

_OPEN_FILES = 64
_PIECE = 1 << 19


#: why boxes may not tile a tensor
_UNTILED = "a shard is missing or two of them overlap"


class Place(NamedTuple):
    """Bytes ``start <= i < stop`` of the tensor lie in ``path`` from ``offset`` on."""

    start: int
    stop: int
    path: str
    offset: int


class Placement:
    """All places of one tensor.

    Args:
        dtype: of the tensor.
        shape: of the tensor.
        extents: its boxes.
        name: for messages.

    Raises:
        CheckpointError: the boxes do not tile the tensor.
    """

    __slots__ = ("extents", "flat", "item", "places", "shape")

    def __init__(self, dtype: str, shape: tuple[int, ...], extents: tuple[Extent, ...], name: str) -> None:
        self.item = ITEM_BYTES[dtype]
        self.shape = shape
        self.extents = extents
        self.places: tuple[Place, ...] = ()
        self.flat = True
        if len(extents) == 1 and extents[0].strides is None and extents[0].shape == shape:
            size = prod(shape) * self.item
            self.places = (Place(0, size, extents[0].path, extents[0].offset),) if size else ()
            return
        covered = sum(prod(extent.shape) for extent in extents)
        if covered != prod(shape):
            raise CheckpointError(
                f"tensor {name!r} has {prod(shape)} entries, its parts on disk have {covered}",
                hint=_UNTILED,
            )
        found = [self._place(extent) for extent in extents if prod(extent.shape)]
        flat = [place for place in found if place is not None]
        if len(flat) == len(found):
            self.places = tuple(sorted(flat))
            self._check(name)
        elif not tiles([(extent.start, extent.shape) for extent in extents], shape):
            raise _untiled(name)
        self.flat = len(flat) == len(found)

    def _place(self, extent: Extent) -> Place | None:
        """The extent as one range of the tensor's bytes, None if it is not one."""
        if extent.strides is not None and not is_contiguous(extent.shape, extent.strides):
            return None
        split = 0
        while split < len(self.shape) and extent.shape[split] == 1:
            split += 1
        if extent.shape[split + 1 :] != self.shape[split + 1 :]:
            return None
        start = 0
        for index, size in zip(extent.start, self.shape, strict=True):
            start = start * size + index
        start *= self.item
        return Place(start, start + prod(extent.shape) * self.item, extent.path, extent.offset)

    def _check(self, name: str) -> None:
        at = 0
        for place in self.places:
            if place.start != at:
                raise _untiled(name)
            at = place.stop

    def cut(self, start: int, stop: int) -> Iterator[Place]:
        """The places of a byte range of a flat tensor, in order."""
        if len(self.places) == 1:
            only = self.places[0]
            yield Place(start, stop, only.path, only.offset + start)
            return
        first = bisect_right(self.places, start, key=lambda place: place.start) - 1
        for place in map(self.places.__getitem__, range(max(0, first), len(self.places))):
            low, high = max(start, place.start), min(stop, place.stop)
            if low >= high:
                break
            yield Place(low, high, place.path, place.offset + low - place.start)


def _untiled(name: str) -> CheckpointError:
    return CheckpointError(f"the parts of tensor {name!r} on disk overlap or leave a gap", hint=_UNTILED)


def tiles(boxes: Sequence[tuple[Sequence[int], Sequence[int]]], shape: Sequence[int]) -> bool:
    """Whether boxes (offsets, sizes) cover a shape, no entry twice.

    A sum of boxes is determined by its signed corners (its mixed difference along all dims), so the boxes
    tile exactly if their corners cancel to those of the whole: work linear in the number of boxes.
    """
    corners: Counter[tuple[int, ...]] = Counter()

    def add(start: Sequence[int], size: Sequence[int], sign: int) -> None:
        for upper in product((0, 1), repeat=len(size)):
            corner = tuple(a + n * up for a, n, up in zip(start, size, upper, strict=True))
            corners[corner] += sign * (-1) ** sum(upper)

    if not boxes:
        return 0 in shape
    for start, size in boxes:
        add(start, size, 1)
    add([0] * len(shape), shape, -1)
    return not any(corners.values())


class Handles:
    """Open files of one directory (or one single file), for one thread.

    Args:
        root: the directory, or the file itself for the path "".
        writing: open for writing; else read-only.
    """

    def __init__(self, root: Path, *, writing: bool = False) -> None:
        self.root = root
        self.writing = writing
        self._open: OrderedDict[str, int] = OrderedDict()

    def path(self, relative: str) -> Path:
        """The full path of a file."""
        return self.root / relative if relative else self.root

    def get(self, relative: str) -> int:
        """A file descriptor."""
        found = self._open.get(relative)
        if found is not None:
            return found
        if len(self._open) >= _OPEN_FILES:
            os.close(self._open.popitem(last=False)[1])
        flags = (os.O_RDWR if self.writing else os.O_RDONLY) | getattr(os, "O_CLOEXEC", 0)
        found = os.open(self.path(relative), flags)
        self._open[relative] = found
        return found

    def close(self) -> None:
        """Close all."""
        while self._open:
            os.close(self._open.popitem()[1])


def read(handles: Handles, placement: Placement, start: int, stop: int, out: Array) -> None:
    """Read bytes ``start <= i < stop`` of a tensor into ``out`` (uint8).

    Raises:
        CheckpointError: a file ends early or cannot be read; names it.
    """
    if not placement.flat:
        try:
            for box, part in _boxes(handles, placement, start, stop, out):
                part[...] = box
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename}: {error.strerror}") from error
        return
    for place in placement.cut(start, stop):
        read_range(handles, place.path, place.offset, out[place.start - start : place.stop - start])


def fetched(handles: Handles, placement: Placement, start: int = 0, stop: int | None = None) -> Array:
    """The bytes of entries ``start <= i < stop`` of a tensor, by default of all, in an array of their own.

    Raises:
        CheckpointError: see :func:`read`.
    """
    import numpy as np

    stop = prod(placement.shape) if stop is None else stop
    data = np.empty((stop - start) * placement.item, dtype=np.uint8)
    read(handles, placement, start * placement.item, stop * placement.item, data)
    return data


def read_range(handles: Handles, path: str, offset: int, out: Array) -> None:
    """Fill ``out`` from one file.

    Raises:
        CheckpointError: the file ends early or cannot be read; names it.
    """
    view: memoryview = memoryview(out)  # type: ignore[arg-type]
    try:
        descriptor = handles.get(path)
        while view:
            count = os.preadv(descriptor, [view], offset)
            if count == 0:
                raise CheckpointError(
                    f"{handles.path(path)} ends at byte {offset}, {len(view)} more were expected",
                    hint="the file is truncated, or was changed while it was read",
                )
            view, offset = view[count:], offset + count
    except OSError as error:
        raise CheckpointError(f"cannot read {handles.path(path)}: {error.strerror}") from error


def span_of(handles: Handles, where: str | Placement, start: int, length: int) -> Span:
    """A range of a file, or of a tensor's row-major bytes, and its CRC-32; read in pieces.

    Args:
        handles: the open files.
        where: path of a file, or a tensor's placement.
        start: first byte.
        length: bytes.

    Raises:
        CheckpointError: it cannot be read.
    """
    import numpy as np

    buffer, crc, at = np.empty(min(_PIECE, length), dtype=np.uint8), 0, start
    while at < start + length:
        part = buffer[: min(_PIECE, start + length - at)]
        if isinstance(where, str):
            read_range(handles, where, at, part)
        else:
            read(handles, where, at, at + len(part), part)
        crc = combine(crc, crc32(part), len(part))
        at += len(part)
    return Span(start, length, crc)


def write(handles: Handles, placement: Placement, start: int, stop: int, data: Array) -> None:
    """Write bytes ``start <= i < stop`` of a tensor. Its files exist in full length.

    Raises:
        OSError: with the file's name.
    """
    if not placement.flat:
        for box, part in _boxes(handles, placement, start, stop, data):
            box[...] = part
        return
    for place in placement.cut(start, stop):
        write_range(handles, place.path, place.offset, data[place.start - start : place.stop - start])


def write_range(handles: Handles, path: str, offset: int, data: Any) -> None:
    """Write a buffer into one file.

    Raises:
        OSError: with the file's name.
    """
    view = memoryview(data)
    try:
        descriptor = handles.get(path)
        while view:
            count = os.pwrite(descriptor, view, offset)
            view, offset = view[count:], offset + count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(handles.path(path))) from error


def _boxes(
    handles: Handles, placement: Placement, start: int, stop: int, data: Array
) -> Iterator[tuple[Array, Array]]:
    """Pairs of equal boxes: strided in the mapped file, and in ``data``."""
    item = placement.item
    for extent in placement.extents:
        if not prod(extent.shape):
            continue
        strides = extent.strides or row_major(extent.shape)
        span = (sum((n - 1) * s for n, s in zip(extent.shape, strides, strict=True)) + 1) * item
        with _mapped(handles, extent.path, extent.offset, span) as region:
            stored = _strided(region, extent.shape, strides, item)
            for slab_start, slab_shape, at in slabs(placement.shape, start // item, stop // item):
                window = _overlap(extent.start, extent.shape, slab_start, slab_shape)
                if window is None:
                    continue
                first = at * item - start
                slab = data[first : first + prod(slab_shape) * item]
                slab = slab.reshape(*slab_shape, item)
                yield stored[window[0]], slab[window[1]]


def slabs(
    shape: tuple[int, ...], start: int, stop: int, at: int = 0
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """Boxes (start, shape, flat index) that make up entries ``start <= i < stop`` of a tensor, in order."""
    if start >= stop:
        return
    if not shape:
        yield (), (), at
        return
    inner = prod(shape[1:])
    first, head = divmod(start, inner)
    last, tail = divmod(stop, inner)
    if head or first == last:
        end = tail if first == last else inner
        for begin, size, where in slabs(shape[1:], head, end, at + first * inner):
            yield (first, *begin), (1, *size), where
        first += 1
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:]), at + first * inner
    if tail and first <= last:
        for begin, size, where in slabs(shape[1:], 0, tail, at + last * inner):
            yield (last, *begin), (1, *size), where


def _overlap(
    box_start: tuple[int, ...],
    box_shape: tuple[int, ...],
    slab_start: tuple[int, ...],
    slab_shape: tuple[int, ...],
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a box and a slab meet: slices into the box and into the slab."""
    in_box, in_slab = [], []
    for a, n, b, m in zip(box_start, box_shape, slab_start, slab_shape, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        if low >= high:
            return None
        in_box.append(slice(low - a, high - a))
        in_slab.append(slice(low - b, high - b))
    return tuple(in_box), tuple(in_slab)


def _strided(region: Array, shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> Array:
    import numpy as np

    return np.lib.stride_tricks.as_strided(region, (*shape, item), (*(s * item for s in strides), 1))


@contextmanager
def _mapped(handles: Handles, path: str, offset: int, length: int) -> Iterator[Array]:
    """A range of a file as a uint8 array over mapped pages, which are dropped on leaving."""
    import numpy as np

    size = os.fstat(handles.get(path)).st_size
    if size < offset + length:
        raise CheckpointError(
            f"{handles.path(path)} ends at byte {size}, {offset + length} were expected",
            hint="the file is truncated, or was changed while it was read",
        )
    mode: Any = "r+" if handles.writing else "r"
    region: Any = np.memmap(handles.path(path), np.uint8, mode, offset, (length,))
    yield region
    # not closed here: arrays still point into it; their last one going away unmaps it
    if hasattr(mmap, "MADV_DONTNEED"):
        region._mmap.madvise(mmap.MADV_DONTNEED)
