"""What of a tensor has a distribution, and a stream of random numbers, of its own.

q, k and v fused in one tensor, gate and up, and stacked experts are different matrices that share a tensor.
A *unit* is one of them: a number for every dim that is cut (``Run.part``), in the order of the dims. Its
entries are counted row-major within the unit, so a unit's statistics and random numbers are the same
whether it lies in a tensor of its own or in a fused one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from sparkling_cli.widening.geometry import View, ViewDim

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: number of the part along every dim that is cut
Unit = tuple[int, ...]


def stream_of(tensor: str, unit: Unit) -> str:
    """The name of a unit's random numbers; ``experts.gate_up[3,0]`` is the gate of the fourth expert."""
    return f"{tensor}[{','.join(map(str, unit))}]" if unit else tensor


class Along:
    """The entries of one part along a dim: spans ``(start, length)``, in order, in source or target."""

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        self.spans = tuple(spans)
        self.size = sum(length for _, length in self.spans)

    @cached_property
    def _table(self) -> Array:
        import numpy as np

        return np.concatenate([np.arange(start, start + length) for start, length in self.spans])

    def before(self, index: int) -> int:
        """How many of the entries stand before an index of the dim."""
        return sum(min(max(index - start, 0), length) for start, length in self.spans)

    def places(self, ranks: Any) -> Any:
        """Indices along the dim of entries counted within the part: numbers or arrays."""
        if len(self.spans) == 1:
            return self.spans[0][0] + ranks
        return self._table[ranks]


def along(dim: ViewDim, *, source: bool) -> dict[Unit, Along]:
    """Every part of a dim."""
    spans: dict[Unit, list[tuple[int, int]]] = {}
    runs = [run for run in dim.runs if not (source and run.new)]
    for run in sorted(runs, key=lambda run: run.source if source else run.target):
        spans.setdefault(run.part, []).append((run.source if source else run.target, run.length))
    return {part: Along(found) for part, found in spans.items()}


class Box:
    """A unit's place in its tensor.

    Attributes:
        unit: which one.
        drawn_as: the unit whose distribution and random numbers it has; itself, if it is no copy.
        dims: its entries along every dim.
        sizes: of the whole tensor along every dim.
    """

    def __init__(self, unit: Unit, drawn_as: Unit, dims: Sequence[Along], sizes: Sequence[int]) -> None:
        self.unit, self.drawn_as, self.dims, self.sizes = unit, drawn_as, tuple(dims), tuple(sizes)
        self.shape = tuple(dim.size for dim in self.dims)
        self.entries = prod(self.shape)

    def places(self, first: int, last: int) -> Array:
        """Flat indices in the tensor of the unit's entries ``first <= i < last``, ascending."""
        import numpy as np

        ranks = np.unravel_index(np.arange(first, last), self.shape)
        found = [dim.places(rank) for dim, rank in zip(self.dims, ranks, strict=True)]
        flat: Array = np.ravel_multi_index(found, self.sizes)
        return flat

    def before(self, place: int) -> int:
        """How many of the unit's entries stand before a flat index of the tensor."""
        count, left = 0, self.entries
        inner = prod(self.sizes)
        for dim, size in zip(self.dims, self.sizes, strict=True):
            inner //= size
            left //= dim.size
            index, place = divmod(place, inner)
            below = dim.before(index)
            count += below * left
            if dim.before(index + 1) == below:  # outside the part
                break
        return count


def boxes(view: View, *, source: bool) -> Iterator[Box]:
    """Every unit of a tensor, in the source or in the target."""
    dims = [along(dim, source=source) for dim in view]
    sizes = [dim.source if source else dim.target for dim in view]
    drawn_as = [{run.part: run.drawn_as for run in dim.runs} for dim in view]
    for chosen in product(*(dim.items() for dim in dims)):
        unit = tuple(number for part, _ in chosen for number in part)
        numbers = (n for dim, (part, _) in zip(drawn_as, chosen, strict=True) for n in dim[part])
        yield Box(unit, tuple(numbers), [found for _, found in chosen], sizes)
