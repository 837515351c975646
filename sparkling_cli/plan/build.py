"""Checkpoint + layout + spec -> plan: recipes, and one row per output tensor, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

from sparkling_cli.errors import CheckpointError, SpecError
from sparkling_cli.formats.detect import format_of
from sparkling_cli.formats.model import Checkpoint, Declared, Further, OutputFile, OutputRequest
from sparkling_cli.formats.optimizer_states import (
    REFUSED,
    Form,
    StateKind,
    base_name,
    changes_sides,
    form_of,
    is_apart,
    is_named,
    state_kind,
    turns,
)
from sparkling_cli.formats.other_files import OpenFile, lay_out_further
from sparkling_cli.formats.safetensors import SafetensorsFile
from sparkling_cli.layout.depth import LAYERS, deeper_layout, silent_value
from sparkling_cli.layout.expr import TensorLayout
from sparkling_cli.layout.model import Compensation, ModelLayout, TensorPattern
from sparkling_cli.layout.names import NameTemplate, skeleton
from sparkling_cli.layout.parse import parse_layout
from sparkling_cli.plan.account import (
    Growing,
    Sorted,
    Stray,
    account_of,
    check_carry,
    further_notes,
    sort_further,
)
from sparkling_cli.plan.advice import check_locked, notes_for, small_share, turned_notes
from sparkling_cli.plan.config import changed_config
from sparkling_cli.plan.deepen import Orders, copies_on_disk, deeper_source, is_new, orders_of
from sparkling_cli.plan.model import CARRIED, Calibration, Plan, Recipe, Row
from sparkling_cli.plan.naming import Weight, weights_of
from sparkling_cli.plan.quantized import QuantizedParts, quantized_parts
from sparkling_cli.plan.resolve import resolve_growth
from sparkling_cli.plan.state_checks import check_numbers, check_pairs, stateless_warning
from sparkling_cli.plan.state_names import Known, ways
from sparkling_cli.plan.symmetry import check_pair, treatment_of, with_fills
from sparkling_cli.results.account import Kind
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.storage.tensors import FLOATING, StoredTensor
from sparkling_cli.widening.derived import turned
from sparkling_cli.widening.geometry import (
    Fill,
    Growth,
    Run,
    Span,
    Treatment,
    View,
    growth_at,
    target_shape,
    view_of,
)


def build_plan(
    checkpoint: Checkpoint,
    layout: ModelLayout,
    spec: ExpansionSpec,
    originals: Mapping[str, tuple[Span, ...]] | None = None,
    calibration: Calibration | None = None,
) -> Plan:
    """The whole widening, checked: every tensor has a layout and the shape that it says.

    Args:
        checkpoint: the source.
        layout: its layout.
        spec: what is asked for.
        originals: of axes that have grown before (see :class:`~sparkling_cli.widening.geometry.Growth`).
        calibration: factors fitted on tokens.

    Raises:
        SpecError: the spec asks for what this model cannot have.
        LayoutError: tensors and layout disagree.
        CheckpointError: optimizer state that cannot be widened.
    """
    treatment, earlier = treatment_of(spec), originals or {}
    growth = {
        axis: replace(grown, originals=earlier.get(axis, ()))
        for axis, grown in resolve_growth(spec, layout).items()
    }
    check_pair(growth, layout, treatment)
    growth = with_fills(growth, layout, treatment)
    given, shallow = checkpoint, layout
    orders = orders_of(layout, growth, checkpoint.format)
    if orders:
        checkpoint = deeper_source(checkpoint, layout, orders)
    if LAYERS in orders:
        layout = deeper_layout(layout, orders[LAYERS])
    recipes = _Recipes(layout, growth, treatment, spec, calibration or Calibration(), orders)
    drawn = "random" in (*spec.init.split("-"), spec.vocab_fill) or spec.router_noise > 0
    streams = drawn or spec.scaling == "calibrated"
    weights, renamed = weights_of(checkpoint, layout, spec.names, random=streams)
    rows = _weight_rows(weights, recipes)
    known = Known({weight.module: weight.stored for weight in weights}, checkpoint, layout, spec)
    kinds, measured = known.state_kinds()
    strays: list[Stray] = []
    rows += _state_rows(checkpoint, recipes, kinds, strays)
    growing = Growing.of(recipes.all)
    among = [stray.judged(growing, spec.carry) for stray in strays]
    further = (*checkpoint.further, *among)
    if spec.carry:
        check_carry(spec.carry, further, {name for row in rows for name in (row.name, row.slot)})
    found = sort_further(further, growing, spec.carry, known.copied)
    rows += _further_rows(checkpoint, found, recipes)
    check_pairs(checkpoint)
    if not spec.allow_nonfinite:
        check_numbers(checkpoint)
    notes = (*turned_notes(rows), *further_notes(found))
    moments = any(recipe.kind in (Kind.MOMENT, Kind.FACTOR) for recipe in recipes.all)
    warnings = (
        check_locked(given, shallow, spec, growth, moments=moments),
        stateless_warning(given),
        small_share(shallow, growth),
    )
    scalars = {
        f"{state.param}.{name}": 0.0
        for state in checkpoint.states
        for name in state.scalars
        if spec.optimizer == "drop" and name == "step"
    }
    rewritten = {item.file for item, _ in found.widened} & set(checkpoint.further_files)
    carried = tuple(path for path in checkpoint.carried if path not in rewritten)
    source, read = (replace(one, carried=carried) if rewritten else one for one in (given, checkpoint))
    return Plan(
        source=source,
        layout=shallow,
        spec=spec,
        growth=growth,
        treatment=recipes.treatment,
        recipes=recipes.all,
        rows=tuple(rows),
        config=changed_config(given, shallow, growth, recipes.treatment, spec.scaling),
        scalars=scalars,
        calibration=calibration,
        account=account_of(rows, found),
        notes=(*notes_for(given, shallow, spec, growth, renamed), *measured, *notes),
        warnings=tuple(warning for warning in warnings if warning is not None),
        read=read if orders else None,
    )


def with_calibration(plan: Plan, calibration: Calibration) -> Plan:
    """The same plan with factors that were fitted on tokens."""
    originals = {axis: grown.originals for axis, grown in plan.growth.items()}
    made = build_plan(plan.source, plan.layout, plan.spec, originals, calibration)
    notes = (*plan.notes, calibration.note) if calibration.note else plan.notes
    return replace(made, notes=notes, warnings=plan.warnings)


def lay_out(plan: Plan) -> tuple[OutputFile, ...]:
    """Every output file of a plan, by the source's own format."""
    strays = {item.key: item.weight for item in plan.source.further if item.weight}
    declared = tuple(
        Declared(
            key=key,
            name=name if recipe.kind is Kind.WEIGHT else strays.get(key, ""),
            dtype=recipe.dtype,
            shape=recipe.shape,
            source_file=source.extents[0].path if source.extents else "",
            around=target_shape(recipe.view) if recipe.blocks is not None else (),
            view=recipe.view,
        )
        for key, name, source, recipe, *_ in plan.rows
    )
    own, rewritten = lay_out_further(plan.source, declared)
    request = OutputRequest(own, plan.config, plan.scalars)
    return (*format_of(plan.source.format).outputs(plan.read or plan.source, request), *rewritten)


