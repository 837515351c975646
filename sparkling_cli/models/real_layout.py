"""From what was found on the tiny model to the layout of the real one: sizes, names, config keys, disk."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import (
    COUNTED,
    Axis,
    Expr,
    Fixed,
    Role,
    TensorLayout,
    atoms,
    size_of,
    solved,
    with_atoms,
)
from sparkling_cli.layout.keys import Path, get_path
from sparkling_cli.layout.model import AxisInfo, Compensation, ModelLayout, TensorPattern
from sparkling_cli.layout.names import NameTemplate, skeleton
from sparkling_cli.layout.solve import Equation, solve_sizes
from sparkling_cli.models.add_layers import with_depth
from sparkling_cli.models.axes import FROZEN, PER_TOKEN, TinyAxes, chooses_experts
from sparkling_cli.models.disk import DiskTensor
from sparkling_cli.models.patterns import Pattern, fill, numbered, patterns_of, placeholder, split, template
from sparkling_cli.models.prove import WIDTHS, Findings
from sparkling_cli.models.real_model import RealModel, as_built, without_towers
from sparkling_cli.models.shrink import Shapes
from sparkling_cli.models.sizes import OTHER_MODALITY, kind_of, walk
from sparkling_cli.models.skeleton import (
    ConfigDict,
    ModelFactory,
    build_model,
    shared_names,
    text_config,
)
from sparkling_cli.models.tiny_config import chosen_layers, layer_count, real_path

#: Kinds of axes that never grow; head_dim does not either, but hidden may need it written.
_NEVER_WRITTEN = frozenset({"positions", "shared_experts"})


def real_layout(
    findings: Findings,
    config: Mapping[str, Any],
    real: ConfigDict,
    prefix: Path,
    *,
    name: str,
    factory: ModelFactory | None = None,
) -> ModelLayout:
    """The layout of the model of ``config``.

    Args:
        findings: verdicts and layouts of the tiny model.
        config: the checkpoint's config.
        real: the language model's own config, defaults filled in.
        prefix: where that stands in ``config``.
        name: of the class.
        factory: the user's own model.

    Raises:
        LayoutError: the real model has tensors that the tiny one has no match for.
    """
    built = build_model(real, factory=factory)
    real_shapes: Shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    sizes = real_sizes(findings, real, real_shapes)
    model = RealModel(findings.found, real, real_shapes, sizes, _proved(findings), factory)
    patterns = _patterns(findings, real_shapes, sizes, model)
    disk, assembly = disk_patterns(findings, patterns)
    axes = _axis_infos(findings, sizes)
    for stored, count in _counts(patterns).items():
        axes.setdefault(stored, AxisInfo(count, reason="stored in the tensors' names"))
    layout = ModelLayout(
        name=name,
        axes=axes,
        tensors=tuple(TensorPattern(template(p), p.layout.text) for p in patterns),
        disk=None if disk is None else tuple(TensorPattern(t, lay.text) for t, lay in disk.items()),
        config=_config_terms(findings.found, real, prefix, axes) | _repeated_counts(config, axes),
        compensations=_compensations(findings, patterns, assembly),
        tied=_tied(findings, shared_names(built)),
        assembly=assembly,
        aliases=_aliases(findings),
        notes=findings.notes,
        buffers=tuple(template(p) for p in patterns if p.key in findings.buffers),
        ignored=findings.ignored,
    )
    layout.check_axes()
    layout.check_shapes(real_shapes, on_disk=False)
    layout = as_built(layout, model, len(prefix))
    layout = with_depth(layout, findings, config, real, prefix)
    counts = _repeated_counts(config, axes)  # what the config says itself stands for the class's own name
    own = {key: term for key, term in layout.config.items() if key in counts or term not in counts.values()}
    layout = without_towers(replace(layout, config=own), config, model, prefix)
    terms = {_as_written(key, config): term for key, term in layout.config.items()}
    layout = replace(layout, config={**terms, **_earlier_names(terms, config, real)})
    others = "ffn" in findings.found.axes or "expert_ffn" not in findings.found.axes
    return layout if others else _experts_ffn(layout)


def _proved(findings: Findings) -> tuple[str, ...]:
    return tuple(name for name, verdict in findings.verdicts.items() if verdict.proved)


def _patterns(
    findings: Findings,
    real_shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    model: RealModel,
) -> list[Pattern]:
    by_key = findings.by_skeleton
    layouts: dict[str, TensorLayout] = {}
    for name, shape in real_shapes.items():
        key = skeleton(name)
        fits = [f for f in (fitted(lay, shape, sizes) for lay in by_key.get(key, ())) if f is not None]
        if not fits:
            known = "; ".join(lay.text for lay in by_key.get(key, ())) or "no tensor of that name"
            raise LayoutError(
                f"{name!r} has shape {shape}, which fits nothing in a tiny model of this class: {known}",
                hint="give a layout file (--layout FILE)",
            )
        layouts[name] = model.choose(name, list({f.text: f for f in fits}.values()))
    return patterns_of(layouts)


def _counts(patterns: Iterable[Pattern]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pattern in patterns:
        for position, indices in enumerate(pattern.indices):
            name = placeholder(position)
            counts[name] = max(counts.get(name, 0), max(indices) + 1)
    return counts


def _experts_ffn(layout: ModelLayout) -> ModelLayout:
    """The layout with ``expert_ffn`` called ``ffn``: no other MLP has an inner width."""

    def short(text: str) -> str:
        return re.sub(r"\bexpert_ffn\b", "ffn", text)

    def patterns(found: Iterable[TensorPattern]) -> tuple[TensorPattern, ...]:
        return tuple(replace(pattern, layout=short(pattern.layout)) for pattern in found)

    return replace(
        layout,
        axes={short(n): replace(i, joint=tuple(map(short, i.joint))) for n, i in layout.axes.items()},
        tensors=patterns(layout.tensors),
        disk=None if layout.disk is None else patterns(layout.disk),
        config={key: short(term) for key, term in layout.config.items()},
        aliases={"expert_ffn": "ffn"},
    )


def _aliases(findings: Findings) -> dict[str, str]:
    stacked = [
        "experts" in layout.axes()
        for family, layout in zip(findings.families, findings.layouts, strict=True)
        if family.involves("ffn")
    ]
    return {"expert_ffn": "ffn"} if stacked and all(stacked) else {}


def _axis_infos(findings: Findings, sizes: Mapping[str, int]) -> dict[str, AxisInfo]:
    used = {a for layout in findings.layouts for a in layout.axes()}
    infos = {}
    for name, verdict in findings.verdicts.items():
        known = name in used or verdict.proved or findings.found.axes[name].kind in WIDTHS
        if name not in sizes or not known:
            continue
        infos[name] = AxisInfo(sizes[name], verdict.proved, verdict.reason, verdict.joint)
    return infos


def _config_terms(
    found: TinyAxes,
    real: ConfigDict,
    prefix: tuple[str, ...],
    known: Iterable[str],
) -> dict[str, str]:
    """The config keys of every axis that the layout has and that a widening may have to write."""
    terms = {}
    declared = set(known)
    for path, names in found.terms.items():
        fixed = all(found.axes[n].kind in _NEVER_WRITTEN for n in names if not n.isdigit())
        if fixed or not declared.issuperset(n for n in names if not n.isdigit()):
            continue
        for place in _real_places(path, real, found):
            terms[".".join((*prefix, *place))] = names[0] if len(names) == 1 else f"({' '.join(names)})"
    return terms


def _as_written(key: str, config: Mapping[str, Any]) -> str:
    """A key of the class's own config as the checkpoint's has it, which may be without a table of the class.

    Older configs of models that see have the text's sizes beside ``vision_config``, not in a ``text_config``.
    """
    table, _, rest = key.partition(".")
    flat = rest and table not in config and "hidden_size" in config and not OTHER_MODALITY.search(table)
    return rest if flat else key


def _earlier_names(
    terms: Mapping[str, str], config: Mapping[str, Any], real: Mapping[str, Any]
) -> dict[str, str]:
    """Keys of older versions that the class takes for one of its own: it is twice as large if they are."""
    found = {}
    for key, term in terms.items():
        others = [k for k, value in config.items() if type(value) is int and k not in (*real, *terms)]
        for other in others if key in real and key not in config else ():
            if config[other] == real[key]:
                with suppress(LayoutError):
                    if text_config({**config, other: 2 * config[other]}).get(key) == 2 * config[other]:
                        found[other] = term
    return found


def _repeated_counts(config: Mapping[str, Any], axes: Mapping[str, AxisInfo]) -> dict[str, str]:
    """Config keys that give a count once more: under another name of the class, or beside a text config."""
    found = {}
    for path, value in walk(config):
        axis = PER_TOKEN if chooses_experts(path[-1]) else kind_of(path[-1])
        text = not OTHER_MODALITY.search(".".join(path[:-1]))
        if axis in COUNTED and axis in axes and value == axes[axis].size and text:
            found[".".join(path)] = axis
    return found


def _real_places(path: Path, real: ConfigDict, found: TinyAxes) -> list[Path]:
    """The paths in the real config that a tiny one's stands for: of every layer that says the same."""
    if not any(key.isdigit() for key in path):
        return [path]
    first = real_path(path, chosen_layers(real, layer_count(found.config)))
    return [
        p
        for p, value in walk(real)
        if len(p) == len(path)
        and all(a == b or (a.isdigit() and b.isdigit()) for a, b in zip(p, path, strict=True))
        and value == get_path(real, first)
    ]


