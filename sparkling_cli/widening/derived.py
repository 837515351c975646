"""State whose new entries follow from all of the old ones: means of factors, diagonals of preconditioners.

Such tensors are small beside the weights (a vector, or a matrix on one dim), so each is made as a whole.
"""

from __future__ import annotations

from math import fsum
from typing import TYPE_CHECKING, Any

from sparkling_cli.widening.entries import as_doubles, draw_into, numpy_dtype
from sparkling_cli.widening.geometry import Fill, Run, View, ViewDim
from sparkling_cli.widening.moments import Moments

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: fills that need more than the entry that a new one is a copy of
DERIVED = (Fill.AVERAGE, Fill.DIAGONAL, Fill.UNIT)


def is_derived(view: View) -> bool:
    """Whether a tensor has entries with such a fill."""
    return any(run.fill in DERIVED for dim in view for run in dim.runs)


def derived(view: View, old: Array, dtype: str) -> Array:
    """The target's entries, of numpy's dtype for ``dtype``, in the target's shape.

    New entries along a dim with fill ``AVERAGE`` are the mean of the old ones along it. In the square of one
    with fill ``DIAGONAL`` or ``UNIT`` everything new is zero, but for the diagonal, which is the mean of the
    old diagonal, or one.

    Args:
        view: of the tensor.
        old: the source's entries, in the source's shape.
        dtype: of both, by torch's name.
    """
    import numpy as np

    dims = indices(view)
    new = old
    for axis, (source, fills) in enumerate(dims):
        fresh = np.flatnonzero(fills)
        fill = Fill(int(fills[fresh[0]])) if len(fresh) else Fill.COPY
        means = _means(np.moveaxis(new, axis, -1), dtype) if fill is Fill.AVERAGE else None
        new = np.take(new, source, axis)
        if means is not None:
            np.moveaxis(new, axis, -1)[..., fresh] = means[..., None]
        elif len(fresh) and axis == len(dims) - 1:  # the second dim of the square: both are as one
            diagonal = np.diagonal(old, axis1=-2, axis2=-1)
            one = np.ones(diagonal.shape[:-1])
            values = _means(diagonal, dtype) if fill is Fill.DIAGONAL else _rounded(one, dtype)
            new[..., fresh, :] = 0
            new[..., :, fresh] = 0
            new[..., fresh, fresh] = values[..., None]
    return new


def turned(columns: int, rows: int) -> View:
    """The view of a factor of columns that shall be one of rows: each is the mean of all old entries.

    Means of rows and of columns have one mean, that of the whole matrix; of single rows no more is known.
    """
    new = tuple(Run(row, 0, 1, new=True, fill=Fill.AVERAGE) for row in range(rows))
    return ViewDim(1, rows, new, 0), ViewDim(columns, 1, new[:1], 1)


def indices(view: View) -> list[tuple[Array, Array]]:
    """Per storage dim, the source index and the fill of every target index; old ones have ``COPY``."""
    return [_along([dim for dim in view if dim.dim == number]) for number in range(1 + view[-1].dim)]


def _along(parts: list[ViewDim]) -> tuple[Array, Array]:
    import numpy as np

    source, fills = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for part in parts:
        runs = [(np.arange(run.source, run.source + run.length), run) for run in part.runs]
        inner = np.concatenate([indices for indices, _ in runs])
        fill = np.concatenate([np.full(len(indices), run.fill) for indices, run in runs])
        source = np.add.outer(source * part.source, inner).reshape(-1)
        fills = np.maximum.outer(fills, fill).reshape(-1)
    return source, fills


def _means(old: Array, dtype: str) -> Array:
    """Along the last dim; the sum is exact, so the order of its terms does not matter."""
    import numpy as np

    lines = as_doubles(np.ascontiguousarray(old).view(np.uint8).reshape(-1), dtype).reshape(-1, old.shape[-1])
    means = np.array([fsum(line) / len(line) for line in lines.tolist()])
    return _rounded(means.reshape(old.shape[:-1]), dtype)


def _rounded(values: Array, dtype: str) -> Array:
    """Numbers as entries."""
    import numpy as np

    wide = np.ascontiguousarray(values.reshape(-1), np.float64 if dtype == "float64" else np.float32)
    into = np.empty(len(wide), numpy_dtype(dtype))
    draw_into(wide, Moments(1, 0.0, 1.0), 1.0, 0.0, into, dtype)  # the numbers themselves, rounded
    return into.reshape(values.shape)
