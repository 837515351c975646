"""Tensors of an output, read once: their CRC-32, and whether they follow from the source.

Large tensors are read piece by piece; small ones that are neighbours in both checkpoints are read together.
What an entry must be comes from ``widening.reference``: a tensor is a grid of boxes of one kind each, and
tensors of one kind share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.storage.byte_ranges import Handles, Place, Placement, fetched, read_range
from sparkling_cli.storage.crc import Span, crc32
from sparkling_cli.verification.quantized import QuantizedSubject, quantized_fault
from sparkling_cli.widening import fill, moments
from sparkling_cli.widening.means import Means
from sparkling_cli.widening.parts import stream_of
from sparkling_cli.widening.reference import (
    COPY,
    FILL_NAMES,
    MEAN,
    NOISY,
    RANDOM,
    ZERO,
    Along,
    Wanted,
    as_numbers,
    averaged,
    bits_dtype,
    computed,
    drawn,
    noisy,
)
from sparkling_cli.widening.reference_state import made as state_made

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: entries of the target that are looked at together
_ENTRIES = 1 << 17
#: bytes of the output, and of the source, that are read together
_WINDOW = 1 << 20
#: a small tensor with more boxes than this is read as large ones are
_BOXES = 64
#: one place of the last digit, relative
_LAST = {"float64": 2.0**-51, "float32": 2.0**-22, "float16": 2.0**-9, "bfloat16": 2.0**-6}
#: bytes between neighbours that are read along
_GAP = 4096


class Subject(NamedTuple):
    """A tensor to be proved.

    Attributes:
        key: its key.
        wanted: what it must be.
        seed: of random entries.
        stream: of random entries; see ``widening.parts`` for those of its units.
        target: where its bytes are.
        source: where its source's bytes are; None if there is no source to compare with.
        quantized: the moment that it is a part of, of which the first part is looked into for all.
    """

    key: str
    wanted: Wanted
    seed: int
    stream: str
    target: Placement
    source: Placement | None
    quantized: QuantizedSubject | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the target."""
        return prod(self.wanted.shape) * self.target.item


class Found(NamedTuple):
    """Of one tensor: CRCs of the target's bytes and of the source's, and what is wrong, if anything."""

    target: list[Span]
    source: list[Span]
    fault: str | None


class _Box(NamedTuple):
    """Rows and columns of the target whose entries are of one kind, and the source's that they come from.

    Attributes:
        rows: of the target.
        columns: of the target.
        top: first row of the source.
        left: first column of the source.
        how: they are filled; ``COPY`` also for old entries.
        factor: on the entries; None where they are the source's, bit by bit.
    """

    rows: slice
    columns: slice
    top: int
    left: int
    how: int
    factor: Any


def bundles(subjects: Sequence[Subject]) -> list[tuple[Subject, ...]]:
    """All subjects in their order; small ones that are neighbours on both sides stand together."""
    found: list[list[Subject]] = []
    last: tuple[Place, Place] | None = None
    room = 0
    for subject in subjects:
        places = _places(subject)
        size = 0 if places is None else max(place.stop for place in places) + _GAP
        room -= size
        if places and last and room >= 0 and all(map(_follows, places, last)):
            found[-1].append(subject)
        else:
            found.append([subject])
            room = _WINDOW - size
        last = places
    return [tuple(bundle) for bundle in found]


def _follows(place: Place, last: Place) -> bool:
    """Whether a place lies behind another with hardly a gap."""
    return place.path == last.path and 0 <= place.offset - last.offset - last.stop <= _GAP


def _places(subject: Subject) -> tuple[Place, Place] | None:
    """Where a small subject and its source are; None if it is no matter of one place each, or not small."""
    target, source = subject.target.places, None if subject.source is None else subject.source.places
    alone = subject.wanted.zero or subject.wanted.whole
    if source is None or alone or len(target) != 1 or len(source) != 1:
        return None
    small = max(target[0].stop, source[0].stop) <= _WINDOW - _GAP and _grid(subject.wanted) is not None
    return (target[0], source[0]) if small else None


