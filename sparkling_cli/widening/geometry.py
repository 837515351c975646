"""What widening does to one tensor: for every dim, a few runs (method, section 2).

A tensor is seen through a *view*: every storage dim is split at its flattened factors, so that an axis
that grows inside a dim (query heads in their groups) stays two runs instead of hundreds. Views cost
nothing: the bytes are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from heapq import heapify, heapreplace
from itertools import pairwise, product
from math import sqrt

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.depth import LAYERS, deeper_layout
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
    factors,
    size_of,
)
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.spec.choices import ALL, LayerKey

#: sizes of anonymous factors that stand for gate and up, or q, k and v, where names could not be given
FUSED = (2, 3)


class Fill(IntEnum):
    """How a new entry gets its value; where dims disagree, the larger wins."""

    COPY = 0
    NOISY = 1
    MEAN = 2
    RANDOM = 3
    ZERO = 4
    AVERAGE = 5
    """of state: the mean of the old entries along the dim (see ``widening.derived``)"""
    DIAGONAL = 6
    """of state: zero, but on the diagonal of a square the mean of its old entries"""
    UNIT = 7
    """of state: zero, but on the diagonal of a square one"""


@dataclass(frozen=True)
class Run:
    """``target[target : target+length]`` comes from ``source[source : source+length]``.

    ``scale`` multiplies the run's entries; ``fill`` and ``new`` say what becomes of new entries;
    ``shield`` marks parts (q, k, gate) that zero fill leaves copied, whichever factor of their dim grows;
    ``part`` numbers what has a distribution of its own (see ``widening.parts``), where entries are random;
    ``drawn_as`` is the part whose distribution and numbers it has: of a copied expert, its source.
    """

    target: int
    source: int
    length: int
    new: bool = False
    scale: float = 1.0
    fill: Fill = Fill.COPY
    shield: bool = False
    part: tuple[int, ...] = ()
    drawn_as: tuple[int, ...] = ()


@dataclass(frozen=True)
class ViewDim:
    """One dim of the view: sizes before and after, runs that tile the target, the storage dim."""

    source: int
    target: int
    runs: tuple[Run, ...]
    dim: int

    @cached_property
    def identity(self) -> bool:
        """Nothing happens along this dim."""
        return self.runs == (Run(0, 0, self.source),) and self.source == self.target


View = tuple[ViewDim, ...]


#: consecutive indices: the first, and how many
Span = tuple[int, int]


@dataclass(frozen=True)
class Growth:
    """An axis that grows from ``source`` to ``target`` entries.

    Whole factors copy every entry equally often, in order: new entry t copies (t-d) mod d. At other factors
    the sources that occur least often are copied first, counted over the axis's whole history: entries that
    earlier expansions copied from one original count together. So 1.5x and then 4/3x gives every original
    two copies, as 2x does.

    Attributes:
        source: entries before.
        target: entries after.
        copied: all that meets on the axis is copied: every producer's new rows and every consumer's new
            columns. A fact about the fills used (see ``plan.symmetry``), not about the pair asked for.
        originals: spans of originals, one for each entry before; () where every entry is its own.
        means: of each new entry whose fill is the mean, the old entries that it is the mean of; () for all.
        order: the source of each target entry, where it was chosen; () where it is as above. Of layers the
            first of a source is the old one; on any other axis new entries stand behind the old ones.
        by_layer: ``order`` in each layer of the widened model, where these differ; () where they do not.
    """

    source: int
    target: int
    copied: bool = True
    originals: tuple[Span, ...] = ()
    means: tuple[tuple[int, ...], ...] = ()
    order: tuple[int, ...] = ()
    by_layer: tuple[tuple[int, ...], ...] = ()

    def with_copies(self, copies: Mapping[LayerKey, Sequence[int]], layers: Sequence[int]) -> Growth:
        """The growth with so many of each entry, itself included, in a layer or in all.

        Args:
            copies: number of the source's layer, or ``ALL`` for every other one, -> how many of each entry.
            layers: of the widened model, the source's layer that each is read from.
        """
        orders = {key: in_turn(counts) for key, counts in copies.items()}
        everywhere = orders.get(ALL, ())
        if orders.keys() <= {ALL}:
            return replace(self, order=everywhere)
        if not layers:
            raise ValueError("layers differ, and it is not known how many there are")
        return replace(self, by_layer=tuple(orders.get(layer, everywhere) for layer in layers))

    def in_layer(self, layer: int) -> Growth:
        """The growth in one layer of the widened model."""
        return replace(self, order=self.by_layer[layer], by_layer=()) if self.by_layer else self

    @cached_property
    def new_sources(self) -> tuple[Span, ...]:
        """The sources of the new entries, in the target's order."""
        if self.by_layer:
            raise ValueError("layers differ: ask for the growth in one of them")
        if self.order:
            return _spans(self.order[self.source :])
        rounds, extra = divmod(self.target - self.source, self.source)
        if not self.originals or not extra:
            spans = [(0, self.source)] * rounds + [(0, extra)] * bool(extra)
            return tuple(spans)
        return _spans(_least_copied(_entries(self.originals), self.target - self.source))

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """The source of every target entry."""
        return (*range(self.source), *_entries(self.new_sources))

    @cached_property
    def copies(self) -> Mapping[int, tuple[int, ...]]:
        """Source entry -> the new entries that are copies of it."""
        found: dict[int, list[int]] = {}
        for target in range(self.source, self.target):
            found.setdefault(self.sources[target], []).append(target)
        return {source: tuple(targets) for source, targets in found.items()}

    @cached_property
    def originals_after(self) -> tuple[Span, ...]:
        """``originals`` of all entries after widening; new entries that are no copies are originals."""
        before = _entries(self.originals) if self.originals else list(range(self.source))
        if self.copied:
            return _spans(before + [before[i] for i in _entries(self.new_sources)])
        first = max(before) + 1
        return _spans(before + list(range(first, first + self.target - self.source)))

    def multiplicities(self) -> tuple[tuple[int, int, int], ...]:
        """``(start, stop, m)``: how often the sources start..stop-1 occur after widening."""
        times = [1] * self.source
        for start, length in self.new_sources:
            for i in range(start, start + length):
                times[i] += 1
        edges = [0, *(i for i in range(1, self.source) if times[i] != times[i - 1]), self.source]
        return tuple((start, stop, times[start]) for start, stop in pairwise(edges))

    @cached_property
    def alpha(self) -> float:
        """The fan-in factor.

        Where all is copied, ``sqrt(sum_j m_j^2 / sum_j M_j^2)``: m_j is how often original j occurs before,
        M_j after. On an axis that never grew that is ``sqrt(d / sum_j M_j^2)``, the general form of Eq.
        16-17, equal to them for d' <= 2d and for every integer factor. Derivation (ours): of independent
        features x_j, the entries that copy one original add up, so ``W x = a * sum_j M_j w_j x_j`` has a
        variance proportional to ``a^2 sum_j M_j^2``, and before it was proportional to ``sum_j m_j^2``; the
        factors of earlier stages are in w on both sides. Over several stages the factors multiply to
        ``sqrt(d / sum_j M_j^2)``: when all M_j are one M that is 1/M, and the original's function is kept.

        ``sqrt(d/d')`` where something is not copied (Eq. 14; App. B for zero).
        """
        if not self.copied:
            return sqrt(self.source / self.target)
        before = Counter(_entries(self.originals)) if self.originals else dict.fromkeys(range(self.source), 1)
        after = Counter(_entries(self.originals_after))
        return sqrt(sum(m * m for m in before.values()) / sum(m * m for m in after.values()))


