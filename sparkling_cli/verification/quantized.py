"""Quantized moments of an output, held to those of the source by what their codes say.

A block whose old entries come from one block of the source says the same to the bit. In any other the scale
reaches the largest number, and no code says less well what its entry shall be.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.formats.quantized_states import Quantized
from sparkling_cli.storage.byte_ranges import Handles, Placement, fetched
from sparkling_cli.widening.reference import ZERO, Wanted

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: scales and distances to levels are worked out in float32: relative to a scale's largest number
_NEAR = 1e-5
#: entries that are looked at together
_CHUNK = 1 << 20


class QuantizedSubject(NamedTuple):
    """A quantized moment to be proved.

    Attributes:
        own: how it is quantized.
        wanted: what its numbers must be.
        target: where its codes, scales and levels are in the output.
        source: the same in the source.
    """

    own: Quantized
    wanted: Wanted
    target: tuple[Placement, ...]
    source: tuple[Placement, ...]


def quantized_fault(subject: QuantizedSubject, output: Handles, source: Handles) -> str | None:
    """What is wrong with a moment; None if nothing is.

    Raises:
        CheckpointError: a file cannot be read.
    """
    import numpy as np

    own, wanted = subject.own, subject.wanted
    old, new = _Moment(own, subject.source, source), _Moment(own, subject.target, output)
    if not np.array_equal(old.levels, new.levels, equal_nan=True):
        return "its levels are not those of the source"
    step = own.size * max(_CHUNK // own.size, 1)
    for slab in range(own.slabs):
        for start in range(0, prod(wanted.shape), step):
            some = np.arange(start, min(start + step, prod(wanted.shape)))
            fault = _fault(own, wanted, (old, new), slab, some)
            if fault is not None:
                return fault
    return None


def _fault(
    own: Quantized, wanted: Wanted, moments: tuple[_Moment, _Moment], slab: int, some: Array
) -> str | None:
    """What is wrong with some whole blocks of entries, given by their numbers."""
    import numpy as np

    old, new = moments
    row, column = some // len(wanted.column.source), some % len(wanted.column.source)
    entry = wanted.row.source[row] * wanted.column.size + wanted.column.source[column]
    zero = np.maximum(wanted.row.fill[row], wanted.column.fill[column]) == ZERO
    factor = np.full(len(some), wanted.scale)
    for side, at in ((wanted.row, row), (wanted.column, column)):
        for one in side.factors:
            factor *= one[at]
    shall = np.where(zero, 0, old.numbers(slab, entry) * factor)
    home, block = np.where(zero, -1, entry // own.size), (some - some[0]) // own.size
    scale = new.scales[slab, some // own.size]
    first = -_most(np.where(zero, -np.inf, -home), block)
    alone = (_most(home, block) == first) & (_most(np.where(zero, 0, np.abs(factor - 1)), block) == 0)
    kept = alone[block] & ~zero
    if (new.codes[slab, some] != old.codes[slab, entry])[kept].any():
        return "a code of a block that has not moved is another"
    if (scale != old.scales[slab, np.maximum(home, 0)])[kept].any():
        return "the scale of a block that has not moved is another"
    levels = np.unique(new.levels[np.isfinite(new.levels)]).astype(np.float64)
    reach = _most(np.maximum(shall / levels[-1], shall / levels[0] if levels[0] < 0 else 0), block)[block]
    if (np.abs(scale - reach) > _NEAR * reach)[~alone[block]].any():
        return "the scale of a block is not the one that reaches its largest number"
    off = np.abs(new.numbers(slab, some) - shall)
    if (off > _distance(levels, shall, scale) + _NEAR * scale * levels[-1])[~kept].any():
        return "a code is not the nearest to what its entry must be"
    return None


class _Moment:
    """A quantized moment: codes and scales as a whole, by slab, and what they say."""

    def __init__(self, own: Quantized, places: tuple[Placement, ...], handles: Handles) -> None:
        import numpy as np

        codes, scales, *levels = (fetched(handles, place) for place in places)
        if own.bits == 4:
            codes = np.repeat(codes, 2)
            codes[0::2] >>= 4
            codes[1::2] &= 15
        self.levels = levels[0].view(np.float32) if levels else _float8()
        self.codes = codes.reshape(own.slabs, -1)
        self.scales = scales.view(np.float32).reshape(own.slabs, -1).astype(np.float64)
        self._size = own.size

    def numbers(self, slab: int, entries: Array) -> Array:
        """What the codes of some entries say."""
        said: Array = self.levels[self.codes[slab, entries]] * self.scales[slab, entries // self._size]
        return said


def _float8() -> Array:
    """What every byte says as ``float8_e4m3fn``, by torch."""
    import numpy as np
    import torch

    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    numbers: Array = np.asarray(every.float().numpy())
    return numbers


def _most(values: Array, at: Array) -> Array:
    """The largest value of every block."""
    import numpy as np

    found = np.full(at[-1] + 1, -np.inf)
    np.maximum.at(found, at, values)
    return found


def _distance(levels: Array, shall: Array, scales: Array) -> Array:
    """How far the nearest level is from each number."""
    import numpy as np

    share = np.divide(shall, scales, out=np.zeros_like(shall), where=scales > 0)
    above = np.clip(np.searchsorted(levels, share), 1, len(levels) - 1)
    best = np.minimum(np.abs(levels[above] - share), np.abs(levels[above - 1] - share))
    distance: Array = best * scales
    return distance