def examine(
    bundle: Sequence[Subject], output: Handles, source: Handles | None, known: Neighbours
) -> list[Found]:
    """Read the tensors of a bundle once, and what they come from.

    Args:
        bundle: the tensors.
        output: open files of the output.
        source: open files of the source, if there is one.
        known: distributions that random entries are drawn from.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if len(bundle) == 1 or source is None:
        return [_examine_one(subject, output, source, known) for subject in bundle]
    new = _neighbours(output, [subject.target.places[0] for subject in bundle])
    old = _neighbours(source, [subject.source.places[0] for subject in bundle if subject.source is not None])
    found = []
    for subject, after, before in zip(bundle, new, old, strict=True):
        wanted, grid = subject.wanted, _grid(subject.wanted)
        assert grid is not None
        kind = bits_dtype(subject.target.item)
        seen = after.view(kind).reshape(len(wanted.row.source), len(wanted.column.source))
        there = before.view(kind).reshape(wanted.row.size, wanted.column.size)
        fault = _fault(subject, grid, seen, (0, 0), there, (0, 0), known)
        spans = [Span(0, len(data), crc32(data)) for data in (after, before)]
        found.append(Found(spans[:1], spans[1:], fault))
    return found


def _neighbours(handles: Handles, places: Sequence[Place]) -> list[Array]:
    """The bytes of neighbouring places, read at once; each aligned to its entries."""
    import numpy as np

    first, last = places[0].offset, places[-1].offset + places[-1].stop
    lead = first % 64  # as aligned in memory as in the file
    buffer = np.empty(lead + last - first, dtype=np.uint8)
    read_range(handles, places[0].path, first, buffer[lead:])
    starts = [lead + place.offset - first for place in places]
    return [buffer[at : at + place.stop] for at, place in zip(starts, places, strict=True)]


def _examine_one(subject: Subject, output: Handles, source: Handles | None, known: Neighbours) -> Found:
    wanted, item = subject.wanted, subject.target.item
    if subject.source is None or source is None or wanted.zero:
        return _alone(subject, output)
    if subject.quantized is not None:
        return _quantized(subject, subject.quantized, output, source)
    if wanted.whole:
        return _whole(subject, output, source)
    width = len(wanted.column.source)
    found = Found([], [], None)
    for rows, columns in _chunks(wanted):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        data = _read(output, subject.target, rows.start * width + columns.start, prod(shape), found.target)
        whole = shape[1] == width
        boxes = _boxes(wanted, [rows], _parts(wanted) if whole else [columns])
        corner = (int(wanted.row.source[rows.start]), 0 if whole else boxes[0].left)
        there: Array = data[:0]
        if any(box.how != ZERO for box in boxes):
            size = (shape[0], wanted.column.size if whole else shape[1])
            start = corner[0] * wanted.column.size + corner[1]
            spans: list[Span] = []
            there = _read(source, subject.source, start, prod(size), spans)
            there = there.view(bits_dtype(item)).reshape(size)
            if not wanted.row.new[rows.start] and (whole or not wanted.column.new[columns.start]):
                found.source.extend(spans)
        seen = data.view(bits_dtype(item)).reshape(shape)
        at_first = (rows.start, columns.start)
        fault = _fault(subject, boxes, seen, at_first, there, corner, known)
        if fault and found.fault is None:
            found = found._replace(fault=fault)
    return found


def _alone(subject: Subject, output: Handles) -> Found:
    """Only the output's own bytes, and that they are zero where the whole tensor must be."""
    found = Found([], [], None)
    entries = prod(subject.wanted.shape)
    for at in range(0, entries, _ENTRIES):
        data = _read(output, subject.target, at, min(_ENTRIES, entries - at), found.target)
        if subject.wanted.zero and data.any():
            found = found._replace(fault="a dropped tensor is not zero")
    return found


