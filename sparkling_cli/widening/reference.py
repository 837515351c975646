"""What every entry of a widened tensor must be, index by index: the rules of the method, written out.

The engine works with runs of neighbouring indices (``geometry``) and compiled steps (``kernel``). Here every
dim has plain arrays with one number per target index: which source index it comes from, whether it is new,
how it is filled, by what it is scaled. The two share the layout language and the definition of the random
numbers, nothing else, so that a fault in one does not hide in the other. It is slow, and used by ``verify``
and by the proofs of layouts on tiny models.

Equations and sections are those of arXiv 2602.02472.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.layout.expr import (
    NONLINEAR_LABELS,
    PACKINGS,
    Axis,
    Dim,
    Expr,
    Product,
    Role,
    Sum,
    TensorLayout,
    axis_names,
    size_of,
)
from sparkling_cli.storage.tensors import FLOATING

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

#: How a new entry is filled; where the dims of a tensor differ, the larger one holds.
COPY, RANDOM, ZERO = range(3)
_FILLS = {"copy": COPY, "random": RANDOM, "zero": ZERO}
FILL_NAMES = ("copied", "random", "zero")


@dataclass(frozen=True)
class Rules:
    """What is asked for.

    Attributes:
        sizes: axis sizes before widening.
        growth: axis -> entries before and after, for axes that grow.
        fan_out: fill of new rows of a producer: copy, random or zero.
        fan_in: fill of new columns of a consumer.
        scaling: rms, function or none.
        copied: axes on which everything that meets is copied; see :func:`copied_axes`.
    """

    sizes: Mapping[str, int]
    growth: Mapping[str, tuple[int, int]]
    fan_out: str = "copy"
    fan_in: str = "copy"
    scaling: str = "rms"
    copied: frozenset[str] = field(default=frozenset())

    def origin(self, axis: str) -> Array:
        """Target index -> source index: the old entries, then copies of them in their order, repeatedly."""
        import numpy as np

        before, after = self.growth[axis]
        return np.arange(after) % before

    def factors(self, axis: str) -> Array:
        """Target index -> what a fan-in column is multiplied by.

        ``sqrt(d / sum_j m_j^2)``, ``m_j`` being how often source j occurs, where all that meets on the axis
        is copied (Eq. 16-17 in general), else ``sqrt(d/d')`` (Eq. 14, App. B). Net2Net's ``1/m_j`` for
        scaling ``function``, 1 for ``none``.
        """
        import numpy as np

        before, after = self.growth[axis]
        origin = self.origin(axis)
        times = np.bincount(origin, minlength=before)
        if self.scaling == "none":
            return np.ones(after)
        if self.scaling == "function":
            return 1.0 / times[origin]
        if axis not in self.copied:
            return np.full(after, sqrt(before / after))
        return np.full(after, sqrt(before / int((times * times).sum())))


def copied_axes(rules: Rules, layouts: Iterable[TensorLayout]) -> frozenset[str]:
    """Axes whose new entries are copies in every producer and in every consumer.

    Args:
        rules: what is asked for.
        layouts: of all tensors of the model.
    """
    found = set(rules.growth)
    for dim in (dim for layout in layouts for dim in layout.dims):
        for axis in found & set(axis_names(dim.expr)):
            alone = Rules(rules.sizes, {axis: rules.growth[axis]}, rules.fan_out, rules.fan_in, "none")
            along = _along(dim, alone, frozenset(), "float64")
            if along.fill.any():
                found.discard(axis)
    return frozenset(found)


class Along(NamedTuple):
    """Plain arrays along one dim, or along several that are flattened; one entry per target index.

    Attributes:
        size: of the source.
        source: source index.
        new: whether the index is new.
        fill: ``COPY``, ``RANDOM`` or ``ZERO``; ``COPY`` where it is old.
        factors: what entries are multiplied by, one after the other; what is 1 everywhere is left out.
    """

    size: int
    source: Array
    new: Array
    fill: Array
    factors: tuple[Array, ...]


class _Term(NamedTuple):
    """The same of one term of the layout language, before it is known what its dim does."""

    size: int
    source: Array
    new: Array
    nonlinear: Array
    factor: Array


def _term(expr: Expr, rules: Rules, scaled: frozenset[str], label: str | None) -> _Term:
    """A term index by index.

    Args:
        expr: the term.
        rules: what is asked for.
        scaled: axes whose fan-in factor the entries carry.
        label: of the terms around it.
    """
    import numpy as np

    label = expr.label or label
    if isinstance(expr, Sum):
        parts = [_term(part, rules, scaled, label) for part in expr.parts]
        starts = np.cumsum([0, *(part.size for part in parts)])
        return _Term(
            int(starts[-1]),
            np.concatenate([part.source + start for part, start in zip(parts, starts, strict=False)]),
            *(np.concatenate([part[i] for part in parts]) for i in (2, 3, 4)),
        )
    if isinstance(expr, Product):
        whole = _term(expr.factors[0], rules, scaled, label)
        for part in expr.factors[1:]:
            inner = _term(part, rules, scaled, label)
            whole = _Term(
                whole.size * inner.size,
                np.add.outer(whole.source * inner.size, inner.source).reshape(-1),
                np.logical_or.outer(whole.new, inner.new).reshape(-1),
                np.logical_or.outer(whole.nonlinear, inner.nonlinear).reshape(-1),
                np.multiply.outer(whole.factor, inner.factor).reshape(-1),
            )
        return whole
    size = size_of(expr, rules.sizes)
    named = PACKINGS.get(expr.name) if isinstance(expr, Axis) else None
    if named is not None:
        nonlinear = np.array(
            [(label or part) in NONLINEAR_LABELS or part in NONLINEAR_LABELS for part in named]
        )
        return _Term(size, np.arange(size), np.zeros(size, bool), nonlinear, np.ones(size))
    if isinstance(expr, Axis) and expr.name in rules.growth:
        source = rules.origin(expr.name)
        factor = rules.factors(expr.name) if expr.name in scaled else np.ones(len(source))
        new = np.arange(len(source)) >= size
    else:
        source, factor, new = np.arange(size), np.ones(size), np.zeros(size, bool)
    return _Term(size, source, new, np.full(len(source), label in NONLINEAR_LABELS), factor)


def _along(dim: Dim, rules: Rules, consumed: frozenset[str], wide: str, moment: str = "") -> Along:
    """A storage dim index by index.

    Args:
        dim: its meaning.
        rules: what is asked for.
        consumed: axes whose fan-in factor an elementwise tensor carries (App. D.1).
        wide: numpy dtype of the arithmetic.
        moment: treatment, if the tensor is optimizer state that is no copy of the weight.
    """
    import numpy as np

    scaled = frozenset(axis_names(dim.expr)) if dim.role is Role.IN else frozenset()
    scaled = consumed if dim.role is Role.SCALE else scaled
    # each factor of the dim's term is one factor of the arithmetic, rounded to its precision
    terms = [_term(expr, rules, scaled, label) for expr, label in _flattened(dim.expr, None)]
    size, count = prod(t.size for t in terms), prod(len(t.source) for t in terms)
    source = np.zeros(1, np.int64)
    new, nonlinear = np.zeros(1, bool), np.zeros(1, bool)
    factors = []
    outer = 1
    for term in terms:
        n = len(term.source)
        source = np.add.outer(source * term.size, term.source).reshape(-1)
        new = np.logical_or.outer(new, term.new).reshape(-1)
        nonlinear = np.logical_or.outer(nonlinear, term.nonlinear).reshape(-1)
        outer *= n
        if not (term.factor == 1).all() and moment in ("", "asymmetric-scaled"):
            factors.append(np.tile(np.repeat(term.factor, count // outer), outer // n).astype(wide))
    if moment:
        how = COPY if moment == "copy" else ZERO  # S' = [S, 0] (Eq. 24), on whatever dim
    else:
        asked = {Role.IN: rules.fan_in, Role.OUT: rules.fan_out, Role.BIAS: rules.fan_out}
        how = _FILLS[asked.get(dim.role, "copy")]
    # a product of two zeros has no gradient in either, for ever: q, k and gate are copied
    shielded = nonlinear if how == ZERO and not moment and dim.role is not Role.IN else False
    filled = np.where(new & ~np.asarray(shielded), how, COPY).astype(np.int8)
    return Along(size, source, new, filled, tuple(factors))


def _flattened(expr: Expr, label: str | None) -> list[tuple[Expr, str | None]]:
    label = expr.label or label
    if not isinstance(expr, Product):
        return [(expr, label)]
    return [found for factor in expr.factors for found in _flattened(factor, label)]


class Wanted:
    """What one kind of tensor must be: rows (every dim but the last, flattened) and columns.

    Args:
        layout: what its dims mean.
        rules: what is asked for.
        dtype: of source and target, by torch's name.
        consumed: axes whose fan-in factor it carries, if it is elementwise.
        scale: factor on all entries.
        offset: added after scaling.
        moment: the treatment, if it is optimizer state that is no copy of a weight.

    Attributes:
        before: shape of the source.
        shape: of the target.
        row: rows.
        column: columns.
        zero: the whole tensor is zero (dropped state).
        same: every entry is the source's.
        random: some entries are drawn.
    """

    def __init__(
        self,
        layout: TensorLayout,
        rules: Rules,
        dtype: str,
        *,
        consumed: frozenset[str] = frozenset(),
        scale: float = 1.0,
        offset: float = 0.0,
        moment: str = "",
    ) -> None:
        self.dtype, self.scale, self.offset, self.moment = dtype, scale, offset, moment
        dims = [_along(dim, rules, consumed, wide_dtype(dtype), moment) for dim in layout.dims]
        self.before = tuple(dim.size for dim in dims)
        self.shape = tuple(len(dim.source) for dim in dims)
        self.zero = moment == "drop"
        self.row = _joined(dims[:-1])
        self.column = dims[-1] if dims else _joined([])
        sides = (self.row, self.column)
        still = self.before == self.shape and not any(side.factors for side in sides)
        self.same = still and scale == 1.0 and offset == 0.0 and not self.zero
        self.random = any((side.fill == RANDOM).any() for side in sides)

    def factor(self, rows: slice, columns: slice) -> Array:
        """Products of all factors, in the order of the dims; one number if it is one."""
        import numpy as np

        wide = np.dtype(wide_dtype(self.dtype)).type
        factor: Array = np.full((1, 1), wide(self.scale))
        for one in self.row.factors:
            factor = factor * one[rows][:, None]
        for one in self.column.factors:
            factor = factor * one[columns][None, :]
        return factor[:1, :1] if (factor == factor[0, 0]).all() else factor


def _joined(dims: Iterable[Along]) -> Along:
    """Several dims flattened row-major."""
    import numpy as np

    whole = Along(1, np.zeros(1, np.int64), np.zeros(1, bool), np.zeros(1, np.int8), ())
    for dim in dims:
        n, m = len(whole.source), len(dim.source)
        whole = Along(
            whole.size * dim.size,
            np.add.outer(whole.source * dim.size, dim.source).reshape(-1),
            np.logical_or.outer(whole.new, dim.new).reshape(-1),
            np.maximum.outer(whole.fill, dim.fill).reshape(-1),
            tuple(np.repeat(f, m) for f in whole.factors) + tuple(np.tile(f, n) for f in dim.factors),
        )
    return whole


def computed(old: Array, factor: Array, offset: float, dtype: str) -> Array:
    """``factor * old + offset`` in float32 (float64 for float64), rounded once.

    Args:
        old: bit patterns, as unsigned integers.
        factor: in the precision of the arithmetic.
        offset: added after scaling.
        dtype: of the entries.

    Raises:
        ValueError: a dtype that has no arithmetic.
    """
    if dtype not in FLOATING:
        raise ValueError(f"{dtype} entries cannot have been computed")
    values = _numbers(old, dtype) * factor
    return rounded(values + values.dtype.type(offset) if offset else values, dtype).view(old.dtype)


def drawn(numbers: Array, spread: float, factor: Array, dtype: str) -> Array:
    """Random entries as bit patterns: standard normal numbers times the spread and the factor of each entry.

    Args:
        numbers: of the stream, float32.
        spread: standard deviation.
        factor: in the precision of the arithmetic; spread and factor meet in that precision.
        dtype: of the entries.
    """
    import numpy as np

    wide = np.dtype(wide_dtype(dtype))
    bits = rounded(numbers.astype(wide) * (wide.type(spread) * factor), dtype)
    return bits.view(bits_dtype(bits.dtype.itemsize))


def _numbers(bits: Array, dtype: str) -> Array:
    """Entries in the precision of the arithmetic."""
    return bits.view(dtype) if dtype in ("float32", "float64") else as_numbers(bits, dtype, "float32")


def as_numbers(bits: Array, dtype: str, wide: str = "float64") -> Array:
    """Bit patterns (or bytes) of floating entries as numbers of another dtype."""
    import numpy as np

    if dtype in ("float32", "float64"):
        return bits.view(dtype).astype(wide)
    import torch

    kind = getattr(torch, dtype)
    stored = torch.from_numpy(np.ascontiguousarray(bits).view(signed_dtype(kind.itemsize)))
    values: Array = stored.view(kind).to(getattr(torch, wide)).numpy()
    return values


def rounded(values: Array, dtype: str) -> Array:
    """Numbers in the tensor's dtype: as they are, or their bits where numpy does not have it."""
    if dtype in ("float32", "float64"):
        return values
    import numpy as np
    import torch

    found = torch.from_numpy(np.ascontiguousarray(values)).to(getattr(torch, dtype))
    bits: Array = found.view(getattr(torch, signed_dtype(found.element_size()))).numpy()
    return bits


def wide_dtype(dtype: str) -> str:
    """The numpy dtype of the arithmetic."""
    return "float64" if dtype == "float64" else "float32"


def bits_dtype(item: int) -> str:
    """A numpy dtype of that size that is compared bit by bit."""
    return {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64", 16: "complex128"}[item]


def signed_dtype(item: int) -> str:
    """A numpy dtype of that size that torch knows."""
    return {1: "int8", 2: "int16", 4: "int32", 8: "int64", 16: "complex128"}[item]


def widened_array(tensor: Array, wanted: Wanted) -> Array:
    """A whole tensor of a numpy dtype, widened; what is random cannot be made of it alone.

    Raises:
        TypeError: arithmetic on entries that are no floating-point numbers.
    """
    import numpy as np

    flat = tensor.reshape(wanted.row.size, wanted.column.size)
    picked = flat[np.ix_(wanted.row.source, wanted.column.source)]
    factor = wanted.factor(slice(None), slice(None))
    if wanted.offset or not (factor == 1).all():
        if tensor.dtype.kind != "f":
            raise TypeError(f"{tensor.dtype} entries can be copied, not computed")
        picked = (picked * factor + wanted.offset).astype(tensor.dtype)
    filled = np.maximum.outer(wanted.row.fill, wanted.column.fill)
    picked[filled == ZERO] = 0
    result: Array = picked.reshape(wanted.shape)
    return result