def in_turn(counts: Sequence[int]) -> tuple[int, ...]:
    """The source of each target entry: all old ones, then a copy of each that has one more, and so on.

    Equal counts give the order of whole factors.
    """
    rounds = range(max(counts))
    return tuple(entry for number in rounds for entry, count in enumerate(counts) if count > number)


def shared_out(load: Sequence[float], total: int) -> tuple[int, ...]:
    """How many of each entry there shall be, so that the largest load of one copy is as small as can be.

    One of each, then one at a time for the entry whose copies have the most each (highest averages, as seats
    are shared out by D'Hondt); the first of equals.

    Args:
        load: of each entry, on any scale.
        total: of all entries together, at least as many as there are.
    """
    counts = [1] * len(load)
    queue = [(-one, entry) for entry, one in enumerate(load)]
    heapify(queue)
    for _ in range(total - len(load)):
        entry = queue[0][1]
        counts[entry] += 1
        heapreplace(queue, (-load[entry] / counts[entry], entry))
    return tuple(counts)


def growth_at(growth: Mapping[str, Growth], template: NameTemplate, name: str) -> Mapping[str, Growth]:
    """The growth as it is in the layer that a tensor of the widened model is of.

    Args:
        growth: axis -> growth.
        template: stands for the tensor.
        name: of the tensor.

    Raises:
        LayoutError: it is none of the template's, and layers differ.
    """
    if not any(grown.by_layer for grown in growth.values()) or LAYERS not in template.axes:
        return growth
    indices = template.indices(name)
    if indices is None:
        raise LayoutError(f"{template.text!r} does not stand for {name!r}, whose layer has copies of its own")
    layer = indices[template.axes.index(LAYERS)]
    return {axis: grown.in_layer(layer) for axis, grown in growth.items()}


