"""Small tensors of an output, many at a time: read together, and compared by a recipe that many share.

What a tensor must be is worked out once for all tensors of one view, from the same index tables as for
large ones (``compare``).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.storage.crc import Span, crc32
from sparkling_cli.storage.places import Handles, Place, read_range
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.verification.arithmetic import as_doubles, bits_dtype
from sparkling_cli.verification.compare import (
    Found,
    Subject,
    examine,
    factors_of,
    is_random,
    keeps,
    misfit_of,
    stretches,
    tables_of,
    told,
    wrong_entries,
)
from sparkling_cli.verification.tables import Tables, faults
from sparkling_cli.widening import moments
from sparkling_cli.widening.geometry import Fill

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: bytes of the output, and of the source, that are read together
_ROOM = 1 << 20
#: a tensor with more boxes than this is read as large ones are
_BOXES = 64
#: bytes between neighbours that are read along
_GAP = 4096

Bundle = tuple[Subject, ...]


class _Box(NamedTuple):
    """A box of the target whose entries are of one kind, and the box of the source that they come from.

    Of a tensor that is copied as a whole, ``factor`` is None.
    """

    target: tuple[slice, slice]
    source: tuple[slice, slice]
    how: Fill
    zero: bool
    exact: bool
    factor: Any


class Recipe(NamedTuple):
    """How a tensor follows from its source.

    Attributes:
        shapes: rows and columns of the target and of the source.
        boxes: they tile the target.
        random: some entries are random.
        fault: what is wrong with the manifest itself.
    """

    shapes: tuple[tuple[int, int], tuple[int, int]]
    boxes: tuple[_Box, ...]
    random: bool
    fault: str | None


class Recipes:
    """Recipes made so far; subjects share their views, so these are told by identity."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Recipe | None] = {}

    def of(self, subject: Subject) -> Recipe | None:
        """The recipe of a subject with a source; None if it is not worth one."""
        assert subject.source is not None
        mark = (
            *(id(subject.view), subject.dtype, subject.scale, subject.offset, subject.reset),
            *(subject.shape, subject.source.shape),
        )
        if mark not in self._made:
            self._made[mark] = _recipe(subject)
        return self._made[mark]


def bundles(subjects: Sequence[Subject]) -> list[Bundle]:
    """All subjects in their order; small ones that are neighbours on both sides stand together."""
    found: list[list[Subject]] = []
    last: tuple[Place, Place] | None = None
    room = 0
    for subject in subjects:
        places = _places(subject)
        if places is not None:
            size = max(place.stop for place in places) + _GAP
            room -= size
            if last is not None and room >= 0 and all(map(_follows, places, last)):
                found[-1].append(subject)
            else:
                found.append([subject])
                room = _ROOM - size
        else:
            found.append([subject])
        last = places
    return [tuple(bundle) for bundle in found]


def _follows(place: Place, last: Place) -> bool:
    """Whether a place lies behind another with hardly a gap."""
    return place.path == last.path and 0 <= place.offset - last.offset - last.stop <= _GAP


def _places(subject: Subject) -> tuple[Place, Place] | None:
    """Where a small subject and its source are; None if it is no matter of one place each, or not small."""
    target, source = subject.target.places, None if subject.source is None else subject.source.places
    if source is None or subject.zero or len(target) != 1 or len(source) != 1:
        return None
    return (target[0], source[0]) if max(target[0].stop, source[0].stop) <= _ROOM - _GAP else None