def _whole(subject: Subject, output: Handles, source: Handles) -> Found:
    """State whose new entries follow from all old ones: old ones bit by bit, means to their last place."""
    import numpy as np

    assert subject.source is not None
    wanted, found, bits = subject.wanted, Found([], [], None), bits_dtype(subject.target.item)
    seen = _read(output, subject.target, 0, prod(wanted.shape), found.target).view(bits)
    there = _read(source, subject.source, 0, prod(wanted.before), found.source).view(bits)
    numbers = as_numbers(there, wanted.dtype).reshape(wanted.sizes)
    made, new = state_made(wanted, numbers)
    now = as_numbers(seen, wanted.dtype).reshape(made.shape)
    near = np.abs(now - made) <= _LAST[wanted.dtype] * np.abs(made)
    wrong = np.where(new, ~near, now != made)
    wrong &= ~(np.isnan(now) & np.isnan(made))
    if wrong.any():
        found = found._replace(fault=_words(subject, int(np.argmax(wrong)), COPY))
    return found


def _quantized(subject: Subject, moment: QuantizedSubject, output: Handles, source: Handles) -> Found:
    """Bytes of a part of a quantized moment; with its codes, what is wrong with the moment."""
    assert subject.source is not None
    found = Found([], [], quantized_fault(moment, output, source) if subject.target.item == 1 else None)
    _read(output, subject.target, 0, prod(subject.wanted.shape), found.target)
    _read(source, subject.source, 0, prod(subject.source.shape), found.source)
    return found


def _read(handles: Handles, placement: Placement, first: int, count: int, spans: list[Span]) -> Array:
    """Bytes of some entries of a tensor, their CRCs noted, cut where they change files."""
    data = fetched(handles, placement, first, first + count)
    start, size = first * placement.item, len(data)
    if placement.flat and len(placement.places) > 1:
        for place in placement.cut(start, start + size):
            part = data[place.start - start : place.stop - start]
            spans.append(Span(place.start, len(part), crc32(part)))
    else:
        spans.append(Span(start, size, crc32(data)))
    return data


