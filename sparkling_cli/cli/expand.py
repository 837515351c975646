"""``sparkling expand``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.complete import checkpoints
from sparkling_cli.cli.console import output
from sparkling_cli.cli.options import option
from sparkling_cli.spec.choices import (
    InitPair,
    Names,
    OptimizerTreatment,
    ReportKind,
    Scaling,
    StateTreatment,
    VocabFill,
)


def expand(
    source: opt.CheckpointArg,
    destination: Annotated[
        Path | None,
        typer.Argument(
            help="Output; must not exist. Default: CKPT-<axis><factor>x beside CKPT.",
            metavar="DST",
            autocompletion=checkpoints,
        ),
    ] = None,
    axis: opt.AxisOption = [],
    factor: opt.FactorOption = [],
    to: opt.ToOption = [],
    multiple_of: opt.MultipleOption = None,
    spec: opt.SpecOption = None,
    init: Annotated[
        str | None,
        option(
            "--init",
            panel=opt.METHOD,
            choices=InitPair,
            default="copy-copy",
            words="New entries of fan-out and fan-in dims.",
        ),
    ] = None,
    scaling: Annotated[
        str | None,
        option(
            "--scaling",
            panel=opt.METHOD,
            choices=Scaling,
            default="rms",
            words="What fan-in matrices are scaled to keep: the RMS (calibrated: fitted on tokens), or the "
            "function.",
        ),
    ] = None,
    optimizer: Annotated[
        str | None,
        option(
            "--optimizer",
            panel=opt.METHOD,
            choices=OptimizerTreatment,
            default="asymmetric",
            words="Optimizer state: old entries keep theirs and new ones start at zero; or otherwise.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        option("--seed", panel=opt.METHOD, metavar="NUMBER", default=0, words="Seed of random entries."),
    ] = None,
    vocab_fill: Annotated[
        str | None,
        option(
            "--vocab-fill",
            panel=opt.METHOD,
            choices=VocabFill,
            default="mean",
            words="New rows of the vocabulary: the mean of all old ones, or otherwise.",
        ),
    ] = None,
    vocab_from: Annotated[
        list[str],
        option(
            "--vocab-from",
            panel=opt.METHOD,
            metavar="FILE",
            words="New token ids and the old ones whose mean they get; or one of them, as 512=17,203; may "
            "be repeated.",
        ),
    ] = [],
    router_noise: Annotated[
        float | None,
        option(
            "--router-noise",
            panel=opt.METHOD,
            metavar="SHARE",
            default=0,
            words="Noise on the router rows of new experts, by the deviation of the old ones: 0.01.",
        ),
    ] = None,
    allow_locked: Annotated[
        bool,
        option(
            "--allow-locked",
            panel=opt.METHOD,
            words="Go on where copies would stay equal to their sources for ever.",
        ),
    ] = False,
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
    layout: opt.LayoutOption = None,
    model: opt.ModelOption = None,
    param_order: Annotated[
        Path | None,
        option(
            "--param-order",
            panel=opt.INPUT,
            metavar="FILE",
            words="Names of the parameters, one per line, in the optimizer's order, where it numbers them.",
        ),
    ] = None,
    carry: Annotated[
        list[str],
        option(
            "--carry",
            panel=opt.INPUT,
            metavar="PATTERN",
            words="Tensors that stay as they are although their shape is one that grows: a name, * for any "
            "part; may be repeated.",
        ),
    ] = [],
    state: Annotated[
        list[str],
        option(
            "--state",
            panel=opt.INPUT,
            metavar=f"NAME=[{'|'.join(get_args(StateTreatment))}]",
            words="What optimizer state of that name is: widened like the weight, a moment, or left as it "
            "is; may be repeated.",
        ),
    ] = [],
    allow_nonfinite: Annotated[
        bool,
        option("--allow-nonfinite", panel=opt.INPUT, words="Go on where weights or state hold NaN or Inf."),
    ] = False,
    dry_run: Annotated[
        bool, option("--dry-run", panel=opt.OUTPUT, words="Print the whole plan; write nothing.")
    ] = False,
    report: Annotated[
        str,
        option(
            "--report",
            panel=opt.OUTPUT,
            choices=ReportKind,
            default="auto",
            words="Measure activations before and after; auto: less of large models.",
        ),
    ] = "auto",
    data: opt.DataOption = None,
    names: Annotated[
        str | None,
        option(
            "--names", panel=opt.OUTPUT, choices=Names, default="auto", words="Weight names in the output."
        ),
    ] = None,
    memory: opt.MemoryOption = "1G",
    threads: Annotated[
        int | None,
        option(
            "--threads", panel=opt.RUNNING, metavar="COUNT", words="Worker threads; default: by the machine."
        ),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
) -> None:
    """Write a wider checkpoint: weights and optimizer state.

    With it go a schedule of the new entries' learning rate and a report. The source is never written to.
    The output appears whole or not at all.

    \b
    Examples:
        sparkling expand ckpt/ --axis ffn --factor 2
        sparkling expand ckpt/ wide/ --axis hidden=1.5 --axis ffn=2 --dry-run
        sparkling expand ckpt/ --axis hidden --axis heads --factor 2
        sparkling expand ckpt/ --spec expansion.yaml --json
    """
    from sparkling_cli import api
    from sparkling_cli.cli.render import show_plan, show_result
    from sparkling_cli.execute.commit import check_destination
    from sparkling_cli.report.plan import plan_result
    from sparkling_cli.spec.quantities import LEAST_MEMORY, parse_bytes
    from sparkling_cli.spec.sources import means_from_options, state_from_options

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
            "vocab_fill": vocab_fill,
            "router_noise": router_noise,
            "vocab_from": means_from_options(vocab_from),
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
    with output.progress("planning", None):
        expansion = api.make_plan(
            source, chosen, destination, layout=layout, model=model, param_order=param_order
        )
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


def _spec(path: Path | None, axis: list[str], factor: list[str], to: list[str], given: dict[str, Any]) -> Any:
    from sparkling_cli.spec.sources import axes_from_options, make_spec, merge, read_spec_file

    base = read_spec_file(path) if path else {}
    over = opt.given(given)
    axes = axes_from_options(axis, factor, to, given["multiple_of"])
    if axes:
        over["axes"] = axes
    return make_spec(merge(base, over), str(path) if path and not over else "options")
