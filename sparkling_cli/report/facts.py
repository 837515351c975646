"""From a plan and what was measured to the facts of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any
from zlib import crc32

from sparkling_cli import __version__
from sparkling_cli.compute.flops import step_saving
from sparkling_cli.compute.shape import ParameterCount
from sparkling_cli.execute.stream import Written
from sparkling_cli.layout.depth import LAYERS
from sparkling_cli.layout.expr import COUNTED, UNSHAPED, Role
from sparkling_cli.layout.model import TensorPattern
from sparkling_cli.manifest import Manifest
from sparkling_cli.plan.advice import symmetry_warning
from sparkling_cli.plan.model import CARRIED, Expansion, Plan, Recipe, Row
from sparkling_cli.plan.resolve import all_chosen
from sparkling_cli.report.command import command_of, with_spec
from sparkling_cli.report.plan import fills, parameter_counts
from sparkling_cli.report.rates import learning_rate_of
from sparkling_cli.results.expansion import (
    AxisChange,
    Compute,
    LearningRate,
    OptimizerSummary,
    Provenance,
    Report,
    Size,
    StateSlot,
    TensorChange,
)
from sparkling_cli.results.measured import Activations
from sparkling_cli.results.verdict import verdict_of_expansion
from sparkling_cli.schedule.baseline import example_words, schedule_command
from sparkling_cli.schedule.rewarmup import Rewarmup
from sparkling_cli.schedule.write import notes, remarks
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.sources import make_spec
from sparkling_cli.storage.tensors import ITEM_BYTES
from sparkling_cli.widening.geometry import Growth


def assemble(
    expansion: Expansion,
    written: Written,
    activations: Activations | None,
    activations_missing: str,
    unasked: str = "",
) -> Report:
    """Everything that a report says about one expansion.

    Args:
        expansion: what was done.
        written: digests of what was read and written.
        activations: of source and output on the same tokens.
        activations_missing: why they were not measured.
        unasked: why the model's own class could not be asked for its names and shapes.
    """
    left_out = (
        (f"names and shapes were not compared with the model's own class: {unasked}",) if unasked else ()
    )
    plan, previous = expansion.plan, expansion.previous
    learning_rate = None if expansion.rewarmup is None else learning_rate_of(expansion.rewarmup)
    before, after, known = parameter_counts(plan)
    facts: dict[str, Any] = {
        "source": plan.source.root.name,
        "destination": expansion.destination.name,
        "model": plan.layout.name,
        "command": command_of(plan.spec, expansion.invocation),
        "spec": plan.spec.as_data(),
        "axes": tuple(_axes(plan, previous)),
        "tensors": tuple(_tensors(plan)),
        "account": plan.account,
        "before": _size(plan.nbytes(after=False), before, known=known),
        "after": _size(plan.nbytes(after=True), after, known=known),
        "activations": activations,
        "activations_missing": activations_missing,
        "learning_rate": learning_rate,
        "learning_rate_missing": "" if learning_rate is not None else missing_schedule(expansion),
        "optimizer": _optimizer(plan),
        "provenance": _provenance(plan, written, previous),
        "notes": plan.notes + left_out,
        "warnings": plan.warnings,
    }
    return _judged(facts, plan.growth)


def missing_schedule(expansion: Expansion) -> str:
    """Why there is no re-warmup, and the command that adds one."""
    source = expansion.plan.source
    command = schedule_command(source, expansion.destination.name)
    return (
        f"{expansion.rewarmup_missing}. To add one, in the folder that the output lies in: {command} "
        f"({example_words(source)}; put in the run's own schedule, rates and steps)"
    )


def with_rewarmup(
    report: Report,
    spec: ExpansionSpec,
    rewarmup: Rewarmup,
    before: Rewarmup | None,
    growth: Mapping[str, Growth],
) -> Report:
    """The report as it would be, had the output been made with another schedule.

    Args:
        report: of the output.
        spec: with the schedule's description.
        rewarmup: the new one.
        before: the one that it replaces.
        growth: of the output's axes.
    """
    old_warnings, old_notes = ((), ()) if before is None else (notes(before), remarks(before, spec, growth))
    facts = {name: getattr(report, name) for name in Report.model_fields}
    facts |= {
        "command": with_spec(report.command, make_spec(report.spec), spec),
        "spec": spec.as_data(),
        "learning_rate": learning_rate_of(rewarmup),
        "learning_rate_missing": "",
        "warnings": tuple(w for w in report.warnings if w not in old_warnings) + notes(rewarmup),
        "notes": tuple(n for n in report.notes if n not in old_notes) + remarks(rewarmup, spec, growth),
    }
    return _judged(facts, growth)


def _judged(facts: dict[str, Any], growth: Mapping[str, Growth]) -> Report:
    """A report with what follows from the other facts: compute and verdict."""
    rate: LearningRate | None = facts["learning_rate"]
    optimizer: OptimizerSummary | None = facts["optimizer"]
    treatment = None if optimizer is None else optimizer.treatment
    verdict = verdict_of_expansion(
        facts["activations"],
        facts["activations_missing"],
        rate,
        facts["learning_rate_missing"],
        symmetry_warning(growth, treatment),
        facts["warnings"],
        copies=None
        if growth.keys() == {LAYERS}
        else any(grown.copied for axis, grown in growth.items() if axis not in UNSHAPED),
        keeps_function=keeps_function(growth, facts["spec"]),
        remedy=_remedy(growth, facts["spec"]),
    )
    compute = _compute(facts["before"].active, facts["after"].active, rate)
    return Report(**{**facts, "compute": compute, "verdict": verdict})


def _remedy(growth: Mapping[str, Growth], spec: Mapping[str, Any]) -> str:
    """What would keep a signal that the formulas do not keep, in a sentence."""
    ways = []
    silent = LAYERS not in growth or spec["layer_mode"] == "identity"
    if not silent:
        ways.append("--layer-mode identity")
    if spec["scaling"] != "calibrated" and growth.keys() != {LAYERS}:
        ways.append("--scaling calibrated, which fits what each block adds on tokens")
    if not all(grown.copied for grown in growth.values()) and spec["init"] != "copy-copy":
        ways.append("--init copy-copy")
    elif any(grown.target % grown.source for axis, grown in growth.items() if axis not in COUNTED):
        ways.append("a whole factor")
    return f"To keep the signal, make the output again with {', or with '.join(ways)}." if ways else ""


def keeps_function(growth: Mapping[str, Growth], spec: Mapping[str, Any]) -> bool:
    """Whether an expansion leaves the model's function as it is.

    Copies, scaled, by whole factors; or new columns of zeros, and the old ones as they are.
    """
    wide = {axis: grown for axis, grown in growth.items() if axis != LAYERS}
    if LAYERS in growth and spec["layer_mode"] != "identity":
        return False
    whole = all(grown.target % grown.source == 0 for grown in wide.values())
    silent = spec["scaling"] == "function" and spec["init"].endswith("-zero")
    copied = all(grown.copied for grown in wide.values())
    return all_chosen(growth) and (silent or (copied and (not wide or spec["scaling"] != "none") and whole))


def _axes(plan: Plan, previous: Manifest | None) -> Sequence[AxisChange]:
    births = {} if previous is None else previous.births()
    return [
        AxisChange(
            axis=name,
            before=grown.source,
            after=grown.target,
            original=sum(stop - start for start, stop, stage in births[name] if stage == 0)
            if name in births
            else grown.source,
        )
        for name, grown in plan.growth.items()
    ]


def _tensors(plan: Plan) -> Sequence[TensorChange]:
    """One entry per pattern of which any axis grew."""
    counts = Counter(row.recipe for row in plan.rows)
    grown = {row.recipe for row in plan.rows if row.grows}
    found: dict[str, TensorChange] = {}
    for recipe in plan.recipes:
        if recipe.pattern is not None and recipe in grown:
            change = _tensor(recipe, recipe.pattern, counts[recipe])
            known = found.setdefault(change.name, change)
            if known is not change:  # of another dtype, or with a compensation
                found[change.name] = known.model_copy(update={"count": known.count + change.count})
    return list(found.values())


def _tensor(recipe: Recipe, pattern: TensorPattern, count: int) -> TensorChange:
    dims = [dim.role for dim in pattern.dims.dims]
    grown = sorted({dim.dim for dim in recipe.view if dim.source != dim.target})
    roles = {dims[i] for i in grown}
    side = {Role.OUT: "fan-out", Role.IN: "fan-in"}
    return TensorChange(
        name=pattern.name,
        layout=pattern.layout,
        before=recipe.before,
        after=recipe.shape,
        new_dims=tuple(grown),
        role="both" if len(roles) > 1 else side.get(next(iter(roles), None), "elementwise"),  # type: ignore[arg-type]
        scale=recipe.scales,
        fill=fills(recipe),
        count=count,
    )


def _size(nbytes: tuple[int, int], counted: ParameterCount, *, known: bool) -> Size:
    return Size(
        parameters=counted.total,
        active=counted.active if known else None,
        embedding=counted.embedding,
        weight_bytes=nbytes[0],
        state_bytes=nbytes[1],
    )


def _optimizer(plan: Plan) -> OptimizerSummary | None:
    if not plan.has_moments:
        return None
    slots: dict[str, list[Row]] = {}
    for row in plan.rows:
        if row.slot and row.slot != CARRIED:
            slots.setdefault(row.slot, []).append(row)
    pairs = [g.get("betas") for g in plan.source.param_groups]
    betas = [pair[1] for pair in pairs if isinstance(pair, (tuple, list)) and len(pair) == 2]
    return OptimizerSummary(
        treatment=plan.spec.optimizer,
        name=plan.source.facts.get("optimizer_class"),
        slots=tuple(_slot(name, rows) for name, rows in slots.items()),
        beta2=float(max(betas)) if betas else None,
    )


def _slot(name: str, rows: list[Row]) -> StateSlot:
    entries = sum(prod(row.shape) for row in rows)
    kept = sum(0 if row.recipe.zero else row.entries_before for row in rows)
    size = sum(prod(row.shape) * ITEM_BYTES[row.dtype] for row in rows)
    return StateSlot(slot=name, tensors=len(rows), entries=entries, kept=kept, bytes=size)


def _compute(before: int | None, after: int | None, rate: LearningRate | None) -> Compute | None:
    if before is None or after is None or rate is None or not 0 < rate.expansion_step < rate.total_steps:
        return None
    saved = step_saving(before, after, rate.expansion_step, rate.total_steps)
    return Compute(expansion_step=rate.expansion_step, total_steps=rate.total_steps, saved=saved)


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