def examine_bundle(bundle: Bundle, output: Handles, source: Handles | None, recipes: Recipes) -> list[Found]:
    """Read the tensors of a bundle once, and what they come from.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if len(bundle) == 1 or source is None:
        return [examine(subject, output, source) for subject in bundle]
    new = _window(output, [subject.target.places[0] for subject in bundle])
    old = _window(source, [subject.source.places[0] for subject in bundle if subject.source is not None])
    found = []
    for subject, after, before in zip(bundle, new, old, strict=True):
        recipe = recipes.of(subject)
        if recipe is None:
            found.append(examine(subject, output, source))
            continue
        fault = recipe.fault or _unequal(subject, recipe, after, before)
        spans = [Span(0, len(data), crc32(data)) for data in (after, before)]
        found.append(Found(spans[:1], spans[1:], fault))
    return found


def _window(handles: Handles, places: Sequence[Place]) -> list[Array]:
    """The bytes of neighbouring places, read at once; each aligned to its entries."""
    import numpy as np

    first, last = places[0].offset, places[-1].offset + places[-1].stop
    lead = first % 64  # as aligned in memory as in the file
    buffer = np.empty(lead + last - first, dtype=np.uint8)
    read_range(handles, places[0].path, first, buffer[lead:])
    starts = [lead + place.offset - first for place in places]
    return [buffer[at : at + place.stop] for at, place in zip(starts, places, strict=True)]


def _recipe(subject: Subject) -> Recipe | None:
    if subject.view is None and subject.scale == 1.0 and subject.offset == 0.0:
        return _copy(subject)
    tables = tables_of(subject)
    fault = misfit_of(subject, tables)
    if fault is not None:
        return Recipe(((0, 0), (0, 0)), (), False, fault)
    rows, columns = tables.row, tables.column
    pairs = [
        (part, other)
        for part in stretches(rows, len(rows.source))
        for other in stretches(columns, len(columns.source))
    ]
    if len(pairs) > _BOXES:
        return None
    return Recipe(
        shapes=((len(rows.source), len(columns.source)), (rows.size, columns.size)),
        boxes=tuple(_box(subject, tables, part, other) for part, other in pairs),
        random=is_random(tables),
        fault=faults(tables, reset=subject.reset),
    )


def _copy(subject: Subject) -> Recipe:
    """Every byte is the source's."""
    assert subject.source is not None
    size = prod(subject.shape)
    if prod(subject.source.shape) != size:
        fault = "the source has another size than the output, which should be a copy"
        return Recipe(((0, 0), (0, 0)), (), False, fault)
    everything = (slice(0, 1), slice(0, size))
    box = _Box(everything, everything, Fill.COPY, False, True, None)
    return Recipe(((1, size), (1, size)), (box,), False, None)


def _box(subject: Subject, tables: Tables, rows: slice, columns: slice) -> _Box:
    how = Fill(max(int(tables.row.fill[rows.start]), int(tables.column.fill[columns.start])))
    top, left = int(tables.row.source[rows.start]), int(tables.column.source[columns.start])
    factor = factors_of(subject, tables, rows, columns)
    return _Box(
        target=(rows, columns),
        source=(slice(top, top + rows.stop - rows.start), slice(left, left + columns.stop - columns.start)),
        how=how,
        zero=how is Fill.ZERO and not (keeps(tables.row, rows) and keeps(tables.column, columns)),
        exact=how is Fill.COPY and subject.offset == 0.0 and bool((factor == 1).all()),
        factor=factor,
    )


def _unequal(subject: Subject, recipe: Recipe, after: Array, before: Array) -> str | None:
    """The first entry that is not what it must be, in words."""
    kind = bits_dtype(ITEM_BYTES[subject.dtype])
    new, old = after.view(kind).reshape(recipe.shapes[0]), before.view(kind).reshape(recipe.shapes[1])
    width = recipe.shapes[0][1]
    spread = _spread(before, subject.dtype) if recipe.random else 0.0
    for box in recipe.boxes:
        here = new[box.target]
        if box.zero:
            wrong = here != 0 if here.any() else None
        else:
            there = old[box.source]
            if box.exact:
                unlike = here != there
                wrong = unlike if unlike.any() else None
            else:
                place = (*box.target, width)
                wrong = wrong_entries(subject, box.factor, place, here, there, box.how, spread)
        if wrong is not None and box.factor is None:
            return f"entry {int(wrong.argmax())} is not the source's"
        if wrong is not None:
            return told(subject, wrong, *box.target, width, box.how)
    return None


def _spread(data: Array, dtype: str) -> float:
    values = as_doubles(data, dtype)
    block = moments.BLOCK
    return moments.deviation(
        moments.block_moments(values[at : at + block]) for at in range(0, len(values), block)
    )
