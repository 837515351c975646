"""Which entries of a parameter were born at which expansion.

An axis's history is a list of births: ``(start, stop, stage)``, stage 0 being the original model. An
entry of a tensor is as old as its youngest index: its stage is the largest among its dims. So the new
entries of a stage form an L (or a frame) that splits into a few disjoint boxes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import PACKINGS, Axis, Expr, Fixed, Product, TensorLayout, factors, size_of

#: ``(start, stop, stage)`` along one dim, in order, without gaps.
Interval = tuple[int, int, int]
#: ``(start, stop)`` per view dim.
Box = tuple[tuple[int, int], ...]
Births = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Region:
    """The stages of a parameter's entries.

    Attributes:
        shape: the parameter's own shape.
        dims: per storage dim, the intervals of each of its view dims (the dim's flattened factors).
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[tuple[Interval, ...], ...], ...]

    @property
    def view(self) -> tuple[int, ...]:
        """The shape in which every interval lies along one dim; same entries, same order."""
        return tuple(factor[-1][1] for dim in self.dims for factor in dim)

    @property
    def intervals(self) -> tuple[tuple[Interval, ...], ...]:
        """Per view dim, its intervals."""
        return tuple(factor for dim in self.dims for factor in dim)

    @property
    def stages(self) -> tuple[int, ...]:
        """The stages that occur, ascending."""
        found: set[int] = {0}
        for dim in self.intervals:
            found = {max(a, b) for a in found for b in {stage for _, _, stage in dim}}
        return tuple(sorted(found))

    def boxes(self, stage: int) -> Iterator[Box]:
        """Disjoint boxes of the view that together hold exactly the entries of ``stage``.

        Entries are sorted by the first dim whose index is of ``stage``: dims before it are older,
        dims after it not younger.
        """
        dims = self.intervals
        for first in range(len(dims)):
            choices = []
            for i, dim in enumerate(dims):
                if i < first:
                    kept = [(a, b) for a, b, s in dim if s < stage]
                elif i == first:
                    kept = [(a, b) for a, b, s in dim if s == stage]
                else:
                    kept = [(a, b) for a, b, s in dim if s <= stage]
                choices.append(_joined(kept))
            yield from product(*choices)
        if stage == 0 and not dims:
            yield ()

    def count(self, stage: int) -> int:
        """Number of entries of a stage."""
        return sum(prod(stop - start for start, stop in box) for box in self.boxes(stage))

    def take(self, indices: Sequence[Sequence[int] | None]) -> Region:
        """The region of a part of the parameter.

        Args:
            indices: per storage dim, the indices that the part holds, in its order; None for all.
        """
        dims = []
        shape = []
        for size, parts, chosen in zip(self.shape, self.dims, indices, strict=True):
            if chosen is None:
                dims.append(parts)
                shape.append(size)
                continue
            along = [stage for start, stop, stage in _flattened(parts) for _ in range(start, stop)]
            dims.append((_runs([along[i] for i in chosen]),))
            shape.append(len(chosen))
        return Region(tuple(shape), tuple(dims))

    def window(self, box: Box) -> Region:
        """The region of a box of the view, as a tensor of the box's own shape."""
        dims = tuple(
            (tuple((max(a, lo) - lo, min(b, hi) - lo, s) for a, b, s in dim if a < hi and b > lo),)
            for dim, (lo, hi) in zip(self.intervals, box, strict=True)
        )
        return Region(tuple(hi - lo for lo, hi in box), dims)


def region_of(layout: TensorLayout, sizes: Mapping[str, int], births: Births, stage: int = 0) -> Region:
    """The region of one parameter.

    Args:
        layout: what its dims mean.
        sizes: axis sizes now, after all expansions.
        births: axis -> births, for every axis that ever grew.
        stage: in which the parameter as a whole was born, with its layer.

    Raises:
        LayoutError: an axis's births do not tile its size.
    """
    dims = tuple(
        tuple(_intervals(factor, sizes, births) for factor in factors(dim.expr)) for dim in layout.dims
    )
    if stage and dims:  # no entry is older
        first, *rest = dims[0]
        older = tuple((start, stop, max(own, stage)) for start, stop, own in first)
        dims = ((_merged(list(older)), *rest), *dims[1:])
    return Region(layout.shape(sizes), dims)


def stage_of(index: int, births: Sequence[Sequence[int]]) -> int:
    """The stage that one entry of an axis was born in.

    Raises:
        LayoutError: the births end before it.
    """
    for start, stop, stage in births:
        if start <= index < stop:
            return int(stage)
    raise LayoutError(f"births {list(births)} have no entry {index}")


def _intervals(expr: Expr, sizes: Mapping[str, int], births: Births) -> tuple[Interval, ...]:
    if isinstance(expr, (Fixed, Axis)):
        size = size_of(expr, sizes)
        if isinstance(expr, Fixed) or expr.name in PACKINGS or expr.name not in births:
            return ((0, size, 0),)
        return _checked(expr.name, births[expr.name], size)
    if isinstance(expr, Product):
        return _flattened(tuple(_intervals(factor, sizes, births) for factor in factors(expr)))
    found: list[Interval] = []
    offset = 0
    for part in expr.parts:
        inner = _intervals(part, sizes, births)
        found += [(start + offset, stop + offset, stage) for start, stop, stage in inner]
        offset += inner[-1][1]
    return _merged(found)


def _checked(axis: str, births: Sequence[Sequence[int]], size: int) -> tuple[Interval, ...]:
    intervals = tuple((int(start), int(stop), int(stage)) for start, stop, stage in births)
    at = 0
    for start, stop, stage in intervals:
        if start != at or stop <= start or stage < 0:
            raise LayoutError(f"births of axis {axis!r} do not follow each other: {list(births)}")
        at = stop
    if at != size:
        raise LayoutError(f"births of axis {axis!r} end at {at}, the axis has {size} entries")
    return intervals


def _flattened(dims: tuple[tuple[Interval, ...], ...]) -> tuple[Interval, ...]:
    """Row-major product of intervals; an index is as old as its youngest factor."""
    result = dims[-1]
    for outer in reversed(dims[:-1]):
        width = result[-1][1]
        if len(result) == 1:
            inner = result[0][2]
            result = tuple((a * width, b * width, max(s, inner)) for a, b, s in outer)
            continue
        result = _merged(
            [
                (i * width + a, i * width + b, max(s, stage))
                for start, stop, s in outer
                for i in range(start, stop)
                for a, b, stage in result
            ]
        )
    return result


def _merged(intervals: list[Interval]) -> tuple[Interval, ...]:
    merged = [intervals[0]]
    for start, stop, stage in intervals[1:]:
        if merged[-1][2] == stage:
            merged[-1] = (merged[-1][0], stop, stage)
        else:
            merged.append((start, stop, stage))
    return tuple(merged)


def _runs(stages: list[int]) -> tuple[Interval, ...]:
    if not stages:
        return ((0, 0, 0),)
    return _merged([(i, i + 1, stage) for i, stage in enumerate(stages)])


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbouring spans as one, empty ones left out."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined
