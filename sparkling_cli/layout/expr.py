"""Terms of the layout language: axes, flattened products, concatenated parts.

``(a b)`` flattens row-major, ``(x:a + y:b)`` concatenates labelled parts, an integer is an anonymous
axis that nothing happens to. A *packing* is an axis whose entries have names of their own, such as
``gate_up`` (0 = gate, 1 = up).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from math import prod

from sparkling_cli.errors import LayoutError

#: Axes of fixed size whose entries are named; the order is the storage order.
PACKINGS: Mapping[str, tuple[str, ...]] = {
    "gate_up": ("gate", "up"),
    "up_gate": ("up", "gate"),
    "qkv": ("q", "k", "v"),
    "kv": ("k", "v"),
}

#: Axes whose entries are looked up or chosen one by one and never summed over: no factor follows from their
#: growth, and new entries have a rule of their own.
COUNTED = frozenset({"vocab", "experts", "experts_per_token", "layers"})
#: Of these, axes that are no dim of any tensor: copies along them get gradients of their own.
UNSHAPED = frozenset({"experts_per_token", "layers"})

#: Parts through which the consumer's input is *not* linear. Zero fill leaves them copied: a product of
#: two zero factors has a zero gradient in both, for ever (method, the trap of the gated MLP).
NONLINEAR_LABELS = frozenset({"gate", "q", "k"})


class Role(str, Enum):
    """What a dim does in its tensor."""

    OUT = "out"
    """fan-out: the tensor produces this axis"""
    IN = "in"
    """fan-in: the tensor consumes this axis"""
    SCALE = "scale"
    """elementwise on the axis: norm scales and shifts, convolution channels"""
    BIAS = "bias"
    """elementwise, follows the fan-out rule of the linear layer that it belongs to"""
    STACK = "stack"
    """independent copies of the tensor, stacked"""


@dataclass(frozen=True)
class Axis:
    """A named axis."""

    name: str
    label: str | None = None

    def __str__(self) -> str:
        return _labelled(self.label, self.name)


@dataclass(frozen=True)
class Fixed:
    """An anonymous axis of a fixed size."""

    size: int
    label: str | None = None

    def __str__(self) -> str:
        return _labelled(self.label, str(self.size))


@dataclass(frozen=True)
class Product:
    """Several axes flattened row-major into one dim."""

    factors: tuple[Expr, ...]
    label: str | None = None

    def __str__(self) -> str:
        return _labelled(self.label, "(" + " ".join(map(str, self.factors)) + ")")


@dataclass(frozen=True)
class Sum:
    """Several parts concatenated along one dim."""

    parts: tuple[Expr, ...]
    label: str | None = None

    def __str__(self) -> str:
        return _labelled(self.label, "(" + " + ".join(map(str, self.parts)) + ")")


Expr = Axis | Fixed | Product | Sum


def _labelled(label: str | None, text: str) -> str:
    return text if label is None else f"{label}:{text}"


@dataclass(frozen=True)
class Dim:
    """One storage dim of a tensor: its meaning and its role."""

    expr: Expr
    role: Role


@dataclass(frozen=True)
class TensorLayout:
    """The dims of one tensor in storage order; ``text`` is what was parsed."""

    dims: tuple[Dim, ...]
    text: str

    @classmethod
    def of(cls, dims: Iterable[Dim]) -> TensorLayout:
        """The layout that has these dims."""
        found = tuple(dims)
        return cls(found, _rendered(found))

    def with_terms(self, terms: Mapping[int, Expr]) -> TensorLayout:
        """The layout with other terms for some dims."""
        return self.of(replace(dim, expr=terms.get(i, dim.expr)) for i, dim in enumerate(self.dims))

    def axes(self) -> frozenset[str]:
        """Names of all axes (packings included) in any dim."""
        return frozenset(name for dim in self.dims for name in axis_names(dim.expr))

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The tensor's shape under the given axis sizes."""
        return tuple(size_of(dim.expr, sizes) for dim in self.dims)