@dataclass(frozen=True)
class _Recipes:
    """Recipes of patterns, made once each: 40,000 tensors share a few dozen."""

    layout: ModelLayout
    growth: Mapping[str, Growth]
    treatment: Treatment
    spec: ExpansionSpec
    calibration: Calibration
    orders: Orders
    _made: dict[tuple[object, ...], Recipe] = field(default_factory=dict)
    _in_layers: dict[tuple[int, ...], Mapping[str, Growth]] = field(default_factory=dict)

    @property
    def all(self) -> tuple[Recipe, ...]:
        """Every recipe that was asked for."""
        return tuple(self._made.values())

    def weight(
        self,
        pattern: TensorPattern,
        name: str,
        dtype: str,
        *,
        stream: str = "",
        slot: str = "",
        form: Form | None = None,
        new: bool = False,
    ) -> Recipe:
        """What becomes of a weight, or of state that is a copy of it.

        Args:
            pattern: stands for the weight.
            name: of the weight in the module; it may have compensations that others of its pattern lack.
            dtype: as stored.
            slot: "" for weights, else the state's name.
            stream: name of its random numbers, where that is not ``name``.
            form: of state, where it is not stored as the weight is.
            new: it is of a layer that is new.

        Raises:
            CheckpointError: new weights of this dtype cannot be computed.
        """
        found, fitted = self.compensations(name, pattern), self.calibration.of(stream or name)
        silent, fresh = self.silent(name, new=new), self.calibration.of_new(stream or name)
        growth = self.growth_at(pattern, name)
        mark = (slot, pattern.name, dtype, fitted, fresh, form, silent, id(growth), *found)
        if mark not in self._made:
            stored = form.of_copy if form is not None else tuple
            stack = self.silent(name, new=LAYERS in growth and LAYERS in pattern.dims.axes())
            view = self._view(pattern.dims, found, growth, layers=Fill.COPY if stack is None else Fill.ZERO)
            scale, offset = self._factor(found, fitted) if silent is None else (0.0, silent)
            recipe = Recipe(
                kind=Kind.COPY if slot else Kind.WEIGHT,
                slot=slot,
                dtype=dtype,
                before=stored(self.layout.shape_of(pattern)),
                shape=stored(target_shape(view)),
                view=view,
                scale=scale,
                offset=offset,
                zero=silent == 0,
                pattern=None if slot else pattern,
                fresh=None if fresh is None else self._factor(found, fresh)[0],
            )
            if recipe.changes and not slot and dtype not in FLOATING:
                raise CheckpointError(
                    f"{name!r} is stored as {dtype}, in which new weights cannot be computed",
                    hint="dequantize the checkpoint to bfloat16 or float32 first",
                )
            self._made[mark] = recipe
        return self._made[mark]

    def moment(
        self,
        pattern: TensorPattern,
        name: str,
        stored: StoredTensor,
        slot: str,
        kind: StateKind,
        form: Form,
        *,
        new: bool = False,
        quantized: QuantizedParts | None = None,
    ) -> Recipe:
        """What becomes of state of a parameter that is no copy of its weight: see :func:`state_view`.

        Of a quantized moment, of which ``stored`` has the codes or the scales, ``form`` is that of the whole.
        """
        found, fitted = self.compensations(name, pattern), self.calibration.of(name)
        optimizer = self.spec.optimizer
        fresh = new and kind is StateKind.MOMENT and optimizer != "copy"
        growth = self.growth_at(pattern, name)
        own = None if quantized is None else quantized.own
        like = (slot, pattern.name, stored.dtype, stored.shape, kind, form, own)
        mark = (*like, fitted, fresh, id(growth), *found)
        if mark not in self._made:
            dims = form.layout(pattern.dims, stored.shape)
            view = state_view(self._view(dims, found, growth, copied=True), optimizer, kind, form)
            after = target_shape(self._view(pattern.dims, found, growth, copied=True))
            if changes_sides(slot, stored.shape, self.layout.shape_of(pattern), after):
                raise CheckpointError(
                    f"optimizer state {slot!r} of {name!r} has the directions of one side, and in the new "
                    f"shape {after} the other side is the shorter one, to which they do not belong",
                    hint="choose other sizes, or expand a copy of the checkpoint without the optimizer's "
                    "state, with --init random-copy, and restart the optimizer",
                )
            if turns(slot, stored.shape, after):
                view = turned(stored.shape[1], after[0])
            scaled = optimizer == "asymmetric-scaled" and kind is StateKind.MOMENT
            self._made[mark] = Recipe(
                kind=Kind.MOMENT if kind is StateKind.MOMENT else Kind.FACTOR,
                slot=slot,
                dtype=stored.dtype,
                before=stored.shape,
                shape=form.stored(target_shape(view))
                if quantized is None
                else quantized.shape(slot, target_shape(view), name),
                view=view,
                scale=self._factor(found, fitted)[0] if scaled else 1.0,
                zero=fresh or (optimizer == "drop" and kind is not StateKind.BASIS),
                blocks=None if quantized is None else quantized.blocks(slot),
            )
        return self._made[mark]

    def quantized(
        self, pattern: TensorPattern, name: str, slot: str, found: QuantizedParts, *, new: bool
    ) -> Recipe:
        """Of codes, scales or levels of a quantized moment."""
        stored, dims = found.of(slot), pattern.dims
        changes = new or self.spec.optimizer == "drop" or dims.axes() & set(self.growth)
        if slot == found.own.levels or not changes:
            return self.unchanged(Kind.OTHER, slot, stored)
        whole = Form(tuple(range(len(dims.dims))))
        return self.moment(pattern, name, stored, slot, StateKind.MOMENT, whole, new=new, quantized=found)

    def unchanged(self, kind: Kind, slot: str, stored: StoredTensor) -> Recipe:
        """Every byte stays as it is."""
        mark = (kind, slot, stored.dtype, stored.shape)
        if mark not in self._made:
            dims = parse_layout("scale " + " ".join(map(str, stored.shape)) if stored.shape else "")
            view = view_of(dims, {}, {}, Treatment())
            self._made[mark] = Recipe(kind, slot, stored.dtype, stored.shape, stored.shape, view)
        return self._made[mark]

    def growth_at(self, pattern: TensorPattern, name: str) -> Mapping[str, Growth]:
        """The growth in the layer that a tensor is of; one object for all layers in which it is the same."""
        experts = self.growth.get("experts")
        if experts is None or not experts.by_layer or "experts" not in pattern.axes:
            return self.growth
        found = growth_at(self.growth, pattern.template, name)
        return self._in_layers.setdefault(found["experts"].order, found)

    def new(self, pattern: TensorPattern, name: str, *axes: str) -> bool:
        """Whether a parameter is of a new layer, or expert; of certain axes only, if they are given."""
        orders = {axis: own for axis, own in self.orders.items() if not axes or axis in axes}
        return bool(orders) and is_new(pattern, name, orders)

    def same_for_all(self, pattern: TensorPattern) -> bool:
        """Whether one recipe is that of all tensors of a pattern, and none of them has copies."""
        counted = not (self.growth.keys() | self.orders.keys()).isdisjoint(pattern.template.axes)
        own = pattern.template.key in self._compensated or any(g.by_layer for g in self.growth.values())
        return not (counted or own or self.calibration.factors or self.calibration.fresh)

    def silent(self, name: str, *, new: bool) -> float | None:
        """The number in all entries of a weight of a new layer that adds nothing yet; None of others."""
        return silent_value(self.layout, name) if new and self.spec.layer_mode == "identity" else None

    @cached_property
    def _compensated(self) -> dict[str, list[Compensation]]:
        """Skeleton of a name -> compensations whose tensors have it, for axes that grow."""
        found: dict[str, list[Compensation]] = {}
        for item in self.layout.compensations:
            if item.tensor and (item.axis in self.growth or item.offset) and self.spec.scaling != "none":
                found.setdefault(skeleton(NameTemplate(item.tensor).key), []).append(item)
        return found

    def compensations(self, name: str, pattern: TensorPattern) -> tuple[Compensation, ...]:
        """Factors that this tensor carries for the axes that grow."""
        if pattern.template.key not in self._compensated:
            return ()
        return tuple(
            item for item in self._compensated[skeleton(name)] if NameTemplate(item.tensor).matches(name)
        )

    def _view(
        self,
        dims: TensorLayout,
        compensations: Iterable[Compensation],
        growth: Mapping[str, Growth],
        *,
        copied: bool = False,
        layers: Fill = Fill.COPY,
    ) -> View:
        """The view of a weight; ``copied`` for state, whose fills are not the weight's."""
        consumed = frozenset(item.axis for item in compensations if item.fan_in)
        treatment = Treatment(scaling=self.treatment.scaling) if copied else self.treatment
        treatment = treatment if layers is Fill.COPY else replace(treatment, layers=layers)
        return view_of(dims, self.layout.sizes, growth, treatment, consumed=consumed)

    def _factor(self, compensations: Iterable[Compensation], fitted: float) -> tuple[float, float]:
        """``(scale, offset)`` of a tensor's factors: ``c (w + o) - o = c w + (c - 1) o``."""
        scale, offset = fitted, 0.0
        for item in compensations:
            grown = self.growth.get(item.axis)
            power = 1.0 if grown is None else item.scale(grown.source, grown.target)
            scale *= power
            if item.offset:
                alpha = self.treatment.alpha(grown) if grown is not None and item.fan_in else 1.0
                whole = fitted * power * alpha
                if (
                    grown is not None
                    and item.fan_in
                    and self.treatment.per_column
                    and grown.target % grown.source
                ):
                    raise SpecError(
                        f"scaling {self.spec.scaling!r} at a fractional factor is not possible here: the "
                        "final norm computes (1 + w), so its factor is not one number",
                        hint="use scaling 'rms', or a whole factor",
                    )
                offset += (whole - 1.0) * item.offset
        return scale, offset


