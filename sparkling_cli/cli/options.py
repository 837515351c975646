"""Option types that several commands share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer

from sparkling_cli.cli import console
from sparkling_cli.cli.complete import axes, checkpoints, choices_of
from sparkling_cli.spec.choices import (
    BaselineType,
    BiasCorrection,
    DecayShape,
    Init,
    LayerMode,
    Names,
    OptimizerTreatment,
    Scaling,
    StateTreatment,
    VocabFill,
)

#: headings of a command's options, in their order
PANELS = GROW, METHOD, RATE, INPUT, OUTPUT, RUNNING = (
    "What to grow", "Method", "Learning rate", "Input and layout", "Output and report", "Running"
)  # fmt: skip


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


def _field(
    panel: str, flag: str, kind: Any, words: str, default: object = None, metavar: str | None = None
) -> Parameter:
    """An option that gives a field of the spec, as a command's parameter that is empty where it is not given.

    Args:
        panel: the heading that it stands under.
        flag: its name.
        kind: type of its value, or a ``Literal`` of its values.
        words: its help.
        default: the spec's, which is shown.
        metavar: what its value is, where ``kind`` does not say it.
    """
    choices = kind if get_origin(kind) is Literal else None
    empty: object = {bool: False, list[str]: []}.get(kind)
    taken = kind if empty is not None else (str if choices else kind) | None
    given = option(flag, panel, words, choices=choices, metavar=metavar, default=default)
    name = flag.removeprefix("--").replace("-", "_")
    return Parameter(name, Parameter.KEYWORD_ONLY, default=empty, annotation=Annotated[taken, given])


#: the options of re-warmup and of the run's own schedule
RATE_FIELDS = (
    _field(RATE, "--rho", float, "Re-warmup peak / rate at the expansion.", 1.3, "RATIO"),
    _field(RATE, "--rewarmup-steps", int, "Length of the re-warmup.", 250, "STEPS"),
    _field(RATE, "--bias-correction", BiasCorrection, "Adam's step counter for new entries.", "inherit"),
    _field(
        RATE,
        "--keep-step",
        bool,
        "Old entries step as far as before, where steps follow a matrix' shape (Muon) or the model's width.",
    ),
    _field(
        RATE,
        "--schedule",
        BaselineType,
        "The run's own schedule, where the checkpoint does not say it; with the options below.",
    ),
    _field(RATE, "--peak-lr", float, "Its peak learning rate.", metavar="LR"),
    _field(RATE, "--min-lr", float, "Its final learning rate.", metavar="LR"),
    _field(RATE, "--warmup-steps", int, "Its warmup.", metavar="STEPS"),
    _field(RATE, "--decay-steps", int, "Its decay (wsd).", metavar="STEPS"),
    _field(RATE, "--decay", DecayShape, "The shape of that decay (wsd).", "cosine"),
    _field(RATE, "--total-steps", int, "Its length in all.", metavar="STEPS"),
    _field(RATE, "--expansion-step", int, "Optimizer step of this checkpoint.", metavar="STEP"),
)
#: the options of every other field that has one, but for the growth itself
OTHER_FIELDS = (
    _field(METHOD, "--init", Init, "New entries of fan-out and fan-in dims.", "copy-copy"),
    _field(
        METHOD,
        "--scaling",
        Scaling,
        "What fan-in matrices are scaled to keep: the RMS (calibrated: fitted on tokens), or the function.",
        "rms",
    ),
    _field(
        METHOD,
        "--optimizer",
        OptimizerTreatment,
        "Optimizer state: old entries keep theirs and new ones start at zero; or otherwise.",
        "asymmetric",
    ),
    _field(METHOD, "--seed", int, "Seed of random entries.", 0, "NUMBER"),
    _field(
        METHOD,
        "--vocab-fill",
        VocabFill,
        "New rows of the vocabulary: the mean of all old ones, or otherwise.",
        "mean",
    ),
    _field(
        METHOD,
        "--vocab-from",
        list[str],
        "New token ids and the old ones whose mean they get; or one of them, as 512=17,203; may be repeated.",
        metavar="FILE",
    ),
    _field(
        METHOD,
        "--copies",
        list[str],
        "How many there shall be of each expert, in all layers or by their numbers; or all=2,1,3,2; may be "
        "repeated.",
        metavar="FILE",
    ),
    _field(
        METHOD,
        "--expert-load",
        list[str],
        "The same by what each expert has to do: who has most gets most copies.",
        metavar="FILE",
    ),
    _field(
        METHOD,
        "--router-noise",
        float,
        "Noise on the router rows of new experts, by the deviation of the old ones: 0.01.",
        0,
        "SHARE",
    ),
    _field(
        METHOD,
        "--layer-mode",
        LayerMode,
        "New layers: add nothing yet (identity), or copy the one before or all before them.",
        "identity",
    ),
    _field(
        METHOD,
        "--at",
        str,
        "Where identity layers go: spread, behind the last, or behind certain ones (3,7,11; the first is 0).",
        "even",
        "[even|end|LAYERS]",
    ),
    _field(METHOD, "--allow-locked", bool, "Go on where copies would stay equal to their sources for ever."),
    _field(
        INPUT,
        "--carry",
        list[str],
        "Tensors that stay as they are although their shape is one that grows: a name, * for any part; "
        "may be repeated.",
        metavar="PATTERN",
    ),
    _field(
        INPUT,
        "--state",
        list[str],
        "What optimizer state of that name is: widened like the weight, a moment, or left as it is; "
        "may be repeated.",
        metavar=f"NAME=[{'|'.join(get_args(StateTreatment))}]",
    ),
    _field(INPUT, "--allow-nonfinite", bool, "Go on where weights or state hold NaN or Inf."),
    _field(OUTPUT, "--names", Names, "Weight names in the output.", "auto"),
)
_Command = TypeVar("_Command", bound=Callable[..., None])


def takes(*fields: Parameter) -> Callable[[_Command], _Command]:
    """A command whose ``**fields`` are these options, each under its heading, behind the command's own."""

    def taking(command: _Command) -> _Command:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.name != "fields"]
        panels = (None, *PANELS)
        every = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *fields)]
        every.sort(key=lambda p: panels.index(p.annotation.__metadata__[0].rich_help_panel))
        command.__signature__ = signature(command).replace(parameters=every)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in every}
        return command

    return taking


def spec_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a command's ``**fields`` say, as fields of the spec."""
    from sparkling_cli.spec.options import from_keywords
    from sparkling_cli.spec.sources import lists_from_options, state_from_options

    lists = ("vocab_from", "copies", "expert_load")
    readers = {name: partial(lists_from_options, what=name) for name in lists} | {"state": state_from_options}
    return from_keywords(
        {
            name: readers[name](value) if name in readers else value
            for name, value in options.items()
            if not (value is None or value is False or value == [])
        }
    )