def _rendered(dims: Sequence[Dim]) -> str:
    """The text of a layout's dims; the inverse of parsing."""
    stack = [str(d.expr) for d in dims if d.role is Role.STACK]
    rest = [d for d in dims if d.role is not Role.STACK]
    prefix = " ".join(stack) + " | " if stack else ""
    roles = [d.role for d in rest]
    if Role.IN in roles and Role.OUT in roles:
        first = roles[0]
        split = next(i for i, r in enumerate(roles) if r is not first)
        left = " ".join(str(d.expr) for d in rest[:split])
        right = " ".join(str(d.expr) for d in rest[split:])
        return f"{prefix}{left} {'->' if first is Role.IN else '<-'} {right}"
    if not rest:
        return ""
    word = "bias" if roles[0] is Role.BIAS else "scale"
    return f"{prefix}{word} " + " ".join(str(d.expr) for d in rest)


def atoms(expr: Expr) -> Iterator[Axis | Fixed]:
    """All axes of a term, anonymous ones included, from left to right."""
    if isinstance(expr, Product):
        for factor in expr.factors:
            yield from atoms(factor)
    elif isinstance(expr, Sum):
        for part in expr.parts:
            yield from atoms(part)
    else:
        yield expr


def with_atoms(expr: Expr, change: Callable[[Axis | Fixed], Expr]) -> Expr:
    """A term of the same form with other axes."""
    if isinstance(expr, Product):
        return replace(expr, factors=tuple(with_atoms(factor, change) for factor in expr.factors))
    if isinstance(expr, Sum):
        return replace(expr, parts=tuple(with_atoms(part, change) for part in expr.parts))
    return change(expr)


def axis_names(expr: Expr) -> Iterator[str]:
    """All axis names in a term, from left to right, repeats included."""
    return (atom.name for atom in atoms(expr) if isinstance(atom, Axis))


def factors(expr: Expr) -> tuple[Expr, ...]:
    """A term split at its outermost products; a labelled product hands its label to every factor."""
    if not isinstance(expr, Product):
        return (expr,)
    found: list[Expr] = []
    for factor in expr.factors:
        handed = factor if factor.label or not expr.label else replace(factor, label=expr.label)
        found.extend(factors(handed))
    return tuple(found)


def size_of(expr: Expr, sizes: Mapping[str, int]) -> int:
    """Number of entries of a term.

    Raises:
        LayoutError: an axis has no size.
    """
    if isinstance(expr, Fixed):
        return expr.size
    if isinstance(expr, Axis):
        if expr.name in PACKINGS:
            return len(PACKINGS[expr.name])
        if expr.name not in sizes:
            known = ", ".join(sorted(sizes)) or "none"
            raise LayoutError(f"axis {expr.name!r} has no size (axes with a size: {known})")
        return sizes[expr.name]
    if isinstance(expr, Product):
        return prod(size_of(factor, sizes) for factor in expr.factors)
    return sum(size_of(part, sizes) for part in expr.parts)


def solved(
    expr: Expr, value: int, sizes: Mapping[str, int], free: Callable[[Axis | Fixed], bool]
) -> int | None:
    """What the one free axis in a term must be for the term to have ``value`` entries; None if nothing fits.

    Raises:
        LayoutError: an axis that is not free has no size.
    """
    if isinstance(expr, (Axis, Fixed)):
        return value if value >= 1 and free(expr) else None
    inner = expr.factors if isinstance(expr, Product) else expr.parts
    opened = [term for term in inner if any(map(free, atoms(term)))]
    if len(opened) != 1:
        return None
    others = [size_of(term, sizes) for term in inner if term is not opened[0]]
    left, odd = divmod(value, prod(others)) if isinstance(expr, Product) else (value - sum(others), 0)
    return None if odd else solved(opened[0], left, sizes, free)