#: what new entries of state start from, where the treatment does not say otherwise
_FRESH = {
    StateKind.FACTOR: Fill.AVERAGE,
    StateKind.PRECONDITIONER: Fill.DIAGONAL,
    StateKind.BASIS: Fill.UNIT,
}


def state_view(
    view: View, optimizer: str, kind: StateKind = StateKind.MOMENT, form: Form | None = None
) -> View:
    """The view of state: old entries kept, new ones zero (Eq. 24), or what its kind or the treatment says.

    Of a factor that is stacked (one for each expert) the last dim of the parameter is the factor's own.
    """
    scaled = optimizer == "asymmetric-scaled" and kind is StateKind.MOMENT
    fresh = _FRESH.get(kind, Fill.ZERO)
    own = set(range(1 + max((dim.dim for dim in view), default=0)))
    if form is not None and kind is StateKind.FACTOR:
        own = {max((index for index in own if form.dims[index] is not None), default=0)}
    if form is not None and kind is StateKind.PRECONDITIONER and len(set(form.dims)) == len(form.dims):
        fresh = Fill.AVERAGE  # a diagonal one is stored as a vector

    def fill(run: Run, dim: int) -> Fill:
        if not run.new or dim not in own:
            return Fill.COPY
        # what is no copy of its source has nothing to copy from the source's state
        copied = optimizer == "copy" and kind in (StateKind.MOMENT, StateKind.FACTOR)
        return Fill.COPY if copied and run.fill is Fill.COPY else fresh

    return tuple(
        replace(
            dim,
            runs=tuple(
                replace(
                    run,
                    scale=run.scale if scaled else 1.0,
                    fill=fill(run, dim.dim),
                )
                for run in dim.runs
            ),
        )
        for dim in view
    )


