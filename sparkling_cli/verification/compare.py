"""One tensor of an output, read piece by piece: its CRC-32, and whether it follows from the source."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.storage.crc import Span, crc32
from sparkling_cli.storage.places import Handles, Placement, read
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.verification.arithmetic import as_doubles, bits_dtype, both_nan, computed, wide_dtype
from sparkling_cli.verification.tables import DimTable, Tables, faults, tensor_tables
from sparkling_cli.widening import moments
from sparkling_cli.widening.geometry import Fill, Run, View, ViewDim

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: entries of the target that are looked at together
_ENTRIES = 1 << 17


class Subject(NamedTuple):
    """A tensor to be proved.

    Attributes:
        key: its key.
        dtype: of source and target.
        shape: of the target.
        view: how it was widened; None if it is a copy.
        scale: factor on all entries.
        offset: added after scaling.
        zero: the whole tensor is zero.
        reset: optimizer state whose new entries are zero and whose old ones are kept.
        seed: of random entries.
        stream: of random entries.
        target: where its bytes are.
        source: where its source's bytes are; None if there is no source to compare with.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    view: View | None
    scale: float
    offset: float
    zero: bool
    reset: bool
    seed: int
    stream: str
    target: Placement
    source: Placement | None

    @property
    def nbytes(self) -> int:
        """Bytes of the target."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Found(NamedTuple):
    """Of one tensor: CRCs of the target's bytes and of the source's, and what is wrong, if anything."""

    target: list[Span]
    source: list[Span]
    fault: str | None


def examine(subject: Subject, output: Handles, source: Handles | None) -> Found:
    """Read a tensor of the output once, and what it comes from.

    Raises:
        CheckpointError: a file cannot be read.
    """
    item = ITEM_BYTES[subject.dtype]
    if subject.source is None or source is None or subject.zero:
        return _alone(subject, output, item)
    if subject.view is None and subject.scale == 1.0 and subject.offset == 0.0:
        return _copied(subject, output, source, item)
    tables = tables_of(subject)
    fault = faults(tables, reset=subject.reset)
    misfit = misfit_of(subject, tables)
    if misfit is not None:
        return Found([], [], misfit)
    spread = _spread(subject, source, item) if is_random(tables) else 0.0
    found = Found([], [], fault)
    for rows, columns in _chunks(tables):
        at = (rows.start * len(tables.column.source) + columns.start) * item
        count = (rows.stop - rows.start) * (columns.stop - columns.start)
        seen = _read(output, subject.target, at, count * item, found.target)
        wrong = _unequal(subject, tables, rows, columns, seen, source, spread, found.source)
        if wrong and found.fault is None:
            found = found._replace(fault=wrong)
    return found


def _alone(subject: Subject, output: Handles, item: int) -> Found:
    """Only the output's own bytes, and that they are zero where the whole tensor must be."""
    spans: list[Span] = []
    fault = None
    total = prod(subject.shape) * item
    for at in range(0, total, _ENTRIES * item):
        data = _read(output, subject.target, at, min(_ENTRIES * item, total - at), spans)
        if subject.zero and data.any():
            fault = "a dropped tensor is not zero"
    return Found(spans, [], fault)


def _copied(subject: Subject, output: Handles, source: Handles, item: int) -> Found:
    import numpy as np

    assert subject.source is not None
    found = Found([], [], None)
    total = prod(subject.shape) * item
    if prod(subject.source.shape) * item != total:
        return Found([], [], "the source has another size than the output, which should be a copy")
    for at in range(0, total, _ENTRIES * item):
        size = min(_ENTRIES * item, total - at)
        seen = _read(output, subject.target, at, size, found.target)
        wanted = _read(source, subject.source, at, size, found.source)
        if not np.array_equal(seen, wanted) and found.fault is None:
            place = at + int(np.argmax(seen != wanted))
            found = found._replace(fault=f"entry {place // item} is not the source's")
    return found


