"""``sparkling plan``: what a progressive run costs, and what it saves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.console import output
from sparkling_cli.cli.options import option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sparkling_cli.results.commands import RunPlan


def plan(
    source: Annotated[Path, opt.checkpoint("Checkpoint, or a config.json.", "CKPT_OR_CONFIG")],
    tokens: Annotated[
        str,
        option("--tokens", opt.GROW, "Tokens of the whole run: 200B, 1.5T.", metavar="COUNT"),
    ],
    expand_at: Annotated[
        str | None,
        option("--expand-at", opt.GROW, "Tokens before the expansion: 100B, or 50%.", metavar="COUNT"),
    ] = None,
    axis: opt.AxisOption = [],
    factor: opt.FactorOption = [],
    to: opt.ToOption = [],
    multiple_of: opt.MultipleOption = None,
    then: Annotated[
        list[str],
        option(
            "--then",
            opt.GROW,
            "A later expansion: ffn=2,hidden=1.5@150B; may be repeated.",
            metavar="AXIS=FACTOR,...@COUNT",
        ),
    ] = [],
    experts_per_token: Annotated[
        int | None,
        option("--experts-per-token", opt.INPUT, "Where the config does not say it.", metavar="COUNT", min=1),
    ] = None,
    layout: opt.LayoutOption = None,
    model: opt.ModelOption = None,
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
) -> None:
    """Parameters and compute of a run that widens half-way.

    They are set against those of the wide model from scratch.

    \b
    Examples:
        sparkling plan config.json --axis ffn=2 --tokens 200B --expand-at 50%
        sparkling plan ckpt/ --tokens 200B --axis ffn=2 --expand-at 50B \\
            --then ffn=2@100B
    """
    from sparkling_cli.cli.render import show_remarks
    from sparkling_cli.forecast import plan_run
    from sparkling_cli.spec.sources import axes_from_options

    axes = axes_from_options(axis, factor, to, multiple_of)
    found = plan_run(
        source,
        tokens,
        expand_at=expand_at,
        then=then,
        multiple_of=multiple_of,
        experts_per_token=experts_per_token,
        layout=layout,
        model=model,
        **({"axes": axes} if axes else {}),
    )
    output.data(found)
    for part in _tables(found):
        output.show(part)
    show_remarks(output, found.notes, found.warnings)


def _tables(found: RunPlan) -> list[RenderableType]:
    from rich.text import Text

    from sparkling_cli.report.sparkline import share_bar
    from sparkling_cli.report.terminal import table_of
    from sparkling_cli.results.numbers import count, nbytes

    grown = list(found.phases[-1].sizes)
    titles = ("tokens", *grown, "parameters", "active", "embeddings", "FLOPs", "checkpoint")
    table = table_of(*(f">{title}" for title in titles))
    for phase in found.phases:
        table.add_row(
            f"{count(phase.start_tokens) if phase.start_tokens else '0'} - {count(phase.stop_tokens)}",
            *(f"{phase.sizes[axis]:,}" for axis in grown),
            count(phase.parameters),
            count(phase.active_parameters),
            count(phase.embedding_parameters),
            f"{phase.flops:.2e}",
            nbytes(phase.checkpoint_bytes),
        )
    parts: list[RenderableType] = [
        Text(f"{found.model} ({found.source})", style="bold"),
        table,
    ]
    if len(found.phases) > 1:
        costs = table_of("|", ">", "|")
        costs.show_header = False
        most = max(found.flops.scratch, found.flops.progressive)
        for name, flops in (
            ("widest from scratch", found.flops.scratch),
            ("this run", found.flops.progressive),
            ("smallest all along", found.flops.small),
        ):
            costs.add_row(name, f"{flops:.3e} FLOPs", share_bar(flops / most, 24))
        parts += [
            "",
            costs,
            Text(f"saved {found.saved:.1%} of the compute of the widest from scratch", style="bold"),
        ]
    return parts
