"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from sparkling_cli.cli import console
from sparkling_cli.cli.complete import axes, checkpoints, choices_of
from sparkling_cli.spec.choices import BaselineType, BiasCorrection, DecayShape

GROW, METHOD, RATE = "What to grow", "Method", "Learning rate"
INPUT, OUTPUT, RUNNING = "Input and layout", "Output and report", "Running"


def option(
    *flags: str,
    panel: str,
    metavar: str | None = None,
    choices: object = None,
    default: object = None,
    complete: Callable[..., list[str]] | None = None,
    words: str,
    **more: Any,
) -> Any:
    """An option of a group.

    Args:
        flags: its names.
        panel: the heading that it stands under.
        metavar: what its value is, in capitals.
        choices: a ``Literal`` of its values, which are shown and completed; the spec checks them.
        default: what holds when it is not given, where that is the spec's to say.
        complete: offers values to the shell.
        words: its help.
        more: for ``typer.Option``.
    """
    if choices is not None:
        metavar, complete = f"[{'|'.join(get_args(choices))}]", choices_of(get_args(choices))
    return typer.Option(
        *flags,
        rich_help_panel=panel,
        metavar=metavar,
        autocompletion=complete,
        show_default=False if default is None else str(default),
        help=words,
        **more,
    )


CheckpointArg = Annotated[
    Path,
    typer.Argument(
        help="Checkpoint directory or file.", metavar="CKPT", show_default=False, autocompletion=checkpoints
    ),
]


def _set(name: str):  # type: ignore[no-untyped-def]
    def callback(value: bool) -> bool:
        if value:
            setattr(console.output, name, True)
        return value

    return callback


JsonOption = Annotated[
    bool,
    option(
        "--json",
        panel=RUNNING,
        words="Print one JSON document instead.",
        callback=_set("as_json"),
        is_eager=True,
    ),
]
QuietOption = Annotated[
    bool,
    option("--quiet", "-q", panel=RUNNING, words="Print errors and warnings only.", callback=_set("quiet")),
]
VerboseOption = Annotated[
    bool,
    option("--verbose", "-v", panel=RUNNING, words="Print every tensor and note.", callback=_set("verbose")),
]
LayoutOption = Annotated[
    Path | None,
    option("--layout", panel=INPUT, metavar="FILE", words="Layout file (TOML) instead of inference."),
]
ModelOption = Annotated[
    str | None,
    option(
        "--model",
        panel=INPUT,
        metavar="MODULE:FACTORY",
        words="Your own model: a callable from a config dict to an nn.Module. It is imported and run.",
    ),
]
AxisOption = Annotated[
    list[str],
    option(
        "--axis",
        "-a",
        panel=GROW,
        metavar="AXIS[=FACTOR]",
        complete=axes,
        words="Axis to widen: ffn, hidden, heads, kv_heads, ...; may be repeated.",
    ),
]
FactorOption = Annotated[
    list[str],
    option(
        "--factor",
        "-f",
        panel=GROW,
        metavar="NUMBER",
        words="New size / old size: one for all axes, or one for each.",
    ),
]
ToOption = Annotated[
    list[str],
    option(
        "--to",
        panel=GROW,
        metavar="SIZE",
        words="New size instead of a factor: one for all axes, or one for each.",
    ),
]
SpecOption = Annotated[
    Path | None,
    option(
        "--spec",
        panel=GROW,
        metavar="FILE",
        words="All of this in a file (YAML, TOML or JSON); options override it.",
    ),
]
MultipleOption = Annotated[
    int | None,
    option(
        "--multiple-of",
        panel=GROW,
        metavar="SIZE",
        words="Round sizes that are not given by --to up to a multiple of it.",
    ),
]
DataOption = Annotated[
    Path | None,
    option(
        "--data",
        panel=OUTPUT,
        metavar="FILE",
        words="Text, JSONL or tokens (.bin, .npy) to measure on; default: a bundled text.",
    ),
]
PlotOption = Annotated[
    Path | None,
    option("--plot", panel=OUTPUT, metavar="FILE", words="Draw it: .png, .svg or .pdf."),
]
MemoryOption = Annotated[
    str, option("--memory", panel=RUNNING, metavar="BYTES", default="1G", words="Memory budget: 512M, 2G.")
]

RhoOption = Annotated[
    float | None,
    option(
        "--rho", panel=RATE, metavar="RATIO", default=1.3, words="Re-warmup peak / rate at the expansion."
    ),
]
RewarmupStepsOption = Annotated[
    int | None,
    option("--rewarmup-steps", panel=RATE, metavar="STEPS", default=250, words="Length of the re-warmup."),
]
BiasCorrectionOption = Annotated[
    str | None,
    option(
        "--bias-correction",
        panel=RATE,
        choices=BiasCorrection,
        default="inherit",
        words="Adam's step counter for new entries.",
    ),
]
ScheduleOption = Annotated[
    str | None,
    option(
        "--schedule",
        panel=RATE,
        choices=BaselineType,
        words="The run's own schedule, where the checkpoint does not say it; with the options below.",
    ),
]
PeakOption = Annotated[
    float | None, option("--peak-lr", panel=RATE, metavar="LR", words="Its peak learning rate.")
]
MinimumOption = Annotated[
    float | None, option("--min-lr", panel=RATE, metavar="LR", words="Its final learning rate.")
]
WarmupOption = Annotated[
    int | None, option("--warmup-steps", panel=RATE, metavar="STEPS", words="Its warmup.")
]
DecayStepsOption = Annotated[
    int | None, option("--decay-steps", panel=RATE, metavar="STEPS", words="Its decay (wsd).")
]
DecayOption = Annotated[
    str | None,
    option(
        "--decay", panel=RATE, choices=DecayShape, default="cosine", words="The shape of that decay (wsd)."
    ),
]
TotalStepsOption = Annotated[
    int | None, option("--total-steps", panel=RATE, metavar="STEPS", words="Its length in all.")
]
ExpansionStepOption = Annotated[
    int | None,
    option("--expansion-step", panel=RATE, metavar="STEP", words="Optimizer step of this checkpoint."),
]


def schedule_fields(
    *,
    rho: float | None,
    rewarmup_steps: int | None,
    bias_correction: str | None,
    schedule: str | None,
    peak_lr: float | None,
    min_lr: float | None,
    warmup_steps: int | None,
    decay_steps: int | None,
    decay: str | None,
    total_steps: int | None,
    expansion_step: int | None,
) -> dict[str, dict[str, Any]]:
    """The spec's ``rewarmup`` and ``baseline`` as these options give them; None: not given."""
    return {
        "rewarmup": {"rho": rho, "steps": rewarmup_steps, "bias_correction": bias_correction},
        "baseline": {
            "type": schedule,
            "peak": peak_lr,
            "minimum": min_lr,
            "warmup_steps": warmup_steps,
            "decay_steps": decay_steps,
            "decay": decay,
            "total_steps": total_steps,
            "expansion_step": expansion_step,
        },
    }


def given(fields: dict[str, Any]) -> dict[str, Any]:
    """What was given of nested fields."""
    kept: dict[str, Any] = {}
    for key, value in fields.items():
        inner = given(value) if isinstance(value, dict) else value
        if inner is not None and inner != {}:
            kept[key] = inner
    return kept
