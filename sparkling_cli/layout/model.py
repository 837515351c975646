"""A whole model's layout: which tensor has which dims, which axes may grow, and what follows.

It is made by inference, by a layout file, or by a file in the package; everything after it (plan,
execution, verification, training) knows the architecture from here alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import frexp, ldexp, prod, sqrt
from typing import Annotated, ClassVar

from pydantic import AfterValidator, ConfigDict, Field, GetPydanticSchema, PlainSerializer

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import PACKINGS, TensorLayout, axis_names, size_of
from sparkling_cli.layout.names import NameTemplate, skeleton, skeletons
from sparkling_cli.layout.parse import parse_expr, parse_layout

#: how a layout file is read
_STRICT = ConfigDict(extra="forbid", strict=True)


@dataclass(frozen=True)
class AxisInfo:
    """One axis: its size, whether it may be widened, and with which others.

    Attributes:
        size: entries now.
        widenable: proved (or declared by a layout file) to be safe to widen.
        reason: why it cannot be widened, or how it was proved.
        joint: axes that must grow by the same factor (hidden coupled to heads).
        multiple_of: its size must stay a multiple of this.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    size: Annotated[int, Field(ge=1)]
    widenable: bool = False
    reason: str = ""
    joint: tuple[str, ...] = ()
    multiple_of: Annotated[int, Field(ge=1)] = 1


