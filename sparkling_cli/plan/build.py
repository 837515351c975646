"""Checkpoint + layout + spec -> plan: one row per output tensor, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from sparkling_cli.errors import CheckpointError, LayoutError, SpecError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.formats.states import StateKind, state_kind
from sparkling_cli.layout.model import Compensation, ModelLayout, TensorPattern
from sparkling_cli.layout.names import NameTemplate, skeleton
from sparkling_cli.plan.advice import notes_for, warnings_for
from sparkling_cli.plan.model import Plan, Row
from sparkling_cli.plan.naming import Weight, weights_of
from sparkling_cli.plan.resolve import resolve_growth
from sparkling_cli.plan.state_checks import check_numbers, check_pairs
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.storage.tensors import FLOATING, StoredTensor
from sparkling_cli.widening.geometry import Fill, Growth, Treatment, View, target_shape, view_of

_FILLS = {"copy": Fill.COPY, "zero": Fill.ZERO, "random": Fill.RANDOM}


def build_plan(checkpoint: Checkpoint, layout: ModelLayout, spec: ExpansionSpec) -> Plan:
    """The whole widening, checked: every tensor has a layout and the shape that it says.

    Raises:
        SpecError: the spec asks for what this model cannot have.
        LayoutError: tensors and layout disagree.
        CheckpointError: optimizer state that cannot be widened.
    """
    growth = resolve_growth(spec, layout)
    views = _Views(layout, growth, treatment_of(spec), spec)
    weights, renamed = weights_of(checkpoint, layout, spec.names)
    rows = _weight_rows(weights, views)
    for state in checkpoint.states:
        if not layout.module_table.has(layout.canonical(state.param)):
            raise CheckpointError(f"optimizer state of {state.param!r}, which is no parameter of the model")
        for slot, key in state.tensors.items():
            rows.append(_state_row(state.param, slot, key, checkpoint.tensors[key], views))
    check_pairs(checkpoint)
    if not spec.allow_nonfinite:
        check_numbers(checkpoint)
    scalars = {
        f"{state.param}.{name}": 0.0
        for state in checkpoint.states
        for name in state.scalars
        if spec.optimizer == "drop" and name == "step"
    }
    return Plan(
        source=checkpoint,
        layout=layout,
        spec=spec.as_data(),
        growth=growth,
        rows=tuple(rows),
        config=_config(checkpoint, layout, growth, views),
        scalars=scalars,
        seed=spec.seed,
        notes=notes_for(checkpoint, layout, spec, growth, renamed),
        warnings=warnings_for(checkpoint, spec),
    )


def treatment_of(spec: ExpansionSpec) -> Treatment:
    """The spec's initialization pair and scaling as geometry rules."""
    fan_out, fan_in = spec.init.split("-")
    return Treatment(_FILLS[fan_out], _FILLS[fan_in], spec.scaling)


def sizes_after(layout: ModelLayout, growth: Mapping[str, Growth]) -> dict[str, int]:
    """Axis sizes after widening."""
    return {**layout.sizes, **{name: g.target for name, g in growth.items()}}


@dataclass(frozen=True)
class _Views:
    """Views of patterns, made once each: 40,000 tensors share a few dozen."""

    layout: ModelLayout
    growth: Mapping[str, Growth]
    treatment: Treatment
    spec: ExpansionSpec

    @cached_property
    def _made(self) -> dict[tuple[str, frozenset[str], str], tuple[View, tuple[int, ...]]]:
        return {}

    @cached_property
    def _recipes(self) -> dict[str, _Recipe]:
        return {}

    def recipe(self, pattern: TensorPattern, name: str) -> _Recipe:
        """What becomes of a weight, worked out once for all weights of a pattern.

        Args:
            pattern: stands for the weight.
            name: of the weight; only in a pattern of a compensated tensor's skeleton it makes a difference.
        """
        found = self._recipes.get(pattern.name)
        if found is None:
            view, shape = self.of(pattern, self.layout.shape_of(pattern), name, "")
            scale, offset = self.factor(name)
            changed = scale != 1.0 or offset != 0.0 or not all(dim.identity for dim in view)
            found = _Recipe(self.layout.shape_of(pattern), view, shape, scale, offset, changed)
            if pattern.template.key not in self._compensations:
                self._recipes[pattern.name] = found
        return found

    @cached_property
    def _compensations(self) -> dict[str, list[Compensation]]:
        found: dict[str, list[Compensation]] = {}
        for item in self.layout.compensations:
            if item.tensor and item.axis in self.growth and self.spec.scaling != "none":
                found.setdefault(skeleton(NameTemplate(item.tensor).key), []).append(item)
        return found

    def compensations(self, name: str) -> list[Compensation]:
        """Factors that this tensor carries for the axes that grow."""
        return [
            c for c in self._compensations.get(skeleton(name), ()) if NameTemplate(c.tensor).matches(name)
        ]

    def of(
        self, pattern: TensorPattern, shape: tuple[int, ...], name: str, slot: str
    ) -> tuple[View, tuple[int, ...]]:
        """View and target shape of a tensor; its source shape is checked."""
        consumed = frozenset(c.axis for c in self.compensations(name) if c.fan_in)
        key = (pattern.layout, consumed, slot)
        if key not in self._made:
            view = view_of(pattern.dims, self.layout.sizes, self.growth, self.treatment, consumed=consumed)
            if slot:
                view = state_view(view, self.spec.optimizer)
            self._made[key] = (view, target_shape(view))
        if shape != self.layout.shape_of(pattern):
            self.layout.check_one(name, pattern, shape)
        return self._made[key]

    def factor(self, name: str) -> tuple[float, float]:
        """``(scale, offset)`` of a tensor's compensations: ``c (w + o) - o = c w + (c - 1) o``."""
        scale, offset = 1.0, 0.0
        for item in self.compensations(name):
            grown = self.growth[item.axis]
            power = (grown.target / grown.source) ** item.power
            scale *= power
            if item.offset:
                whole = power * (self.treatment.alpha(grown) if item.fan_in else 1.0)
                if item.fan_in and self.treatment.per_column and grown.target % grown.source:
                    raise SpecError(
                        "scaling 'function' at a fractional factor is not possible here: the final norm "
                        "computes (1 + w), so its factor is not one number",
                        hint="use scaling 'rms', or a whole factor",
                    )
                offset += (whole - 1.0) * item.offset
        return scale, offset


