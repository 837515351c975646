"""``sparkling schedule``: learning rates of old and new entries, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output
from sparkling_cli.cli.options import option
from sparkling_cli.errors import SpecError

if TYPE_CHECKING:
    from rich.table import Table

    from sparkling_cli.results.commands import Schedule
    from sparkling_cli.schedule.curves import Rewarmed
    from sparkling_cli.schedule.rewarmup import Rewarmup

#: Rows of the table without ``--steps``.
ROWS = 14


@opt.takes(*opt.RATE_FIELDS)
def schedule(
    source: Annotated[Path, opt.checkpoint("Output of `sparkling expand`, or its rewarmup.json.", "CKPT")],
    steps: Annotated[
        str | None,
        option("--steps", opt.OUTPUT, "Every step from A to B instead of a selection.", metavar="A:B"),
    ] = None,
    plot: opt.PlotOption = None,
    write: Annotated[
        bool,
        option(
            "--write",
            opt.RATE,
            "Add the schedule to an output, or replace it, by the options below; then show it.",
        ),
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    **fields: Any,
) -> None:
    """Show or write the learning rates of old and new entries.

    This is what the training side applies. The row of step t is what the optimizer step after t finished
    ones uses. With --write the schedule is written anew, from the checkpoint's own files and the options;
    weights and state are not touched, and what is not given stays as it was last written.

    \b
    Examples:
        sparkling schedule wide/
        sparkling schedule wide/ --steps 600:620 --json
        sparkling schedule wide/ --plot schedule.svg
        sparkling schedule wide/ --write --schedule wsd --peak-lr 3e-4 \\
            --warmup-steps 500 --total-steps 20000 --decay-steps 4000
    """
    from sparkling_cli.outcome import schedule_doubts
    from sparkling_cli.schedule.rewarmup import read_rewarmup

    changes = opt.spec_fields(fields)
    if changes and not write:
        raise SpecError("these options describe a schedule that is to be written", hint="add --write")
    rewarmup = _written(source, changes) if write else read_rewarmup(source)
    for text in () if write else schedule_doubts(source):
        output.warn(text)
    first, last = _range(steps, rewarmup)
    chosen = _chosen(first, last, everything=steps is not None)
    if plot is not None:
        from sparkling_cli.report.plots import plot_schedule
        from sparkling_cli.report.rates import learning_rate_of

        window = (first, last) if steps is not None else None
        plot_schedule(learning_rate_of(rewarmup, window), plot)
        output.note(f"drawn  {plot}")
    output.data(_result(rewarmup, chosen))
    output.show(_table(rewarmup, chosen))
    curve = rewarmup.curves[-1]
    output.show(
        f"expansion at step {curve.expansion_step:,} of {rewarmup.baseline.total_steps:,}; new entries to "
        f"{curve.rho:g} x {curve.eta_e:.3e} = {curve.peak:.3e} in {curve.steps:,} steps"
    )


def _written(source: Path, changes: dict[str, Any]) -> Rewarmup:
    from sparkling_cli.outcome import write_schedule
    from sparkling_cli.schedule.write import notes
    from sparkling_cli.storage.sidecar import REWARMUP, sidecar_root

    if source.suffix == ".json":
        raise SpecError("--write needs the output itself", hint="give its directory, or its file")
    rewarmup, said = write_schedule(source, changes)
    for text in (*notes(rewarmup), *said):
        output.warn(text)
    output.note(f"written  {sidecar_root(source) / REWARMUP}")
    return rewarmup


def _range(text: str | None, rewarmup: Rewarmup) -> tuple[int, int]:
    low, high = rewarmup.expansion_step, rewarmup.baseline.total_steps
    if text is None:
        return low, high
    start, colon, stop = text.partition(":")
    try:
        first, last = int(start or low), int(stop or high)
    except ValueError:
        colon = ""
        first = last = 0
    if not colon or first > last or first < 0 or last > high:
        raise SpecError(
            f"--steps {text!r}: expected A:B with 0 <= A <= B <= {high}",
            hint=f"the expansion is at step {low}: e.g. --steps {low}:{min(high, low + 20)}",
        )
    return first, last


def _chosen(first: int, last: int, *, everything: bool) -> list[int]:
    from sparkling_cli.report.rates import thin

    return list(range(first, last + 1)) if everything else thin(range(first, last + 1), ROWS)


def _result(rewarmup: Rewarmup, chosen: list[int]) -> Schedule:
    from sparkling_cli.results.commands import CurvePoint, RewarmupStage, Schedule

    curves = rewarmup.curves
    return Schedule(
        expansion_step=rewarmup.expansion_step,
        total_steps=rewarmup.baseline.total_steps,
        baseline=rewarmup.baseline,
        stages=tuple(
            RewarmupStage(**stage.model_dump(), eta_e=curve.eta_e, peak=curve.peak)
            for stage, curve in zip(rewarmup.stages, curves, strict=True)
        ),
        curve=tuple(
            CurvePoint(
                step=step,
                old=rewarmup.baseline(step),
                new=tuple(c.eta_new(step) if step >= c.expansion_step else None for c in curves),
                ratio=tuple(c.ratio(step) if step >= c.expansion_step else None for c in curves),
            )
            for step in chosen
        ),
    )


def _ratio(curve: Rewarmed, step: int) -> str:
    """New over old; nothing where both are zero."""
    return f"{curve.ratio(step):.3f}" if curve.baseline(step) > 0 else "-"


def _table(rewarmup: Rewarmup, chosen: list[int]) -> Table:
    from sparkling_cli.report.sparkline import sparkline
    from sparkling_cli.report.terminal import table_of

    several = len(rewarmup.stages) > 1
    new = (f">new (expansion {stage.stage})" if several else ">new" for stage in rewarmup.stages)
    table = table_of(">step", ">old", *(title for name in new for title in (name, ">new / old")))
    for step in chosen:
        cells = []
        for curve in rewarmup.curves:
            born = step >= curve.expansion_step
            cells += [f"{curve.eta_new(step):.4e}", _ratio(curve, step)] if born else ["", ""]
        table.add_row(f"{step:,}", f"{rewarmup.baseline(step):.4e}", *cells)
    shapes = [sparkline([rewarmup.baseline(t) for t in chosen], 11)]
    for curve in rewarmup.curves:
        alive = [t for t in chosen if t >= curve.expansion_step]
        shapes += [sparkline([curve.eta_new(t) for t in alive], 11), ""]
    table.add_section()
    table.add_row("", *shapes)
    return table