def _read(handles: Handles, placement: Placement, start: int, size: int, spans: list[Span]) -> Array:
    """Bytes of a tensor, their CRCs noted, cut where they change files."""
    import numpy as np

    data = np.empty(size, dtype=np.uint8)
    read(handles, placement, start, start + size, data)
    if placement.flat and len(placement.places) > 1:
        for place in placement.cut(start, start + size):
            part = data[place.start - start : place.stop - start]
            spans.append(Span(place.start, len(part), crc32(part)))
    else:
        spans.append(Span(start, size, crc32(data)))
    return data


def tables_of(subject: Subject) -> Tables:
    """What every entry must be, index by index."""
    view = subject.view
    if view is None:  # scaled as a whole
        view = tuple(ViewDim(n, n, (Run(0, 0, n),), dim) for dim, n in enumerate(subject.shape))
    return _tables(view, subject.dtype)


@lru_cache(maxsize=64)
def _tables(view: View, dtype: str) -> Tables:
    return tensor_tables(view, wide_dtype(dtype))


def misfit_of(subject: Subject, tables: Tables) -> str | None:
    """Why output or source cannot have the sizes that the manifest says, if so."""
    if prod(subject.shape) != len(tables.row.source) * len(tables.column.source):
        return "the manifest's shape and view disagree"
    if subject.source is not None and prod(subject.source.shape) != tables.row.size * tables.column.size:
        return "the source has another size than the manifest's view"
    return None


def is_random(tables: Tables) -> bool:
    """Some entries are random."""
    return any((table.fill == Fill.RANDOM).any() for table in (tables.row, tables.column))