def _tied(findings: Findings, shared: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Tied module names, and the names of the same tensors on disk.

    Args:
        findings: of the tiny model, whose ties outside its layers are the real one's.
        shared: names of the real model that are one tensor; blocks may be shared by other layers than in the
            tiny one.
    """
    on_disk = {t.source: t.name for t in findings.disk or ()}
    groups = [tuple(group) for group in shared if any(split(name)[1] for name in group)]
    for group in findings.tied:
        if any(split(name)[1] for name in group):
            continue
        others = [on_disk[n] for n in group[1:] if on_disk.get(n, n) != n]
        groups.append((*group, *others))
        first = on_disk.get(group[0], group[0])
        apart = [on_disk.get(n, n) for n in group[1:] if on_disk.get(n, n) not in group]
        if first != group[0] and apart:  # a name follows one other, in the module as on disk
            groups.append((first, *apart))
    return tuple(groups)


def _compensations(
    findings: Findings, patterns: Sequence[Pattern], assembly: Mapping[str, Sequence[str]]
) -> tuple[Compensation, ...]:
    """Factors under module names, and again under the names on disk where those differ.

    A factor is one number for a whole tensor of the module, and so for each of its parts on disk.

    Args:
        findings: of the tiny model.
        patterns: of the real one.
        assembly: pattern of the module -> the patterns on disk that make it up, in the real model.

    Raises:
        LayoutError: a factor is on one layer in the middle, or on a part of a tensor on disk.
    """
    on_disk = {t.source: t.name for t in findings.disk or ()}
    parts = {module: tuple(own) for module, own in assembly.items()}
    found: dict[Compensation, None] = {}
    for c in findings.compensations:
        found.update(dict.fromkeys(replace(c, tensor=name) for name in _tensors_of(c, findings, patterns)))
    for c in findings.compensations:
        if not c.tensor or on_disk.get(c.tensor, c.tensor) == c.tensor:
            continue
        if not split(c.tensor)[1]:
            found[replace(c, tensor=on_disk[c.tensor])] = None
            continue
        for name in _tensors_of(c, findings, patterns):
            template = next((one for one in parts if one == name or NameTemplate(one).matches(name)), None)
            if template is None:
                raise LayoutError(
                    f"the factor on {c.tensor!r} is on a tensor that is stored with others, as one"
                )
            at = NameTemplate(template).at(name) or {}
            filled = (NameTemplate(part).partly(at) for part in parts[template])
            found.update(dict.fromkeys(replace(c, tensor=part) for part in filled))
    return tuple(found)


def _tensors_of(found: Compensation, findings: Findings, patterns: Sequence[Pattern]) -> list[str]:
    """Names in the real model of the tensors that a factor on a tensor of the tiny model is for.

    What all layers of the tiny model have, all of the real one have; what the last one has (a final norm
    that is inside it), the last one.

    Raises:
        LayoutError: neither.
    """
    key, indices = split(found.tensor)
    if not indices:
        return [found.tensor]
    tiny = {split(n)[1] for family in findings.families for n in family.names if split(n)[0] == key}
    alike = [split(c.tensor) for c in findings.compensations if replace(c, tensor=found.tensor) == found]
    own = {place for other, place in alike if other == key}
    fitting = [pattern for pattern in patterns if pattern.key == key]
    if own == tiny:
        return [template(pattern) for pattern in fitting]
    if own == {max(tiny)}:
        return [numbered(key, max(tuple(map(max, pattern.indices)) for pattern in fitting))]
    raise LayoutError(f"the factor on {found.tensor!r} is neither on every layer nor on the last one")


def real_sizes(
    findings: Findings, real: ConfigDict, real_shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Axis sizes from the real config; those that it leaves to be derived, from the shapes.

    Raises:
        LayoutError: the config contradicts what was found out about its keys on the tiny model.
    """
    found = findings.found
    known: dict[str, int] = {}
    values: dict[Path, int] = {}
    layers = chosen_layers(real, layer_count(found.config))
    for path, names in sorted(found.terms.items(), key=lambda term: len(term[1])):
        value = get_path(real, real_path(path, layers))
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if type(value) is not int:
            continue
        values[path] = value
        rest = [n for n in names if n not in known and not n.isdigit()]
        if len(rest) == 1:
            known[rest[0]] = value // prod(
                int(n) if n.isdigit() else known[n] for n in names if n not in rest
            )
    own = ("heads",) if "heads" in known else ("kv_heads", "q_per_kv")
    derived = "head_dim" in found.axes and not found.keys("head_dim")
    if derived and known.keys() >= {"hidden", *own}:
        heads = prod(known.get(n) or int(n) for n in (found.blocks, *own))
        known["head_dim"] = known["hidden"] // heads  # as the class works it out
    _check_config(found, values, known)
    equations = []
    by_key = findings.by_skeleton
    for name, shape in real_shapes.items():
        layouts = by_key.get(skeleton(name), [])
        if len(layouts) == 1 and len(layouts[0].dims) == len(shape):
            for dim, n in zip(layouts[0].dims, shape, strict=True):
                equations.append(Equation(dim.expr, n, name))
    return solve_sizes(equations, known) if set(found.axes) - set(known) else known


