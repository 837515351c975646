"""The command that makes an output again, as its report records it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparkling_cli.plan.model import Invocation
from sparkling_cli.spec.model import ExpansionSpec

#: spec field -> its default and its option
_OPTIONS: Mapping[str, tuple[Any, str]] = {
    "multiple_of": (None, "--multiple-of"),
    "init": ("copy-copy", "--init"),
    "scaling": ("rms", "--scaling"),
    "optimizer": ("asymmetric", "--optimizer"),
    "seed": (0, "--seed"),
    "names": ("auto", "--names"),
}
_REWARMUP: Mapping[str, tuple[Any, str]] = {
    "rho": (1.3, "--rho"),
    "steps": (250, "--rewarmup-steps"),
    "bias_correction": ("inherit", "--bias-correction"),
}
_BASELINE: Mapping[str, tuple[Any, str]] = {
    "type": (None, "--schedule"),
    "peak": (None, "--peak-lr"),
    "minimum": (None, "--min-lr"),
    "warmup_steps": (None, "--warmup-steps"),
    "decay_steps": (None, "--decay-steps"),
    "decay": (None, "--decay"),
    "total_steps": (None, "--total-steps"),
    "expansion_step": (None, "--expansion-step"),
}


def command_of(chosen: ExpansionSpec, invocation: Invocation) -> str:
    """The command that does the same again, where it was given.

    Relative paths stand as they were given. Of absolute ones only as much is kept as tells source and
    output apart: an output neither depends on where on a machine it lies, nor tells.
    """
    spec = chosen.as_data()
    words = ["sparkling", "expand", *_places(invocation.source, invocation.destination)]
    axes = spec["axes"]
    for axis in axes:
        words += ["--axis", axis["axis"]]
    for axis in axes:
        words += ["--factor", _text(axis["factor"])] if axis["to"] is None else ["--to", str(axis["to"])]
    words += [*_given(spec, _OPTIONS), *_given(spec["rewarmup"], _REWARMUP)]
    words += _given(spec.get("baseline", {}), _BASELINE)
    words += ["--allow-nonfinite"] if spec.get("allow_nonfinite") else []
    for option, path in (("--layout", invocation.layout), ("--data", invocation.data)):
        words += [option, _place(path)] if path is not None else []
    words += ["--model", invocation.model] if invocation.model is not None else []
    words += ["--report", invocation.report] if invocation.report != "auto" else []
    return shlex.join(words)


def _given(values: Mapping[str, Any], options: Mapping[str, tuple[Any, str]]) -> Iterator[str]:
    for field, (default, option) in options.items():
        value = values.get(field, default)
        if value != default:
            yield from (option, _text(value))


def _text(value: Any) -> str:
    """A value as an option; a number in its shortest form that reads back to the same."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def _place(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)


def _places(source: Path, destination: Path | None) -> list[str]:
    if destination is None:
        return [_place(source)]
    found = [_place(source), _place(destination)]
    depth = 1
    while found[0] == found[1] and depth < max(len(source.parts), len(destination.parts)):
        depth += 1
        found = [
            str(Path(*path.parts[-depth:])) if path.is_absolute() else str(path)
            for path in (source, destination)
        ]
    return found