@dataclass(frozen=True)
class Compensation:
    """A factor on one tensor that follows from widening ``axis`` (App. D.1 and the like).

    The factor is ``(d'/d)**power``, and, if ``fan_in``, also the axis's fan-in factor, entry by entry:
    for a tied head the final norm carries what the shared matrix cannot. ``offset`` is 1 for norms that
    compute ``(1 + w)``: the tensor becomes ``c (w + offset) - offset``. With ``config`` set, the factor
    goes into that config number instead of a tensor. ``rounded`` is for classes that keep ``sqrt(d)`` in
    bfloat16, whatever the model's dtype: the factor is then ``(R(sqrt(d')) / R(sqrt(d)))**(2 power)``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    axis: str
    tensor: str = ""
    config: str = ""
    fan_in: bool = False
    power: float = 0.0
    offset: float = 0.0
    rounded: bool = False

    def scale(self, before: int, after: int) -> float:
        """The factor when the axis grows, without its fan-in factor."""
        if not self.rounded:
            return float((after / before) ** self.power)
        return float((_bfloat16(sqrt(after)) / _bfloat16(sqrt(before))) ** (2 * self.power))


def _bfloat16(number: float) -> float:
    """The nearest number with eight significant bits, the even one of two."""
    mantissa, exponent = frexp(number)
    return ldexp(round(ldexp(mantissa, 8)), exponent - 8)


@dataclass(frozen=True)
class TensorPattern:
    """A name template and the layout of every tensor that it stands for."""

    name: str
    layout: str

    @cached_property
    def template(self) -> NameTemplate:
        """The parsed name."""
        return NameTemplate(self.name)

    @cached_property
    def dims(self) -> TensorLayout:
        """The parsed layout."""
        return parse_layout(self.layout)

    @cached_property
    def axes(self) -> frozenset[str]:
        """Axes in the name and in the layout."""
        return frozenset(self.template.axes) | self.dims.axes()


def _from_table(table: dict[str, str]) -> tuple[TensorPattern, ...]:
    return tuple(TensorPattern(*item) for item in table.items())


def _to_table(patterns: Iterable[TensorPattern]) -> dict[str, str]:
    return {pattern.name: pattern.layout for pattern in patterns}


#: in a file patterns are a table: name template -> layout
_TABLE = GetPydanticSchema(
    lambda _source, handler: handler(
        Annotated[dict[str, str], AfterValidator(_from_table), PlainSerializer(_to_table)]
    )
)


def entries_of(pattern: TensorPattern, sizes: Mapping[str, int]) -> int:
    """Entries of all tensors that a pattern stands for, under the given axis sizes.

    Raises:
        LayoutError: an axis has no size.
    """
    entries = prod(pattern.dims.shape(sizes))
    for axis, only in pattern.template.placeholders:
        if only is None and axis not in sizes:
            raise LayoutError(f"axis {axis!r} in the name {pattern.name!r} has no size")
        entries *= sizes[axis] if only is None else len(only)
    return entries


class PatternTable:
    """Finds the one pattern for a name; 40,000 names that are asked for together cost a lookup each."""

    def __init__(self, patterns: Iterable[TensorPattern]) -> None:
        self.patterns = tuple(patterns)
        self._by_key: dict[str, list[TensorPattern]] = {}
        for pattern in self.patterns:
            self._by_key.setdefault(pattern.template.key, []).append(pattern)
        self._known: dict[str, list[TensorPattern]] = {}

    @cached_property
    def _only(self) -> dict[str, TensorPattern]:
        """Skeleton -> the pattern that stands for all names of it."""
        return {key: one[0] for key, one in self._by_key.items() if len(one) == 1 and one[0].template.free}

    def _standing_for(self, name: str) -> list[TensorPattern]:
        """All patterns that stand for ``name``; every name is looked at once."""
        found = self._known.get(name)
        if found is None:
            key = skeleton(name)
            only = None if "*" in name else self._only.get(key)
            if only is not None:
                found = [only]
            else:
                found = [p for p in self._by_key.get(key, ()) if p.template.matches(name)]
            self._known[name] = found
        return found

    def has(self, name: str) -> bool:
        """Whether any pattern stands for ``name``."""
        return bool(self._standing_for(name))

    def find(self, name: str) -> TensorPattern:
        """The pattern that stands for ``name``.

        Raises:
            LayoutError: none does, or more than one.
        """
        found = self._standing_for(name)
        if len(found) == 1:
            return found[0]
        if found:
            both = ", ".join(repr(p.name) for p in found)
            raise LayoutError(f"tensor {name!r} matches {len(found)} patterns of the layout: {both}")
        raise LayoutError(
            f"tensor {name!r} matches no pattern of the layout",
            hint="print the layout with `sparkling layout CKPT`, add the tensor, pass it by --layout",
        )

    def look_up(self, names: Sequence[str]) -> list[TensorPattern | None]:
        """The patterns that stand for ``names``, in their order; None where not exactly one does."""
        keys = skeletons(names)
        found = list(map(self._only.get, keys))
        if all(found) and "*" not in "".join(names):  # most often; there may be 40,000 of them
            return found
        for i, (name, key) in enumerate(zip(names, keys, strict=True)):
            if (found[i] is None and key in self._by_key) or "*" in name:
                all_of_them = self._standing_for(name)
                found[i] = all_of_them[0] if len(all_of_them) == 1 else None
        return found

    def find_all(self, names: Sequence[str]) -> list[TensorPattern]:
        """The patterns that stand for ``names``, in their order.

        Raises:
            LayoutError: see :meth:`find`.
        """
        found = self.look_up(names)
        return [pattern or self.find(name) for name, pattern in zip(names, found, strict=True)]


@dataclass(frozen=True)
class ModelLayout:
    """Layouts of all tensors of a model, in the module and on disk.

    Attributes:
        name: the model's class, or the layout file's own name.
        axes: every named axis.
        tensors: patterns under the module's names; optimizer state follows these.
        disk: patterns under the names on disk, where they differ from the module's.
        config: config key (dotted for nested) -> term that gives its value, e.g. ``(kv_heads q_per_kv)``.
        compensations: factors that follow from widening.
        tied: groups of module names that share one storage; all have the first one's layout.
        assembly: module name template -> templates on disk that it is made of, where they differ. Axes
            that only the names on disk have are stacked in front; several templates are concatenated,
            in order, along the dim behind those.
        aliases: other names for an axis that users may say (``expert_ffn`` -> ``ffn``).
        notes: what a reader of the layout should know.
        ordered: ``tensors`` stand in the order in which the module registers its parameters, and of these
            a trainer decays exactly those with more than one dim.
        buffers: patterns of ``tensors`` that are saved with the weights and are no parameters.
        divisible: pairs of terms; the class wants the first one's size to be a multiple of the second one's.
        ignored: regular expressions of names that the class leaves aside when it loads a checkpoint.
        silent: names of a layer's tensors, in the module and on disk, with ``*`` for every number or for the
            layer's alone, and the number in all their entries with which the layer adds nothing: output
            projections and their biases, or the scales of norms behind them.
        numbered: what a layer is depends on its number, so new ones can only stand behind the others.
    """

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    name: str
    axes: Mapping[str, AxisInfo]
    tensors: Annotated[tuple[TensorPattern, ...], _TABLE]
    disk: Annotated[tuple[TensorPattern, ...], _TABLE] | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    compensations: Annotated[tuple[Compensation, ...], Field(alias="compensate")] = ()
    tied: tuple[tuple[str, ...], ...] = ()
    assembly: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    ordered: bool = False
    buffers: tuple[str, ...] = ()
    divisible: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    silent: Mapping[str, float] = field(default_factory=dict)
    numbered: bool = False

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} {axis.size}" for name, axis in self.axes.items() if axis.widenable)
        return f"ModelLayout({self.name}: {sizes})"

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Axis sizes before widening."""
        return {name: info.size for name, info in self.axes.items()}

    @cached_property
    def module_table(self) -> PatternTable:
        """Patterns under module names."""
        return PatternTable(self.tensors)

    @cached_property
    def disk_table(self) -> PatternTable:
        """Patterns under on-disk names."""
        return self.module_table if self.disk is None else PatternTable(self.disk)

    @cached_property
    def _canonical(self) -> dict[str, str]:
        return {name: group[0] for group in self.tied for name in group[1:]}

    def canonical(self, name: str) -> str:
        """The name whose layout holds for a tied tensor; other names are returned as they are."""
        return self._canonical.get(name, name)

    def has(self, name: str) -> bool:
        """Whether a tensor, by its name in the module or on disk, has a pattern."""
        own = self.canonical(name)
        return self.disk_table.has(own) or self.module_table.has(own)

    def carries(self, axes: Iterable[str]) -> bool:
        """Whether some tensor's entries carry a factor when these axes grow, fan-in factors aside."""
        grown = set(axes)
        return any(item.power and item.tensor and item.axis in grown for item in self.compensations)

    def carried(self, name: str, before: Mapping[str, int], after: Mapping[str, int]) -> float:
        """The factor that a tensor's entries carry for axes that have grown, fan-in factors aside.

        Args:
            name: of the tensor.
            before: sizes of the axes.
            after: their sizes now.
        """
        return prod(
            item.scale(before[item.axis], after[item.axis])
            for item in self.compensations
            if item.power and item.tensor and NameTemplate(item.tensor).matches(name)
        )

    def canonical_names(self, names: Iterable[str]) -> list[str]:
        """The same of many names."""
        known = self._canonical
        return [known.get(name, name) for name in names] if known else list(names)

    def shape_of(self, pattern: TensorPattern) -> tuple[int, ...]:
        """The shape that a pattern says."""
        found = self._shapes.get(pattern.layout)
        if found is None:
            found = self._shapes[pattern.layout] = pattern.dims.shape(self.sizes)
        return found

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {}

    def check_one(self, name: str, pattern: TensorPattern, shape: tuple[int, ...]) -> None:
        """The tensor has the shape that its layout says.

        Raises:
            LayoutError: with the pattern, the shape and the sizes involved.
        """
        expected = self.shape_of(pattern)
        if expected != tuple(shape):
            axes = sorted(pattern.dims.axes())
            sizes = ", ".join(f"{axis} = {self.sizes[axis]}" for axis in axes if axis in self.sizes)
            raise LayoutError(
                f"tensor {name!r} has shape {tuple(shape)}, its layout says {expected}\n"
                f"    {pattern.name}: {pattern.layout}\n    {sizes}"
            )

    def renamed(self, named: Callable[[str], str]) -> ModelLayout:
        """The layout with other name templates in place of its own."""

        def patterns(found: Iterable[TensorPattern]) -> tuple[TensorPattern, ...]:
            return tuple(replace(pattern, name=named(pattern.name)) for pattern in found)

        return replace(
            self,
            tensors=patterns(self.tensors),
            disk=None if self.disk is None else patterns(self.disk),
            compensations=tuple(replace(item, tensor=named(item.tensor)) for item in self.compensations),
            assembly={named(whole): tuple(map(named, parts)) for whole, parts in self.assembly.items()},
            buffers=tuple(map(named, self.buffers)),
        )

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the module, tied ones once.

        Of an ``ordered`` layout in the order of the module's ``named_parameters()``: layer by layer, what
        stands under one prefix together, in the order of the patterns.
        """
        ranks: dict[tuple[str, ...], int] = {}
        found: dict[str, tuple[tuple[int, ...], TensorPattern]] = {}
        for pattern in self.tensors:
            if pattern.name in self.buffers:
                continue
            for name in pattern.template.names(self.sizes):
                if self.canonical(name) != name:
                    continue
                parts = skeleton(name).split(".")
                key: list[int] = []
                for depth, (part, own) in enumerate(zip(parts, name.split("."), strict=True)):
                    rank = ranks.setdefault(tuple(parts[: depth + 1]), len(ranks))
                    key += [rank, int(own) if part == "*" else 0]
                found[name] = tuple(key), pattern
        return {name: self.shape_of(found[name][1]) for name in sorted(found, key=lambda n: found[n][0])}

    def config_sizes(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The value of every config key in ``config`` under the given axis sizes."""
        return {key: size_of(parse_expr(text), sizes) for key, text in self.config.items()}

    def check_axes(self) -> None:
        """Every axis that a term uses is declared.

        Raises:
            LayoutError: names the first axis that is not, and where it is used.
        """
        known = set(self.axes) | set(PACKINGS)
        for pattern in (*self.tensors, *(self.disk or ())):
            for axis in pattern.dims.axes() - known:
                raise LayoutError(
                    f"axis {axis!r} in the layout of {pattern.name!r} is not declared: {pattern.layout}"
                )
        terms = [(f"the config key {key!r}", text) for key, text in self.config.items()]
        terms += [("divisible", text) for pair in self.divisible for text in pair]
        for where, text in terms:
            for axis in set(axis_names(parse_expr(text))) - known:
                raise LayoutError(f"axis {axis!r} in {where} is not declared: {text}")

    def check_shapes(
        self, shapes: Mapping[str, tuple[int, ...]], *, on_disk: bool, complete: bool = True
    ) -> list[TensorPattern]:
        """Every tensor has one pattern and the shape that it says; every pattern has a tensor.

        Args:
            shapes: name -> shape, as found.
            on_disk: whether the names are on-disk names.
            complete: whether a pattern without a tensor is an error.

        Returns:
            The pattern of every tensor.

        Raises:
            LayoutError: with the pattern, the shape and the sizes involved.
        """
        table = self.disk_table if on_disk else self.module_table
        found = table.find_all(self.canonical_names(shapes))
        patterns = dict(zip(map(id, found), found, strict=True))
        kinds = set(zip(map(id, found), shapes.values(), strict=True))  # some dozens, of 40,000 tensors
        if any(shape != self.shape_of(patterns[number]) for number, shape in kinds):
            for (name, shape), pattern in zip(shapes.items(), found, strict=True):
                self.check_one(name, pattern, shape)
        used = {pattern.name for pattern in found}
        followers = [n for group in self.tied for n in group[1:]]
        unused = [
            p.name
            for p in table.patterns
            if p.name not in used and not any(p.template.matches(n) for n in followers)
        ]
        if complete and unused:
            raise LayoutError(
                f"{len(unused)} pattern(s) of the layout match no tensor, the first: {unused[0]!r}",
                hint="a shard may be missing, or the layout is for another model",
            )
        return found