def grown_layout(layout: ModelLayout, growth: Mapping[str, Growth]) -> ModelLayout:
    """The layout of the widened model."""
    if LAYERS in growth:
        layout = deeper_layout(layout, growth[LAYERS].order)
    axes = {name: replace(layout.axes[name], size=grown.target) for name, grown in growth.items()}
    return replace(layout, axes={**layout.axes, **axes})


def _entries(spans: Iterable[Span]) -> list[int]:
    return [i for start, length in spans for i in range(start, start + length)]


def _spans(entries: Sequence[int]) -> tuple[Span, ...]:
    edges = [0, *(i for i in range(1, len(entries)) if entries[i] != entries[i - 1] + 1), len(entries)]
    return tuple((entries[start], stop - start) for start, stop in pairwise(edges))


def _least_copied(originals: Sequence[int], count: int) -> list[int]:
    """The next ``count`` entries to copy: one of every original that occurs least often, and so on.

    Of an original's entries the one that has been copied least is taken, then the first.
    """
    entries: dict[int, list[int]] = {}
    for entry, original in enumerate(originals):
        entries.setdefault(original, []).append(entry)
    times = {original: len(found) for original, found in entries.items()}
    copies = [0] * len(originals)
    chosen: list[int] = []
    while len(chosen) < count:
        least = min(times.values())
        level = sorted(
            min(found, key=lambda entry: (copies[entry], entry))
            for original, found in entries.items()
            if times[original] == least
        )
        for entry in level[: count - len(chosen)]:
            chosen.append(entry)
            copies[entry] += 1
            times[originals[entry]] += 1
    return chosen


@dataclass(frozen=True)
class Treatment:
    """Rules for a tensor's new entries and for its fan-in columns.

    ``vocab`` is the fill of new entries of the vocabulary, in whatever tensor, ``layers`` that of new layers
    in a tensor of all of them; ``noisy`` gives noise to the router's new rows.
    """

    fan_out: Fill = Fill.COPY
    fan_in: Fill = Fill.COPY
    scaling: str = "rms"
    vocab: Fill = Fill.MEAN
    layers: Fill = Fill.COPY
    noisy: bool = False

    def alpha(self, growth: Growth) -> float:
        """The factor on every fan-in column.

        1 when scaling is off (``none``), and where the function is kept by new columns of zeros.
        """
        kept = self.scaling == "function" and self.fan_in is Fill.ZERO
        return 1.0 if self.scaling == "none" or kept else growth.alpha

    @property
    def random(self) -> bool:
        """Some new entries are drawn: what has a distribution of its own is told apart."""
        return Fill.RANDOM in (self.fan_out, self.fan_in)

    @property
    def per_column(self) -> bool:
        """Net2Net's 1/multiplicity per column instead of one alpha (copy-copy only)."""
        return self.scaling in ("function", "calibrated") and self.fan_out == self.fan_in == Fill.COPY


