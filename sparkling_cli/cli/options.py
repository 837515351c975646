"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparkling_cli.cli import console

CheckpointArg = Annotated[
    Path, typer.Argument(help="Checkpoint directory or file.", metavar="CKPT", show_default=False)
]


def _set(name: str):  # type: ignore[no-untyped-def]
    def callback(value: bool) -> bool:
        if value:
            setattr(console.output, name, True)
        return value

    return callback


JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document instead.", callback=_set("as_json"), is_eager=True),
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.", callback=_set("quiet"))
]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print every tensor and note.", callback=_set("verbose"))
]
LayoutOption = Annotated[
    Path | None,
    typer.Option("--layout", help="Layout file (TOML) instead of inference.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PACKAGE.MODULE:FACTORY",
        help="Your own model: a callable from a config dict to an nn.Module. It is imported and run.",
        show_default=False,
    ),
]
AxisOption = Annotated[
    list[str],
    typer.Option(
        "--axis", "-a", help="Axis to widen: ffn, hidden, heads, ... May be repeated.", show_default=False
    ),
]
FactorOption = Annotated[
    list[float],
    typer.Option(
        "--factor", "-f", help="New size / old size. One for all axes, or one each.", show_default=False
    ),
]
ToOption = Annotated[
    list[int],
    typer.Option(
        "--to", help="New size instead of a factor. One for all axes, or one each.", show_default=False
    ),
]
SpecOption = Annotated[
    Path | None,
    typer.Option(
        "--spec", help="Expansion spec (YAML, TOML or JSON); options override it.", show_default=False
    ),
]
MultipleOption = Annotated[
    int | None,
    typer.Option("--multiple-of", help="Round sizes given by a factor up to a multiple.", show_default=False),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Text, JSONL or token file (.bin, .npy) to measure on; default: a bundled text.",
        show_default=False,
    ),
]

RhoOption = Annotated[float | None, typer.Option("--rho", help="Re-warmup peak / rate at expansion (1.3).")]
RewarmupStepsOption = Annotated[
    int | None, typer.Option("--rewarmup-steps", help="Re-warmup length tau_w in steps (250).")
]
BiasCorrectionOption = Annotated[
    str | None,
    typer.Option(
        "--bias-correction", help="inherit (default) or fresh: Adam's step counter for new entries."
    ),
]
ScheduleOption = Annotated[
    str | None,
    typer.Option("--schedule", help="Baseline schedule if it cannot be read: cosine, linear, constant, wsd."),
]
PeakOption = Annotated[float | None, typer.Option("--peak-lr", help="Baseline peak learning rate.")]
MinimumOption = Annotated[float | None, typer.Option("--min-lr", help="Baseline final learning rate.")]
WarmupOption = Annotated[int | None, typer.Option("--warmup-steps", help="Baseline warmup steps.")]
DecayStepsOption = Annotated[int | None, typer.Option("--decay-steps", help="Baseline decay steps (wsd).")]
DecayOption = Annotated[
    str | None, typer.Option("--decay", help="Shape of that decay: cosine (default), linear, 1-sqrt.")
]
TotalStepsOption = Annotated[int | None, typer.Option("--total-steps", help="Baseline total steps.")]
ExpansionStepOption = Annotated[
    int | None, typer.Option("--expansion-step", help="Optimizer step of this checkpoint.")
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
