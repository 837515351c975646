"""What pydantic refuses of a spec, in the words of who wrote it, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sparkling_cli.spec.model import AxisSpec, BaselineSpec, ExpansionSpec, RewarmupSpec
from sparkling_cli.spec.options import OPTIONS, keyword_of

#: fields of the spec that have fields of their own
_NESTED: Mapping[str, type[BaseModel]] = {
    "axes": AxisSpec,
    "rewarmup": RewarmupSpec,
    "baseline": BaselineSpec,
}
#: pydantic's kinds of errors that would speak of Python's types
_EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping of fields",
    "string_type": "expected a text",
    "float_type": "expected a number",
    "float_parsing": "expected a number",
    "int_type": "expected a whole number",
    "int_parsing": "expected a whole number",
    "int_from_float": "expected a whole number",
    "bool_type": "expected true or false",
    "bool_parsing": "expected true or false",
    "missing": "is missing",
    "too_short": "is empty",
}
#: what people write for a value that has another name here
_MEANT = {
    "warmup_stable_decay": "wsd",
    "warmup-stable-decay": "wsd",
    "trapezoidal": "wsd",
    "reset": "asymmetric",
    "none": "drop",
    "keep": "asymmetric",
    "net2net": "function",
    "std": "rms",
}
#: options of the commands, and keywords of the functions, that no spec file has
_OF_THE_COMMAND = ("memory", "threads", "report", "data", "layout", "model", "param_order")
_EXAMPLE = "axes: [{axis: ffn, factor: 2}]"


def explain(error: ValidationError, where: str) -> str:
    """What is wrong, one line for each field: where it stands, what was expected and what was found."""
    lines = []
    found_in = {str(item["loc"][0]) for item in error.errors() if len(item["loc"]) > 1}
    unknown = [item["loc"] for item in error.errors() if item["type"] == "extra_forbidden"]
    for item in error.errors():
        if item["type"] == "too_short" and str(item["loc"][0]) in found_in:
            continue  # what it should hold is wrong, which is said
        location: tuple[int | str, ...] = item["loc"]
        message = _EXPECTED.get(item["type"], item["msg"].removeprefix("Value error, "))
        message = message.replace("Input should be ", "expected ")
        if item["type"] == "extra_forbidden":
            message = f"no such field; fields here: {', '.join(_fields(location))}"
            beside = [name for *above, name in unknown if above == list(location[:-1])]
            if len(beside) > 2:
                first = f"{_place(location, where).removesuffix(': ')} and {len(beside) - 1} more: "
                lines += [first + message.replace("field;", "fields;")] if beside[0] == location[-1] else []
                continue
        found = (
            ""
            if item["type"] in ("extra_forbidden", "missing", "value_error")
            else f" (found {item['input']!r})"
        )
        lines.append(f"{_place(location, where)}{message}{found}")
    return "\n".join(lines)


def hint(error: ValidationError, where: str) -> str | None:
    """What was probably meant, where that can be said."""
    items = sorted(error.errors(), key=lambda item: item["loc"] != ("model_type",))
    return next((found for item in items for found in _hints(item, where)), None)


def _hints(item: Any, where: str) -> Iterator[str]:
    location, given = item["loc"], str(item["input"])
    if item["type"] == "extra_forbidden" and location == ("model_type",):
        yield f"this is a model's config; a spec says what to widen: {_EXAMPLE}"
    if item["type"] == "extra_forbidden":
        yield from _hints_of_a_name(str(location[-1]), location, where)
    if item["type"] == "literal_error":
        allowed = _choices(location)
        near = [choice for choice in allowed if choice.startswith(given)]
        near = near or [choice for choice in allowed if choice == _MEANT.get(given)]
        near = near or difflib.get_close_matches(given, allowed, n=1)
        if near:
            yield f"did you mean {near[0]!r}?"
        default = _model(location).model_fields[str(location[-1])].default
        if default is not None:
            yield f"leave it out for the default, {default!r}"
    if location and location[0] == "axes":
        yield f"name what to widen: {'--axis ffn --factor 2' if where == 'options' else _EXAMPLE}"


def _hints_of_a_name(name: str, location: tuple[int | str, ...], where: str) -> Iterator[str]:
    """For a field that there is none of."""
    if name == "dry_run":
        yield "make_plan(...) takes the same, writes nothing and says what would be done"
    if name in _OF_THE_COMMAND:
        yield f"this is no part of a spec: pass --{name.replace('_', '-')} beside it"
    known = _fields(location)
    if where == "options":
        known += ["axis", "factor", "to", *_OF_THE_COMMAND]
        known += [keyword_of(option) for table in OPTIONS.values() for option in table.values()]
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        yield f"did you mean {near[0]}?"


def _place(location: tuple[int | str, ...], where: str) -> str:
    """The field as it was given: an option's name where it came from one."""
    path = ".".join(map(str, location))
    if where == "options":
        option = OPTIONS.get(_model(location), {}).get(str(location[-1]) if location else "")
        return f"{option}: " if option else f"{path}: " if path else ""
    return f"{where}: {path}: " if path else f"{where}: "


def _model(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The model whose field stands at ``location``."""
    return _NESTED.get(str(location[0]), ExpansionSpec) if len(location) > 1 else ExpansionSpec


def _fields(location: tuple[int | str, ...]) -> list[str]:
    return sorted(_model(location).model_fields)


def _choices(location: tuple[int | str, ...]) -> list[str]:
    """The values that a field chooses from; it may be optional."""
    field = _model(location).model_fields.get(str(location[-1]))
    flat = [] if field is None else [field.annotation, *get_args(field.annotation)]
    return [value for kind in flat for value in get_args(kind) if isinstance(value, str)]