def view_of(
    layout: TensorLayout,
    sizes: Mapping[str, int],
    growth: Mapping[str, Growth],
    treatment: Treatment,
    *,
    consumed: frozenset[str] = frozenset(),
) -> View:
    """The view of one tensor: source sizes, target sizes and runs of every view dim.

    Args:
        layout: what the tensor's dims mean.
        sizes: axis sizes before widening.
        growth: the axes that grow.
        treatment: fill and scaling rules.
        consumed: axes whose fan-in factor this elementwise tensor carries (a tied head's final norm,
            App. D.1).
    """
    dims: list[ViewDim] = []
    for index, dim in enumerate(layout.dims):
        for factor in factors(dim.expr):
            runs = _runs(factor, dim, sizes, growth, treatment, consumed, None)
            source = size_of(factor, sizes)
            target = runs[-1].target + runs[-1].length
            dims.append(ViewDim(source, target, runs, index))
    return tuple(dims)


def target_shape(view: View) -> tuple[int, ...]:
    """The storage shape that a view widens to."""
    shape: dict[int, int] = {}
    for dim in view:
        shape[dim.dim] = shape.get(dim.dim, 1) * dim.target
    return tuple(shape[i] for i in sorted(shape))


def source_shape(view: View) -> tuple[int, ...]:
    """The shape that a view widens from; on disk it may be flat, or have dims of one before it."""
    return target_shape(tuple(replace(dim, target=dim.source) for dim in view))


def scale_range(view: View) -> tuple[float, float]:
    """Smallest and largest product of run factors over the entries."""
    low = high = 1.0
    for dim in view:
        scales = [run.scale for run in dim.runs]
        low, high = low * min(scales, default=1.0), high * max(scales, default=1.0)
    return low, high


def fills_on(
    layout: TensorLayout, axis: str, sizes: Mapping[str, int], treatment: Treatment
) -> tuple[frozenset[Fill], frozenset[Fill]]:
    """How new entries of an axis are filled in one tensor: as producer, and as consumer of the axis.

    Empty where the tensor does not produce, or does not consume, the axis. Elementwise tensors do neither.
    """
    produced: set[Fill] = set()
    consumed: set[Fill] = set()
    grown = {axis: Growth(sizes[axis], 2 * sizes[axis])}
    view = view_of(layout, sizes, grown, treatment)
    for index, dim in enumerate(layout.dims):
        found = {Role.OUT: produced, Role.BIAS: produced, Role.IN: consumed}.get(dim.role)
        if found is None or axis not in axis_names(dim.expr):
            continue
        apart = [[(r.new, r.fill, r.shield) for r in d.runs] for d in view if d.dim == index]
        for runs in product(*map(dict.fromkeys, apart)):
            if any(new for new, _, _ in runs):
                shield = any(shield for _, _, shield in runs)
                found.add(Fill.COPY if shield else max(fill for _, fill, _ in runs))
    return frozenset(produced), frozenset(consumed)


def _runs(
    expr: Expr,
    dim: Dim,
    sizes: Mapping[str, int],
    growth: Mapping[str, Growth],
    treatment: Treatment,
    consumed: frozenset[str],
    label: str | None,
) -> tuple[Run, ...]:
    label = expr.label or label
    zeroed = treatment.fan_out is Fill.ZERO and dim.role in (Role.OUT, Role.BIAS)
    if isinstance(expr, (Axis, Fixed)):
        shield = zeroed and label in NONLINEAR_LABELS
        if isinstance(expr, Axis) and expr.name in growth:
            return _grown_runs(expr.name, growth[expr.name], dim, treatment, consumed, shield)
        size = size_of(expr, sizes)
        if isinstance(expr, Axis) and expr.name in PACKINGS and zeroed:
            parts = enumerate(PACKINGS[expr.name])
            return tuple(Run(i, i, 1, shield=part in NONLINEAR_LABELS) for i, part in parts)
        if treatment.random and _apart(expr, dim):
            return tuple(Run(i, i, 1, part=(i,), drawn_as=(i,)) for i in range(size))
        return (Run(0, 0, size, shield=shield),)
    inner = [
        _runs(e, dim, sizes, growth, treatment, consumed, label)
        for e in (expr.factors if isinstance(expr, Product) else expr.parts)
    ]
    terms = expr.factors if isinstance(expr, Product) else expr.parts
    widths = [size_of(e, sizes) for e in terms]
    if isinstance(expr, Sum):
        if treatment.random and dim.role is not Role.IN:
            inner = [
                tuple(replace(r, part=(number, *r.part), drawn_as=(number, *r.drawn_as)) for r in runs)
                for number, runs in enumerate(inner)
            ]
        return _concatenated(inner, widths)
    runs = inner[-1]
    width = widths[-1]
    for outer, outer_width in zip(reversed(inner[:-1]), reversed(widths[:-1]), strict=True):
        runs = flattened(outer, runs, width)
        width *= outer_width
    return runs


