"""From what the tiny model taught to the layout of the real one: names, sizes, config keys, assembly."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Axis, Dim, Expr, Fixed, TensorLayout, with_atoms
from sparkling_cli.layout.model import AxisInfo, Compensation, ModelLayout, TensorPattern
from sparkling_cli.layout.names import skeleton
from sparkling_cli.models.axes import Coordinates
from sparkling_cli.models.court import WIDTHS, Judgement
from sparkling_cli.models.labels import render
from sparkling_cli.models.patterns import Pattern, patterns_of, placeholder, split, template
from sparkling_cli.models.realize_disk import disk_patterns
from sparkling_cli.models.realize_sizes import fitted, real_sizes
from sparkling_cli.models.roles import OTHER_MODALITY, Path, get_path, walk
from sparkling_cli.models.shrink import shapes
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory, text_prefix
from sparkling_cli.models.tiny_config import chosen_layers, layer_count, real_path
from sparkling_cli.models.witness import Witness

#: Roles of axes that never grow; head_dim does not either, but hidden may need it written.
_NEVER_WRITTEN = frozenset({"vocab", "positions", "experts", "shared_experts"})

#: Keys of a tower that say how wide its output is.
_OUTPUT = re.compile(
    r"^(out|output|proj|projection|projector|text|llm|lm|language)_|_output_dim$|^output_dims?$"
)


def realize(
    judged: Judgement,
    config: Mapping[str, Any],
    real: ConfigDict,
    *,
    name: str,
    factory: ModelFactory | None = None,
) -> ModelLayout:
    """The layout of the model of ``config``.

    Args:
        judged: verdicts and layouts of the tiny model.
        config: the checkpoint's config.
        real: the language model's own config, defaults filled in.
        name: of the class.
        factory: the user's own model.

    Raises:
        LayoutError: the real model has tensors that the tiny one has no match for.
    """
    real_shapes = shapes(real, factory)
    sizes = real_sizes(judged, real, real_shapes)
    witness = Witness(judged.found, real, real_shapes, sizes, _proved(judged), factory)
    patterns = _patterns(judged, real_shapes, sizes, witness)
    prefix = text_prefix(config, factory=factory)
    renames = _renames(judged)
    disk, assembly = disk_patterns(judged, patterns)
    axes = {renames.get(n, n): info for n, info in _axis_infos(judged, sizes, renames).items()}
    for stored, count in _counts(patterns).items():
        axes.setdefault(stored, AxisInfo(count, reason="stored in the tensors' names"))
    layout = ModelLayout(
        name=name,
        axes=axes,
        tensors=tuple(TensorPattern(template(p), _renamed(p.layout, renames)) for p in patterns),
        disk=None
        if disk is None
        else tuple(TensorPattern(t, _renamed(lay, renames)) for t, lay in disk.items()),
        config=_config_terms(judged.found, real, prefix, renames, axes),
        compensations=_compensations(judged),
        tied=_tied(judged),
        assembly=assembly,
        aliases=_aliases(judged, renames),
        notes=judged.notes,
        buffers=tuple(template(p) for p in patterns if p.key in judged.buffers),
    )
    layout.check_axes()
    layout.check_shapes(real_shapes, on_disk=False)
    return _without_towers(_as_built(layout, witness, len(prefix)), config if prefix else real)


def _as_built(layout: ModelLayout, witness: Witness, depth: int) -> ModelLayout:
    """The layout without axes whose widened config would build another model than the widened tensors."""
    axes = dict(layout.axes)
    for name, info in layout.axes.items():
        if info.widenable:
            contradiction = witness.contradiction(layout, (name, *info.joint), depth)
            if contradiction is not None:
                axes[name] = replace(info, widenable=False, reason=contradiction)
    for name, info in layout.axes.items():
        refused = [other for other in info.joint if not axes[other].widenable]
        if info.widenable and refused:
            axes[name] = replace(info, widenable=False, reason=axes[refused[0]].reason)
    return replace(layout, axes=axes)


def _without_towers(layout: ModelLayout, config: Mapping[str, Any]) -> ModelLayout:
    """The layout without growth of hidden where a tower's output is as wide by a number of its own.

    The class would build such a model, and text would run: only images would meet a width that is no more.
    """
    hidden = layout.axes.get("hidden")
    if hidden is None or not hidden.widenable:
        return layout
    for path, value in walk(config):
        tower = OTHER_MODALITY.search(".".join(path[:-1])) and _OUTPUT.search(path[-1])
        if tower and value == hidden.size and ".".join(path) not in layout.config:
            reason = f"{'.'.join(path)} = {value} is the width of what enters the text, and would stay"
            refused = {n: layout.axes[n] for n in ("hidden", *hidden.joint)}
            changed = {n: replace(info, widenable=False, reason=reason) for n, info in refused.items()}
            return replace(layout, axes={**layout.axes, **changed})
    return layout


def _proved(judged: Judgement) -> tuple[str, ...]:
    return tuple(name for name, verdict in judged.verdicts.items() if verdict.proved)


def _patterns(
    judged: Judgement,
    real_shapes: Mapping[str, tuple[int, ...]],
    sizes: Mapping[str, int],
    witness: Witness,
) -> list[Pattern]:
    by_key: dict[str, list[TensorLayout]] = {}
    for family, layout in zip(judged.families, judged.layouts, strict=True):
        by_key.setdefault(skeleton(family.names[0]), []).append(layout)
    grouped: dict[str, dict[str, tuple[TensorLayout, list[tuple[int, ...]]]]] = {}
    for name, shape in real_shapes.items():
        key, indices = split(name)
        fits = [f for f in (fitted(lay, shape, sizes) for lay in by_key.get(key, ())) if f is not None]
        if not fits:
            known = "; ".join(lay.text for lay in by_key.get(key, ())) or "no tensor of that name"
            raise LayoutError(
                f"{name!r} has shape {shape}, which fits nothing in a tiny model of this class: {known}",
                hint="give a layout file (--layout FILE)",
            )
        layout = witness.choose(name, list({f.text: f for f in fits}.values()))
        grouped.setdefault(key, {}).setdefault(layout.text, (layout, []))[1].append(indices)
    return patterns_of({key: list(layouts.values()) for key, layouts in grouped.items()})


def _counts(patterns: Iterable[Pattern]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for pattern in patterns:
        for position, indices in enumerate(pattern.indices):
            name = placeholder(position)
            counts[name] = max(counts.get(name, 0), max(indices) + 1)
    return counts


def _renames(judged: Judgement) -> dict[str, str]:
    """``expert_ffn`` is called ``ffn`` where no other MLP has an inner width."""
    axes = judged.found.axes
    return {"expert_ffn": "ffn"} if "expert_ffn" in axes and "ffn" not in axes else {}


def _aliases(judged: Judgement, renames: Mapping[str, str]) -> dict[str, str]:
    if renames:
        return dict(renames)
    stacked = [
        "experts" in layout.axes()
        for family, layout in zip(judged.families, judged.layouts, strict=True)
        if family.involves("ffn")
    ]
    return {"expert_ffn": "ffn"} if stacked and all(stacked) else {}


def _renamed(layout: TensorLayout, renames: Mapping[str, str]) -> str:
    if not renames:
        return layout.text
    return render([Dim(_rename_term(d.expr, renames), d.role) for d in layout.dims])


def _rename_term(expr: Expr, renames: Mapping[str, str]) -> Expr:
    def change(atom: Axis | Fixed) -> Expr:
        return replace(atom, name=renames.get(atom.name, atom.name)) if isinstance(atom, Axis) else atom

    return with_atoms(expr, change)


def _axis_infos(
    judged: Judgement, sizes: Mapping[str, int], renames: Mapping[str, str]
) -> dict[str, AxisInfo]:
    used = {a for layout in judged.layouts for a in layout.axes()}
    infos = {}
    for name, verdict in judged.verdicts.items():
        known = name in used or verdict.proved or judged.found.axes[name].role in WIDTHS
        if name not in sizes or not known:
            continue
        joint = tuple(renames.get(j, j) for j in verdict.joint)
        infos[name] = AxisInfo(sizes[name], verdict.proved, verdict.reason, joint)
    return infos


def _config_terms(
    found: Coordinates,
    real: ConfigDict,
    prefix: tuple[str, ...],
    renames: Mapping[str, str],
    known: Iterable[str],
) -> dict[str, str]:
    """The config keys of every axis that the layout has and that a widening may have to write."""
    terms = {}
    declared = set(known)
    for path, names in found.terms.items():
        named = [renames.get(n, n) for n in names]
        fixed = all(found.axes[n].role in _NEVER_WRITTEN for n in names if not n.isdigit())
        if fixed or not declared.issuperset(n for n in named if not n.isdigit()):
            continue
        for place in _real_places(path, real, found):
            terms[".".join((*prefix, *place))] = named[0] if len(named) == 1 else f"({' '.join(named)})"
    return terms


def _real_places(path: Path, real: ConfigDict, found: Coordinates) -> list[Path]:
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


def _tied(judged: Judgement) -> tuple[tuple[str, ...], ...]:
    """Tied module names, and the names of the same tensors on disk."""
    on_disk = {t.source: t.name for t in judged.disk or ()}
    groups = []
    for group in judged.tied:
        others = [on_disk[n] for n in group[1:] if on_disk.get(n, n) != n]
        groups.append((*group, *others))
        first = on_disk.get(group[0], group[0])
        if first != group[0]:
            groups.append((first, *(on_disk.get(n, n) for n in group[1:])))
    return tuple(groups)


def _compensations(judged: Judgement) -> tuple[Compensation, ...]:
    """Factors under module names, and again under the names on disk where those differ."""
    on_disk = {t.source: t.name for t in judged.disk or ()}
    found = list(judged.compensations)
    for c in judged.compensations:
        if c.tensor and on_disk.get(c.tensor, c.tensor) != c.tensor:
            found.append(replace(c, tensor=on_disk[c.tensor]))
    return tuple(found)
