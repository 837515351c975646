"""Layouts under the names on disk, and which of them make up which tensor of the module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Axis, Dim, Expr, Fixed, Role, TensorLayout, atoms, with_atoms
from sparkling_cli.layout.names import NameTemplate, skeleton
from sparkling_cli.models.court import Judgement
from sparkling_cli.models.disk import DiskTensor
from sparkling_cli.models.labels import render
from sparkling_cli.models.patterns import Pattern, fill, placeholder, split, template


def disk_patterns(
    judged: Judgement, patterns: Sequence[Pattern]
) -> tuple[dict[str, TensorLayout] | None, dict[str, tuple[str, ...]]]:
    """Patterns on disk for the real model, and which of them make up which module tensor."""
    if judged.disk is None:
        return None, {}
    by_source: dict[str, list[DiskTensor]] = {}
    for tensor in judged.disk:
        by_source.setdefault(tensor.source, []).append(tensor)
    followers = {n for group in judged.tied for n in group[1:]}
    followers |= {n for tensor in judged.disk for n in tensor.others}
    result: dict[str, TensorLayout] = {}
    assembly: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        source = _representative(judged, pattern)
        parts = by_source.get(source)
        if parts is None:
            if source in followers:
                continue
            raise LayoutError(f"{source!r} is nowhere on disk", hint="give a layout file (--layout FILE)")
        own, templates = template(pattern), _disk_templates(source, parts, pattern, judged)
        result.update(templates)
        counted = all(set(NameTemplate(t).axes) >= set(NameTemplate(own).axes) for t in templates)
        if list(templates) != [own] and counted and _assembles(source, parts, judged):
            assembly[own] = tuple(templates)
    return result, assembly


def _representative(judged: Judgement, pattern: Pattern) -> str:
    """A tiny tensor with the pattern's skeleton and meaning."""
    for family, layout in zip(judged.families, judged.layouts, strict=True):
        if skeleton(family.names[0]) == pattern.key and _same(layout, pattern.layout):
            return family.names[0]
    raise AssertionError(pattern.key)


def _same(tiny: TensorLayout, real: TensorLayout) -> bool:
    """Equal but for anonymous sizes."""
    blank = re.compile(r"(?<![\w])\d+")
    return blank.sub("#", tiny.text) == blank.sub("#", real.text)


def _disk_templates(
    source: str, parts: Sequence[DiskTensor], pattern: Pattern, judged: Judgement
) -> dict[str, TensorLayout]:
    """Disk name template -> layout, in the order in which the parts make up the module tensor."""
    _, own = split(source)
    layout = next(lay for f, lay in zip(judged.families, judged.layouts, strict=True) if source in f.names)
    grouped: dict[str, list[DiskTensor]] = {}
    for part in sorted(parts, key=lambda p: p.start):
        grouped.setdefault(split(part.name)[0], []).append(part)
    result: dict[str, TensorLayout] = {}
    for key, members in grouped.items():
        placeholders = []
        for place in range(key.count("*")):
            values = [split(m.name)[1][place] for m in members]
            placeholders.append(_place_name(place, values, own, members, layout, pattern))
        real = _fit_like(members[0].layout, layout, pattern.layout)
        result[fill(key, placeholders, pattern)] = real
    return result


def _place_name(
    place: int,
    values: Sequence[int],
    own: tuple[int, ...],
    members: Sequence[DiskTensor],
    layout: TensorLayout,
    pattern: Pattern,
) -> str:
    """What a number in a name on disk counts: experts, layers, or something of its own."""
    for dim in members[0].fixed:
        fixed = [m.fixed.get(dim) for m in members]
        expr = layout.dims[dim].expr
        if list(values) == fixed and isinstance(expr, Axis):
            return expr.name
        if list(values) == fixed and place >= len(own):  # routed and other experts in one stack
            return placeholder(place)
    if place < len(own) and all(v == own[place] for v in values):
        return placeholder(place)
    if len(members) == 1 and all(pattern.whole):
        return f"number_{place + 1}"  # no index of the module, so no assembly either
    raise LayoutError(f"the numbers in {members[0].name!r} on disk could not be explained")


def _fit_like(part: TensorLayout, tiny: TensorLayout, real: TensorLayout) -> TensorLayout:
    """Carry replaced anonymous sizes over to a part on disk."""
    if part.text == tiny.text:
        return real
    changed = {
        before: after
        for one, two in zip(tiny.dims, real.dims, strict=True)
        for before, after in zip(_numbers(one.expr), _numbers(two.expr), strict=True)
    }
    dims = [Dim(_with_numbers(d.expr, changed), d.role) for d in part.dims]
    return TensorLayout(tuple(dims), render(dims))


def _numbers(expr: Expr) -> list[int]:
    """Anonymous sizes in a term, from left to right."""
    return [atom.size for atom in atoms(expr) if isinstance(atom, Fixed)]


def _with_numbers(expr: Expr, changed: Mapping[int, int]) -> Expr:
    def change(atom: Axis | Fixed) -> Expr:
        return replace(atom, size=changed.get(atom.size, atom.size)) if isinstance(atom, Fixed) else atom

    return with_atoms(expr, change)


def _assembles(source: str, parts: Sequence[DiskTensor], judged: Judgement) -> bool:
    """Whether stacking in front and concatenating behind gives the module tensor."""
    layout = next(lay for f, lay in zip(judged.families, judged.layouts, strict=True) if source in f.names)
    sizes = judged.found.sizes
    shape = layout.shape(sizes)
    front = len(parts[0].fixed)
    first = [p for p in parts if p.fixed == parts[0].fixed]
    if any(p.others or set(p.fixed) != set(range(front)) for p in parts) or len(shape) < front:
        return False
    rest = shape[front:]
    if any(len(p.layout.dims) != len(rest) for p in parts):
        return False
    at = 0
    for part in sorted(first, key=lambda p: p.start):
        own = part.layout.shape(sizes)
        if own[1:] != rest[1:] or (part.start != at and len(first) > 1):
            return False
        at += own[0] if own else 0
    roles = [d.role for d in layout.dims[front:]]
    return (not rest or at == rest[0]) and all(
        Role.IN not in roles or [d.role for d in p.layout.dims] == roles for p in parts
    )
