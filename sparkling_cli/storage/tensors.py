"""What a stored tensor is: its dtype, its shape, and the boxes of bytes that it lies in."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

Shape = tuple[int, ...]

#: Bytes per entry of every dtype that a checkpoint may hold, by torch's own names.
ITEM_BYTES: Mapping[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip

#: dtypes in which new weights can be computed.
FLOATING = frozenset({"float64", "float32", "float16", "bfloat16"})


class Extent(NamedTuple):  # a tuple: there are tens of thousands, and dataclasses cost twice as much
    """A box of a tensor, stored in one piece of one file.

    Attributes:
        path: file, relative to the checkpoint's root, with forward slashes ("" if the root is the file).
        offset: first byte.
        start: the box's first index in the tensor, per dim.
        shape: the box's size, per dim.
        strides: entries to skip per dim in the file; None when row-major and contiguous.
    """

    path: str
    offset: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None


def are_sizes(value: Any, kind: type[tuple[Any, ...]] | type[list[Any]] = tuple) -> bool:
    """Whether a value of unknown origin is a tuple (a list) of whole numbers from 0 on."""
    if type(value) is not kind:
        return False
    for size in value:  # noqa: SIM110  # a generator takes twice as long, and this runs per tensor
        if type(size) is not int or size < 0:
            return False
    return True


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in entries, of a contiguous tensor; a size of 0 counts as 1, as torch has it."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether entries lie row-major without gaps; strides of dims of size 1 do not matter."""
    step = 1
    for size, found in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1:
            if found != step and 0 not in shape:
                return False
            step *= size
    return True


class StoredTensor(NamedTuple):
    """A tensor on disk: its boxes tile it."""

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return prod(self.shape) * ITEM_BYTES[self.dtype]


def grown_box(start: Shape, sizes: Shape, before: Shape, after: Shape) -> tuple[Shape, Shape]:
    """A box of a tensor of shape ``before``, in the same place of one of shape ``after``.

    Every dim's boundaries are moved by one monotone map, so boxes that tile the one tile the other.
    """
    new_start, new_sizes = [], []
    for at, size, old, new in zip(start, sizes, before, after, strict=True):
        low = at * new // old if old else 0
        high = (at + size) * new // old if old else new
        new_start.append(low)
        new_sizes.append(high - low)
    return tuple(new_start), tuple(new_sizes)
