"""Layouts of the names on disk, read off the library's own conversion.

Every element of the tiny model's state dict gets a number of its own; after the conversion to disk
names the numbers say where each element went, whatever the conversion does. The result is checked:
widening on disk must equal widening in the module and converting afterwards, bit for bit.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import (
    PACKINGS,
    Axis,
    Dim,
    Expr,
    Fixed,
    Product,
    Role,
    Sum,
    TensorLayout,
    size_of,
)
from sparkling_cli.layout.parse import parse_layout


@dataclass(frozen=True)
class DiskTensor:
    """One tensor on disk.

    Attributes:
        name: on disk.
        source: the module tensor that its elements come from.
        layout: what its dims mean.
        fixed: module dim -> the one index of it that this tensor holds (an expert).
        start: first entry on the split dim, for the order of parts.
        others: further module tensors that it is made of, where the disk fuses what the module keeps apart.
    """

    name: str
    source: str
    layout: TensorLayout
    fixed: Mapping[int, int]
    start: int
    others: tuple[str, ...] = ()


def to_disk(model: nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict under the names on disk.

    Raises:
        LayoutError: the library's conversion fails on this class.
    """
    if not hasattr(model, "config") or not hasattr(model, "save_pretrained"):
        return dict(state)
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
    except ImportError:
        return dict(state)  # before transformers 5 both names are the same
    try:
        found: dict[str, Any] = loading.revert_weight_conversion(model, dict(state))
    except Exception as error:  # the library's own conversion may raise anything
        raise LayoutError(f"the library cannot convert this class to its names on disk: {error}") from error
    return found


