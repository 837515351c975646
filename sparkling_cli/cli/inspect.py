"""``sparkling inspect``: what is in a checkpoint, and what changed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparkling_cli.cli import options as opt
from sparkling_cli.cli.complete import checkpoints
from sparkling_cli.cli.console import output
from sparkling_cli.cli.options import option
from sparkling_cli.errors import ExitCode

if TYPE_CHECKING:
    from sparkling_cli.results.measured import Inspection


def inspect(
    checkpoint: opt.CheckpointArg,
    against: Annotated[
        Path | None,
        option(
            "--against",
            opt.INPUT,
            "An earlier state of the same model: what it was widened from, or the widened checkpoint "
            "that it was trained on from.",
            metavar="CKPT",
            complete=checkpoints,
        ),
    ] = None,
    model: opt.ModelOption = None,
    layout: opt.LayoutOption = None,
    data: opt.DataOption = None,
    activations: Annotated[
        bool,
        option(
            "--activations/--no-activations",
            opt.OUTPUT,
            "Run the model on tokens and measure.",
            default="activations",
        ),
    ] = True,
    sequences: Annotated[
        int, option("--sequences", opt.OUTPUT, "Sequences at most.", metavar="COUNT", default=8, min=1)
    ] = 8,
    length: Annotated[
        int, option("--length", opt.OUTPUT, "Tokens in each at most.", metavar="TOKENS", default=256, min=2)
    ] = 256,
    seed: Annotated[
        int,
        option(
            "--seed",
            opt.OUTPUT,
            "Seed of random tokens, where there is no text.",
            metavar="NUMBER",
            default=0,
        ),
    ] = 0,
    plot: opt.PlotOption = None,
    memory: opt.MemoryOption = "1G",
    as_json: opt.JsonOption = False,
    quiet: opt.QuietOption = False,
    verbose: opt.VerboseOption = False,
) -> None:
    """Measure a checkpoint, and what changed since another.

    The RMS of weights, optimizer state and activations is given by kind of tensor and layer. Activations
    are measured on --data, else on a bundled text through the checkpoint's own tokenizer, else on random
    tokens, with a note. Weights are read while they are used: the model may be larger than memory.

    With --against, what every block adds to the residual stream (attention, MLP, mixer), the stream itself,
    the logits, the loss, the routing of experts and every linear layer's r = RMS(y)/RMS(x) are compared on
    the same tokens. Where the other checkpoint is the output of an expansion that this one was trained on
    from, the symmetry meter says per layer how far new channels have moved from their sources, and how many
    are still locked to them. The verdict is then go or no-go; no-go is exit code 8.

    \b
    Examples:
        sparkling inspect checkpoint-1000/
        sparkling inspect wide/ --against checkpoint-1000/ --data heldout.txt
        sparkling inspect checkpoint-1200/ --against wide/
        sparkling inspect checkpoint-1000/ --no-activations --json
    """
    from sparkling_cli.diagnostics.inspect import inspect_checkpoint
    from sparkling_cli.spec.quantities import LEAST_MEMORY, parse_bytes

    report = inspect_checkpoint(
        checkpoint,
        against=against,
        data=data,
        model=model,
        layout=layout,
        activations=activations,
        sequences=sequences,
        length=length,
        memory=parse_bytes(memory, "--memory", least=LEAST_MEMORY),
        seed=seed,
    )
    if plot is not None:
        _draw(report, plot)
    output.data(report)
    if not output.as_json:
        _show(report)
    if report.symmetry is not None and report.verdict is not None and report.verdict.level == "attention":
        raise typer.Exit(int(ExitCode.VERIFY))


def _draw(report: Inspection, path: Path) -> None:
    """The activations as a picture: before and after with ``--against``, else this model alone."""
    from sparkling_cli.errors import SpecError
    from sparkling_cli.report.plots import plot_activations, plot_measurement

    if report.change is not None:
        plot_activations(report.change, path)
    elif report.activations is not None:
        plot_measurement(report.activations, path)
    else:
        raise SpecError(
            "--plot: no activations were measured, so there is nothing to draw",
            hint="leave out --no-activations; the notes of `sparkling inspect` say what is missing",
        )
    output.note(f"drawn  {shlex.quote(str(path))}")


def _show(report: Inspection) -> None:
    """Facts, weights, activations, then the verdict, so that it is the last thing on the screen."""
    from sparkling_cli.report import terminal

    output.show(terminal.facts_line(report))
    output.show(terminal.weight_table(report.weights))
    rows = None if output.verbose else terminal.ROWS
    if report.activations is not None and (report.change is None or output.verbose):
        output.show(terminal.measurement_table(report.activations))
    if report.change is not None:
        for table in terminal.change_tables(report.change, rows=rows):
            output.show(table)
    if report.symmetry is not None:
        output.show(terminal.symmetry_table(report.symmetry, rows=rows))
    if report.tokens:
        style = "yellow" if report.random_tokens else "dim"
        output.note(f"measured on {report.tokens}", style=style)
    for note in report.notes:
        output.note(f"note: {note}")
    if report.doubt:
        output.warn(report.doubt)
    for stat in report.weights.tensors:
        if stat.nan or stat.inf:
            output.warn(f"{stat.label} {stat.slot or 'weights'}: {stat.nan} NaN, {stat.inf} Inf")
    if report.verdict is not None:
        for line in terminal.verdict_lines(report.verdict):
            output.show(line, whole=True)
