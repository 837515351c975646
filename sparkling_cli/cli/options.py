"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from sparkling_cli.cli import console
from sparkling_cli.cli.complete import axes, checkpoints, choices_of
from sparkling_cli.spec.choices import BaselineType, BiasCorrection, DecayShape

GROW, METHOD, RATE = "What to grow", "Method", "Learning rate"
INPUT, OUTPUT, RUNNING = "Input and layout", "Output and report", "Running"


def option(
    flags: str,
    panel: str,
    words: str,
    *,
    metavar: str | None = None,
    choices: object = None,
    default: object = None,
    complete: Callable[..., list[str]] | None = None,
    **more: Any,
) -> Any:
    """An option of a group.

    Args:
        flags: its names.
        panel: the heading that it stands under.
        words: its help.
        metavar: what its value is, in capitals.
        choices: a ``Literal`` of its values, which are shown and completed; the spec checks them.
        default: what holds when it is not given, where that is the spec's to say.
        complete: offers values to the shell.
        more: for ``typer.Option``.
    """
    if choices is not None:
        metavar, complete = f"[{'|'.join(get_args(choices))}]", choices_of(get_args(choices))
    return typer.Option(
        *flags.split(),
        rich_help_panel=panel,
        metavar=metavar,
        autocompletion=complete,
        show_default=False if default is None else str(default),
        help=words,
        **more,
    )


def checkpoint(words: str, metavar: str) -> Any:
    """A checkpoint as an argument."""
    return typer.Argument(help=words, metavar=metavar, show_default=False, autocompletion=checkpoints)


CheckpointArg = Annotated[Path, checkpoint("Checkpoint directory or file.", "CKPT")]


def _set(name: str):  # type: ignore[no-untyped-def]
    def callback(value: bool) -> bool:
        if value:
            setattr(console.output, name, True)
        return value

    return callback


JsonOption = Annotated[
    bool,
    option("--json", RUNNING, "Print one JSON document instead.", callback=_set("as_json"), is_eager=True),
]
QuietOption = Annotated[
    bool, option("--quiet -q", RUNNING, "Print errors and warnings only.", callback=_set("quiet"))
]
VerboseOption = Annotated[
    bool, option("--verbose -v", RUNNING, "Print every tensor and note.", callback=_set("verbose"))
]
LayoutOption = Annotated[
    Path | None, option("--layout", INPUT, "Layout file (TOML) instead of inference.", metavar="FILE")
]
ModelOption = Annotated[
    str | None,
    option(
        "--model",
        INPUT,
        "Your own model: a callable from a config dict to an nn.Module. It is imported and run.",
        metavar="MODULE:FACTORY",
    ),
]
AxisOption = Annotated[
    list[str],
    option(
        "--axis -a",
        GROW,
        "Axis to widen: ffn, hidden, heads, kv_heads, ...; may be repeated.",
        metavar="AXIS[=FACTOR]",
        complete=axes,
    ),
]
FactorOption = Annotated[
    list[str],
    option("--factor -f", GROW, "New size / old size: one for all axes, or one for each.", metavar="NUMBER"),
]
ToOption = Annotated[
    list[str],
    option("--to", GROW, "New size instead of a factor: one for all axes, or one for each.", metavar="SIZE"),
]
SpecOption = Annotated[
    Path | None,
    option(
        "--spec", GROW, "All of this in a file (YAML, TOML or JSON); options override it.", metavar="FILE"
    ),
]
MultipleOption = Annotated[
    int | None,
    option(
        "--multiple-of",
        GROW,
        "Round sizes that are not given by --to up to a multiple of it.",
        metavar="SIZE",
    ),
]
DataOption = Annotated[
    Path | None,
    option(
        "--data",
        OUTPUT,
        "Text, JSONL or tokens (.bin, .npy) to measure on; default: a bundled text.",
        metavar="FILE",
    ),
]
PlotOption = Annotated[Path | None, option("--plot", OUTPUT, "Draw it: .png, .svg or .pdf.", metavar="FILE")]
MemoryOption = Annotated[
    str, option("--memory", RUNNING, "Memory budget: 512M, 2G.", metavar="BYTES", default="1G")
]

RhoOption = Annotated[
    float | None,
    option("--rho", RATE, "Re-warmup peak / rate at the expansion.", metavar="RATIO", default=1.3),
]
RewarmupStepsOption = Annotated[
    int | None, option("--rewarmup-steps", RATE, "Length of the re-warmup.", metavar="STEPS", default=250)
]
BiasCorrectionOption = Annotated[
    str | None,
    option(
        "--bias-correction",
        RATE,
        "Adam's step counter for new entries.",
        choices=BiasCorrection,
        default="inherit",
    ),
]
ScheduleOption = Annotated[
    str | None,
    option(
        "--schedule",
        RATE,
        "The run's own schedule, where the checkpoint does not say it; with the options below.",
        choices=BaselineType,
    ),
]
PeakOption = Annotated[float | None, option("--peak-lr", RATE, "Its peak learning rate.", metavar="LR")]
MinimumOption = Annotated[float | None, option("--min-lr", RATE, "Its final learning rate.", metavar="LR")]
WarmupOption = Annotated[int | None, option("--warmup-steps", RATE, "Its warmup.", metavar="STEPS")]
DecayStepsOption = Annotated[int | None, option("--decay-steps", RATE, "Its decay (wsd).", metavar="STEPS")]
DecayOption = Annotated[
    str | None,
    option("--decay", RATE, "The shape of that decay (wsd).", choices=DecayShape, default="cosine"),
]
TotalStepsOption = Annotated[int | None, option("--total-steps", RATE, "Its length in all.", metavar="STEPS")]
ExpansionStepOption = Annotated[
    int | None, option("--expansion-step", RATE, "Optimizer step of this checkpoint.", metavar="STEP")
]


def spec_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's fields that have an option of one value each, as far as they were given.

    Args:
        params: of the command, by name.
    """
    from sparkling_cli.spec.options import OPTIONS, from_keywords, keyword_of

    known = [keyword_of(flag) for flags in OPTIONS.values() for flag in flags.values()]
    return from_keywords({name: params[name] for name in known if params.get(name) is not None})