def _apart(expr: Axis | Fixed, dim: Dim) -> bool:
    """Entries of this term have distributions of their own: stacked experts, gate and up, q, k and v."""
    if isinstance(expr, Axis):
        return dim.role is Role.STACK or expr.name in PACKINGS
    return expr.size in FUSED and isinstance(dim.expr, Product) and dim.role in (Role.OUT, Role.BIAS)


def _grown_runs(
    name: str,
    growth: Growth,
    dim: Dim,
    treatment: Treatment,
    consumed: frozenset[str],
    shield: bool,
) -> tuple[Run, ...]:
    """Runs of one growing axis: the old entries, then the new ones by their sources."""
    counted = name in COUNTED
    fan_in = not counted and (dim.role is Role.IN or (dim.role is Role.SCALE and name in consumed))
    fill = Fill.COPY
    if counted:
        routes = dim.role is Role.OUT and isinstance(dim.expr, Axis)  # a row of scores for each expert
        copies = Fill.NOISY if treatment.noisy and routes else Fill.COPY
        fill = {"vocab": treatment.vocab, LAYERS: treatment.layers}.get(name, copies)
    elif dim.role is Role.IN:
        fill = treatment.fan_in
    elif dim.role in (Role.OUT, Role.BIAS):
        fill = Fill.COPY if shield else treatment.fan_out
    spans = [(0, growth.source, treatment.alpha(growth) if fan_in else 1.0)]
    if fan_in and treatment.per_column:
        spans = [(start, stop, 1.0 / m) for start, stop, m in growth.multiplicities()]
    runs: list[Run] = []
    at = 0
    for first, length in ((0, growth.source), *growth.new_sources):
        new = at >= growth.source
        for start, stop, scale in spans:
            low, high = max(start, first), min(stop, first + length)
            if low < high:
                runs.append(Run(at, low, high - low, new, scale, fill if new else Fill.COPY, shield))
                at += high - low
    if treatment.random and dim.role is Role.STACK:  # a copied expert is one as a whole, random entries too
        ones = ((run, i) for run in runs for i in range(run.length))
        return tuple(
            replace(r, target=t, source=s, length=1, part=(t,), drawn_as=(s,))
            for r, i in ones
            for t, s in [(r.target + i, r.source + i)]
        )
    return tuple(runs)


def _concatenated(parts: list[tuple[Run, ...]], widths: list[int]) -> tuple[Run, ...]:
    runs: list[Run] = []
    source = target = 0
    for part, width in zip(parts, widths, strict=True):
        runs += [replace(r, target=r.target + target, source=r.source + source) for r in part]
        source += width
        target += part[-1].target + part[-1].length
    return _merged(runs)


def flattened(outer: tuple[Run, ...], inner: tuple[Run, ...], width: int) -> tuple[Run, ...]:
    """Row-major product of runs; ``width`` is the inner source size."""
    target_width = inner[-1].target + inner[-1].length
    if inner == (Run(0, 0, width),):
        return tuple(
            replace(r, target=r.target * width, source=r.source * width, length=r.length * width)
            for r in outer
        )
    runs = [
        Run(
            target=(o.target + i) * target_width + r.target,
            source=(o.source + i) * width + r.source,
            length=r.length,
            new=o.new or r.new,
            scale=o.scale * r.scale,
            fill=max(o.fill, r.fill) if not (o.shield or r.shield) else Fill.COPY,
            shield=o.shield or r.shield,
            part=o.part + r.part,
            drawn_as=o.drawn_as + r.drawn_as,
        )
        for o in outer
        for i in range(o.length)
        for r in inner
    ]
    return _merged(runs)


def _merged(runs: list[Run]) -> tuple[Run, ...]:
    """Join neighbours that continue each other."""
    merged = [runs[0]]
    for run in runs[1:]:
        last = merged[-1]
        continues = replace(last, target=run.target, source=run.source, length=run.length) == run
        if continues and last.source + last.length == run.source:
            merged[-1] = replace(last, length=last.length + run.length)
        else:
            merged.append(run)
    return tuple(merged)
