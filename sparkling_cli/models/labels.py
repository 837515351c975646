"""Which parts of a producer are linear: ``up`` and ``v``, against ``gate``, ``q`` and ``k``.

Negating a part's rows together with the consumer's columns leaves the logits as they are exactly if
the consumer's input is linear in that part. Zero fill needs to know: the other parts stay copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch

from sparkling_cli.layout.expr import (
    PACKINGS,
    Axis,
    Expr,
    Fixed,
    Product,
    Role,
    Sum,
    TensorLayout,
    axis_names,
    size_of,
)
from sparkling_cli.layout.names import block_of
from sparkling_cli.models.families import Family
from sparkling_cli.models.parity import LogitParity

#: A family, one of its dims, and entries of that which belong together.
Part = tuple[int, int, list[int]]


def label(
    parity: LogitParity, families: Sequence[Family], layouts: Sequence[TensorLayout], axes: Sequence[str]
) -> list[TensorLayout]:
    """The layouts with ``gate``/``up`` and ``q``/``k``/``v`` written where they can be told apart."""
    result = list(layouts)
    for axis in axes:
        for group in _groups(families, result, axis):
            _label_group(parity, families, result, group, axis)
    return result


def _groups(
    families: Sequence[Family], layouts: Sequence[TensorLayout], axis: str
) -> Iterator[tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """(producing dims, consuming dims) of the axis, block by block."""
    blocks: dict[tuple[str, ...], tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for i, (family, layout) in enumerate(zip(families, layouts, strict=True)):
        for d, dim in enumerate(layout.dims):
            if axis not in axis_names(dim.expr):
                continue
            block = blocks.setdefault(tuple(sorted({block_of(n) for n in family.names})), ([], []))
            if dim.role in (Role.OUT, Role.BIAS):
                block[0].append((i, d))
            elif dim.role is Role.IN:
                block[1].append((i, d))
    for outs, ins in blocks.values():
        if outs and ins:
            yield outs, ins


def _label_group(
    parity: LogitParity,
    families: Sequence[Family],
    layouts: list[TensorLayout],
    group: tuple[list[tuple[int, int]], list[tuple[int, int]]],
    axis: str,
) -> None:
    outs, ins = group
    sizes = parity.found.sizes
    modules: dict[str, list[tuple[int, int]]] = {}
    for i, d in outs:
        owner = families[i].names[0].removesuffix("_bias").removesuffix(".bias").removesuffix(".weight")
        modules.setdefault(owner, []).append((i, d))
    parts: list[tuple[str, bool, list[Part]]] = []
    for owner, dims in modules.items():
        terms = [layouts[i].dims[d].expr for i, d in dims]
        split = [
            [(i, d, own) for own in parts_of(term, sizes)] for (i, d), term in zip(dims, terms, strict=True)
        ]
        queries = ["q_per_kv" in axis_names(part) for part in _terms(terms[0], len(split[0]))]
        parts += [(owner, grouped, list(own)) for grouped, *own in zip(queries, *split, strict=True)]
    if len(parts) < 2 or len(parts) > 6:
        return
    consumers = [(i, d, list(range(families[i].shape[d]))) for i, d in ins]
    linear = [keeps(parity, families, [*p, *consumers]) for _, _, p in parts]
    attention = parity.found.axes[axis].kind in ("heads", "kv_heads", "q_per_kv", "head_dim")
    names = _names(linear, attention, [grouped for _, grouped, _ in parts])
    if names is None:
        return
    for owner, dims in modules.items():
        own = [n for (o, _, _), n in zip(parts, names, strict=True) if o == owner]
        for i, d in dims:
            layouts[i] = layouts[i].with_terms({d: _with_names(layouts[i].dims[d].expr, own)})


def _fused(expr: Expr) -> tuple[tuple[Expr, ...], int | None]:
    """The factors of a term, and the place of the one that is made of parts; None if none is."""
    factors = expr.factors if isinstance(expr, Product) else (expr,)
    for at, factor in enumerate(factors):
        counts = isinstance(factor, Fixed) and factor.size in (2, 3) and len(factors) > 1
        if counts or isinstance(factor, Sum):
            return factors, at
    return factors, None


def parts_of(expr: Expr, sizes: Mapping[str, int]) -> list[list[int]]:
    """Entries of every part of a fused dim; of all as one where it is not fused."""
    everything = range(size_of(expr, sizes))
    factors, at = _fused(expr)
    if at is None:
        return [list(everything)]
    factor, inner = factors[at], prod(size_of(behind, sizes) for behind in factors[at + 1 :])
    own = factor.parts if isinstance(factor, Sum) else [Fixed(1)] * size_of(factor, sizes)
    part = [k for k, term in enumerate(own) for _ in range(size_of(term, sizes) * inner)]
    return [[entry for entry in everything if part[entry % len(part)] == k] for k in range(len(own))]


def keeps(
    parity: LogitParity, families: Sequence[Family], parts: Sequence[Part], *, exchanged: bool = False
) -> bool:
    """Whether negating all these entries, or exchanging the first two of each part, keeps the logits."""
    state = {k: v.clone() for k, v in parity.state.items()}
    for family, dim, entries in parts:
        index = torch.tensor(entries[:2] if exchanged else entries)
        for name in families[family].names:
            own = state[name].index_select(dim, index)
            state[name].index_copy_(dim, index, own.flip(dim) if exchanged else -own)
    return parity.unchanged(state)


def _terms(expr: Expr, parts: int) -> Sequence[Expr]:
    """What the parts of a term are made of."""
    factors, at = _fused(expr)
    fused = None if at is None else factors[at]
    return fused.parts if isinstance(fused, Sum) else (expr,) * parts


def _names(linear: Sequence[bool], attention: bool, queries: Sequence[bool]) -> list[str] | None:
    """A name for every part; None where the pattern is not one that names exist for.

    Args:
        linear: which parts are.
        attention: whether the parts are heads.
        queries: which parts have the heads of a group.
    """
    if not attention:
        if len(linear) == 2 and sum(linear) == 1:
            return ["up" if is_linear else "gate" for is_linear in linear]
        return None
    if sum(linear) != 1 or len(linear) < 3:
        return None
    rest = [i for i, is_linear in enumerate(linear) if not is_linear]
    names = ["v" if is_linear else "q" for is_linear in linear]
    alone = [i for i in rest if not queries[i]]
    key = alone[-1] if 0 < len(alone) < len(rest) else rest[-1]
    names[key] = "k"
    return names


def _with_names(expr: Expr, names: Sequence[str]) -> Expr:
    if len(names) == 1:
        return replace(expr, label=names[0])
    factors, at = _fused(expr)
    assert at is not None
    factor = factors[at]
    own = factor.parts if isinstance(factor, Sum) else [Fixed(1)] * len(names)
    new: Expr = Sum(tuple(replace(part, label=name) for part, name in zip(own, names, strict=True)))
    packing = next((n for n, parts in PACKINGS.items() if parts == tuple(names)), None)
    if packing and not isinstance(factor, Sum):
        new = Axis(packing)
    return Product((*factors[:at], new, *factors[at + 1 :])) if len(factors) > 1 else new
