"""Layout files that leave sizes open: the checkpoint's own shapes and config numbers close them.

A family's file says what the dims mean; how large they are is the checkpoint's business. In such a file

- an axis without ``size`` is solved: every tensor dim and every config number gives one equation, e.g.
  ``(kv_heads q_per_kv head_dim) = 512``;
- a name that ends in ``?`` (tensor, config key) may be missing from the checkpoint;
- a ``*`` in a config key stands for every key or index there is at its place;
- a config key that ends in ``+`` is implied when it is missing (``head_dim`` = hidden / heads): it is
  written once something grows;
- ``classes`` says which classes of transformers a file is for: ``model_type`` -> name, which becomes the
  layout's; such a file knows every config key of a width that the checkpoint has;
- in a class's file a name occurs in all layers or in none, unless the file says ``mixed_layers``;
- ``requires`` lists config values that a checkpoint of this family has (of a list, any), where it has the
  key at all (and it has to, where the key ends in ``!``); the value ``"none"`` says that the key is not set;
- an axis grows where its ``where`` holds: config key -> the values (``"false or none"``: or it is not set);
- ``silent_if`` has, for such values of a config key, the tensors that make a new layer silent;
- names in one group of ``tied`` whose layouts differ may be tied or not: they are if only one of them is
  stored, or if what is stored is the same. Tied ones have the layout of the table that is looked up in, and
  ``compensate`` with ``fan_in`` holds for them only. ``ties`` names the config key that must agree, with
  what holds where it is missing.

What comes out is an ordinary layout in which every tensor has been checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import (
    PACKINGS,
    Axis,
    Expr,
    Fixed,
    Product,
    Role,
    atoms,
    axis_names,
    size_of,
    solved,
)
from sparkling_cli.layout.file import from_dict
from sparkling_cli.layout.keys import lookup
from sparkling_cli.layout.model import ModelLayout, TensorPattern
from sparkling_cli.layout.parse import parse_expr, parse_layout
from sparkling_cli.layout.presence import (
    Indices,
    NamesDifferError,
    Shapes,
    assembled,
    axes_in,
    by_config,
    check_sizes,
    indices_of,
    narrowed,
    present,
    present_numbers,
    required,
)

#: Tables and keys that only such files have.
_OPEN = frozenset({"requires", "classes", "ties", "mixed_layers", "silent_if"})


@dataclass(frozen=True)
class Equation:
    """A term has a value; ``origin`` says where it stands."""

    term: Expr
    value: int
    origin: str


def is_open(data: Mapping[str, Any]) -> bool:
    """Whether a parsed file leaves something to the checkpoint: a size, or whether a name occurs."""
    return _with_placeholders(data) != data


def solve_layout(
    data: Mapping[str, Any],
    weights: Shapes,
    states: Shapes,
    config: Mapping[str, Any] | None,
    where: str,
    *,
    alike: Callable[[str, str], bool] = lambda one, other: False,
    sizing: Iterable[str] = (),
) -> ModelLayout:
    """The layout of a checkpoint from a file that leaves sizes open.

    Args:
        data: the parsed TOML.
        weights: weight name on disk -> shape.
        states: parameter name in the module -> shape of its state; empty without optimizer state.
        config: the checkpoint's own numbers.
        where: the file, for messages.
        alike: whether two weights hold the same values.
        sizing: config keys whose numbers size something, which a file of a class must know.

    Raises:
        NamesDifferError: a tensor has no pattern, a pattern has no tensor, a config key is missing or
            unknown.
        LayoutError: a size cannot be solved, or a tensor or number contradicts the others.
    """
    from_dict(_with_placeholders(data), where)  # its own errors first
    check_sizes(data, sizing, where)
    data = _with_ties(required(data, config or {}, where), weights, config or {}, where, alike)
    data = by_config(data, config or {})
    classes = data.pop("classes", None)
    if classes:
        data["name"] = classes[(config or {})["model_type"]]
    on_disk = "disk" if data.get("disk") is not None else "tensors"
    table, named = present(data[on_disk], weights, where)
    tables, stated = {on_disk: table}, dict[str, TensorPattern]()
    if on_disk == "disk":
        there = assembled(data, table)
        tables["tensors"], stated = present(
            data["tensors"], states, where, complete=bool(states), known=there
        )
    numbers = present_numbers(data.get("config", {}), config or {}, axes_in(tables.values()), where)
    equations = [
        *_config_equations(numbers, config or {}),
        *_tensor_equations(named, weights),
        *_tensor_equations(stated, states),
    ]
    known = {name: axis["size"] for name, axis in data["axes"].items() if "size" in axis}
    indices = indices_of(named)
    if classes and not data.pop("mixed_layers", False):
        _check_layers(indices, where)
    indices = {**indices_of(stated), **indices}
    counts = _counts(indices)
    sizes = solve_sizes(equations, {**known, **counts})
    layout = from_dict(_closed(data, tables, numbers, sizes, where), where)
    # patterns stand for the layers that they occur in only
    parts = layout.assembly
    layout = layout.renamed(lambda name: narrowed(name, indices, parts.get(name, ()), counts))
    layout.check_shapes(weights, on_disk=True)
    if states:
        layout.check_shapes(states, on_disk=False, complete=False)
    for equation in equations:
        if size_of(equation.term, layout.sizes) != equation.value:
            raise LayoutError(f"{where}: {_contradiction(equation, layout.sizes)}")
    return layout


def solve_sizes(equations: Iterable[Equation], known: Mapping[str, int]) -> dict[str, int]:
    """Axis sizes that follow from the equations, one unknown at a time.

    Raises:
        LayoutError: an equation has no whole positive solution.
    """
    sizes = dict(known)

    def unknown(atom: Axis | Fixed) -> bool:
        return isinstance(atom, Axis) and atom.name not in PACKINGS and atom.name not in sizes

    left = list(equations)
    while left:
        left = [*left, *_quotients(left, sizes)]
        before = len(sizes)
        unsolved = []
        for equation in left:
            axes = [a.name for a in atoms(equation.term) if isinstance(a, Axis) and unknown(a)]
            if len(axes) > 1:
                unsolved.append(equation)
            elif axes:
                size = solved(equation.term, equation.value, sizes, unknown)
                if size is None:
                    raise LayoutError(_contradiction(equation, sizes))
                sizes[axes[0]] = size
        if len(sizes) == before:
            break
        left = unsolved
    return sizes


def _quotients(equations: Iterable[Equation], sizes: Mapping[str, int]) -> list[Equation]:
    """``(a b c) = 48`` and ``(a b) = 16`` together say ``c = 3``: products divided by products in them."""
    products: dict[tuple[str, ...], Equation] = {}
    for equation in equations:
        factors = _unknown_factors(equation, sizes)
        if factors is not None:
            products.setdefault(factors[0], Equation(equation.term, factors[1], equation.origin))
    found = []
    for large, whole in products.items():
        for small, part in products.items():
            rest = Counter(large) - Counter(small)
            if len(small) + sum(rest.values()) != len(large) or not rest:
                continue
            if part.value < 1 or whole.value % part.value:
                continue
            names = tuple(sorted(rest.elements()))
            if names not in products:
                origin = f"{whole.origin}, with {part.origin},"
                found.append(Equation(Product(tuple(map(Axis, names))), whole.value // part.value, origin))
    return found


def _unknown_factors(equation: Equation, sizes: Mapping[str, int]) -> tuple[tuple[str, ...], int] | None:
    """The axes without a size in a pure product, and its value divided by the others."""
    terms = equation.term.factors if isinstance(equation.term, Product) else (equation.term,)
    unknown = [t.name for t in terms if isinstance(t, Axis) and t.name not in (*PACKINGS, *sizes)]
    known = [t for t in terms if not (isinstance(t, Axis) and t.name in unknown)]
    if any(name not in PACKINGS and name not in sizes for t in known for name in axis_names(t)):
        return None
    divisor = prod(size_of(t, sizes) for t in known)
    if not unknown or divisor < 1 or equation.value % divisor:
        return None
    return tuple(sorted(unknown)), equation.value // divisor


def _contradiction(equation: Equation, sizes: Mapping[str, int]) -> str:
    named = ", ".join(f"{n} = {sizes[n]}" for n in dict.fromkeys(axis_names(equation.term)) if n in sizes)
    return f"{equation.origin} says {equation.term} = {equation.value}, which does not fit {named or 'it'}"


def _with_placeholders(data: Mapping[str, Any]) -> dict[str, Any]:
    """The file with a size for every axis and without question marks, to be checked for form."""
    plain = dict(data)
    axes = plain.get("axes")
    if isinstance(axes, Mapping):
        plain["axes"] = {
            name: {"size": 1, **{k: v for k, v in axis.items() if k != "where"}}
            if isinstance(axis, Mapping)
            else axis
            for name, axis in axes.items()
        }
    for table in ("tensors", "disk", "config"):
        if isinstance(plain.get(table), Mapping):
            plain[table] = {str(name).rstrip("?+"): text for name, text in plain[table].items()}
    return {key: value for key, value in plain.items() if key not in _OPEN}


def _with_ties(
    data: dict[str, Any],
    weights: Shapes,
    config: Mapping[str, Any],
    where: str,
    alike: Callable[[str, str], bool],
) -> dict[str, Any]:
    """The file with every group of ``tied`` tied or not, as the checkpoint has it.

    Raises:
        NamesDifferError: the config says otherwise than the tensors.
    """
    tables = {t: dict(data[t]) for t in ("tensors", "disk") if data.get(t) is not None}
    groups = []
    for group in data.get("tied", ()):
        texts = {name: text for t in tables.values() for name, text in t.items() if name in group}
        stored = [name for name in group if name in weights]
        if len(set(texts.values())) > 1:  # else the file is for tied ones only
            tied = all(alike(stored[0], name) for name in stored[1:]) if stored else False
            for key, usual in data.get("ties", {}).items():
                found = lookup(config, key)
                if (usual if found is None else found) is not tied:
                    raise NamesDifferError(
                        f"{where}: {' and '.join(group)} are not as the config's {key} says"
                    )
            if not tied:
                continue
            # the embedding's layout: its first dim is looked up in
            shared = min(texts.values(), key=lambda text: parse_layout(text).dims[0].role is not Role.IN)
            # of tied names one has state; there may be a table for weights, which are stored once or twice
            absent = {key: set(group) - set(stored) for key in tables} | (
                {"tensors": set(group)} if "disk" in tables else {}
            )
            tables = {
                key: {
                    f"{name}?" if name in absent[key] else name: shared if name in group else text
                    for name, text in table.items()
                }
                for key, table in tables.items()
            }
        groups.append(group)
    factors = [c for c in data.get("compensate", ()) if groups or not c.get("fan_in", False)]
    left = {key: value for key, value in data.items() if key not in ("tied", "ties", "compensate")}
    return {**left, **tables, "tied": groups, "compensate": factors}


def _config_equations(numbers: Mapping[str, str], config: Mapping[str, Any]) -> Iterable[Equation]:
    for key, text in numbers.items():
        if isinstance(lookup(config, key), int):
            yield Equation(parse_expr(text), int(lookup(config, key)), f"the config's {key}")


def _tensor_equations(patterns: Mapping[str, TensorPattern], shapes: Shapes) -> Iterable[Equation]:
    seen = set()
    for name, pattern in patterns.items():
        shape = shapes[name]
        if (pattern.name, shape) in seen:
            continue
        seen.add((pattern.name, shape))
        dims = pattern.dims.dims
        if len(dims) != len(shape):
            raise LayoutError(
                f"tensor {name!r} has shape {shape}; its layout has {len(dims)} dims: {pattern.layout}"
            )
        for index, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            yield Equation(dim.expr, size, f"dim {index} of {name!r}")


def _counts(indices: Indices) -> dict[str, int]:
    """Sizes of axes that are stored in names: the largest index plus one."""
    sizes: dict[str, int] = {}
    for axes in indices.values():
        for axis, found in axes.items():
            sizes[axis] = max(sizes.get(axis, 0), max(found) + 1)
    return sizes


def _check_layers(indices: Indices, where: str) -> None:
    """Every pattern that occurs does so at every index of its axes.

    Raises:
        LayoutError: one does not.
    """
    counts = _counts(indices)
    for name, axes in indices.items():
        for axis, found in axes.items():
            if len(found) < counts[axis]:
                index = min(set(range(counts[axis])) - found)
                raise LayoutError(
                    f"{where}: {name!r} is there for {len(found)} of {counts[axis]} {axis}, not for {index}",
                    hint="a shard may be missing",
                )


def _closed(
    data: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, str]],
    numbers: Mapping[str, str],
    sizes: Mapping[str, int],
    where: str,
) -> dict[str, Any]:
    """The file with everything decided."""
    names = {name for table in tables.values() for name in table}
    used = axes_in(tables.values())
    axes = {name: axis for name, axis in data["axes"].items() if name in used}
    unsolved = [name for name in axes if name not in sizes]
    if unsolved:
        raise LayoutError(
            f"{where}: the checkpoint's shapes do not say how large {', '.join(unsolved)} is",
            hint=f"give it in the layout file: [axes.{unsolved[0]}] size = ...",
        )
    closed = {**data, **tables, "config": dict(numbers)}
    if "assembly" in data:
        closed["assembly"] = {n: parts for n, parts in data["assembly"].items() if n in tables["tensors"]}
    closed["axes"] = {name: {**axis, "size": sizes[name]} for name, axis in axes.items()}
    for name, axis in closed["axes"].items():
        axis["joint"] = [other for other in axis.get("joint", ()) if other in axes]
        if name in {
            a for table in tables.values() for n in table for a in TensorPattern(n, "").template.axes
        }:
            axis.setdefault("reason", "stored in the tensors' names")
    if "buffers" in data:
        closed["buffers"] = [name for name in data["buffers"] if name in tables["tensors"]]
    closed["tied"] = [group for group in data.get("tied", ()) if group[0] in names]
    closed["compensate"] = [
        c
        for c in data.get("compensate", ())
        if c.get("tensor", "") in names or c.get("config", "") in numbers
    ]
    return closed