def _weight_rows(weights: Iterable[Weight], recipes: _Recipes) -> list[Row]:
    """A row per weight."""
    rows: list[Row] = []
    known: dict[tuple[int, str], Recipe] = {}
    for key, name, module, stored, pattern, stream in weights:
        if (usual := known.get((id(pattern), stored.dtype))) and stored.shape == usual.before:
            rows.append(Row(key, name, stored, usual, stream))
            continue
        layer = recipes.new(pattern, name, LAYERS)
        recipe = recipes.weight(pattern, module, stored.dtype, stream=stream, new=layer)
        if stored.shape != recipe.before:
            recipes.layout.check_one(name, pattern, stored.shape)
        rows.append(Row(key, name, stored, recipe, stream, new=recipes.new(pattern, name)))
        if recipes.same_for_all(pattern):
            known[id(pattern), stored.dtype] = recipe
        for copy in copies_on_disk(name, pattern, recipes.growth_at(pattern, name), recipes.orders):
            if key != name:
                raise CheckpointError(
                    f"{name!r} is of one expert, and a file of this format has no place for copies of it",
                    hint="expand a directory with safetensors files",
                )
            rows.append(Row(copy, copy, stored, recipe, stream, new=True))
    return rows


def _state_rows(
    checkpoint: Checkpoint, recipes: _Recipes, kinds: Mapping[str, StateKind], strays: list[Stray]
) -> Iterator[Row]:
    """A row per state tensor.

    Args:
        checkpoint: the source.
        recipes: where the rows' recipes are made.
        kinds: of states whose name is not in the table.
        strays: takes what lies among the state of a parameter that grows and is none that is known.

    Raises:
        CheckpointError: state of no parameter, or that cannot be widened.
    """
    layout = recipes.layout
    levels: set[str] = set()  # parameters may share them
    for state in checkpoint.states:
        name = layout.canonical(state.param)
        if not layout.module_table.has(name):
            raise CheckpointError(f"optimizer state of {state.param!r}, which is no parameter of the model")
        pattern = layout.module_table.find(name)
        if set(pattern.template.axes) & recipes.growth.keys() - recipes.orders.keys():
            raise CheckpointError(
                f"the optimizer has state of {name!r}, of one expert: a checkpoint of format "
                f"{checkpoint.format!r} has no place for its copies, which are new parameters",
                hint="expand a checkpoint without the optimizer's state, and restart the optimizer",
            )
        new = recipes.new(pattern, name)
        quantized = quantized_parts(checkpoint, state, layout.shape_of(pattern), recipes.spec)
        for slot, key in state.tensors.items():
            stored = checkpoint.tensors[key]
            if slot in quantized:
                found = quantized[slot]
                if slot != found.own.levels or key not in levels:
                    recipe = recipes.quantized(pattern, name, slot, found, new=new)
                    yield Row(key, state.param, stored, recipe, name, new=new, parts=found.parts)
                levels.add(key)
                continue
            try:
                recipe = _state_recipe(state.param, slot, stored, pattern, recipes, kinds, new=new)
            except CheckpointError as error:
                if is_named(slot) or slot in recipes.spec.state:
                    raise
                apart = is_apart(slot, stored.shape, layout.shape_of(pattern))
                item = Further(f"optimizer state: {state.param}.{slot}", "", key, stored)
                strays.append(Stray(item, None if apart else error))
                continue
            yield Row(key, state.param, stored, recipe, name, new=new)


