"""From a plan and what was measured to the facts of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from zlib import crc32

from sparkling_cli import __version__
from sparkling_cli.compute.flops import step_saving
from sparkling_cli.execute.stream import Written
from sparkling_cli.layout.expr import Role
from sparkling_cli.layout.model import TensorPattern
from sparkling_cli.manifest import Manifest
from sparkling_cli.plan.model import Plan, Row
from sparkling_cli.plan.totals import Content, content_of
from sparkling_cli.report.command import Asked, command_of
from sparkling_cli.report.facts import active_parameters
from sparkling_cli.report.model import (
    Activations,
    AxisChange,
    Compute,
    LearningRate,
    OptimizerSummary,
    Provenance,
    ReportData,
    Size,
    StateSlot,
    TensorChange,
)
from sparkling_cli.report.verdict import verdict
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.widening.geometry import scale_range


def assemble(
    plan: Plan,
    written: Written,
    previous: Manifest | None,
    destination: str,
    asked: Asked,
    *,
    activations: Activations | None,
    activations_missing: str,
    learning_rate: LearningRate | None,
    learning_rate_missing: str,
) -> ReportData:
    """Everything that a report says about one expansion."""
    optimizer = _optimizer(plan)
    active = active_parameters(plan) or {}
    return ReportData(
        source=plan.source.root.name,
        destination=destination,
        model=plan.layout.name,
        command=command_of(plan.spec, asked),
        spec=dict(plan.spec),
        axes=tuple(_axes(plan, previous)),
        tensors=tuple(_tensors(plan)),
        before=_size(content_of(plan, after=False), active.get("before")),
        after=_size(content_of(plan, after=True), active.get("after")),
        activations=activations,
        activations_missing=activations_missing,
        learning_rate=learning_rate,
        learning_rate_missing=learning_rate_missing,
        optimizer=optimizer,
        compute=_compute(active, learning_rate),
        provenance=_provenance(plan, written, previous),
        notes=plan.notes,
        warnings=plan.warnings,
        verdict=verdict(
            dict(plan.spec),
            activations,
            activations_missing,
            learning_rate,
            learning_rate_missing,
            optimizer,
            plan.warnings,
            keeps_function=keeps_function(plan),
            form=plan.source.format,
        ),
    )


def keeps_function(plan: Plan) -> bool:
    """Whether this widening leaves the model's function as it is: copies, scaled, by whole factors."""
    whole = all(grown.target % grown.source == 0 for grown in plan.growth.values())
    return plan.spec["init"] == "copy-copy" and plan.spec["scaling"] != "none" and whole


def _axes(plan: Plan, previous: Manifest | None) -> Sequence[AxisChange]:
    births = {} if previous is None else previous.births()
    return [
        AxisChange(
            axis=name,
            before=grown.source,
            after=grown.target,
            original=births[name][0][1] if name in births else grown.source,
        )
        for name, grown in plan.growth.items()
    ]


def _tensors(plan: Plan) -> Sequence[TensorChange]:
    """One entry per pattern of which any axis grew."""
    groups: dict[str, list[Row]] = {}
    patterns: dict[str, TensorPattern] = {}
    for row in plan.rows:
        if row.pattern is not None and row.shape != row.source.shape:
            groups.setdefault(row.pattern.name, []).append(row)
            patterns[row.pattern.name] = row.pattern
    return [_tensor(pattern, groups[name]) for name, pattern in patterns.items()]


def _tensor(pattern: TensorPattern, rows: list[Row]) -> TensorChange:
    row = rows[0]
    dims = [dim.role for dim in pattern.dims.dims]
    grown = sorted({dim.dim for dim in row.view if dim.source != dim.target})
    roles = {dims[i] for i in grown}
    low, high = scale_range(row.view)
    side = {Role.OUT: "fan-out", Role.IN: "fan-in"}
    return TensorChange(
        name=pattern.name,
        layout=pattern.layout,
        before=row.source.shape,
        after=row.shape,
        new_dims=tuple(grown),
        role="both" if len(roles) > 1 else side.get(next(iter(roles)), "elementwise"),  # type: ignore[arg-type]
        scale=(row.scale * low, row.scale * high),
        fill=tuple(sorted({r.fill.name.lower() for d in row.view for r in d.runs if r.new})),
        count=len(rows),
    )


def _size(content: Content, active: int | None) -> Size:
    return Size(
        parameters=content.parameters,
        active=active,
        weight_bytes=content.weight_bytes,
        state_bytes=content.state_bytes,
    )


def _optimizer(plan: Plan) -> OptimizerSummary | None:
    if not plan.source.states:
        return None
    slots: dict[str, list[Row]] = {}
    for row in plan.rows:
        if row.slot:
            slots.setdefault(row.slot, []).append(row)
    pairs = [g.get("betas") for g in plan.source.param_groups]
    betas = [pair[1] for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2]
    return OptimizerSummary(
        treatment=plan.spec["optimizer"],
        name=plan.source.facts.get("optimizer_class"),
        slots=tuple(_slot(name, rows) for name, rows in slots.items()),
        beta2=float(max(betas)) if betas else None,
    )


def _slot(name: str, rows: list[Row]) -> StateSlot:
    entries = sum(prod(row.shape) for row in rows)
    kept = sum(0 if row.zero else prod(row.source.shape) for row in rows)
    size = sum(prod(row.shape) * ITEM_BYTES[row.dtype] for row in rows)
    return StateSlot(slot=name, tensors=len(rows), entries=entries, kept=kept, bytes=size)


def _compute(active: Mapping[str, int], rate: LearningRate | None) -> Compute | None:
    if not active or rate is None or not 0 < rate.expansion_step < rate.total_steps:
        return None
    saving = step_saving(active["before"], active["after"], rate.expansion_step, rate.total_steps)
    return Compute(expansion_step=rate.expansion_step, total_steps=rate.total_steps, saved=saving.saved)


def _provenance(plan: Plan, written: Written, previous: Manifest | None) -> Provenance:
    digests = "".join(f"{key}:{value:08x}\n" for key, value in written.sources.items())
    stages = [] if previous is None else [_stage(s.growth, s.step) for s in previous.stages]
    now = {name: (g.source, g.target) for name, g in plan.growth.items()}
    stages.append(_stage(now, plan.source.facts.get("global_step")))
    return Provenance(
        tool="sparkling-cli",
        version=__version__,
        source=plan.source.root.name,
        format=plan.source.format,
        tensors=len(plan.rows),
        source_digest=f"{crc32(digests.encode()):08x}",
        stages=tuple(stages),
    )


def _stage(growth: Mapping[str, tuple[int, int]], step: int | None) -> str:
    grown = ", ".join(f"{axis} {before} -> {after}" for axis, (before, after) in sorted(growth.items()))
    return grown if step is None else f"step {step}: {grown}"
