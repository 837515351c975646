"""Sizes of the real model: of its axes, and of the anonymous numbers in its tensors' layouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Dim, Expr, Fixed, Product, Sum, TensorLayout, size_of
from sparkling_cli.layout.names import skeleton
from sparkling_cli.layout.solve import Equation, solve_sizes
from sparkling_cli.models.axes import FROZEN, Coordinates
from sparkling_cli.models.court import Judgement
from sparkling_cli.models.labels import render
from sparkling_cli.models.roles import Path, get_path
from sparkling_cli.models.skeleton import ConfigDict
from sparkling_cli.models.tiny_config import chosen_layers, layer_count, real_path


def real_sizes(
    judged: Judgement, real: ConfigDict, real_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Axis sizes from the real config; those that it leaves to be derived, from the shapes.

    Raises:
        LayoutError: the config contradicts what the tiny model has taught about its keys.
    """
    found = judged.found
    known: dict[str, int] = {}
    said: dict[Path, int] = {}
    layers = chosen_layers(real, layer_count(found.config))
    for path, names in found.terms.items():
        value = get_path(real, real_path(path, layers))
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        said[path] = value
        rest = [n for n in names if n not in known and not n.isdigit()]
        if len(rest) == 1:
            known[rest[0]] = value // prod(
                int(n) if n.isdigit() else known[n] for n in names if n not in rest
            )
    _check_said(found, said, known)
    equations = []
    by_key: dict[str, list[TensorLayout]] = {}
    for family, layout in zip(judged.families, judged.layouts, strict=True):
        by_key.setdefault(skeleton(family.names[0]), []).append(layout)
    for name, shape in real_shapes.items():
        layouts = by_key.get(skeleton(name), [])
        if len(layouts) == 1 and len(layouts[0].dims) == len(shape):
            for dim, n in zip(layouts[0].dims, shape, strict=True):
                equations.append(Equation(dim.expr, n, name))
    return solve_sizes(equations, known) if set(found.axes) - set(known) else known


def _check_said(found: Coordinates, said: Mapping[Path, int], known: Mapping[str, int]) -> None:
    """What is known of the axes gives back every number of the config that a widening would write.

    Raises:
        LayoutError: it does not, so that the config would be written wrongly.
    """
    for path, value in said.items():
        names = found.terms[path]
        axes = [n for n in names if not n.isdigit()]
        if all(found.axes[n].role in FROZEN for n in axes) or not known.keys() >= set(axes):
            continue
        product = prod(int(n) if n.isdigit() else known[n] for n in names)
        if product != value:
            sizes = ", ".join(f"{n} = {known[n]}" for n in axes)
            raise LayoutError(
                f"{'.'.join(path)} = {value} in the config is not {' x '.join(names)} with {sizes}",
                hint="if the model is as it should be, give a layout file (--layout FILE)",
            )


def fitted(layout: TensorLayout, shape: Sequence[int], sizes: Mapping[str, int]) -> TensorLayout | None:
    """The layout with anonymous sizes replaced by the real ones; None if it does not fit."""
    if len(layout.dims) != len(shape):
        return None
    dims = []
    for dim, n in zip(layout.dims, shape, strict=True):
        expr = _fitted_term(dim.expr, n, sizes)
        if expr is None:
            return None
        dims.append(Dim(expr, dim.role))
    return TensorLayout(tuple(dims), render(dims))


def _fitted_term(expr: Expr, n: int, sizes: Mapping[str, int]) -> Expr | None:
    """The term with its one anonymous number, however deep, chosen so that it has ``n`` entries."""
    try:
        if size_of(expr, sizes) == n:
            return expr
    except LayoutError:
        return None
    if isinstance(expr, Fixed):
        return Fixed(n, expr.label)
    if not isinstance(expr, (Product, Sum)):
        return None
    inner = expr.factors if isinstance(expr, Product) else expr.parts
    free = [i for i, e in enumerate(inner) if _has_number(e)]
    if len(free) != 1:
        return None
    rest = [size_of(e, sizes) for i, e in enumerate(inner) if i != free[0]]
    value, odd = divmod(n, prod(rest)) if isinstance(expr, Product) else (n - sum(rest), 0)
    if odd or value < 1:
        return None
    fitted = _fitted_term(inner[free[0]], value, sizes)
    if fitted is None:
        return None
    changed = tuple(fitted if i == free[0] else e for i, e in enumerate(inner))
    return replace(expr, factors=changed) if isinstance(expr, Product) else replace(expr, parts=changed)


def _has_number(expr: Expr) -> bool:
    if isinstance(expr, (Product, Sum)):
        return any(_has_number(e) for e in (expr.factors if isinstance(expr, Product) else expr.parts))
    return isinstance(expr, Fixed)
