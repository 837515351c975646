"""The real model as a model where sizes alone do not tell which of two layouts a tensor has.

In a tiny model no two sizes are equal; in a real one a sliding layer's heads may be as wide as a full
layer's latent values. Doubling an axis in the real config, on the meta device, says which it is, and
whether the config that a widening writes builds the model that it writes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from sparkling_cli.errors import LayoutError
from sparkling_cli.layout.expr import Expr, TensorLayout, axis_names
from sparkling_cli.layout.keys import Path, get_path, path_of
from sparkling_cli.layout.model import ModelLayout
from sparkling_cli.layout.parse import parse_expr
from sparkling_cli.models.axes import TinyAxes
from sparkling_cli.models.search import copied
from sparkling_cli.models.shrink import Shapes, changed, moved_dims, tried_shapes
from sparkling_cli.models.sizes import OTHER_MODALITY, tower_outputs, tower_widths
from sparkling_cli.models.skeleton import ConfigDict, ModelFactory
from sparkling_cli.models.tiny_config import chosen_layers, layer_count, real_path

#: Names of modules that are a tower, that lead from one into the text, and that do so at a tower's end.
_TOWER = re.compile(rf"{OTHER_MODALITY.pattern}|visual|tower|encoder")
_INNER_CONNECTION = re.compile(r"merger|connector|aligner")
_CONNECTION = re.compile(
    rf"{_INNER_CONNECTION.pattern}|multi_?modal|(^|_)mm_|projector|embed_(vision|audio|image)"
)
#: Names of tensors that text does not use.
_FROM_TOWER = re.compile(rf"{OTHER_MODALITY.pattern}|visual|{_CONNECTION.pattern}")


@dataclass(frozen=True)
class RealModel:
    """Chooses between layouts of one real tensor; builds the real model again only if it has to."""

    found: TinyAxes
    config: ConfigDict
    shapes: Shapes
    sizes: Mapping[str, int]
    proved: Sequence[str]
    factory: ModelFactory | None
    _moved: dict[str, Shapes | str] = field(default_factory=dict)

    def choose(self, name: str, layouts: Sequence[TensorLayout]) -> TensorLayout:
        """The layout of a tensor among those that fit its shape.

        Raises:
            LayoutError: they differ in what would grow, and the real model tells them not apart.
        """
        if len(layouts) == 1:
            return layouts[0]
        left = self._different(layouts)
        if len(left) > 1:
            left = self._different([lay for lay in layouts if self._moves_so(name, lay, layouts)])
        if len(left) != 1:
            texts = ", ".join(lay.text for lay in layouts)
            raise LayoutError(
                f"{name!r} of shape {self.shapes[name]} may have any of the layouts {texts}",
                hint="give a layout file (--layout FILE)",
            )
        return left[0]

    def contradiction(self, layout: ModelLayout, axes: Sequence[str], depth: int) -> str | None:
        """Why the config of a widened checkpoint would not fit its tensors; None if it does.

        Args:
            layout: of the real model.
            axes: doubled together.
            depth: how many keys lead from the checkpoint's config to the language model's own.
        """
        sizes = {a: 2 * n if a in axes else n for a, n in layout.sizes.items()}
        values = {path_of(key)[depth:]: n for key, n in layout.config_sizes(sizes).items()}
        built = tried_shapes(changed(self.config, values), self.factory)
        if isinstance(built, str):
            return f"the class refuses twice as many: {' '.join(built.split()):.300}"
        if built.keys() != self.shapes.keys():
            other = sorted(built.keys() ^ self.shapes.keys())[0]
            return f"a config with twice as many builds a model with other tensors, e.g. {other}"
        for name, shape in built.items():
            expected = layout.module_table.find(layout.canonical(name)).dims.shape(sizes)
            if shape != expected:
                return f"a config with twice as many makes {name} {shape}, not {expected}"
        return None

    def is_output(self, path: Path) -> bool:
        """Whether a number of the config makes output rows only: what it makes is read elsewhere."""
        built = tried_shapes(changed(self.config, {path: 2 * get_path(self.config, path)}), self.factory)
        if isinstance(built, str) or built.keys() != self.shapes.keys():
            return False
        return {dim for _, dim in moved_dims(self.shapes, built)} == {0}

    def _different(self, layouts: Sequence[TensorLayout]) -> list[TensorLayout]:
        """One layout of each that does the same to this tensor, whatever proved axis grows.

        The role of a dim in which nothing grows says nothing.
        """
        groups: dict[object, TensorLayout] = {}
        for layout in layouts:
            effects = [self._effect(dim.expr) for dim in layout.dims]
            key = tuple((dim.role, e) if e else () for dim, e in zip(layout.dims, effects, strict=True))
            groups.setdefault(key, layout)
        return list(groups.values())

    def _effect(self, expr: Expr) -> tuple[object, ...]:
        """For every proved axis in a term, which entry each entry copies when it triples."""
        axes = sorted(set(axis_names(expr)) & set(self.proved))
        return tuple((axis, copied(str(expr), [axis], self.sizes)) for axis in axes)

    def _moves_so(self, name: str, layout: TensorLayout, others: Sequence[TensorLayout]) -> bool:
        """Whether doubling each axis of any candidate gives the real tensor the shape that this one says."""
        for axis in sorted({a for lay in others for a in lay.axes()} & set(self.proved)):
            joint = {axis, *(self.found.coupled if axis == "hidden" else ())}
            if axis not in self._moved:
                self._moved[axis] = tried_shapes(self._resized(joint), self.factory)
            moved = self._moved[axis]
            grown = {a: n * 2 if a in joint else n for a, n in self.sizes.items()}
            if not isinstance(moved, str) and layout.shape(grown) != moved.get(name):
                return False
        return True

    def _resized(self, axes: set[str]) -> ConfigDict:
        values = {}
        layers = chosen_layers(self.config, layer_count(self.found.config))
        for path, names in self.found.terms.items():
            place, known = real_path(path, layers), [n for n in names if n.isdigit() or n in self.sizes]
            if len(known) < len(names):
                continue
            value = prod(int(n) if n.isdigit() else self.sizes[n] * (2 if n in axes else 1) for n in names)
            # A size that the config leaves to be derived is written, so that it does not move along.
            if get_path(self.config, place) is None or any(n in axes for n in names):
                values[place] = value
        return changed(self.config, values)


def as_built(layout: ModelLayout, model: RealModel, depth: int) -> ModelLayout:
    """The layout without axes whose widened config would build another model than the widened tensors.

    Two that the class refuses one by one may grow together: tables of rotary frequencies, say, are as long as
    a head, which some configs have as hidden over heads.
    """
    axes = dict(layout.axes)
    refused: dict[str, str] = {}
    for name, info in layout.axes.items():
        contradiction = model.contradiction(layout, (name, *info.joint), depth) if info.widenable else None
        if contradiction is not None:
            refused[name] = contradiction
            axes[name] = replace(info, widenable=False, reason=contradiction)
    alone = [name for name in refused if not layout.axes[name].joint]
    for one, other in itertools.combinations(alone, 2):
        paired = axes[one].widenable or axes[other].widenable
        if not paired and model.contradiction(layout, (one, other), depth) is None:
            axes[one] = replace(layout.axes[one], joint=(other,))
            axes[other] = replace(layout.axes[other], joint=(one,))
    for name, info in layout.axes.items():
        held = [other for other in info.joint if not axes[other].widenable]
        if info.widenable and held:
            axes[name] = replace(info, widenable=False, reason=axes[held[0]].reason)
    return replace(layout, axes=axes)


def without_towers(
    layout: ModelLayout, config: Mapping[str, Any], model: RealModel, prefix: Path
) -> ModelLayout:
    """The layout without growth of hidden where a tower's output is as wide by a number of its own.

    The class would build such a model, and text would run: only images would meet a width that is no more.
    """
    hidden = layout.axes.get("hidden")
    if hidden is None or not hidden.widenable:
        return layout
    paths = tower_outputs(config if prefix else model.config, hidden.size)
    built = [p for p in tower_widths(model.config, hidden.size) if (*prefix, *p) not in paths]
    paths += [(*prefix, *p) for p in built if model.is_output(p)]
    fixed = next(
        (".".join(path) for path in paths if not _is_hidden(layout.config.get(".".join(path)))), None
    )
    fixed = fixed or _connection_that_stays(layout, model)
    if fixed is None:
        return layout
    reason = f"{fixed} = {hidden.size} is the width of what enters the text, and would stay"
    refused = {n: layout.axes[n] for n in ("hidden", *hidden.joint)}
    changed = {n: replace(info, widenable=False, reason=reason) for n, info in refused.items()}
    return replace(layout, axes={**layout.axes, **changed})


def _is_hidden(term: str | None) -> bool:
    return term is not None and "hidden" in axis_names(parse_expr(term))


def _connection_that_stays(layout: ModelLayout, model: RealModel) -> str | None:
    """What leads from a tower into the text, is as wide as the text, and does not grow with it.

    Judged by what the class builds, not by the key that sizes it. Of every module that connects the two some
    tensor grows, if any of its sizes is the text's hidden size; and so does one of all outside the text.

    Returns:
        a tensor and which of its dims; None where all is well, or the model has no tower.
    """
    if not any(isinstance(v, Mapping) and OTHER_MODALITY.search(k) for k, v in model.config.items()):
        return None
    groups: dict[str, list[str]] = {}
    for name in model.shapes:
        connection = _connection(name)
        for group in ([connection] if connection else []) + ([""] if _FROM_TOWER.search(name) else []):
            groups.setdefault(group, []).append(name)
    for names in groups.values():
        dims = [
            (n, i) for n in names for i, size in enumerate(model.shapes[n]) if size == layout.sizes["hidden"]
        ]
        grown = ("hidden" in layout.module_table.find(layout.canonical(name)).dims.axes() for name in names)
        if dims and not any(grown):
            return "dim {1} of {0}".format(*dims[0])
    return None


def _connection(name: str) -> str | None:
    """The module that a tensor lies in, if its name says that it leads from a tower into the text."""
    parts = name.split(".")[:-1]
    for i, part in enumerate(parts):
        inside = any(_TOWER.search(outer) for outer in parts[:i])
        if (_INNER_CONNECTION if inside else _CONNECTION).search(part):
            return ".".join(parts[: i + 1])
    return None