def disk_tensors(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    layouts: Mapping[str, TensorLayout],
    sizes: Mapping[str, int],
) -> list[DiskTensor]:
    """Every tensor on disk with its layout.

    Args:
        model: the tiny model.
        state: its state dict.
        layouts: of every module tensor.
        sizes: axis sizes in the tiny model.

    Raises:
        LayoutError: a tensor on disk mixes module tensors in a way that no layout says.
    """
    numbered: dict[str, torch.Tensor] = {}
    starts: list[tuple[int, str]] = []
    at = 0
    for name, tensor in state.items():
        numbered[name] = torch.arange(at, at + tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        starts.append((at, name))
        at += tensor.numel()
    bounds = torch.tensor([start for start, _ in starts], dtype=torch.float64)
    result = []
    for name, ids in to_disk(model, numbered).items():
        ids = ids.to(torch.float64)
        if ids.numel() == 0:
            raise LayoutError(f"{name!r} is empty on disk")
        # for every element, the place in ``starts`` of the module tensor that it comes from
        sources = torch.bucketize(ids, bounds, right=True) - 1
        result.append(_fused(name, ids, sources, starts, state, layouts, sizes))
    return result


def _fused(
    name: str,
    ids: torch.Tensor,
    sources: torch.Tensor,
    starts: Sequence[tuple[int, str]],
    state: Mapping[str, torch.Tensor],
    layouts: Mapping[str, TensorLayout],
    sizes: Mapping[str, int],
) -> DiskTensor:
    """One tensor on disk, made of one module tensor or of several along one dim."""

    def piece(place: int, part: torch.Tensor) -> DiskTensor:
        start, source = starts[place]
        return _traced(name, source, (part - start).long(), state[source], layouts[source], sizes)

    places = torch.unique(sources).tolist()
    if len(places) == 1:
        return piece(places[0], ids)
    moving = [d for d in range(ids.ndim) if _varies(sources, d)]
    if len(moving) != 1:
        raise LayoutError(f"{name!r} on disk is made of several tensors of the module, not along one dim")
    dim = moving[0]
    along = sources.movedim(dim, 0).reshape(sources.shape[dim], -1)[:, 0]
    order = list(dict.fromkeys(along.tolist()))
    parts = [piece(p, ids.index_select(dim, torch.nonzero(along == p).flatten())) for p in order]
    if any(p.fixed for p in parts):
        raise LayoutError(f"{name!r} on disk is made of slices of several tensors of the module")
    expr = _joined([p.layout.dims[dim].expr for p in parts], along.tolist(), order, sizes)
    others = [[d for i, d in enumerate(p.layout.dims) if i != dim] for p in parts]
    if expr is None or any(o != others[0] for o in others):
        raise LayoutError(f"{name!r} on disk mixes tensors of the module in a way that no layout says")
    layout = parse_layout(parts[0].layout.with_terms({dim: expr}).text)
    return DiskTensor(name, parts[0].source, layout, {}, 0, tuple(p.source for p in parts[1:]))


def _joined(
    terms: Sequence[Expr], along: Sequence[int], order: Sequence[int], sizes: Mapping[str, int]
) -> Expr | None:
    """Terms one after the other, or entry by entry in turn."""
    blocks = [p for p, _ in itertools.groupby(along)]
    packing = next((n for n, p in PACKINGS.items() if p == tuple(t.label for t in terms)), None)
    bare = [replace(t, label=None) for t in terms]
    same = all(t == bare[0] for t in bare)
    count: Expr = Axis(packing) if packing else Fixed(len(terms))
    if blocks == list(order):
        if same and packing:
            return Product((count, bare[0]))
        return Sum(tuple(terms))
    if same and blocks == list(order) * size_of(bare[0], sizes):
        return Product((bare[0], count))
    return None


def _traced(
    name: str,
    source: str,
    ids: torch.Tensor,
    tensor: torch.Tensor,
    layout: TensorLayout,
    sizes: Mapping[str, int],
) -> DiskTensor:
    if ids.ndim == 0:
        return DiskTensor(name, source, layout, {}, 0)
    coordinates = torch.unravel_index(ids, tensor.shape)
    dims: dict[int, Dim] = {}
    fixed: dict[int, int] = {}
    start = 0
    for m, index in enumerate(coordinates):
        moving = [d for d in range(ids.ndim) if _varies(index, d)]
        if len(moving) > 1:
            raise LayoutError(f"dim {m} of {source!r} is spread over several dims of {name!r} on disk")
        if not moving:
            if tensor.shape[m] > 1:
                fixed[m] = int(index.flatten()[0])
            continue
        along = index.movedim(moving[0], 0).reshape(index.shape[moving[0]], -1)[:, 0].tolist()
        if moving[0] in dims:
            raise LayoutError(f"several dims of {source!r} lie in one dim of {name!r} on disk")
        expr = sub_term(layout.dims[m].expr, along, sizes)
        if expr is None:
            raise LayoutError(f"dim {moving[0]} of {name!r} on disk is no part of {layout.text!r}")
        if len(along) < tensor.shape[m]:
            start = along[0]
        dims[moving[0]] = Dim(expr, layout.dims[m].role)
    text = TensorLayout.of(_with_ones(ids, dims, layout, sizes)).text
    return DiskTensor(name, source, parse_layout(text), fixed, start)


def _with_ones(
    ids: torch.Tensor, dims: dict[int, Dim], layout: TensorLayout, sizes: Mapping[str, int]
) -> list[Dim]:
    """Dims of size one have no coordinate of their own: take the module's, or a plain 1."""
    spare = [d for d in layout.dims if size_of(d.expr, sizes) == 1]
    role = next((d.role for d in dims.values()), Role.SCALE)
    filled = []
    for d in range(ids.ndim):
        if d in dims:
            filled.append(dims[d])
        elif ids.shape[d] == 1:
            filled.append(spare.pop(0) if spare else Dim(Fixed(1), role))
        else:
            raise LayoutError("a dim on disk repeats its entries")
    return filled


def _varies(index: torch.Tensor, dim: int) -> bool:
    if index.shape[dim] == 1:
        return False
    first = index.narrow(dim, 0, 1)
    return bool((index != first).any())


def sub_term(expr: Expr, along: Sequence[int], sizes: Mapping[str, int]) -> Expr | None:
    """The term of the entries ``along`` of a dim: the whole, a part of it, or its factors reordered."""
    if list(along) == list(range(size_of(expr, sizes))):
        return expr
    if isinstance(expr, Fixed):
        return Fixed(len(along), expr.label)  # nothing happens to it, whatever its order
    if isinstance(expr, Sum):
        return _sub_sum(expr, along, sizes)
    if isinstance(expr, Product):
        return _sub_product(expr, along, sizes)
    return None


def _sub_sum(expr: Sum, along: Sequence[int], sizes: Mapping[str, int]) -> Expr | None:
    at = 0
    for part in expr.parts:
        width = size_of(part, sizes)
        if all(at <= i < at + width for i in along):
            return sub_term(part, [i - at for i in along], sizes)
        at += width
    return None


def _sub_product(expr: Product, along: Sequence[int], sizes: Mapping[str, int]) -> Expr | None:
    widths = [size_of(f, sizes) for f in expr.factors]
    digits = torch.stack(torch.unravel_index(torch.tensor(along), widths), 1).tolist()
    constant = {
        f: digits[0][f]
        for f in range(len(widths))
        if widths[f] > 1 and all(row[f] == digits[0][f] for row in digits)
    }
    partial: dict[int, Expr] = {}
    for f, factor in enumerate(expr.factors):
        values = sorted({row[f] for row in digits})
        if f not in constant and len(values) < widths[f]:
            found = sub_term(factor, values, sizes)
            if found is None:
                return None
            partial[f] = found
    label = next((_packing_label(expr.factors[f], k) for f, k in constant.items()), None)
    kept = [f for f in range(len(widths)) if f not in constant]
    for order in itertools.permutations(kept):
        if _sorted_by(digits, order):
            terms = tuple(partial.get(f, expr.factors[f]) for f in order)
            whole = terms[0] if len(terms) == 1 else Product(terms)
            inherited = whole.label or label or (expr.label if len(order) == len(widths) else None)
            return replace(whole, label=inherited)
    return None


def _packing_label(factor: Expr, index: int) -> str | None:
    if isinstance(factor, Axis) and factor.name in PACKINGS:
        return PACKINGS[factor.name][index]
    if isinstance(factor, Sum) and all(isinstance(p, Fixed) and p.size == 1 for p in factor.parts):
        return factor.parts[index].label
    return None


def _sorted_by(digits: Sequence[Sequence[int]], order: Sequence[int]) -> bool:
    keys = [tuple(row[f] for f in order) for row in digits]
    return all(a < b for a, b in itertools.pairwise(keys))