def state_view(view: View, optimizer: str) -> View:
    """The view of a moment: old entries kept, new ones zero (Eq. 24), or the other treatments."""
    scaled = optimizer == "asymmetric-scaled"
    fill = Fill.COPY if optimizer == "copy" else Fill.ZERO
    return tuple(
        replace(
            dim,
            runs=tuple(
                replace(
                    run,
                    scale=run.scale if scaled else 1.0,
                    fill=fill if run.new else Fill.COPY,
                    shield=False,
                )
                for run in dim.runs
            ),
        )
        for dim in view
    )


class _Recipe(NamedTuple):
    """What becomes of a weight of shape ``source``: see :class:`~sparkling_cli.plan.model.Row`."""

    source: tuple[int, ...]
    view: View
    shape: tuple[int, ...]
    scale: float
    offset: float
    changed: bool


def _weight_rows(weights: Iterable[Weight], views: _Views) -> list[Row]:
    """A row per weight."""
    rows = []
    for key, name, module, stored, pattern, stream in weights:
        source, view, shape, scale, offset, changed = views.recipe(pattern, module)
        if stored.shape != source:
            views.layout.check_one(name, pattern, stored.shape)
        dtype = stored.dtype
        if changed and dtype not in FLOATING:
            raise CheckpointError(
                f"{name!r} is stored as {dtype}, in which new weights cannot be computed",
                hint="dequantize the checkpoint to bfloat16 or float32 first",
            )
        rows.append(Row(key, name, "", stored, dtype, shape, view, scale, offset, False, stream, pattern))
    return rows


def _state_row(param: str, slot: str, key: str, stored: StoredTensor, views: _Views) -> Row:
    pattern = views.layout.module_table.find(views.layout.canonical(param))
    weight_shape = pattern.dims.shape(views.layout.sizes)
    kind = state_kind(slot, stored.shape, weight_shape)
    optimizer = views.spec.optimizer
    if kind is StateKind.SCALAR:
        return _unchanged(param, slot, key, stored)
    if kind is StateKind.OTHER:
        return _unwidened(param, slot, key, stored, pattern, views)
    like_weight = kind is StateKind.WEIGHT
    view, shape = views.of(pattern, stored.shape, param, "" if like_weight else slot_class(optimizer))
    scale, offset = views.factor(param) if like_weight or optimizer == "asymmetric-scaled" else (1.0, 0.0)
    return Row(
        key=key,
        name=param,
        slot=slot,
        source=stored,
        dtype=stored.dtype,
        shape=shape,
        view=view,
        scale=scale,
        offset=offset if like_weight else 0.0,
        zero=optimizer == "drop" and not like_weight,
        stream=views.layout.canonical(param),
    )


def slot_class(optimizer: str) -> str:
    """Views of moments are shared by all state names under one treatment."""
    return f"moment:{optimizer}"


def _unwidened(
    param: str, slot: str, key: str, stored: StoredTensor, pattern: TensorPattern, views: _Views
) -> Row:
    """State of another shape than its parameter's can only be carried over where nothing grows."""
    if pattern.dims.axes() & set(views.growth):
        raise CheckpointError(
            f"optimizer state {slot!r} of {param!r} has shape {stored.shape}, the parameter has "
            f"{pattern.dims.shape(views.layout.sizes)}: factored or quantized state cannot be widened",
            hint="expand a directory without the optimizer file, and restart the optimizer",
        )
    return _unchanged(param, slot, key, stored)


def _unchanged(param: str, slot: str, key: str, stored: StoredTensor) -> Row:
    identity = view_of(_plain(stored.shape), {}, {}, Treatment())
    return Row(key, param, slot, stored, stored.dtype, stored.shape, identity, stream=param)


def _plain(shape: tuple[int, ...]):  # type: ignore[no-untyped-def]
    from sparkling_cli.layout.parse import parse_layout

    return parse_layout("scale " + " ".join(map(str, shape)) if shape else "")


def _config(
    checkpoint: Checkpoint, layout: ModelLayout, growth: Mapping[str, Growth], views: _Views
) -> dict[str, object]:
    """Config keys whose value changes, and keys that were implied before and must now be said."""
    before = layout.config_sizes(layout.sizes)
    after = layout.config_sizes(sizes_after(layout, growth))
    found = _flat(checkpoint.config or {})
    changed: dict[str, object] = {}
    for key, value in after.items():
        if value != before[key] or (key not in found or found[key] is None):
            old = found.get(key)
            changed[key] = [value] * len(old) if isinstance(old, list) else value
    for item in layout.compensations:
        if item.config and item.axis in growth and views.spec.scaling != "none":
            old = found.get(item.config)
            if not isinstance(old, (int, float)):
                raise LayoutError(f"config key {item.config!r} must be a number to be scaled, found {old!r}")
            grown = growth[item.axis]
            factor = (grown.target / grown.source) ** item.power
            changed[item.config] = float(changed.get(item.config, old)) * (  # type: ignore[arg-type]
                factor * (views.treatment.alpha(grown) if item.fan_in else 1.0)
            )
    return changed


def _flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    return dict(_items(config, prefix))


def _items(config: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