def _state_recipe(
    param: str,
    slot: str,
    stored: StoredTensor,
    pattern: TensorPattern,
    recipes: _Recipes,
    kinds: Mapping[str, StateKind],
    *,
    new: bool,
) -> Recipe:
    """What becomes of one state tensor; ``new``: for a layer that is new.

    Raises:
        CheckpointError: state of another shape than its parameter's, where that grows.
    """
    name = recipes.layout.canonical(param)  # by which the layout and the calibration know it
    weight_shape = recipes.layout.shape_of(pattern)
    kind = state_kind(slot, stored.dtype, stored.shape, weight_shape)
    form = form_of(slot, stored.shape, weight_shape) if stored.dtype in FLOATING else None
    if slot in kinds and kind is not StateKind.SCALAR:
        kind = kinds[slot]
    match kind:
        case StateKind.WEIGHT if form is not None and stored.shape == form.of_copy(weight_shape):
            layer = recipes.new(pattern, name, LAYERS)
            return recipes.weight(pattern, name, stored.dtype, slot=slot, form=form, new=layer)
        case StateKind.MOMENT | StateKind.FACTOR | StateKind.PRECONDITIONER | StateKind.BASIS if form:
            return recipes.moment(pattern, name, stored, slot, kind, form, new=new)
    grows = pattern.dims.axes() & set(recipes.growth)
    if kind in (StateKind.SCALAR, StateKind.UNKNOWN) or not grows:
        return recipes.unchanged(Kind.SCALAR if prod(stored.shape) == 1 else Kind.OTHER, slot, stored)
    why = REFUSED.get(base_name(slot), "factored, projected or quantized state of a form that is not known")
    raise CheckpointError(
        f"optimizer state {slot!r} of {param!r} is {stored.dtype} of shape {stored.shape}, the "
        f"parameter has {weight_shape}. It cannot be widened: {why}",
        hint="expand a copy of the checkpoint without the optimizer's state, with --init random-copy (what "
        "parts copies is the state), and restart the optimizer; or say what it is: "
        + (ways(slot) if form is not None else f"--state {slot}=carry"),
    )


