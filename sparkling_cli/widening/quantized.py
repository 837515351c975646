"""Quantized moments: codes into a table of levels, and a scale for each block of entries.

A number is ``level[code] * scale``, in float32. Widened are these numbers. A block of the target whose old
entries come from one block of the source keeps its scale and their codes, so the numbers are the same to
the bit; its new entries get the level nearest to zero. Where entries of several blocks come together, the
scale is the smallest that reaches all of them, and each gets its nearest level: it moves by half a step at
most.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.storage.tensors import row_major
from sparkling_cli.widening.derived import indices
from sparkling_cli.widening.geometry import Fill, View

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: entries that are worked on together
_CHUNK = 1 << 20


class Blocks(NamedTuple):
    """How numbers are quantized.

    Attributes:
        size: entries of a block.
        bits: of a code; of four there are two in a byte, the first in its upper half.
        scales: whether the tensor in question has the scales, not the codes.
        table: whether a tensor has the levels; else codes are numbers of eight bits (float8_e4m3fn).
    """

    size: int
    bits: int
    scales: bool
    table: bool


class Levels:
    """The numbers that codes stand for.

    Args:
        table: level of every code, in float32.
    """

    def __init__(self, table: Array) -> None:
        import numpy as np

        self.table = table
        finite = np.flatnonzero(np.isfinite(table))
        self._sorted, first = np.unique(table[finite], return_index=True)
        self._codes = finite[first].astype(np.uint8)

    @cached_property
    def _middles(self) -> Array:
        middles: Array = (self._sorted[1:] + self._sorted[:-1]) / 2
        return middles

    @property
    def ends(self) -> tuple[float, float]:
        """The lowest level and the highest."""
        return float(self._sorted[0]), float(self._sorted[-1])

    def nearest(self, values: Array) -> Array:
        """The code of the level that is nearest to each value."""
        import numpy as np

        codes: Array = self._codes[np.searchsorted(self._middles, values, side="right")]
        return codes


def float8_table() -> Array:
    """The numbers of ``float8_e4m3fn``: four bits of exponent, three of mantissa, no infinity."""
    import numpy as np

    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9)
    size = np.where(code & 127 == 127, np.nan, size)
    return np.where(code > 127, -size, size).astype(np.float32)


def unpacked(codes: Array, bits: int) -> Array:
    """One code per entry."""
    import numpy as np

    if bits == 8:
        return codes
    both: Array = np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)
    return both


def packed(codes: Array, bits: int) -> Array:
    """As codes are stored."""
    return codes if bits == 8 else codes[0::2] << 4 | codes[1::2]


def requantized(view: View, factor: float, blocks: Blocks, parts: Sequence[Array]) -> Array:
    """The target's codes as they are stored, or its scales.

    Args:
        view: of the tensor that is quantized.
        factor: on all entries.
        blocks: how it is quantized, and which of the two is asked for.
        parts: the source's bytes: of codes, of scales, and of levels if there are any. Where there are
            several times as many codes as the view has entries, so many tensors stand behind each other.
    """
    import numpy as np

    levels = Levels(parts[2].view(np.float32) if blocks.table else float8_table())
    codes, scales = unpacked(parts[0], blocks.bits), parts[1].view(np.float32)
    picker = _Picker(view, factor)
    slabs = len(codes) // prod(picker.before)
    pairs = zip(np.split(codes, slabs), np.split(scales, slabs), strict=True)
    made = [_slab(picker, blocks, *pair, levels) for pair in pairs]
    return np.concatenate([one if blocks.scales else packed(one, blocks.bits) for one in made])


def _slab(picker: _Picker, blocks: Blocks, codes: Array, scales: Array, levels: Levels) -> Array:
    """Codes, one per entry, or scales of one tensor."""
    import numpy as np

    count, size = prod(picker.after), blocks.size
    made = np.zeros(-(-count // size), np.float32) if blocks.scales else np.zeros(count, np.uint8)
    step = size * max(_CHUNK // size, 1)
    for start in range(0, count, step):
        stop = min(start + step, count)
        found = _Some(picker.places(start, stop), size, codes, scales, levels)
        if blocks.scales:
            made[start // size : -(-stop // size)] = found.scales
        else:
            made[start:stop] = found.codes(levels)[: stop - start]
    return made


class _Some:
    """Some blocks of the target: what their entries shall be, and their scales."""

    def __init__(
        self, places: tuple[Array, Array, Array], size: int, codes: Array, scales: Array, levels: Levels
    ) -> None:
        import numpy as np

        pairs = zip(places, (0, True, 1), strict=True)
        source, zero, factors = (_filled(one, size, fill) for one, fill in pairs)
        self._old, home = codes[source], source // size
        values = levels.table[self._old] * scales[home]
        if not (factors == 1).all():
            values *= factors.astype(np.float32)
        values[zero] = 0
        low, high = levels.ends
        reach = values.max(axis=1) / np.float32(high)
        if low < 0:
            reach = np.maximum(reach, values.min(axis=1) / np.float32(low))
        first = np.where(zero, len(scales), home).min(axis=1)
        last = np.where(zero, -1, home).max(axis=1)
        self._same = (first == last) & (zero | (factors == 1)).all(axis=1)
        self.scales = np.where(self._same, scales[np.maximum(last, 0)], reach).astype(np.float32)
        self._values, self._zero = values, zero

    def codes(self, levels: Levels) -> Array:
        """One per entry; the last block is filled up."""
        import numpy as np

        made = np.where(self._zero, levels.nearest(np.zeros(1, np.float32)), self._old)
        anew = np.flatnonzero(~self._same & (self.scales > 0))
        shares = self._values[anew] / self.scales[anew, None]
        made[anew] = np.where(self._zero[anew], made[anew], levels.nearest(shares))
        return made.reshape(-1)


def _filled(one: Array, size: int, fill: Any) -> Array:
    """In rows of one block each."""
    import numpy as np

    missing = -len(one) % size
    whole: Array = np.concatenate([one, np.full(missing, fill, one.dtype)]) if missing else one
    return whole.reshape(-1, size)


class _Picker:
    """Where the entries of a target come from, some at a time."""

    def __init__(self, view: View, factor: float) -> None:
        import numpy as np

        self._dims = indices(view)
        self._factor = factor
        number = range(len(self._dims))
        self._scales = [np.ones(1) for _ in number]
        sizes = [1 for _ in number]
        for part in view:
            along = np.concatenate([np.full(run.length, run.scale) for run in part.runs])
            self._scales[part.dim] = np.multiply.outer(self._scales[part.dim], along).reshape(-1)
            sizes[part.dim] *= part.source
        self.before = tuple(sizes)
        self.after = tuple(len(source) for source, _ in self._dims)
        self._zero = [fills == Fill.ZERO for _, fills in self._dims]

    def places(self, start: int, stop: int) -> tuple[Array, Array, Array]:
        """Of target entries in their order: the source's entry, whether they are zero, and their factor."""
        import numpy as np

        at = np.unravel_index(np.arange(start, stop), self.after)
        source = np.zeros(stop - start, np.int64)
        zero, factors = np.zeros(stop - start, bool), np.full(stop - start, self._factor)
        for index, (own, _), new, stride, scale in zip(
            at, self._dims, self._zero, row_major(self.before), self._scales, strict=True
        ):
            source += own[index] * stride
            if new.any():
                zero |= new[index]
            if (scale != 1).any():
                factors *= scale[index]
        return source, zero, factors
