"""What an output must be, worked out from its spec, its layout and the sizes of its axes.

The manifest is believed in what was asked for, in the layout, in births and in the names of optimizer state;
whatever follows from these is worked out here and by ``widening.reference``, never read from what the plan
made of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from copy import copy
from dataclasses import replace
from functools import cached_property
from math import ceil, isclose, prod
from typing import Any

import numpy as np

from sparkling_cli.errors import LayoutError
from sparkling_cli.formats.model import Checkpoint
from sparkling_cli.formats.optimizer_states import StateKind, form_of, state_kind, turns
from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.keys import lookup
from sparkling_cli.layout.model import Compensation, ModelLayout
from sparkling_cli.layout.names import NameTemplate
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.manifest import Manifest, Stage
from sparkling_cli.results.account import Kind
from sparkling_cli.spec.choices import ALL
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.tensors import StoredTensor
from sparkling_cli.widening.parts import stream_of
from sparkling_cli.widening.reference import DIAGONAL, MEANS, TURNED, UNIT, Rules, Wanted, copied_axes

#: kinds of state that follow a parameter's dims -> what the reference calls their new entries
_FRESH = {
    StateKind.MOMENT: "",
    StateKind.FACTOR: MEANS,
    StateKind.PRECONDITIONER: DIAGONAL,
    StateKind.BASIS: UNIT,
}
#: what is no state, and zero as a whole
_WEIGHT = "weight"
#: what a state of an unknown name was measured to be -> its kind
_MEASURED = {Kind.COPY.value: StateKind.WEIGHT, Kind.MOMENT.value: StateKind.MOMENT}


class Derivation:
    """What follows from a manifest.

    Attributes:
        spec: what was asked for.
        layout: with the sizes before widening.
        rules: of the arithmetic.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        *earlier, last = manifest.stages
        self.spec = make_spec(last.spec)
        after = manifest.model_layout()
        axes = {
            name: replace(info, size=last.growth[name][0]) if name in last.growth else info
            for name, info in after.axes.items()
        }
        self.layout: ModelLayout = replace(after, axes=axes)
        originals: dict[str, Any] = {}
        for stage in earlier:
            rules = self._rules(stage, originals)
            originals |= {axis: rules.originals_after(axis) for axis in stage.growth}
        self.rules = self._rules(last, originals)
        self._made: dict[tuple[object, ...], Wanted] = {}
        self._in_layers: dict[int, Rules] = {}

    def _rules(self, stage: Stage, originals: Mapping[str, Any]) -> Rules:
        """What was asked for in a stage, given the original of every entry before it."""
        spec, growth = make_spec(stage.spec), dict(stage.growth)
        fan_out, fan_in = spec.init.split("-")
        given = range(*growth.get("vocab", (0, 0))) if spec.vocab_from else ()
        rules = Rules(
            {**self.layout.sizes, **{axis: before for axis, (before, _) in growth.items()}},
            growth,
            fan_out,
            fan_in,
            spec.scaling,
            originals=dict(originals),
            vocab=spec.vocab_fill,
            noise=spec.router_noise,
            means=tuple(spec.vocab_from.get(new, ()) for new in given),
            order=_layers(spec, growth),
            experts=_experts(spec.copies.get(ALL, ())),
        )
        return replace(rules, copied=copied_axes(rules, [pattern.dims for pattern in self.layout.tensors]))

    def faults(self) -> list[str]:
        """Where the manifest's own sizes and births are not what its spec gives."""
        if self._manifest.spec != self._manifest.stages[-1].spec:
            return ["the manifest's spec is not that of its last stage"]
        sizes = self._manifest.model_layout().sizes
        found = []
        for axis, (before, after) in self.rules.growth.items():
            births = self._manifest.births().get(axis, [])
            stage = self._manifest.stages[-1].stage
            if axis == "layers" and sizes.get(axis) == after:
                born = [number for start, stop, number in births for _ in range(start, stop)]
                if [number == stage for number in born] != self._repeated():
                    found.append(f"layers are in the order {self.rules.order}, their births are {births}")
                continue
            wrong = [key for key, counts in self.spec.copies.items() if sum(counts) != after]
            if axis == "experts" and wrong:
                found.append(f"the copies in layer {wrong[0]} are not {after} experts")
            if sizes.get(axis) != after or not births or tuple(births[-1]) != (before, after, stage):
                found.append(f"axis {axis!r} grew from {before} to {after}, its births are {births}")
        return found + self._unasked()

    def _unasked(self) -> list[str]:
        """Growth that the spec does not ask for, or that is not as much."""
        found = []
        growth, before = self.rules.growth, self.layout.sizes
        asked = {self.layout.aliases.get(axis.axis, axis.axis): axis for axis in self.spec.axes}
        grouped = "heads" not in before and "q_per_kv" in before
        for grown in growth:
            if grown not in asked and not (grown == "q_per_kv" and grouped and "heads" in asked):
                found.append(f"axis {grown!r} grew, which was not asked for")
        for name, axis in asked.items():
            parts = ("kv_heads", "q_per_kv") if name == "heads" and grouped else (name,)
            old = new = 1
            for part in parts:
                old *= before.get(part, 0)
                new *= growth[part][1] if part in growth else before.get(part, 0)
            counts = ("heads", "kv_heads", "q_per_kv", "experts", "experts_per_token", "layers")
            step = None if name in counts else self.spec.multiple_of
            exact = old * (axis.factor or 1.0)
            wanted = axis.to or (ceil(exact / step - 1e-9) * step if step else round(exact))
            if new != wanted:
                found.append(f"axis {axis.axis!r} has {new} entries, the spec gives {wanted}")
        return found

    def weight(self, name: str, dims: TensorLayout, dtype: str) -> Wanted:
        """What a weight must be, or optimizer state that is a copy of it.

        Args:
            name: of the weight, where tied the first one of its group.
            dims: its layout.
            dtype: as stored.
        """
        if self.spec.layer_mode == "identity" and self.is_new_layer(name):
            short = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            first = re.sub(r"(?<![^.])\d+(?![^.])", "*", name, count=1)
            silent = self.layout.silent.get(short, self.layout.silent.get(first))
            if silent is not None:
                zero, number = {"moment": "drop", "state": _WEIGHT}, {"scale": 0.0, "offset": silent}
                return self._wanted(dims, dtype, self._in(name), **(zero if silent == 0 else number))
        fitted, new = self._fitted(name)
        scale, offset, consumed = self._compensated(name, fitted)
        fresh = None if new is None else self._compensated(name, new)[0]
        factors = {"consumed": consumed, "scale": scale, "fresh": fresh, "offset": offset}
        rules = self._in(name)
        stack = self.spec.layer_mode == "identity" and self.layout.silent.get(name) == 0
        if stack and "layers" in dims.axes() & self.rules.growth.keys():
            rules = replace(rules, layers="zero")
        return self._wanted(dims, dtype, rules, **factors)

    def _in(self, name: str) -> Rules:
        """The rules in the layer that a tensor is of: which expert is a copy of which may differ in each."""
        if self.spec.copies.keys() <= {ALL}:
            return self.rules
        layer = self._layer(name)
        source = layer if layer is None or not self.rules.order else self.rules.order[layer]
        if source is None or source not in self.spec.copies:
            return self.rules
        if source not in self._in_layers:
            self._in_layers[source] = replace(self.rules, experts=_experts(self.spec.copies[source]))
        return self._in_layers[source]

    def _place(self, name: str, axes: Set[str]) -> tuple[NameTemplate, dict[str, int]] | None:
        """The template with any of these axes that stands for a tensor, and the tensor's indices."""
        for pattern in (*self.layout.tensors, *(self.layout.disk or ())):
            at = pattern.template.at(name) if axes & set(pattern.template.axes) else None
            if at is not None:
                return pattern.template, at
        return None

    def _layer(self, name: str) -> int | None:
        """The layer that a tensor is of; None where it is of none."""
        found = self._place(name, {"layers"})
        return None if found is None else found[1]["layers"]

    def _repeated(self) -> list[bool]:
        """Of every layer, whether one before it has the same source."""
        order = self.rules.order
        return [order.index(source) < target for target, source in enumerate(order)]

    def is_new_layer(self, name: str) -> bool:
        """Whether a tensor is of a layer that the last expansion added."""
        layer = self._layer(name) if "layers" in self.rules.growth else None
        return layer is not None and self._repeated()[layer]

    def is_new(self, name: str) -> bool:
        """Whether a parameter is of a layer, or an expert, that the last expansion added."""
        grown = self.rules.growth.keys() - {"layers"}
        _, at = self._place(name, grown) or (None, {})
        behind = any(at[axis] >= self.rules.growth[axis][0] for axis in grown & at.keys())
        return behind or self.is_new_layer(name)

    def source_name(self, name: str, *, but: str = "") -> str:
        """The weight that one was made from: another one where it is a copy with a name of its own.

        Args:
            name: of the output.
            but: an axis of which the copies count as no copies.
        """
        grown = self.rules.growth.keys() - {but}
        found = self._place(name, grown)
        if found is None:
            return name
        (template, at), rules = found, self._in(name)
        return template.fill({**at, **{a: int(rules.origin(a)[at[a]]) for a in grown & at.keys()}})

    def stream(self, name: str) -> str:
        """The name of a weight's random numbers: that of the module, with the place of its part in it.

        A copied expert with a name of its own has those of its source, a copied layer its own.
        """
        name = self.source_name(name, but="layers")
        for whole, parts in self._assembly:
            for number, part in enumerate(parts):
                at = part.at(name)
                if at is not None:
                    unit = tuple(at[axis] for axis in part.axes if axis not in whole.axes)
                    return stream_of(whole.fill(at), unit if len(parts) == 1 else (*unit, number))
        return name

    def state(self, param: str, slot: str, stored: StoredTensor, taken_for: str = "") -> Wanted:
        """What a piece of optimizer state must be.

        Args:
            param: its parameter.
            slot: its name.
            stored: before widening.
            taken_for: what it was measured to be, where neither its name nor the spec says it.

        Raises:
            LayoutError: the parameter is none of the model's, or the state cannot have been widened.
        """
        name = self.layout.canonical(param)
        pattern = self.layout.module_table.find(name)
        kind = state_kind(slot, stored.dtype, stored.shape, self.layout.shape_of(pattern))
        if slot in self.spec.state and kind is not StateKind.SCALAR:
            given = self.spec.state[slot]
            kind = StateKind.SCALAR if given == "carry" else StateKind(given)
        elif kind is StateKind.UNKNOWN:
            kind = _MEASURED.get(taken_for, StateKind.OTHER)
        form = form_of(slot, stored.shape, self.layout.shape_of(pattern))
        if kind is StateKind.WEIGHT and form is not None:
            wanted = self.weight(name, pattern.dims, stored.dtype)
            return _flattened(_behind_ones(wanted, stored.shape), flat=form.flat)
        if kind in _FRESH and form is not None:
            treatment = self.spec.optimizer
            scale, consumed = 1.0, frozenset[str]()
            if treatment == "asymmetric-scaled" and kind is StateKind.MOMENT:
                scale, _, consumed = self._compensated(name, self._fitted(name)[0])
            elif treatment == "asymmetric-scaled":
                treatment = "asymmetric"
            fresh = kind is StateKind.MOMENT and treatment != "copy" and self.is_new(name)
            known = [place for place, dim in enumerate(form.dims) if dim is not None]
            wanted = self._wanted(
                form.layout(pattern.dims, stored.shape),
                stored.dtype,
                self._in(name),
                consumed=consumed,
                scale=scale,
                moment="drop" if fresh else treatment,
                state=_FRESH[kind],
                own=known[-1] if known else -1,
            )
            if kind is StateKind.FACTOR:
                after = self._wanted(pattern.dims, stored.dtype, self._in(name)).shape
                wanted = _turned(wanted, after[0]) if turns(slot, stored.shape, after) else wanted
            return _flattened(wanted, flat=form.flat)
        if kind is StateKind.OTHER and pattern.dims.axes() & set(self.rules.growth):
            raise LayoutError(f"state {slot!r} of {param!r} has another shape than its parameter, which grew")
        return self.carried(stored)

    def numbers(self, param: str) -> tuple[Wanted, tuple[int, ...]]:
        """What the numbers of a quantized moment must be, and its parameter's shape before widening."""
        shape = self.layout.shape_of(self.layout.module_table.find(self.layout.canonical(param)))
        return self.state(param, "exp_avg", StoredTensor("float32", shape, ())), shape

    def reshaped(self, before: tuple[int, ...], after: tuple[int, ...], dtype: str, *, zero: bool) -> Wanted:
        """Of a part of such a moment, the shapes alone."""
        found = copy(self.carried(StoredTensor(dtype, before, ())))
        found.shape, found.zero, found.whole, found.same = after, zero, True, False
        return found

    def carried(self, stored: StoredTensor) -> Wanted:
        """The same bytes as before."""
        text = "scale " + " ".join(map(str, stored.shape)) if stored.shape else ""
        return self._wanted(parse_layout(text), stored.dtype, self.rules)

    def _wanted(self, dims: TensorLayout, dtype: str, rules: Rules, **options: Any) -> Wanted:
        key = (dims.text, dtype, rules.experts, rules.layers, *sorted(options.items()))
        if key not in self._made:
            self._made[key] = Wanted(dims, rules, dtype, **options)
        return self._made[key]

    @cached_property
    def _assembly(self) -> list[tuple[NameTemplate, list[NameTemplate]]]:
        """Weights of the module that a checkpoint keeps in parts, with their parts."""
        return [(NameTemplate(a), [NameTemplate(b) for b in c]) for a, c in self.layout.assembly.items()]

    @cached_property
    def _items(self) -> list[tuple[NameTemplate, Any]]:
        """Compensations that apply, with the names that they are for."""
        if self.spec.scaling == "none":
            return []
        grown = [
            c for c in self.layout.compensations if c.tensor and (c.axis in self.rules.growth or c.offset)
        ]
        return [(NameTemplate(item.tensor), item) for item in grown]

    def _fitted(self, name: str) -> tuple[float, float | None]:
        """A tensor's factor that was fitted on tokens, and that of its new entries if it is another."""
        stage = self._manifest.stages[-1]
        if not stage.calibration and not stage.calibration_new:
            return 1.0, None
        module = self.stream(name).partition("[")[0]
        return stage.calibration.get(module, 1.0), stage.calibration_new.get(module)

    def _compensated(self, name: str, fitted: float) -> tuple[float, float, frozenset[str]]:
        """A tensor's factor and offset, and the axes whose fan-in factor it carries, entry by entry.

        What becomes ``c (w + o) - o`` is multiplied by ``c``, and ``(c - 1) o`` is added (App. D.1, for norms
        that compute ``1 + w``).
        """
        scale, offset, consumed = fitted, 0.0, set()
        for template, item in self._items:
            if template.matches(name):
                before, after = self.rules.growth.get(item.axis, (1, 1))
                power = _multiplier(item, before, after)
                scale *= power
                fan_in = item.fan_in and item.axis in self.rules.growth
                if fan_in:
                    consumed.add(item.axis)
                if item.offset:
                    whole = fitted * power * (float(self.rules.factors(item.axis)[0]) if fan_in else 1.0)
                    offset += (whole - 1.0) * item.offset
        return scale, offset, frozenset(consumed)

    def _list_faults(self, before: Mapping[str, Any], after: Mapping[str, Any], table: str) -> list[str]:
        """Lists with an entry for each layer whose entries are not those of the layers' sources."""
        found = []
        for key, old in before.items():
            new = after.get(key)
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                found += self._list_faults(old, new, f"{table}{key}.")
            if not isinstance(old, list) or not isinstance(new, list) or len(old) == len(new):
                continue
            if (len(old), len(new)) == self.rules.growth.get("layers"):
                every = old == [*range(len(old))]  # the numbers of all layers
                wanted = [*range(len(new))] if every else [old[source] for source in self.rules.order]
                if new != wanted:
                    found.append(
                        f"the config says {table}{key} = {new!r}, the layers' sources give {wanted!r}"
                    )
        return found

    def kind_faults(self, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
        """Kinds of layers that the class makes by itself of a deeper output's config, not of the source's.

        Args:
            before: the source's config as its class completes it.
            after: the output's.
        """
        faults = self._list_faults(_kinds(before), _kinds(after), "")
        return [f"as its class completes it, {fault}" for fault in faults]

    def config_faults(self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[str]:
        """Config keys of the output that are not what its sizes give.

        Args:
            before: the source's config.
            after: the output's.
        """
        if after is None:
            return []
        sizes = {**self.layout.sizes, **{axis: grown[1] for axis, grown in self.rules.growth.items()}}
        found = []
        for key, value in self.layout.config_sizes(sizes).items():
            seen = lookup(after, key)
            if any(one != value for one in (seen if isinstance(seen, list) else [seen])):
                found.append(f"the config says {key} = {seen!r}, the axes give {value}")
        found += self._list_faults(before or {}, after, "")
        factors: dict[str, float] = {}
        for item in self.layout.compensations:
            if item.config and item.axis in self.rules.growth and self.spec.scaling != "none":
                old, new = self.rules.growth[item.axis]
                own = _multiplier(item, old, new)
                own *= float(self.rules.factors(item.axis)[0]) if item.fan_in else 1.0
                factors[item.config] = factors.get(item.config, 1.0) * own
        for key, factor in factors.items():
            old_value, seen = lookup(before or {}, key), lookup(after, key)
            if isinstance(old_value, (int, float)) and not (
                isinstance(seen, (int, float)) and isclose(seen, old_value * factor, rel_tol=1e-9)
            ):
                found.append(f"the config says {key} = {seen!r}, {old_value} times {factor:g} is expected")
        return found


def _kinds(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's lists without those of sizes, which may have grown beside the layers."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found[key] = _kinds(value)
        elif isinstance(value, list) and all(isinstance(item, str) or item in (0, 1) for item in value):
            found[key] = value
    return found


def _multiplier(item: Compensation, before: int, after: int) -> float:
    """A factor that follows from an axis's sizes; of roots in bfloat16, from the bits of these."""
    if not item.rounded:
        return float((after / before) ** item.power)
    bits = np.sqrt(np.array([before, after], np.float64)).astype(np.float32).view(np.uint32)
    upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16
    old, new = upper.astype(np.uint32).view(np.float32).astype(np.float64)
    return float((new / old) ** (2 * item.power))


def _layers(spec: ExpansionSpec, growth: Mapping[str, tuple[int, int]]) -> tuple[int, ...]:
    """The layer that each one of a deeper model is made from; () where there are no more of them."""
    if "layers" not in growth:
        return ()
    before, after = growth["layers"]
    own, more = list(range(before)), after - before
    if spec.layer_mode == "stack" or spec.at == "end":
        return (*own, *(own * ceil(more / before))[-more:])
    if isinstance(spec.at, str):  # floor(t b / a) = i where i a / b <= t < (i + 1) a / b
        ends = [-(-layer * after // before) for layer in range(before + 1)]
        return tuple(layer for layer in own for _ in range(ends[layer], ends[layer + 1]))
    behind = sorted(set(spec.at))
    return tuple(sorted([*own, *(behind[number % len(behind)] for number in range(more))]))


def _experts(counts: Sequence[int]) -> tuple[int, ...]:
    """The expert that each one is made from, given how many there shall be of each: copies in rounds."""
    left, found = list(counts), []
    while any(left):
        found += [expert for expert, count in enumerate(left) if count > 0]
        left = [max(count - 1, 0) for count in left]
    return tuple(found)


def _flattened(wanted: Wanted, *, flat: bool) -> Wanted:
    """The same of a tensor that is stored as one dim."""
    if not flat:
        return wanted
    found = copy(wanted)
    found.before, found.shape = (prod(wanted.before),), (prod(wanted.shape),)
    return found


def _behind_ones(wanted: Wanted, stored: tuple[int, ...]) -> Wanted:
    """The same of a tensor that is stored with dims of one entry before its parameter's."""
    ones = stored[: max(len(stored) - len(wanted.before), 0)]
    if not ones:
        return wanted
    found = copy(wanted)
    found.before, found.shape = ones + wanted.before, ones + wanted.shape
    return found


def _turned(wanted: Wanted, rows: int) -> Wanted:
    """What a factor of columns must be that has become one of rows."""
    found = copy(wanted)
    found.shape, found.state, found.whole, found.same = (rows, 1), TURNED, not wanted.zero, False
    return found


def assembled(checkpoint: Checkpoint, layout: ModelLayout) -> tuple[dict[str, StoredTensor], set[str]]:
    """Weights under the module's names, made of those on disk as the layout's ``assembly`` says.

    Returns:
        Module name -> tensor, and the keys of what they are made of.
    """
    places: dict[str, dict[tuple[tuple[int, ...], int], StoredTensor]] = {}
    used: set[str] = set()
    for text, parts in layout.assembly.items():
        whole = NameTemplate(text)
        for number, part in enumerate(map(NameTemplate, parts)):
            for name, key in checkpoint.weights.items():
                at = part.at(name)
                if at is not None:
                    stack = tuple(at[axis] for axis in part.axes if axis not in whole.axes)
                    places.setdefault(whole.fill(at), {})[stack, number] = checkpoint.tensors[key]
                    used.add(key)
    return {name: _stacked(parts) for name, parts in places.items()}, used


def _stacked(parts: Mapping[tuple[tuple[int, ...], int], StoredTensor]) -> StoredTensor:
    """Tensors that lie behind each other on their first dim, and are stacked before it."""
    first = next(iter(parts.values()))
    depth = len(next(iter(parts))[0])
    counts = tuple(1 + max(stack[dim] for stack, _ in parts) for dim in range(depth))
    extents, ends = [], dict.fromkeys((stack for stack, _ in parts), 0)
    for (stack, _), stored in sorted(parts.items(), key=lambda item: item[0]):
        for extent in stored.extents:
            strides = None if extent.strides is None else (0,) * depth + extent.strides
            start = (*stack, extent.start[0] + ends[stack], *extent.start[1:])
            extents.append(extent._replace(start=start, shape=(1,) * depth + extent.shape, strides=strides))
        ends[stack] += stored.shape[0]
    return StoredTensor(first.dtype, (*counts, max(ends.values()), *first.shape[1:]), tuple(extents))