def _check_config(found: TinyAxes, values: Mapping[Path, int], known: Mapping[str, int]) -> None:
    """What is known of the axes gives back every number of the config that a widening would write.

    Raises:
        LayoutError: it does not, so that the config would be written wrongly.
    """
    for path, value in values.items():
        names = found.terms[path]
        axes = [n for n in names if not n.isdigit()]
        if all(found.axes[n].kind in FROZEN for n in axes) or not known.keys() >= set(axes):
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
    terms = [_fitted_term(dim.expr, n, sizes) for dim, n in zip(layout.dims, shape, strict=True)]
    fitting = {i: term for i, term in enumerate(terms) if term is not None}
    return layout.with_terms(fitting) if len(fitting) == len(shape) else None


def _fitted_term(expr: Expr, n: int, sizes: Mapping[str, int]) -> Expr | None:
    """The term with its one anonymous number, however deep, chosen so that it has ``n`` entries."""
    try:
        if size_of(expr, sizes) == n:
            return expr
    except LayoutError:
        return None
    number = solved(expr, n, sizes, lambda atom: isinstance(atom, Fixed))
    return None if number is None else _with_numbers(expr, lambda _: number)


def disk_patterns(
    findings: Findings, patterns: Sequence[Pattern]
) -> tuple[dict[str, TensorLayout] | None, dict[str, tuple[str, ...]]]:
    """Patterns on disk for the real model, and which of them make up which module tensor."""
    if findings.disk is None:
        return None, {}
    by_source: dict[str, list[DiskTensor]] = {}
    for tensor in findings.disk:
        by_source.setdefault(tensor.source, []).append(tensor)
    followers = {n for group in findings.tied for n in group[1:]}
    followers |= {n for tensor in findings.disk for n in tensor.others}
    result: dict[str, TensorLayout] = {}
    assembly: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        source = _representative(findings, pattern)
        parts = by_source.get(source)
        if parts is None:
            if source in followers:
                continue
            raise LayoutError(f"{source!r} is nowhere on disk", hint="give a layout file (--layout FILE)")
        own, templates = template(pattern), _disk_templates(source, parts, pattern, findings)
        result.update(templates)
        counted = all(set(NameTemplate(t).axes) >= set(NameTemplate(own).axes) for t in templates)
        if list(templates) != [own] and counted and _assembles(source, parts, findings):
            assembly[own] = tuple(templates)
    return result, assembly


