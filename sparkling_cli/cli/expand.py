"""``sparkling expand``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output


def expand(
    source: opt.CheckpointArg,
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="Output; must not exist. Default: CKPT-<axis><factor>x beside CKPT.", metavar="DST"
        ),
    ] = None,
    axis: opt.AxisOption = [],
    factor: opt.FactorOption = [],
    to: opt.ToOption = [],
    spec: opt.SpecOption = None,
    multiple_of: opt.MultipleOption = None,
    init: Annotated[
        str | None,
        typer.Option(help="copy-copy (default), zero-copy, random-copy, random-zero, random-random."),
    ] = None,
    scaling: Annotated[str | None, typer.Option(help="rms (default), calibrated, function, none.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="asymmetric (default), asymmetric-scaled, copy, drop.")
    ] = None,
    rho: opt.RhoOption = None,
    rewarmup_steps: opt.RewarmupStepsOption = None,
    bias_correction: opt.BiasCorrectionOption = None,
    schedule: opt.ScheduleOption = None,
    peak_lr: opt.PeakOption = None,
    min_lr: opt.MinimumOption = None,
    warmup_steps: opt.WarmupOption = None,
    decay_steps: opt.DecayStepsOption = None,
    decay: opt.DecayOption = None,
    total_steps: opt.TotalStepsOption = None,
    expansion_step: opt.ExpansionStepOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random fills (0).")] = None,
    names: Annotated[
        str | None,
        typer.Option(help="Weight names in the output: auto (default), disk, module."),
    ] = None,
    layout: opt.LayoutOption = None,
    model: opt.ModelOption = None,
    data: opt.DataOption = None,
    report: Annotated[
        str,
        typer.Option(
            help="Measure activations before and after: auto (less for large models, none for very large "
            "ones), full, none."
        ),
    ] = "auto",
    memory: Annotated[str, typer.Option(help="Memory budget, e.g. 512M, 2G.")] = "1G",
    threads: Annotated[int | None, typer.Option(help="Worker threads; default: by the machine.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the whole plan; write nothing.")] = False,
    allow_locked: Annotated[
        bool,
        typer.Option("--allow-locked", help="Go on where copies would stay equal to their sources for ever."),
    ] = False,
    carry: Annotated[
        list[str],
        typer.Option(
            help="Tensors that stay as they are although their shape is one that grows: a name, * for any "
            "part. May be repeated.",
            metavar="PATTERN",
            show_default=False,
        ),
    ] = [],
    state: Annotated[
        list[str],
        typer.Option(
            help="What optimizer state of that name is: weight (widened like it), moment, carry. May be "
            "repeated.",
            metavar="NAME=KIND",
            show_default=False,
        ),
    ] = [],
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Go on where weights or state hold NaN or Inf.")
    ] = False,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
) -> None:
    """Write a wider checkpoint: weights, optimizer state, re-warmup schedule and report.

    The source is never written to. The output appears whole or not at all.

    \b
    Examples:
        sparkling expand ckpt/ --axis ffn --factor 2
        sparkling expand ckpt/ wide/ --axis hidden --axis heads --factor 1.5 --dry-run
        sparkling expand ckpt/ --spec expansion.yaml --json
    """
    from sparkling_cli import api
    from sparkling_cli.cli.render import show_plan, show_result
    from sparkling_cli.execute.commit import check_destination
    from sparkling_cli.report.plan import plan_result
    from sparkling_cli.spec.quantities import LEAST_MEMORY, parse_bytes
    from sparkling_cli.spec.sources import state_from_options

    chosen = _spec(
        spec,
        axis,
        factor,
        to,
        {
            "multiple_of": multiple_of,
            "init": init,
            "scaling": scaling,
            "optimizer": optimizer,
            "seed": seed,
            "names": names,
            "allow_locked": allow_locked or None,
            "allow_nonfinite": allow_nonfinite or None,
            "carry": carry or None,
            "state": state_from_options(state),
            **opt.schedule_fields(
                rho=rho,
                rewarmup_steps=rewarmup_steps,
                bias_correction=bias_correction,
                schedule=schedule,
                peak_lr=peak_lr,
                min_lr=min_lr,
                warmup_steps=warmup_steps,
                decay_steps=decay_steps,
                decay=decay,
                total_steps=total_steps,
                expansion_step=expansion_step,
            ),
        },
    )
    budget = parse_bytes(memory, "--memory", least=LEAST_MEMORY)
    api.check_report(report, data)
    expansion = api.make_plan(source, chosen, destination, layout=layout, model=model)
    if dry_run:
        check_destination(expansion.plan.source.root, expansion.destination)
        planned = plan_result(expansion)
        output.data(planned)
        show_plan(output, expansion, planned)
        return
    for warning in expansion.plan.warnings:
        output.warn(warning)
    result = api.expand(
        source,
        memory=budget,
        threads=threads,
        data=data,
        report=report,
        progress=output.progress,
        expansion=expansion,
    )
    if result.report is not None:
        output.data(result.report)
        show_result(output, result)


def _spec(
    path: Path | None, axis: list[str], factor: list[float], to: list[int], given: dict[str, Any]
) -> Any:
    from sparkling_cli.spec.sources import axes_from_options, make_spec, merge, read_spec_file

    base = read_spec_file(path) if path else {}
    over = opt.given(given)
    axes = axes_from_options(axis, factor, to)
    if axes:
        over["axes"] = axes
    return make_spec(merge(base, over), str(path) if path and not over else "options")
