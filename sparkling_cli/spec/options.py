"""The spec's fields as options of the command line, and as keywords of the Python functions.

A keyword has the name of its option: ``--rewarmup-steps 10`` is ``rewarmup_steps=10``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from sparkling_cli.errors import SpecError
from sparkling_cli.spec.model import BaselineSpec, ExpansionSpec, RewarmupSpec
from sparkling_cli.spec.sources import axis_with_factor

#: model -> field -> its option, in the order in which a command is written
OPTIONS: Mapping[type[BaseModel], Mapping[str, str]] = {
    ExpansionSpec: {
        "multiple_of": "--multiple-of",
        "init": "--init",
        "scaling": "--scaling",
        "optimizer": "--optimizer",
        "seed": "--seed",
        "names": "--names",
        "vocab_fill": "--vocab-fill",
        "router_noise": "--router-noise",
        "layer_mode": "--layer-mode",
        "at": "--at",
    },
    RewarmupSpec: {
        "rho": "--rho",
        "steps": "--rewarmup-steps",
        "bias_correction": "--bias-correction",
        "keep_step": "--keep-step",
    },
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
            yield option
            if value is not True:
                yield as_word(value)


def as_word(value: Any) -> str:
    """A value as a word; a number in its shortest form that reads back to the same."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def from_keywords(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of a Python call as the spec's fields.

    Args:
        given: fields of the spec as they are; ``axis``, or ``axes`` of names alone, with ``factor`` or
            ``to`` or ``"ffn=2"``; and the options of re-warmup and baseline by their own names.

    Raises:
        SpecError: the axes are given in two ways, or not of this form.
    """
    fields = dict(given)
    for model, inside in ((RewarmupSpec, "rewarmup"), (BaselineSpec, "baseline")):
        for field, option in OPTIONS[model].items():
            keyword = keyword_of(option)
            if keyword in fields:
                fields[inside] = {**(fields.get(inside) or {}), field: fields.pop(keyword)}
    axis, factor, to = (fields.pop(name, None) for name in ("axis", "factor", "to"))
    if axis is None and _is_names(fields.get("axes")):
        axis = fields.pop("axes")
    if axis is not None:
        if "axes" in fields:
            raise SpecError("axis and axes both name what to widen", hint="give one of them")
        names = [axis] if isinstance(axis, str) else list(axis)
        fields["axes"] = [axis_with_factor(str(name), "axis") for name in names]
        for at, item in enumerate(fields["axes"]):
            sizes = {k: _one(v, at, len(names)) for k, v in (("factor", factor), ("to", to)) if v is not None}
            if sizes and "factor" in item:
                raise SpecError(f"axis {names[at]!r} has its factor already", hint="give it once")
            item |= sizes
    elif factor is not None or to is not None:
        raise SpecError("factor and to need an axis", hint='for example axis="ffn", factor=2')
    return fields


def _is_names(axes: Any) -> bool:
    """Whether these are axes by name alone: ``"ffn"``, ``["ffn", "hidden"]``."""
    if isinstance(axes, str):
        return True
    return isinstance(axes, Sequence) and bool(axes) and all(isinstance(axis, str) for axis in axes)


def _one(value: Any, at: int, count: int) -> Any:
    """The value of one axis: of a list its own, else the one for all."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    if len(value) != count:
        raise SpecError(f"{count} axes but {len(value)} values: give one for all, or one for each, in order")
    return value[at]


def keyword_of(option: str) -> str:
    """``rewarmup_steps`` of ``--rewarmup-steps``."""
    return option.removeprefix("--").replace("-", "_")


_OPTION = re.compile(r"--([a-z]+(?:-[a-z]+)*)(?: ([^\s,;)]+?))?(?=[:.]?(?:[\s,;)]|$))")
#: options that take no value
FLAGS = {"allow-locked", "allow-nonfinite", "keep-step", "no-activations"}
#: words behind an option that are no value of it
_WORDS = re.compile("a|an|and|as|can|for|gives|in|is|it|on|or|says|sets|takes|that|the|to|too|which|with")


def python_words(text: str) -> str:
    """A message as one who calls from Python writes it: ``--axis ffn --to 8`` is ``axis="ffn", to=8``.

    What is a command line as a whole stays one.
    """
    if "sparkling " in text or "pip install" in text or "hf download" in text:
        return text
    found = _OPTION.sub(_keyword, text)
    return re.sub(r"(\w+=(?:\"[^\"]*\"|[\w.]+)) (?=\w+=)", r"\1, ", found)


def _keyword(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    keyword = keyword_of(name)
    if name in FLAGS:
        return f"{keyword}=True" + (f" {value}" if value else "")
    if value is None or _WORDS.fullmatch(value):
        return keyword + (f" {value}" if value else "")
    if re.fullmatch(r"[\d.]+|[A-Z_]+", value):
        return f"{keyword}={value}"
    return f'{keyword}="{value}"'
