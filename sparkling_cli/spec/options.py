"""The spec's fields as options of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from sparkling_cli.spec.model import BaselineSpec, ExpansionSpec, RewarmupSpec

#: model -> field -> its option, in the order in which a command is written
OPTIONS: Mapping[type[BaseModel], Mapping[str, str]] = {
    ExpansionSpec: {
        "multiple_of": "--multiple-of",
        "init": "--init",
        "scaling": "--scaling",
        "optimizer": "--optimizer",
        "seed": "--seed",
        "names": "--names",
    },
    RewarmupSpec: {"rho": "--rho", "steps": "--rewarmup-steps", "bias_correction": "--bias-correction"},
    BaselineSpec: {
        "type": "--schedule",
        "peak": "--peak-lr",
        "minimum": "--min-lr",
        "warmup_steps": "--warmup-steps",
        "decay_steps": "--decay-steps",
        "decay": "--decay",
        "total_steps": "--total-steps",
        "expansion_step": "--expansion-step",
    },
}


def as_options(spec: BaseModel) -> Iterator[str]:
    """The words of a command line that give the fields whose value is not the default."""
    for field, option in OPTIONS[type(spec)].items():
        value = getattr(spec, field)
        if value != type(spec).model_fields[field].default:
            yield from (option, as_word(value))


def as_word(value: Any) -> str:
    """A value as a word; a number in its shortest form that reads back to the same."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)
