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
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from math import prod, sqrt
from typing import TYPE_CHECKING, Any, NamedTuple

from sparkling_cli.layout.expr import (
    COUNTED,
    NONLINEAR_LABELS,
    PACKINGS,
    Axis,
    Dim,
    Expr,
    Fixed,
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

    from sparkling_cli.widening.moments import Moments

    Array = np.ndarray[Any, Any]
    _Units = tuple[Array, tuple[tuple[int, ...], ...]]

#: How a new entry is filled; where the dims of a tensor differ, the larger one holds.
COPY, NOISY, MEAN, RANDOM, ZERO = range(5)
_FILLS = {"copy": COPY, "mean": MEAN, "random": RANDOM, "zero": ZERO}
FILL_NAMES = ("copied", "a copy with noise", "a mean", "random", "zero")
#: kinds of state whose new entries follow from all old ones; a factor may have come to be of the other side
MEANS, DIAGONAL, UNIT, TURNED = "factor", "preconditioner", "basis", "turned factor"
#: sizes of anonymous factors that stand for gate and up, or q, k and v
_FUSED = (2, 3)


@dataclass(frozen=True)
class Rules:
    """What is asked for.

    Attributes:
        sizes: axis sizes before widening.
        growth: axis -> entries before and after, for axes that grow.
        fan_out: fill of new rows of a producer: copy, random or zero.
        fan_in: fill of new columns of a consumer.
        scaling: rms, function, calibrated or none.
        copied: axes on which everything that meets is copied; see :func:`copied_axes`.
        originals: axis -> the original that every entry is a copy of, for axes that have grown before.
        vocab, layers: fill of new rows of the vocabulary (copy: in proofs of layouts), of new stacked layers.
        noise: on new rows of routers, as a share of the old rows' standard deviation.
        means: of each new row the old ones that it is the mean of, () for all; () where it is all for each.
        order, experts: the source of each layer, and of each expert of one layer; () where nothing was said.
    """

    sizes: Mapping[str, int]
    growth: Mapping[str, tuple[int, int]]
    fan_out: str = "copy"
    fan_in: str = "copy"
    scaling: str = "rms"
    copied: frozenset[str] = field(default=frozenset())
    originals: Mapping[str, Array] = field(default_factory=dict)
    vocab: str = "copy"
    noise: float = 0.0
    means: tuple[tuple[int, ...], ...] = ()
    order: tuple[int, ...] = ()
    layers: str = "copy"
    experts: tuple[int, ...] = ()

    def origin(self, axis: str) -> Array:
        """Target index -> source index.

        Behind the old entries stand copies of them, in their order, repeatedly, or as was said. Where an axis
        that has grown before grows by a fraction, each new entry in turn copies an original that occurs least
        often, of its entries the one that has been copied least; the first of them.
        """
        import numpy as np

        before, after = self.growth[axis]
        if chosen := {"layers": self.order, "experts": self.experts}.get(axis):
            return np.array(chosen)
        if axis not in self.originals or after % before == 0:
            return np.arange(after) % before
        entries: dict[int, list[tuple[int, int]]] = {}  # original -> (copies, entry)
        for entry, original in enumerate(self.originals[axis].tolist()):
            entries.setdefault(original, []).append((0, entry))
        queue = [(len(found), found[0][1], original) for original, found in entries.items()]
        heapify(queue)
        origin = list(range(before))
        while len(origin) < after:
            times, entry, original = queue[0]
            origin.append(entry)
            copies, _ = heappop(entries[original])
            heappush(entries[original], (copies + 1, entry))
            heapreplace(queue, (times + 1, entries[original][0][1], original))
        return np.array(origin)

    def originals_after(self, axis: str) -> Array:
        """The original of every entry after widening; what is no copy is an original."""
        import numpy as np

        before, after = self.growth[axis]
        known = self.originals.get(axis, np.arange(before))
        if axis in self.copied:
            return known[self.origin(axis)]
        return np.concatenate([known, known.max() + 1 + np.arange(after - before)])

    def factors(self, axis: str) -> Array:
        """Target index -> what a fan-in column is multiplied by.

        ``sqrt(sum_j m_j^2 / sum_j M_j^2)`` where all that meets on the axis is copied, original j occurring
        m_j times before and M_j times after (Eq. 16-17 in general), else ``sqrt(d/d')`` (Eq. 14, App. B).
        For scaling ``function``, and ``calibrated`` under copy-copy, Net2Net's ``1/n`` where the source
        occurs n times, 1 if new columns are zero; 1 for ``none``, and for the vocabulary: it is looked up.
        """
        import numpy as np

        before, after = self.growth[axis]
        origin = self.origin(axis)
        times = np.bincount(origin, minlength=before)
        if self.scaling == "none" or axis in COUNTED or (self.scaling, self.fan_in) == ("function", "zero"):
            return np.ones(after)
        copied = self.fan_out == self.fan_in == "copy"
        if self.scaling == "function" or (self.scaling == "calibrated" and copied):
            return 1.0 / times[origin]
        if axis not in self.copied:
            return np.full(after, sqrt(before / after))
        squares = [
            int((np.unique(found, return_counts=True)[1] ** 2).sum())
            for found in (self.originals.get(axis, np.arange(before)), self.originals_after(axis))
        ]
        return np.full(after, sqrt(squares[0] / squares[1]))


def copied_axes(rules: Rules, layouts: Iterable[TensorLayout]) -> frozenset[str]:
    """Axes whose new entries are copies in every producer and in every consumer.

    Args:
        rules: what is asked for.
        layouts: of all tensors of the model.
    """
    found = set(rules.growth)
    for dim in (dim for layout in layouts for dim in layout.dims):
        for axis in found & set(axis_names(dim.expr)):
            only = {axis: rules.growth[axis]}
            alone = Rules(
                rules.sizes, only, rules.fan_out, rules.fan_in, "none", vocab=rules.vocab, noise=rules.noise
            )
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
        unit: number of the part with a distribution of its own that the index belongs to: stacked experts,
            gate and up, q, k and v.
        units: the numbers by which that part is known, one for each dim that is cut.
    """

    size: int
    source: Array
    new: Array
    fill: Array
    factors: tuple[Array, ...]
    unit: Array
    units: tuple[tuple[int, ...], ...]

    def ranks(self) -> Array:
        """How many indices of the same unit stand before each index."""
        import numpy as np

        order = np.argsort(self.unit, kind="stable")
        counts = np.bincount(self.unit, minlength=len(self.units))
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        return ranks


class _Term(NamedTuple):
    """The same of one term of the layout language, before it is known what its dim does."""

    size: int
    source: Array
    new: Array
    wide: Array  # new on an axis that is summed over
    own: Array  # fill of entries that are new on another, which has a rule of its own
    nonlinear: Array
    factor: Array
    unit: Array
    units: tuple[tuple[int, ...], ...] = ((),)


def _pairs(a: _Units, b: _Units) -> _Units:
    """Units of a flattened product, row-major."""
    import numpy as np

    (outer, names), (inner, others) = a, b
    codes = np.add.outer(outer * len(others), inner).reshape(-1)
    return codes, tuple(name + other for name in names for other in others)


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
        codes = np.cumsum([0, *(len(part.units) for part in parts)])
        return _Term(
            int(starts[-1]),
            np.concatenate([part.source + start for part, start in zip(parts, starts, strict=False)]),
            np.concatenate([part.new for part in parts]),
            np.concatenate([part.wide for part in parts]),
            np.concatenate([part.own for part in parts]),
            np.concatenate([part.nonlinear for part in parts]),
            np.concatenate([part.factor for part in parts]),
            np.concatenate([part.unit + code for part, code in zip(parts, codes, strict=False)]),
            tuple((number, *name) for number, part in enumerate(parts) for name in part.units),
        )
    if isinstance(expr, Product):
        whole = _term(expr.factors[0], rules, scaled, label)
        for part in expr.factors[1:]:
            inner = _term(part, rules, scaled, label)
            whole = _Term(
                whole.size * inner.size,
                np.add.outer(whole.source * inner.size, inner.source).reshape(-1),
                np.logical_or.outer(whole.new, inner.new).reshape(-1),
                np.logical_or.outer(whole.wide, inner.wide).reshape(-1),
                np.maximum.outer(whole.own, inner.own).reshape(-1),
                np.logical_or.outer(whole.nonlinear, inner.nonlinear).reshape(-1),
                np.multiply.outer(whole.factor, inner.factor).reshape(-1),
                *_pairs(whole[7:], inner[7:]),
            )
        return whole
    size = size_of(expr, rules.sizes)
    named = PACKINGS.get(expr.name) if isinstance(expr, Axis) else None
    if named is not None:
        nonlinear = np.array(
            [(label or part) in NONLINEAR_LABELS or part in NONLINEAR_LABELS for part in named]
        )
        still, units = np.zeros(size, bool), tuple((i,) for i in range(size))
        none, ones = np.zeros(size, np.int8), np.ones(size)
        return _Term(size, np.arange(size), still, still, none, nonlinear, ones, np.arange(size), units)
    if isinstance(expr, Axis) and expr.name in rules.growth:
        source = rules.origin(expr.name)
        factor = rules.factors(expr.name) if expr.name in scaled else np.ones(len(source))
        new = np.arange(len(source)) >= size
    else:
        source, factor, new = np.arange(size), np.ones(size), np.zeros(size, bool)
    name = expr.name if isinstance(expr, Axis) else ""
    fill = {"vocab": rules.vocab, "layers": rules.layers}.get(name, "copy")
    own = np.where(new, _FILLS[fill], COPY).astype(np.int8)
    wide, nonlinear = new & (name not in COUNTED), np.full(len(source), label in NONLINEAR_LABELS)
    if isinstance(expr, Fixed) and size in _FUSED:
        units = tuple((i,) for i in range(size))
        return _Term(size, source, new, wide, own, nonlinear, factor, source, units)
    return _Term(size, source, new, wide, own, nonlinear, factor, np.zeros(len(source), np.int64))


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

    scaled = {Role.IN: frozenset(axis_names(dim.expr)), Role.SCALE: consumed}.get(dim.role, frozenset())
    # each factor of the dim's term is one factor of the arithmetic, rounded to its precision
    terms = [_term(expr, rules, scaled, label) for expr, label in _flattened(dim.expr, None)]
    size, count = prod(t.size for t in terms), prod(len(t.source) for t in terms)
    source = np.zeros(1, np.int64)
    new, nonlinear, widened = np.zeros(1, bool), np.zeros(1, bool), np.zeros(1, bool)
    own: Array = np.zeros(1, np.int8)
    cut: _Units = (np.zeros(1, np.int64), ((),))
    factors = []
    outer = 1
    for term in terms:
        n = len(term.source)
        cut = _pairs(cut, term[7:])
        source = np.add.outer(source * term.size, term.source).reshape(-1)
        new = np.logical_or.outer(new, term.new).reshape(-1)
        widened = np.logical_or.outer(widened, term.wide).reshape(-1)
        own = np.maximum.outer(own, term.own).reshape(-1)
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
    if moment:
        filled = np.where((new & (how == ZERO)) | (own != COPY), ZERO, COPY).astype(np.int8)
    else:
        if rules.noise and dim.role is Role.OUT and dim.expr == Axis("experts"):
            own = np.where(new, NOISY, own)
        filled = np.maximum(np.where(widened & ~np.asarray(shielded), how, COPY), own).astype(np.int8)
    if dim.role is Role.STACK:
        cut = np.arange(len(source)), tuple((int(i),) for i in source)  # copies are drawn as their sources
    elif dim.role is Role.IN or (dim.role is not Role.SCALE and not isinstance(dim.expr, (Product, Sum))):
        cut = np.zeros(len(source), np.int64), ((),)
    return Along(size, source, new, filled, tuple(factors), *cut)


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
        scale: factor on all entries; ``fresh`` is that on new ones, if it is another.
        offset: added after scaling.
        moment: the treatment, if it is optimizer state that is no copy of a weight.
        state: ``factor``, ``preconditioner`` or ``basis`` of such state; "" if new entries start from zero.
        own: the factor's dim of its own, along which new entries are means.

    Attributes:
        before: shape of the source, as stored; ``sizes`` that of its dims, which may be stored as one.
        shape: of the target, as stored.
        row: rows.
        column: columns.
        zero: the whole tensor is zero (dropped state).
        whole: new entries follow from all old ones: see ``widening.reference_state``.
        same: every entry is the source's.
        random: some entries are drawn.
        means: see :class:`Rules`.
        noise: see there.
    """

    def __init__(
        self,
        layout: TensorLayout,
        rules: Rules,
        dtype: str,
        *,
        consumed: frozenset[str] = frozenset(),
        scale: float = 1.0,
        fresh: float | None = None,
        offset: float = 0.0,
        moment: str = "",
        state: str = "",
        own: int = -1,
    ) -> None:
        self.dtype, self.scale, self.offset, self.moment = dtype, scale, offset, moment
        self.state, self.own, self.fresh = state, own, fresh
        self.dims = dims = [_along(dim, rules, consumed, wide_dtype(dtype), moment) for dim in layout.dims]
        self.sizes = self.before = tuple(dim.size for dim in dims)
        self.shape = tuple(len(dim.source) for dim in dims)
        self.zero = moment == "drop" and state != UNIT
        grows = self.before != self.shape
        self.whole = bool(state) and grows and not self.zero and not (moment == "copy" and state == MEANS)
        self.row, self.column = _joined(dims[:-1]), dims[-1] if dims else _joined([])
        sides = (self.row, self.column)
        still = self.before == self.shape and not any(side.factors for side in sides)
        self.same = still and scale == 1.0 and offset == 0.0 and not self.zero
        self.random = any(((side.fill == RANDOM) | (side.fill == NOISY)).any() for side in sides)
        self.means, self.noise = rules.means, rules.noise

    def mean_places(self, rows: slice, columns: slice) -> Array:
        """Of a box of means, the place of every entry among the rows of means behind each other."""
        import numpy as np

        row, column = np.arange(rows.start, rows.stop), np.arange(columns.start, columns.stop)
        target = np.add.outer(row * len(self.column.source), column)
        source = np.add.outer(self.row.source[row] * self.column.size, self.column.source[column])
        old, new = prod(self.sizes[1:]), prod(len(dim.source) for dim in self.dims[1:])
        places: Array = (target // new - self.sizes[0]) * old + source % old
        return places

    @cached_property
    def ranks(self) -> tuple[Array, Array]:
        """Of rows and columns, how many of the same unit stand before each."""
        return self.row.ranks(), self.column.ranks()

    def factor(self, rows: slice, columns: slice) -> Array:
        """Products of all factors, in the order of the dims; one number if it is one."""
        import numpy as np

        wide = np.dtype(wide_dtype(self.dtype)).type
        factor: Array = np.full((1, 1), wide(self.scale))
        if self.fresh is not None:
            new = np.logical_or.outer(self.row.new[rows], self.column.new[columns])
            factor = np.where(new, wide(self.fresh), wide(self.scale))
        for one in self.row.factors:
            factor = factor * one[rows][:, None]
        for one in self.column.factors:
            factor = factor * one[columns][None, :]
        return factor[:1, :1] if (factor == factor[0, 0]).all() else factor


def _joined(dims: Iterable[Along]) -> Along:
    """Several dims flattened row-major."""
    import numpy as np

    zero = np.zeros(1, np.int64)
    whole = Along(1, zero, np.zeros(1, bool), np.zeros(1, np.int8), (), zero, ((),))
    for dim in dims:
        n, m = len(whole.source), len(dim.source)
        whole = Along(
            whole.size * dim.size,
            np.add.outer(whole.source * dim.size, dim.source).reshape(-1),
            np.logical_or.outer(whole.new, dim.new).reshape(-1),
            np.maximum.outer(whole.fill, dim.fill).reshape(-1),
            tuple(np.repeat(f, m) for f in whole.factors) + tuple(np.tile(f, n) for f in dim.factors),
            *_pairs((whole.unit, whole.units), (dim.unit, dim.units)),
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


def drawn(numbers: Array, moments: Moments, factor: Array, offset: float, dtype: str) -> Array:
    """Random entries as bit patterns: ``factor * (mean + std * numbers) + offset``, rounded once.

    Args:
        numbers: of the unit's stream, float32.
        moments: of the unit's old entries.
        factor: in the precision of the arithmetic; deviation and mean meet it in that precision.
        offset: added after scaling.
        dtype: of the entries.
    """
    import numpy as np

    wide = np.dtype(wide_dtype(dtype))
    shift = wide.type(moments.mean) * factor + wide.type(offset)
    bits = rounded(numbers.astype(wide) * (wide.type(moments.std) * factor) + shift, dtype)
    return bits.view(bits_dtype(bits.dtype.itemsize))


def noisy(
    old: Array, numbers: Array, moments: Moments, noise: float, factor: Array, offset: float, dtype: str
) -> Array:
    """Noisy copies as bit patterns: ``factor * (old + std * noise * numbers) + offset``, rounded once.

    Args:
        old: bit patterns.
        numbers: of the unit's stream, float32.
        moments: of the unit's old entries.
        noise: as a share of their standard deviation.
        factor: in the precision of the arithmetic.
        offset: added after scaling.
        dtype: of the entries.
    """
    import numpy as np

    wide = np.dtype(wide_dtype(dtype))
    values = numbers.astype(wide) * wide.type(moments.std * noise) + _numbers(old, dtype)
    return averaged(values, factor, offset, dtype)


def averaged(values: Array, factor: Array, offset: float, dtype: str) -> Array:
    """Means as bit patterns: ``factor * values + offset``, rounded once.

    Args:
        values: float64.
        factor: in the precision of the arithmetic.
        offset: added after scaling.
        dtype: of the entries.
    """
    import numpy as np

    made = values.astype(wide_dtype(dtype)) * factor
    bits = rounded(made + made.dtype.type(offset) if offset else made, dtype)
    return bits.view(bits_dtype(np.dtype(bits.dtype).itemsize))


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
