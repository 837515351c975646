"""What every entry of a widened tensor must be, from tables per index of each dim.

A dim's table says, index by index, which source index it copies, whether it is new, how a new entry is
filled, and by what it is scaled. That is the definition, written out; the engine works with runs instead.
Rows are all dims but the last, columns the last one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from sparkling_cli.widening.geometry import Fill, View, ViewDim

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class DimTable:
    """One storage dim, target index by target index.

    Attributes:
        size: of the source.
        source: source index.
        new: whether it is new.
        fill: how it is filled (``Fill``).
        scales: factors of its view dims, in their order; those that are 1 everywhere left out.
    """

    size: int
    source: Array
    new: Array
    fill: Array
    scales: tuple[Array, ...]


def dim_tables(view: View, wide: str) -> tuple[DimTable, ...]:
    """A table per storage dim.

    Args:
        view: of the tensor.
        wide: numpy dtype of the arithmetic.
    """
    return tuple(
        _storage_dim([dim for dim in view if dim.dim == number], wide)
        for number in sorted({dim.dim for dim in view})
    )


def _storage_dim(dims: list[ViewDim], wide: str) -> DimTable:
    """Flatten the view dims of one storage dim, row-major."""
    import numpy as np

    targets = [dim.target for dim in dims]
    places = np.indices(targets).reshape(len(dims), prod(targets))
    source = np.zeros(prod(targets), dtype=np.int64)
    new = np.zeros(prod(targets), dtype=bool)
    shield = np.zeros(prod(targets), dtype=bool)
    fill = np.zeros(prod(targets), dtype=np.int8)
    scales = []
    for dim, place in zip(dims, places, strict=True):
        source = source * dim.source + _expand(dim, "source", np.int64)[place]
        new |= _expand(dim, "new", np.bool_)[place]
        shield |= _expand(dim, "shield", np.bool_)[place]
        fill = np.maximum(fill, _expand(dim, "fill", np.int8)[place])
        scale = _expand(dim, "scale", np.float64).astype(wide)[place]
        if not (scale == 1).all():
            scales.append(scale)
    fill[shield] = Fill.COPY
    return DimTable(prod(dim.source for dim in dims), source, new, fill, tuple(scales))


def _expand(dim: ViewDim, what: str, dtype: Any) -> Array:
    """One value per target index of a view dim."""
    import numpy as np

    values = np.zeros(dim.target, dtype=dtype)
    for run in dim.runs:
        value = getattr(run, what)
        steps = np.arange(run.length, dtype=np.int64) if what == "source" else 0
        values[run.target : run.target + run.length] = value + steps if what == "source" else value
    return values


@dataclass(frozen=True, eq=False)
class Tables:
    """A whole tensor: rows (every dim but the last, flattened) and columns."""

    row: DimTable
    column: DimTable


def tensor_tables(view: View, wide: str) -> Tables:
    """Rows and columns of a tensor with at least one dim."""
    import numpy as np

    dims = dim_tables(view, wide)
    one = DimTable(1, np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(1, np.int8), ())
    row = one
    for dim in dims[:-1]:
        n, m = len(row.source), len(dim.source)
        row = DimTable(
            row.size * dim.size,
            (row.source[:, None] * dim.size + dim.source[None, :]).reshape(-1),
            (row.new[:, None] | dim.new[None, :]).reshape(-1),
            np.maximum(row.fill[:, None], dim.fill[None, :]).reshape(-1),
            tuple(np.repeat(s, m) for s in row.scales) + tuple(np.tile(s, n) for s in dim.scales),
        )
    return Tables(row, dims[-1] if dims else one)


def faults(tables: Tables, *, reset: bool) -> str | None:
    """What is wrong with the tables themselves, if anything.

    Every source entry must be kept by exactly one old entry, in order; and if the tensor is optimizer
    state that is ``reset``, exactly the new entries must be filled with zero, and nothing scaled.
    """
    import numpy as np

    for name, table in (("rows", tables.row), ("columns", tables.column)):
        if not np.array_equal(table.source[~table.new], np.arange(table.size)):
            return f"old {name} are not the source's {name} in their order"
        if reset and not np.array_equal(table.new, table.fill == Fill.ZERO):
            return f"zeros are not exactly the new {name}"
        if reset and table.scales:
            return f"{name} of optimizer state are scaled"
    return None
