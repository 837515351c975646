"""The command that makes an output again, as its report records it."""

from __future__ import annotations

import shlex
from pathlib import Path

from sparkling_cli.plan.model import Invocation
from sparkling_cli.spec.model import ExpansionSpec
from sparkling_cli.spec.options import as_options, as_word


def command_of(chosen: ExpansionSpec, invocation: Invocation) -> str:
    """The command that does the same again, where it was given.

    Relative paths stand as they were given. Of absolute ones only as much is kept as tells source and
    output apart: an output neither depends on where on a machine it lies, nor tells.
    """
    places = _places(invocation.source, invocation.destination)
    words = ["sparkling", "expand", *places, *_words_of(chosen)]
    files = {
        "--layout": invocation.layout, "--param-order": invocation.param_order, "--data": invocation.data
    }  # fmt: skip
    for option, path in files.items():
        words += [option, _place(path)] if path is not None else []
    words += ["--model", invocation.model] if invocation.model is not None else []
    words += ["--report", invocation.report] if invocation.report != "auto" else []
    return shlex.join(words)


def _words_of(chosen: ExpansionSpec) -> list[str]:
    """The options that give a spec."""
    spec = chosen.as_data()
    words = []
    axes = spec["axes"]
    mixed = len({(axis["to"] is None, axis["factor"] is None) for axis in axes}) > 1
    for axis in axes:
        own = f"={as_word(axis['factor'])}" if mixed and axis["factor"] else ""
        words += ["--axis", axis["axis"] + own]
    for axis in axes:
        if axis["to"] is not None:
            words += ["--to", str(axis["to"])]
        elif axis["factor"] and not mixed:
            words += ["--factor", as_word(axis["factor"])]
    words += [*as_options(chosen), *as_options(chosen.rewarmup), *as_options(chosen.baseline)]
    words += ["--allow-locked"] if spec["allow_locked"] else []
    for field in ("vocab_from", "copies", "expert_load"):
        for key, values in spec.get(field, {}).items():
            words += [f"--{field.replace('_', '-')}", f"{key}={','.join(map(as_word, values))}"]
    for pattern in spec["carry"]:
        words += ["--carry", pattern]
    for name, kind in spec["state"].items():
        words += ["--state", f"{name}={kind}"]
    return [*words, "--allow-nonfinite"] if spec["allow_nonfinite"] else words


def places_in(command: str, destination: str) -> tuple[str, str]:
    """Source and output of a recorded command, as it names them; the output's name where it names none."""
    source, given = shlex.split(command)[2:4]
    return source, str(Path(source).with_name(destination)) if given.startswith("-") else given


def with_spec(command: str, old: ExpansionSpec, new: ExpansionSpec) -> str:
    """A recorded command with the options of another spec in the place of its own."""
    return command.replace(shlex.join(_words_of(old)), shlex.join(_words_of(new)), 1)


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
