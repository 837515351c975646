"""``sparkling expand``: the main job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output
from sparkling_cli.cli.options import option
from sparkling_cli.errors import UsageError
from sparkling_cli.spec.choices import ReportKind

if TYPE_CHECKING:
    from sparkling_cli.spec.model import ExpansionSpec

#: names of axes that most models have
KNOWN_AXES = frozenset({"ffn", "hidden", "heads", "kv_heads", "q_per_kv", "vocab", "experts", "expert_ffn"})


@opt.takes(*opt.OTHER_FIELDS, *opt.RATE_FIELDS)
def expand(
    source: opt.CheckpointArg,
    destination: Annotated[
        Path | None,
        opt.checkpoint("Output; must not exist. Default: CKPT-<axis><factor>x beside CKPT.", "DST"),
    ] = None,
    axis: opt.AxisOption = [],
    factor: opt.FactorOption = [],
    to: opt.ToOption = [],
    multiple_of: opt.MultipleOption = None,
    spec: opt.SpecOption = None,
    layout: opt.LayoutOption = None,
    model: opt.ModelOption = None,
    param_order: Annotated[
        Path | None,
        option(
            "--param-order",
            opt.INPUT,
            "Names of the parameters, one per line, in the optimizer's order, where it numbers them.",
            metavar="FILE",
        ),
    ] = None,
    dry_run: Annotated[bool, option("--dry-run", opt.OUTPUT, "Print the whole plan; write nothing.")] = False,
    report: Annotated[
        str,
        option(
            "--report",
            opt.OUTPUT,
            "Measure activations before and after; auto: less of large models.",
            choices=ReportKind,
            default="auto",
        ),
    ] = "auto",
    data: opt.DataOption = None,
    memory: opt.MemoryOption = "1G",
    threads: Annotated[
        int | None,
        option("--threads", opt.RUNNING, "Worker threads; default: by the machine.", metavar="COUNT", min=1),
    ] = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
    **fields: Any,
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
    from sparkling_cli.outcome import check_data
    from sparkling_cli.report.plan import plan_result
    from sparkling_cli.spec.quantities import LEAST_MEMORY, parse_bytes
    from sparkling_cli.spec.sources import axes_from_options, make_spec, merge, read_spec_file

    axes = axes_from_options(axis, factor, to, multiple_of)
    over = {**opt.spec_fields({**fields, "multiple_of": multiple_of}), **({"axes": axes} if axes else {})}
    base = read_spec_file(spec) if spec else {}
    chosen = make_spec(merge(base, over), str(spec) if spec and not over else "options")
    budget = parse_bytes(memory, "--memory", least=LEAST_MEMORY)
    api.check_report(report, data)
    if destination is not None:
        _check_name(destination, chosen)
        if source.exists():  # before a plan is made, which takes longer
            check_destination(source, destination)
    with output.progress("planning", None):
        expansion = api.make_plan(
            source, destination, chosen, layout=layout, model=model, param_order=param_order
        )
    check_destination(expansion.plan.source.root, expansion.destination)
    if dry_run:
        if data is not None:
            check_data(expansion, data, report)
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


def _check_name(destination: Path, spec: ExpansionSpec) -> None:
    """An output that is called like an axis or a factor was meant as one.

    Raises:
        UsageError: it is.
    """
    word = str(destination)
    if not re.fullmatch(r"\d+(?:\.\d+)?x?", word) and word not in KNOWN_AXES:
        return
    axes = " ".join(f"--axis {axis.axis}" for axis in spec.axes)
    more = (
        f"{axes} --axis {word}" if word in KNOWN_AXES else f"--axis {spec.axes[0].axis}={word.rstrip('x%')}"
    )
    raise UsageError(
        f"the second argument is the output, and {word!r} looks like an axis or a factor",
        hint=f"write {more}; for an output of that name give its whole path",
    )