#: a tensor of up to so many bytes that stays as it is becomes part of its file's own text
_LITERAL = 4096


def _further_rows(checkpoint: Checkpoint, found: Sorted, recipes: _Recipes) -> Iterator[Row]:
    """Rows of copies of weights, and of what is carried inside of files that are written anew."""
    layout = recipes.layout
    for item, param in found.widened:
        assert item.stored is not None
        pattern = layout.module_table.find(layout.canonical(param))
        slot = item.name.removesuffix(param).rstrip(".: ") or item.file
        recipe = recipes.weight(pattern, layout.canonical(param), item.stored.dtype, slot=slot)
        yield Row(item.key, param, item.stored, recipe, layout.canonical(param))
    rewritten = {item.file for item, _ in found.widened}
    for item in found.carried:
        stored = item.stored
        if not item.key or stored is None:
            continue
        further: OpenFile | None = checkpoint.further_files.get(item.file)
        if further is not None and item.file not in rewritten:
            continue  # copied as a whole
        streamed = stored.nbytes > _LITERAL or any(extent.strides for extent in stored.extents)
        streamed = streamed or item.key in checkpoint.tensors
        if streamed or isinstance(further, SafetensorsFile):  # which holds no bytes but in its tensors
            recipe = recipes.unchanged(Kind.OTHER, CARRIED, stored)
            yield Row(item.key, item.name, stored, recipe, item.name)