def _chunks(wanted: Wanted) -> Iterator[tuple[slice, slice]]:
    """Boxes in row-major order whose source rows (or, in one row, columns) are neighbours."""
    width = len(wanted.column.source)
    if width > _ENTRIES:
        for row in range(len(wanted.row.source)):
            for columns in _stretches(wanted.column, _ENTRIES):
                yield slice(row, row + 1), columns
        return
    for rows in _stretches(wanted.row, max(_ENTRIES // max(width, 1), 1)):
        yield rows, slice(0, width)


def _stretches(side: Along, longest: int) -> Iterator[slice]:
    """Ranges of one kind in which each source index is the one before plus one."""
    import numpy as np

    kind = 8 * (8 * side.unit + side.fill) + side.new
    breaks = np.flatnonzero((np.diff(side.source) != 1) | (np.diff(kind) != 0)) + 1
    edges = [0, *breaks.tolist(), len(side.source)]
    for start, stop in pairwise(edges):
        for at in range(start, stop, longest):
            yield slice(at, min(at + longest, stop))


@lru_cache(maxsize=512)
def _parts(wanted: Wanted) -> tuple[slice, ...]:
    """The columns, in ranges of one kind each."""
    return tuple(_stretches(wanted.column, _ENTRIES))


@lru_cache(maxsize=512)
def _grid(wanted: Wanted) -> list[_Box] | None:
    """The boxes of a small tensor; None if they are too many to be worth it."""
    rows = list(_stretches(wanted.row, len(wanted.row.source)))
    columns = list(_stretches(wanted.column, len(wanted.column.source)))
    return _boxes(wanted, rows, columns) if len(rows) * len(columns) <= _BOXES else None


def _boxes(wanted: Wanted, rows: Sequence[slice], columns: Sequence[slice]) -> list[_Box]:
    return [_box(wanted, high, wide) for high in rows for wide in columns]


def _box(wanted: Wanted, rows: slice, columns: slice) -> _Box:
    row, column = wanted.row, wanted.column
    how = max(int(row.fill[rows.start]), int(column.fill[columns.start]))
    factor = None if how == ZERO else wanted.factor(rows, columns)
    if how == COPY and wanted.offset == 0.0 and factor is not None and (factor == 1).all():
        factor = None
    return _Box(rows, columns, int(row.source[rows.start]), int(column.source[columns.start]), how, factor)


def _fault(
    subject: Subject,
    boxes: Sequence[_Box],
    seen: Array,
    at: tuple[int, int],
    there: Array,
    corner: tuple[int, int],
    known: Neighbours,
) -> str | None:
    """The first entry that is not what it must be, in words.

    Args:
        subject: the tensor.
        boxes: that tile ``seen``.
        seen: entries of the output, as integers.
        at: row and column of its first entry in the tensor.
        there: entries of the source that they come from.
        corner: row and column of its first entry in the source.
        known: distributions that random entries are drawn from.
    """
    import numpy as np

    wanted = subject.wanted
    for box in boxes:
        height, width = box.rows.stop - box.rows.start, box.columns.stop - box.columns.start
        top, left = box.rows.start - at[0], box.columns.start - at[1]
        here = seen[top : top + height, left : left + width]
        if box.how == ZERO:
            wrong = here != 0
        else:
            top, left = box.top - corner[0], box.left - corner[1]
            old = there[top : top + height, left : left + width]
            made = old if box.factor is None else _made(subject, box, old, known)
            wrong = here != made
            if box.factor is not None and wrong.any():
                wrong &= ~_both_nan(here, made, wanted.dtype)
        if wrong.any():
            y, x = (int(n) for n in np.argwhere(wrong)[0])
            place = (box.rows.start + y) * len(wanted.column.source) + box.columns.start + x
            return _words(subject, place, box.how)
    return None


def _made(subject: Subject, box: _Box, old: Array, known: Neighbours) -> Array:
    """What the entries of a box must be, as integers; those that nothing is done to keep their bits."""
    import numpy as np

    wanted = subject.wanted
    if box.how == RANDOM:
        stream, numbers = _numbers(subject, box)
        return drawn(numbers, known.moments(stream), box.factor, wanted.offset, wanted.dtype)
    if box.how == NOISY:
        stream, numbers = _numbers(subject, box)
        found = known.moments(stream)
        return noisy(old, numbers, found, wanted.noise, box.factor, wanted.offset, wanted.dtype)
    if box.how == MEAN:
        places = wanted.mean_places(box.rows, box.columns)
        values = known.means(subject, int(places.min()), int(places.max()) + 1)
        return averaged(values[places - places.min()], box.factor, wanted.offset, wanted.dtype)
    made = computed(old, box.factor, wanted.offset, wanted.dtype)
    untouched = box.factor == 1
    return np.where(untouched, old, made) if wanted.offset == 0.0 and untouched.any() else made


def _numbers(subject: Subject, box: _Box) -> tuple[str, Array]:
    """The stream of a box's unit, and its numbers there: of one row only its columns, else of whole rows."""
    row, column = subject.wanted.row, subject.wanted.column
    high, wide = int(row.unit[box.rows.start]), int(column.unit[box.columns.start])
    stream = stream_of(subject.stream, row.units[high] + column.units[wide])
    ranks = subject.wanted.ranks
    top, left = int(ranks[0][box.rows.start]), int(ranks[1][box.columns.start])
    height, count = box.rows.stop - box.rows.start, box.columns.stop - box.columns.start
    width = int((column.unit == wide).sum())
    first = top * width
    if height == 1:
        return stream, fill.normal(subject.seed, stream, first + left, first + left + count)[None, :]
    found = fill.normal(subject.seed, stream, first, first + height * width)
    return stream, found.reshape(-1, width)[:, left : left + count]


class Neighbours:
    """What random entries and means follow from: old entries of the same tensor, looked at when asked for.

    Tensors of one stream (a weight and the optimizer's copy of it) take the distribution of the first.

    Args:
        subjects: all tensors, in the output's order.
        source: root of the source; nothing is asked for where there is none.
    """

    def __init__(self, subjects: Sequence[Subject], source: Path) -> None:
        self._places: dict[str, tuple[Subject, int, int]] = {}
        self._moments: dict[str, moments.Moments] = {}
        self._means: dict[str, Means] = {}
        self._files, self._lock = Handles(source), Lock()
        for subject in subjects:
            if not subject.wanted.random or subject.source is None:
                continue
            for high, outer in enumerate(subject.wanted.row.units):
                for wide, inner in enumerate(subject.wanted.column.units):
                    stream = stream_of(subject.stream, outer + inner)
                    self._places.setdefault(stream, (subject, high, wide))

    def close(self) -> None:
        """Close the source's files."""
        self._files.close()

    def moments(self, stream: str) -> moments.Moments:
        """Mean and deviation of the old entries of a unit, by its stream.

        Raises:
            CheckpointError: the source cannot be read.
        """
        with self._lock:
            if stream not in self._moments:
                blocks = map(moments.block_moments, _in_blocks(self._old_entries(*self._places[stream])))
                self._moments[stream] = moments.merged(blocks)
            return self._moments[stream]

    def means(self, subject: Subject, start: int, stop: int) -> Array:
        """Entries ``start <= i < stop`` of a tensor's rows of means behind each other, float64.

        Raises:
            CheckpointError: the source cannot be read.
        """
        with self._lock:
            if subject.key not in self._means:
                wanted, numbers = subject.wanted, partial(self._numbers, subject)
                self._means[subject.key] = Means(wanted.means, wanted.sizes, numbers)
            return self._means[subject.key](start, stop)

    def _numbers(self, subject: Subject, start: int, stop: int) -> Array:
        """Entries ``start <= i < stop`` of a source, as float64 numbers."""
        assert subject.source is not None
        return as_numbers(fetched(self._files, subject.source, start, stop), subject.wanted.dtype)

    def _old_entries(self, subject: Subject, high: int, wide: int) -> Iterator[Array]:
        """The entries of a unit in the source, in order, as float64 numbers: a few rows at a time."""
        import numpy as np

        row, column = subject.wanted.row, subject.wanted.column
        rows = np.flatnonzero(row.unit[~row.new] == high)
        columns = np.flatnonzero(column.unit[~column.new] == wide)
        step = max(_ENTRIES // max(column.size, 1), 1)
        for at in range(0, len(rows), step):
            chosen = rows[at : at + step]
            first, last = int(chosen[0]) * column.size, int(chosen[-1] + 1) * column.size
            numbers = self._numbers(subject, first, last).reshape(-1, column.size)
            yield numbers[chosen - chosen[0]][:, columns].reshape(-1)


def _in_blocks(pieces: Iterator[Array]) -> Iterator[Array]:
    """The same numbers in blocks of ``moments.BLOCK``."""
    import numpy as np

    rest: Array = np.zeros(0)
    for piece in pieces:
        rest = np.concatenate([rest, piece])
        while len(rest) >= moments.BLOCK:
            yield rest[: moments.BLOCK]
            rest = rest[moments.BLOCK :]
    if len(rest):
        yield rest


def _words(subject: Subject, place: int, how: int) -> str:
    """An entry by its place in the flattened tensor, and that it is wrong."""
    import numpy as np

    where = tuple(int(n) for n in np.unravel_index(place, subject.wanted.shape))
    kind = "old or copied" if how == COPY else FILL_NAMES[how]
    return f"entry {where} ({kind}) is not what the source and the spec give"


def _both_nan(found: Array, wanted: Array, dtype: str) -> Array:
    """Entries that are NaN on both sides: the payload of a computed NaN is nobody's promise."""
    import numpy as np

    both: Array = np.isnan(as_numbers(found, dtype)) & np.isnan(as_numbers(wanted, dtype))
    return both