def _chunks(tables: Tables) -> Iterator[tuple[slice, slice]]:
    """Boxes in row-major order whose source rows (or, in one row, columns) are neighbours."""
    width = len(tables.column.source)
    if width > _ENTRIES:
        for row in range(len(tables.row.source)):
            for columns in stretches(tables.column, _ENTRIES):
                yield slice(row, row + 1), columns
        return
    for rows in stretches(tables.row, max(_ENTRIES // max(width, 1), 1)):
        yield rows, slice(0, width)


def stretches(table: DimTable, longest: int) -> Iterator[slice]:
    """Ranges of one kind in which each source index is the one before plus one."""
    import numpy as np

    kind = 2 * table.fill.astype(np.int16) + table.new
    breaks = np.flatnonzero((np.diff(table.source) != 1) | (np.diff(kind) != 0)) + 1
    edges = [0, *breaks.tolist(), len(table.source)]
    for start, stop in pairwise(edges):
        for at in range(start, stop, longest):
            yield slice(at, min(at + longest, stop))


def _unequal(
    subject: Subject,
    tables: Tables,
    rows: slice,
    columns: slice,
    seen: Array,
    source: Handles,
    spread: float,
    spans: list[Span],
) -> str | None:
    """The first entry of a box that is not what it must be, in words."""
    row, column = tables.row, tables.column
    width = len(column.source)
    item = ITEM_BYTES[subject.dtype]
    found = seen.view(bits_dtype(item)).reshape(rows.stop - rows.start, columns.stop - columns.start)
    whole = columns.stop - columns.start == width
    parts = _column_parts(tables) if whole else (columns,)
    old: Array | None = None
    left = 0
    for part in parts:
        how = Fill(max(int(row.fill[rows.start]), int(column.fill[part.start])))
        here = found[:, part.start - columns.start : part.stop - columns.start]
        if how is Fill.ZERO and not (keeps(row, rows) and keeps(column, part)):
            if here.any():
                return told(subject, here != 0, rows, part, width, how)
            continue
        if old is None:
            old, left = _source_rows(subject, tables, rows, columns, whole, source, spans)
        first = int(column.source[part.start]) - left
        box = old[:, first : first + part.stop - part.start]
        factor = factors_of(subject, tables, rows, part)
        wrong = wrong_entries(subject, factor, (rows, part, width), here, box, how, spread)
        if wrong is not None:
            return told(subject, wrong, rows, part, width, how)
    return None


def keeps(table: DimTable, places: slice) -> bool:
    """The range holds old entries."""
    return not bool(table.new[places.start])


@lru_cache(maxsize=64)
def _column_parts(tables: Tables) -> tuple[slice, ...]:
    return tuple(stretches(tables.column, _ENTRIES))


def told(subject: Subject, wrong: Array, rows: slice, part: slice, width: int, how: Fill) -> str:
    """The first wrong entry of a box, in words."""
    import numpy as np

    y, x = (int(n) for n in np.argwhere(wrong)[0])
    place = np.unravel_index((rows.start + y) * width + part.start + x, subject.shape)
    kind = {Fill.COPY: "old or copied", Fill.RANDOM: "random", Fill.ZERO: "zero"}[how]
    return f"entry {tuple(int(p) for p in place)} ({kind}) is not what the source and the manifest give"


def _source_rows(
    subject: Subject,
    tables: Tables,
    rows: slice,
    columns: slice,
    whole: bool,
    source: Handles,
    spans: list[Span],
) -> tuple[Array, int]:
    """Source rows of a box as integers, and their first column; CRCs are noted of rows that are kept."""
    assert subject.source is not None
    row, column = tables.row, tables.column
    item = ITEM_BYTES[subject.dtype]
    top, count = int(row.source[rows.start]), rows.stop - rows.start
    left = 0 if whole else int(column.source[columns.start])
    width = column.size if whole else columns.stop - columns.start
    noted: list[Span] = []
    data = _read(source, subject.source, (top * column.size + left) * item, count * width * item, noted)
    if keeps(row, rows) and (whole or keeps(column, columns)):
        spans.extend(noted)
    return data.view(bits_dtype(item)).reshape(count, width), left


def wrong_entries(
    subject: Subject,
    factor: Array,
    place: tuple[slice, slice, int],
    found: Array,
    old: Array,
    how: Fill,
    spread: float,
) -> Array | None:
    """Which entries of a box of one kind are not what they must be; None if all are.

    Args:
        subject: the tensor.
        factor: on the box's entries, or one for all.
        place: the box's rows and columns, and the number of columns of the whole tensor.
        found: the box's entries.
        old: the entries that they come from.
        how: new ones are filled.
        spread: standard deviation of the source.
    """
    import numpy as np

    rows, part, width = place
    copied = how is Fill.COPY and subject.offset == 0.0
    if copied and (factor == 1).all():
        wrong: Array = found != old
        return wrong if wrong.any() else None
    wanted = computed(subject, old, factor, how, spread, rows, part, width)
    if copied and (factor == 1).any():
        wanted = np.where(factor == 1, old, wanted)
    wrong = found != wanted
    if not wrong.any():
        return None
    wrong &= ~both_nan(found, wanted, subject.dtype)
    return wrong if wrong.any() else None


def factors_of(subject: Subject, tables: Tables, rows: slice, columns: slice) -> Array:
    """Products of all factors, one after the other in the order of the dims; one number if it is one."""
    import numpy as np

    wide = np.dtype(wide_dtype(subject.dtype)).type
    factor: Array = np.full((1, 1), wide(subject.scale))
    for scale in tables.row.scales:
        factor = factor * scale[rows][:, None]
    for scale in tables.column.scales:
        factor = factor * scale[columns][None, :]
    return factor[:1, :1] if (factor == factor[0, 0]).all() else factor


def _spread(subject: Subject, source: Handles, item: int) -> float:
    """Standard deviation of the whole source."""
    import numpy as np

    assert subject.source is not None
    total = prod(subject.source.shape)

    def blocks() -> Iterator[moments.Moments]:
        for at in range(0, total, moments.BLOCK):
            size = min(moments.BLOCK, total - at)
            data = np.empty(size * item, dtype=np.uint8)
            read(source, subject.source, at * item, (at + size) * item, data)  # type: ignore[arg-type]
            yield moments.block_moments(as_doubles(data, subject.dtype))

    return moments.deviation(blocks())
