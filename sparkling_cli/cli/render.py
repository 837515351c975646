"""Plans and results for people: one screen each."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from sparkling_cli.report.resume import MODULE, call
from sparkling_cli.results.numbers import count, factor, nbytes, significant
from sparkling_cli.schedule.baseline import example, example_words, schedule_command
from sparkling_cli.spec.options import as_options

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.table import Table

    from sparkling_cli.api import ExpansionResult
    from sparkling_cli.cli.console import Output
    from sparkling_cli.plan.model import Expansion
    from sparkling_cli.results.plan import ExpansionPlan, TensorKind


def show_plan(output: Output, expansion: Expansion, planned: ExpansionPlan) -> None:
    """The whole plan; with ``--verbose`` every kind of tensor, state included."""
    from rich.text import Text

    from sparkling_cli.report.terminal import account_table

    states = expansion.plan.source.states
    output.show(_summary(planned))
    output.show(_kinds(planned.kinds, everything=output.verbose))
    output.show(account_table(planned.account, everything=output.verbose))
    for key, value in planned.config.items():
        output.show(f"config  {key} = {value}")
    output.show(Text(f"output  {shlex.quote(str(planned.destination))}"), whole=True)
    output.show(f"optimizer state  {planned.spec['optimizer'] if states else 'none'}")
    output.show(Text(_rewarmup(expansion)), whole=True)
    show_remarks(output, planned.notes, planned.warnings)
    missing = planned.bytes.to_write - planned.bytes.free
    if missing > 0:
        output.warn(f"{nbytes(missing)} more space is needed at {expansion.destination.absolute().parent}")
    output.show("Nothing was written (--dry-run).")


def _rewarmup(expansion: Expansion) -> str:
    if expansion.rewarmup is None:
        source = expansion.plan.source
        options = shlex.join(as_options(example(source)))
        return (
            f"re-warmup  none: {expansion.rewarmup_missing}\n"
            f"           to get one, describe the run's schedule; {example_words(source)}: {options}"
        )
    curve = expansion.rewarmup.curves[-1]
    return (
        f"re-warmup  of new entries in {curve.steps:,} steps from step {curve.expansion_step:,}, "
        f"to {curve.rho:g} x {curve.eta_e:.3e} = {curve.peak:.3e}"
    )


def show_result(output: Output, result: ExpansionResult) -> None:
    """What was done, what was measured, the verdict, and where to go on."""
    from rich.text import Text

    from sparkling_cli.report.plan import plan_result
    from sparkling_cli.report.terminal import change_tables, verdict_lines
    from sparkling_cli.storage.sidecar import REPORT_HTML, sidecar_root

    planned = plan_result(result.expansion)
    output.show(_summary(planned))
    if result.report is not None:
        if result.report.activations is not None:
            for table in change_tables(result.report.activations):
                output.show(table)
        for line in verdict_lines(result.report.verdict):
            output.show(line, whole=True)
    show_remarks(output, planned.notes if result.report is None else result.report.notes, ())
    where = shlex.quote(str(result.destination))
    source = shlex.quote(str(result.expansion.plan.source.root))
    output.show(Text(f"written  {where}"), whole=True)
    page = shlex.quote(f"{sidecar_root(result.destination)}/{REPORT_HTML}")
    output.show(Text(f"report   {page}"), whole=True)
    output.show(Text(f"check    sparkling verify {source} {where}"), whole=True)
    if result.report is not None:
        for words in _train_on(result, str(result.destination)):
            output.show(Text(words), whole=True)


def _train_on(result: ExpansionResult, where: str) -> list[str]:
    """How the training side takes the output up: by its format, if there is a schedule."""
    from sparkling_cli.results.verdict import LOCKED

    plan = result.expansion.plan
    if result.report is None or result.report.verdict.headline == LOCKED:
        return []
    if result.report.learning_rate is None:
        return [
            f"no re-warmup: {result.expansion.rewarmup_missing}",
            f"add one  {schedule_command(plan.source, where)}",
            f"         ({example_words(plan.source)}; put in the run's own schedule, rates and steps)",
        ]
    return [f"train on with {call(plan.source.format, where, f'{MODULE}.')}"]


def _summary(planned: ExpansionPlan) -> Table:
    from sparkling_cli.report.terminal import table_of

    table = table_of("", ">before", ">after", "")
    for name, sizes in planned.axes.items():
        ratio = significant(sizes.after / sizes.before, 4)
        table.add_row(name, str(sizes.before), str(sizes.after), f"{ratio}x")
    rows = [("parameters", planned.parameters)]
    active = planned.active_parameters
    if active is not None and active != planned.parameters:
        rows.append(("active parameters", active))
    rows.append(("of them embeddings", planned.embedding_parameters))
    for title, counts in rows:
        ratio = significant(counts.after / counts.before, 4)
        table.add_row(title, count(counts.before), count(counts.after), f"{ratio}x")
    room = planned.bytes
    table.add_row("checkpoint", nbytes(room.before), nbytes(room.after), f"{nbytes(room.free)} free")
    return table


def _kinds(kinds: Iterable[TensorKind], *, everything: bool) -> Table:
    from sparkling_cli.report.terminal import table_of

    table = table_of("~tensor", ">count", "~before", "~after", ">scale", "~new")
    for kind in kinds:
        changed = kind.before != kind.after or kind.scale != (1.0, 1.0)
        if not everything and (kind.slot or not changed):
            continue
        name = f"{kind.name} [{kind.slot}]" if kind.slot else kind.name
        table.add_row(
            name.replace("[", r"\["),
            str(kind.count),
            "x".join(map(str, kind.before)),
            "x".join(map(str, kind.after)),
            factor(kind.scale),
            ", ".join(kind.fill),
        )
    return table


def show_remarks(output: Output, notes: Iterable[str], warnings: Iterable[str]) -> None:
    """What is worth knowing, and what to act on."""
    for note in notes:
        output.note(f"note: {note}")
    for warning in warnings:
        output.warn(warning)
