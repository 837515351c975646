"""Means of rows of a tensor: what new entries of the vocabulary are filled with.

The rows are added one after the other, in float64, so the result is the same whatever is read together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: entries of the source that are read together
_ENTRIES = 1 << 16


class Means:
    """Rows of means of a tensor, made when they are asked for.

    Args:
        of: for each row of means, the rows that it is the mean of; () for all of the tensor's. An empty
            sequence stands for one () for every row.
        shape: of the tensor.
        read: entries ``start <= i < stop`` of the tensor as float64 numbers, one dim.
    """

    def __init__(
        self, of: Sequence[Sequence[int]], shape: Sequence[int], read: Callable[[int, int], Array]
    ) -> None:
        self._rows, *inner = shape or (1,)
        self._of, self._width, self._read = of, prod(inner), read
        self._whole: Array | None = None

    def __call__(self, start: int, stop: int) -> Array:
        """Entries ``start <= i < stop`` of all rows of means behind each other, float64."""
        import numpy as np

        first, last = start // self._width, -(-stop // self._width)
        rows = [self._mean(self._of[i] if self._of else ()) for i in range(first, last)]
        return np.concatenate(rows)[start - first * self._width : stop - first * self._width]

    def _mean(self, of: Sequence[int]) -> Array:
        if of:
            return self._sum(self._rows_read(i, i + 1) for i in of) / len(of)
        if self._whole is None:
            step = max(_ENTRIES // self._width, 1)
            blocks = (self._rows_read(i, min(i + step, self._rows)) for i in range(0, self._rows, step))
            self._whole = self._sum(blocks) / self._rows
        return self._whole

    def _rows_read(self, first: int, last: int) -> Array:
        return self._read(first * self._width, last * self._width)

    def _sum(self, blocks: Iterator[Array]) -> Array:
        import numpy as np

        total = np.zeros(self._width)
        for block in blocks:
            for row in block.reshape(-1, self._width):
                total += row
        return total
