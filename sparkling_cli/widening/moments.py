"""Mean and spread of a tensor too large for memory, the same to the bit whatever the piece size.

The tensor is cut into blocks of fixed length, summed in float64 each, and merged in their order
(Chan, Golub and LeVeque's update), so neither pieces nor threads can change the result.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

#: entries per block; part of the result's definition, so it must never change.
BLOCK = 1 << 16


class Moments(NamedTuple):
    """Entries, their mean, and the sum of squared deviations from it."""

    entries: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation, 0 of nothing."""
        return sqrt(self.squares / self.entries) if self.entries else 0.0


def block_moments(values: np.ndarray[Any, Any]) -> Moments:
    """Of one block of at most ``BLOCK`` contiguous float64 entries."""
    import numpy as np

    count = len(values)
    if count == 0:
        return Moments()
    mean = float(np.add.reduce(values)) / count
    deviations = values - mean
    np.multiply(deviations, deviations, out=deviations)
    return Moments(count, mean, float(np.add.reduce(deviations)))


def merged(blocks: Iterable[Moments]) -> Moments:
    """Of all blocks together, taken in their order."""
    count, mean, squares = 0, 0.0, 0.0
    for block in blocks:
        if block.entries == 0:
            continue
        total = count + block.entries
        delta = block.mean - mean
        mean += delta * (block.entries / total)
        squares += block.squares + delta * delta * (count * block.entries / total)
        count = total
    return Moments(count, mean, squares)