def _representative(findings: Findings, pattern: Pattern) -> str:
    """A tiny tensor with the pattern's skeleton and meaning."""
    for family, layout in zip(findings.families, findings.layouts, strict=True):
        if skeleton(family.names[0]) == pattern.key and _same(layout, pattern.layout):
            return family.names[0]
    raise AssertionError(pattern.key)


def _same(tiny: TensorLayout, real: TensorLayout) -> bool:
    """Equal but for anonymous sizes."""
    blank = re.compile(r"(?<![\w])\d+")
    return blank.sub("#", tiny.text) == blank.sub("#", real.text)


def _disk_templates(
    source: str, parts: Sequence[DiskTensor], pattern: Pattern, findings: Findings
) -> dict[str, TensorLayout]:
    """Disk name template -> layout, in the order in which the parts make up the module tensor."""
    _, own = split(source)
    layout = findings.layout_of(source)
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
    terms = (_with_numbers(dim.expr, lambda n: changed.get(n, n)) for dim in part.dims)
    return part.with_terms(dict(enumerate(terms)))


def _numbers(expr: Expr) -> list[int]:
    """Anonymous sizes in a term, from left to right."""
    return [atom.size for atom in atoms(expr) if isinstance(atom, Fixed)]


def _with_numbers(expr: Expr, change: Callable[[int], int]) -> Expr:
    return with_atoms(expr, lambda a: replace(a, size=change(a.size)) if isinstance(a, Fixed) else a)


def _assembles(source: str, parts: Sequence[DiskTensor], findings: Findings) -> bool:
    """Whether stacking in front and concatenating behind gives the module tensor."""
    layout = findings.layout_of(source)
    sizes = findings.found.sizes
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
